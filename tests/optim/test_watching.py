"""Parameters and gradients, compared with the last step's, question by question.

Would catch: a layout that changes at the same address and is walked as before, so that elements meet the wrong
moments; a comparison in C that answers otherwise than the one in Python, reads beyond its end, or keeps
what it has seen.

Runs in both passes: with ``TRITON_INTERPRET=1`` steps go by plans, without it by the kernels' function.
"""

import contextlib
import ctypes
import subprocess
import sys
import sysconfig
import tracemalloc
from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import grass
from grass.optim import watching, work
from grass.optim.watching import IN_PYTHON, watch
from grass_kernels._triton import compile_c


def square(seed: int) -> Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["in C", "in Python"])
def either(request, monkeypatch):
    if request.param == "in Python":
        monkeypatch.setattr(work, "watch", lambda: IN_PYTHON)


WATCHES = pytest.mark.parametrize("watched", [watch(), IN_PYTHON], ids=["in C", "in Python"])


def test_c_is_what_runs_here():
    """Else every test of it would pass without it."""
    assert watch() is not IN_PYTHON


@pytest.mark.parametrize("missing", ["a compiler", "the interface", "a known version of it"])
def test_without_it_python_does(missing, monkeypatch):
    def fail(*args):
        raise RuntimeError("Failed to find C compiler")

    with monkeypatch.context() as patch:
        if missing == "a compiler":
            patch.setattr(watching, "compile_c", fail)
        elif missing == "the interface":
            patch.setattr(watching, "torch", SimpleNamespace(Tensor=object))
        else:
            compiled = SimpleNamespace(use=lambda api: (_ for _ in ()).throw(ImportError("DLPack 2.0")))
            patch.setattr(watching, "compile_c", lambda name, source: compiled)
        assert watch.__wrapped__() is IN_PYTHON


def test_the_compiler_has_no_complaint(tmp_path):
    source = Path(watching.__file__).with_suffix(".c")
    include = sysconfig.get_paths()["include"]
    warnings = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers", "-Werror"]
    subprocess.run(
        ["cc", "-c", *warnings, f"-I{include}", str(source), "-o", str(tmp_path / "watching.o")], check=True
    )


@pytest.mark.parametrize("version", [0, 2])
def test_an_interface_of_another_version_is_refused(version):
    """Its fields may stand elsewhere: calling one would end the process."""
    compiled = compile_c("grass_watching", Path(watching.__file__).with_suffix(".c").read_text())
    words = (ctypes.c_uint64 * 7)(version, *[1] * 6)  # functions at address 1
    ctypes.pythonapi.PyCapsule_New.restype = ctypes.py_object
    ctypes.pythonapi.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    name = b"dlpack_exchange_api"
    with pytest.raises(ImportError, match=f"DLPack {version}"):
        compiled.use(ctypes.pythonapi.PyCapsule_New(ctypes.addressof(words), name, None))


def described() -> list[Tensor]:
    params = [nn.Parameter(square(seed)) for seed in range(4)]
    for p, seed in zip(params, (10, 11, None, 13), strict=True):
        p.grad_dtype = None  # any
        p.grad = None if seed is None else square(seed)
    return params


class Marked(Tensor):
    """A tensor of another type."""


def put_grad(convert):
    def change(params):
        params[1].grad = convert(params[1].grad)

    return change


def put_data(convert):
    def change(params):
        params[1].data = convert(params[1].data)

    return change


def cut(params):
    grad, params[1].grad = params[1].grad[:2], None
    params[1].data = params[1].data[:2]
    params[1].grad = grad


CHANGES = {
    "nothing": (lambda params: None, True),
    "what is in a gradient": (lambda params: params[1].grad.zero_(), True),
    "a gradient's address": (put_grad(torch.clone), True),
    "a gradient's dtype": (put_grad(lambda g: g.view(torch.int32)), False),
    "a gradient's width": (put_grad(torch.Tensor.half), False),
    "a gradient's strides": (put_grad(torch.t), False),
    "a gradient's type": (put_grad(lambda g: g.as_subclass(Marked)), False),
    "a gradient's address and sign": (put_grad(lambda g: torch._neg_view(g.clone())), False),
    "a gradient more": (lambda params: setattr(params[2], "grad", square(12)), False),
    "a gradient less": (put_grad(lambda g: None), False),
    "a parameter's address": (put_data(torch.clone), False),
    "a parameter's dtype": (put_data(lambda p: p.view(torch.int32).view(torch.bfloat16)[:, ::2]), False),
    "a parameter's strides": (put_data(torch.t), False),
    "the shape of both": (cut, False),
    "a parameter less": (lambda params: params.pop(), False),
    "all parameters": (lambda params: params.clear(), False),
    "a parameter more": (lambda params: params.append(params[0]), False),
    "a parameter without gradient more": (lambda params: params.append(params[2]), False),
}


@WATCHES
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_seen(watched, change):
    make, same = CHANGES[change]
    params = described()
    description = watched.describe(params)
    before = watched.addresses_if_same(params, description, b"")
    grads = [p.grad for p in params]  # alive, so that a copy lies elsewhere
    make(params)
    addresses = watched.addresses_if_same(params, description, before)
    if same:
        assert list(array("q", addresses)) == [p.grad.data_ptr() for p in params if p.grad is not None]
    else:
        assert addresses is None
    del grads


@WATCHES
@pytest.mark.parametrize("sizes", [[], [(0,)], [()], [(3, 0, 2), (1,), (2, 1, 3, 1, 2)], [(1,)] * 3000])
def test_sizes(watched, sizes):
    """None, empty, scalars, and more words than are taken at first."""
    params = [nn.Parameter(torch.zeros(size)) for size in sizes]
    for p in params:
        p.grad = torch.zeros_like(p)
    for before in (b"", bytes(8 * len(sizes)), bytes(8 * len(sizes) + 8)):
        addresses = watched.addresses_if_same(params, watched.describe(params), before)
        assert list(array("q", addresses)) == [p.grad.data_ptr() for p in params]


@WATCHES
def test_a_tensor_without_addresses(watched):
    """A sparse one has none: neither same as before, nor same as itself."""
    params = described()
    before = watched.describe(params)
    params[1].grad = square(1).to_sparse()
    with contextlib.suppress(RuntimeError):
        assert watched.addresses_if_same(params, before, b"") is None
    with pytest.raises(RuntimeError):
        watched.addresses_if_same(params, watched.describe(params), b"")


@WATCHES
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_negative_view_is_found_where_an_address_has_changed(watched, place):
    """And taken on trust where none has."""
    params = described()
    kept = [p.grad for p in params]
    params[place].grad = torch._neg_view(params[place].grad)
    description = watched.describe(params)
    assert watched.addresses_if_same(params, description, b"") is None
    now = array("q", [p.grad.data_ptr() for p in params if p.grad is not None])
    assert watched.addresses_if_same(params, description, now.tobytes()) == now.tobytes()
    now[min(place, 2)] += 4
    assert watched.addresses_if_same(params, description, now.tobytes()) is None
    del kept


def test_bad_arguments_in_c():
    for arguments in [
        ((), b"", b""),
        ([], bytearray(), b""),
        ([], b"", bytearray()),
        ([3], b"", b""),
        ([], b""),
    ]:
        with pytest.raises((TypeError, AttributeError)):
            watch().addresses_if_same(*arguments)
    with pytest.raises(TypeError, match="list"):
        watch().describe(())


class Emptying(nn.Parameter):
    """Its gradient is a property that empties the list it is in."""

    @property
    def grad(self):
        self.list.clear()
        return square(3)


def test_a_list_that_is_emptied_meanwhile():
    params = [Emptying(square(0)), nn.Parameter(square(1))]
    params[0].list, kept = params, list(params)
    description = watch().describe(params)
    assert params == []
    params.extend(kept)
    assert watch().addresses_if_same(params, description, b"") is not None
    params.extend(kept)
    assert watch().addresses_if_same(params, watch().describe(list(kept[1:])), b"") is None


def test_without_pythons_headers_no_compiler_is_asked(monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda *args, **kwargs: {"include": "/nowhere"})
    with pytest.raises(OSError, match="headers"):
        compile_c("nothing", "#error")


def test_nothing_is_kept():
    """As leaks of gradients, or of what is returned, would."""
    params = described()
    description = watch().describe(params)
    grad, sparse = params[0].grad, square(3).to_sparse()
    counts = sys.getrefcount(grad), sys.getrefcount(sparse)

    def all_ways() -> None:
        for _ in range(200):
            watch().describe(params)
            assert watch().addresses_if_same(params, description, b"") is not None
            assert watch().addresses_if_same(params[:2], description, b"") is None
        params[1].grad, dense = sparse, params[1].grad
        for _ in range(200):
            with contextlib.suppress(RuntimeError):
                watch().describe(params)
            with contextlib.suppress(RuntimeError):
                watch().addresses_if_same(params, description, b"")
        params[1].grad = dense

    all_ways()
    tracemalloc.start()
    try:
        all_ways()
        before = tracemalloc.get_traced_memory()[0]
        all_ways()
        assert tracemalloc.get_traced_memory()[0] - before < 4096
    finally:
        tracemalloc.stop()
    assert (sys.getrefcount(grad), sys.getrefcount(sparse)) == counts


def test_a_parameter_transposed_where_it_lies(either):
    """Same address, same size: only strides tell that its second element is now in another row."""
    p, q = nn.Parameter(square(0)), nn.Parameter(square(0))
    ours = grass.AdamW([p], lr=0.1)
    theirs = torch.optim.AdamW([q], lr=0.1, foreach=False)
    for step in range(4):
        for t, optimizer in ((p, ours), (q, theirs)):
            if step == 2:
                t.data = t.data.t()
            t.grad = square(10 + step)
            optimizer.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_moved_and_is_transposed(either):
    p, q = nn.Parameter(square(0)), nn.Parameter(square(0))
    ours = grass.AdamW([p], lr=0.1)
    theirs = torch.optim.AdamW([q], lr=0.1, foreach=False)
    held = []  # so that each lies elsewhere
    for step in range(4):
        g = square(10 + step)
        held.append(g)
        for t, optimizer in ((p, ours), (q, theirs)):
            t.grad = g.t() if step == 2 else g
            optimizer.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [0, 2])
def test_a_gradient_transposed_where_it_lies(either, step):
    """Same address, same size, in the first step or later."""
    p, q = nn.Parameter(square(0)), nn.Parameter(square(0))
    ours = grass.AdamW([p], lr=0.1)
    theirs = torch.optim.AdamW([q], lr=0.1, foreach=False)
    for t, optimizer in ((p, ours), (q, theirs)):
        t.grad = square(10)
        for now in range(5):
            if now == step:
                t.grad.data = t.grad.data.t()
            optimizer.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_gradient_of_another_dtype_where_it_lies(either):
    """Same address, shape and strides, after a first step in which the parameter allowed but its own dtype."""
    p, q = nn.Parameter(square(0).bfloat16()), nn.Parameter(square(0).bfloat16())
    ours, theirs = grass.AdamW([p], lr=0.1), grass.AdamW([q], lr=0.1)
    memory = torch.zeros(4, 4)
    narrow = memory.view(torch.bfloat16).flatten()[:16].view(4, 4)
    for grad in (narrow, memory):
        grad.copy_(square(10))
        p.grad_dtype = q.grad_dtype = None
        p.grad, q.grad = grad, grad.clone()
        ours.step()
        theirs.step()
    assert torch.equal(p, q)
