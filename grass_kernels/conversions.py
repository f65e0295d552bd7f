"""Device functions: addresses to pointers, and storage types to fp32 and back.

bf16 is read and written as its 16 bits, by integer arithmetic. Triton's interpreter truncates where a
GPU rounds, and mangles bf16 denormals, so a kernel that trusts ``.to(tl.bfloat16)`` is not the kernel
the interpreter tests. With integers the interpreter, a GPU and torch agree on every bit pattern. fp16
needs no such care: the interpreter converts it as IEEE 754 says.
"""

# ruff: noqa: N803, SIM300 - constexpr arguments are in capitals, as everywhere in Triton

from grass_kernels._triton import constexpr, jit, tl

ALIGNMENT = constexpr(16)
"""Bytes of a 128-bit access, which every address it uses must be a multiple of."""


@jit()
def pointer(address, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """The pointer an int64 of a table stands for; bf16 as its 16 bits."""
    return address.to(tl.pointer_type(tl.uint16 if DTYPE == tl.bfloat16 else DTYPE))


@jit()
def to_fp32(x):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """A loaded block in fp32, exactly."""
    bits = x.to(tl.uint32) << 16 if x.dtype == tl.uint16 else x
    return bits.to(tl.float32, bitcast=True) if x.dtype == tl.uint16 else x.to(tl.float32)


@jit()
def from_fp32(x, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """An fp32 block in the type a pointer stores, rounded to the nearest, ties to even; NaN stays NaN."""
    if DTYPE == tl.uint16:
        bits = x.to(tl.uint32, bitcast=True)
        # Adding just under half a unit of the kept bits, plus their last bit, carries exactly when the
        # nearest value is the upper one. A NaN could carry out of its exponent: it is set apart.
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        narrow = tl.where(is_nan, 0x7FC0, rounded).to(tl.uint16)
    else:
        narrow = x.to(DTYPE)
    return narrow


@jit()
def block_pointers(ptr, start, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pointers to `BLOCK` elements from `start` on; with `ALIGNED` the compiler is told they are.

    The hint sits on the sum, not on `ptr`: a hint on `ptr` would reach the masked path of the same kernel.
    """
    first = ptr + start
    if ALIGNED:
        first = tl.multiple_of(first, ALIGNMENT)
    return first + tl.arange(0, BLOCK)


@jit()
def block_mask(start, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which of `BLOCK` elements from `start` on come before `length`."""
    return tl.arange(0, BLOCK) < length - start


@jit()
def load_fp32(pointers, mask):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """Load a block, in fp32. `mask` None is a full block; masked-off elements are zero."""
    return to_fp32(tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0))


@jit()
def store_fp32(pointers, x, mask):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """Round an fp32 block to the pointers' own type and store it. `mask` None is a full block."""
    tl.store(pointers, from_fp32(x, pointers.dtype.element_ty), mask=mask)
