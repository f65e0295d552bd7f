/* watching: one pass over parameters and their gradients, for an optimizer that compares them in every step.

   From Python each question to a tensor costs 50 ns, and there are a dozen. DLPack's exchange interface, a C
   structure that torch publishes, answers them together in 20 to 50 ns. No header of torch is needed, so building
   this takes a fifth of a second. watching.py has the same two functions in Python. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

/* DLPack 1, dlpack.h: https://github.com/dmlc/dlpack. Later minor versions only add at the end. */
typedef struct {
    void *data;
    struct { int32_t type, id; } device;
    int32_t ndim;
    struct { uint8_t code, bits; uint16_t lanes; } dtype;
    int64_t *shape, *strides; /* in elements */
    uint64_t byte_offset;
} DLTensor;

typedef struct {
    struct { uint32_t major, minor; } version;
    void *prev_api, *managed_tensor_allocator, *managed_tensor_from_py_object, *managed_tensor_to_py_object;
    int (*dltensor_from_py_object)(void *object, DLTensor *out); /* borrows; not 0: a Python error is set */
} DLPackExchangeAPI;

static const DLPackExchangeAPI *api;
static PyObject *grad_name, *is_neg_name;

/* A description: 64-bit words. It is either written, or compared with one that was. */
typedef struct {
    int64_t *words;
    size_t used, size;
    int compares, differs, out_of_memory;
} Description;

static void put(Description *d, int64_t word)
{
    if (d->compares) {
        d->differs |= d->used >= d->size || d->words[d->used] != word;
        d->used++;
        return;
    }
    if (d->used == d->size) {
        size_t size = 2 * d->size + 1024;
        int64_t *words = PyMem_Realloc(d->words, size * sizeof *words);
        if (words == NULL) {
            d->out_of_memory = 1;
            return;
        }
        d->words = words;
        d->size = size;
    }
    d->words[d->used++] = word;
}

static int64_t address(const DLTensor *t)
{
    return (int64_t)(intptr_t)t->data + (int64_t)t->byte_offset;
}

static void put_layout(Description *d, const DLTensor *t)
{
    put(d, (int64_t)t->device.type << 32 | (uint32_t)t->device.id);
    put(d, (int64_t)t->ndim << 32 | (uint32_t)t->dtype.code << 24 | (uint32_t)t->dtype.bits << 16 | t->dtype.lanes);
    for (int32_t i = 0; i < t->ndim; i++) {
        put(d, t->shape[i]);
        put(d, t->strides[i]);
    }
}

/* Borrows from a tensor; -1, and an error is set, if it has no memory: it is sparse, or its storage was freed. */
static int borrow(PyObject *tensor, DLTensor *t)
{
    if (api->dltensor_from_py_object(tensor, t) != 0)
        return -1;
    if (t->data != NULL)
        return 0;
    for (int32_t i = 0; i < t->ndim; i++)
        if (t->shape[i] == 0)
            return 0;
    PyErr_SetString(PyExc_RuntimeError, "a tensor has no memory");
    return -1;
}

/* Describes a parameter and its gradient, a new reference (None: there is none), to whose address *word is set.
   NULL, and an error is set, if one of them has no memory of its own. */
static PyObject *look_at(PyObject *param, Description *d, int64_t *word)
{
    DLTensor t;
    Py_INCREF(param); /* a class may have made a property of `grad`, which does what it likes */
    PyObject *grad = PyObject_GetAttr(param, grad_name);
    if (grad == NULL)
        goto done;
    put(d, grad == Py_None ? 0 : (int64_t)(intptr_t)Py_TYPE(grad));
    if (grad == Py_None)
        goto done;
    if (borrow(grad, &t) != 0)
        goto error;
    *word = address(&t);
    put_layout(d, &t); /* before the next call: shape and strides are borrowed */
    if (borrow(param, &t) != 0)
        goto error;
    put(d, address(&t));
    put_layout(d, &t);
    goto done;
error:
    Py_CLEAR(grad);
done:
    Py_DECREF(param);
    return grad;
}

static int may_look(PyObject *params)
{
    if (api == NULL)
        PyErr_SetString(PyExc_RuntimeError, "call use() first");
    else if (!PyList_Check(params))
        PyErr_SetString(PyExc_TypeError, "parameters must be a list");
    else
        return 1;
    return 0;
}

static PyObject *describe(PyObject *self, PyObject *params)
{
    Description d = {0};
    PyObject *result = NULL;
    int64_t word;
    if (!may_look(params))
        return NULL;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); i++) {
        PyObject *grad = look_at(PyList_GET_ITEM(params, i), &d, &word);
        if (grad == NULL)
            goto done;
        Py_DECREF(grad);
    }
    if (d.out_of_memory)
        PyErr_NoMemory();
    else
        result = PyBytes_FromStringAndSize((char *)d.words, (Py_ssize_t)(d.used * sizeof *d.words));
done:
    PyMem_Free(d.words);
    return result;
}

static PyObject *addresses_if_same(PyObject *self, PyObject *args)
{
    PyObject *params, *description, *before, *addresses, *result = NULL;
    Description d = {.compares = 1};
    if (!PyArg_ParseTuple(args, "OSS", &params, &description, &before) || !may_look(params))
        return NULL;
    d.words = (int64_t *)PyBytes_AS_STRING(description);
    d.size = (size_t)PyBytes_GET_SIZE(description) / sizeof *d.words;
    const int64_t *old = (const int64_t *)PyBytes_AS_STRING(before);
    Py_ssize_t old_count = PyBytes_GET_SIZE(before) / (Py_ssize_t)sizeof *old;
    Py_ssize_t count = PyList_GET_SIZE(params), present = 0;
    addresses = PyBytes_FromStringAndSize(NULL, count * (Py_ssize_t)sizeof *old);
    if (addresses == NULL)
        return NULL;
    int64_t *words = (int64_t *)PyBytes_AS_STRING(addresses);
    for (Py_ssize_t i = 0; i < count && i < PyList_GET_SIZE(params) && !d.differs; i++) {
        PyObject *grad = look_at(PyList_GET_ITEM(params, i), &d, &words[present]);
        if (grad == NULL)
            goto done;
        if (grad != Py_None) {
            if (present >= old_count || words[present] != old[present]) {
                PyObject *negative = PyObject_CallMethodNoArgs(grad, is_neg_name);
                d.differs |= negative == Py_True;
                Py_XDECREF(negative);
                if (negative == NULL) {
                    Py_DECREF(grad);
                    goto done;
                }
            }
            present++;
        }
        Py_DECREF(grad);
    }
    if (d.differs || d.used != d.size)
        result = Py_NewRef(Py_None);
    else if (_PyBytes_Resize(&addresses, present * (Py_ssize_t)sizeof *old) == 0)
        result = Py_NewRef(addresses);
done:
    Py_XDECREF(addresses);
    return result;
}

static PyObject *use(PyObject *self, PyObject *capsule)
{
    const DLPackExchangeAPI *given = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (given == NULL)
        return NULL;
    if (given->version.major != 1 || given->dltensor_from_py_object == NULL)
        return PyErr_Format(PyExc_ImportError, "DLPack %u.%u without what is needed", given->version.major,
                            given->version.minor);
    api = given;
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"use", use, METH_O, "Take torch.Tensor.__dlpack_c_exchange_api__ to look at tensors with."},
    {"describe", describe, METH_O, "See watching.py."},
    {"addresses_if_same", addresses_if_same, METH_VARARGS, "See watching.py."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "grass_watching", .m_size = -1, .m_methods = functions};

PyMODINIT_FUNC PyInit_grass_watching(void)
{
    grad_name = PyUnicode_InternFromString("grad");
    is_neg_name = PyUnicode_InternFromString("is_neg");
    return grad_name == NULL || is_neg_name == NULL ? NULL : PyModule_Create(&module);
}
