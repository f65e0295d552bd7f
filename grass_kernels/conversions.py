"""Dtypes of the kernels, and device functions: addresses to pointers, and storage types to fp32 and back.

bf16 is read and written as 16 bits. A GPU rounds to it by its own conversion. Triton's interpreter truncates where a
GPU rounds, and converts bf16 denormals incorrectly: there, as in the reference, integers round, and agree with torch on
every bit pattern. A test on the device compares the two for every number. fp16 needs no such care: the interpreter
converts it by IEEE 754.
"""

# ruff: noqa: N803, SIM300 - constexpr arguments are in capitals, as everywhere in Triton

from collections.abc import Sequence

import torch

from grass_kernels._triton import INTERPRETING, constexpr, jit, tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of parameters and gradients."""
STATE_DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes of moments. In fp16 the squares of small gradients would underflow."""
LR_DTYPES = (torch.float32, torch.float64)
"""Dtypes of a learning rate that kernels read on the device."""
ALIGNMENT = constexpr(16)
"""Bytes of a 128-bit access, and its alignment."""
ON_DEVICE = constexpr(not INTERPRETING)
"""True if bf16 is rounded by the conversion of the device: one instruction for two elements; integers take six each."""
DRAWS = constexpr(8)
"""Elements per call of the random generator: 16 of its 128 bits each."""


def access_width(dtypes: Sequence[torch.dtype]) -> int:
    """Return the number of elements that a thread accesses at a time: 16 bytes of the widest dtype."""
    return ALIGNMENT.value // max(dtype.itemsize for dtype in dtypes)


@jit()
def pointer(address, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """Return the pointer of an int64 address; bf16 as uint16."""
    return address.to(tl.pointer_type(tl.uint16 if DTYPE == tl.bfloat16 else DTYPE))


@jit()
def to_fp32(x):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """Convert a loaded block to fp32, exactly."""
    bits = x.to(tl.uint32) << 16 if x.dtype == tl.uint16 else x
    return bits.to(tl.float32, bitcast=True) if x.dtype == tl.uint16 else x.to(tl.float32)


@jit()
def upper_half(bits, is_nan):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """Return the upper 16 of 32 bits, a bf16; for NaN the quiet NaN, since a sum could change its exponent."""
    return tl.where(is_nan, 0x7FC0, bits >> 16).to(tl.uint16)


@jit()
def from_fp32(x, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """Convert an fp32 block to the type of a pointer, rounded to nearest, ties to even; NaN stays NaN."""
    if DTYPE == tl.uint16 and ON_DEVICE:
        narrow = x.to(tl.bfloat16).to(tl.uint16, bitcast=True)
    elif DTYPE == tl.uint16:
        bits = x.to(tl.uint32, bitcast=True)
        # Adding just under half a unit in the last place, plus the last bit, carries exactly if the nearest value is
        # the upper one.
        narrow = upper_half(bits + 0x7FFF + ((bits >> 16) & 1), x != x)
    else:
        narrow = x.to(DTYPE)
    return narrow


@jit()
def join_fp32(upper, remainder):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """Join the bits of a bf16 and a signed 16-bit remainder to an fp32: their sum, modulo 2^32.

    At ±0 a negative remainder counts as 0, and at ±inf every one: see rounding.join_fp32.
    """
    magnitude = upper & 0x7FFF
    low = remainder.to(tl.int32)
    low = tl.where(magnitude == 0, tl.maximum(low, 0), low)
    low = tl.where(magnitude == 0x7F80, 0, low)
    # Sign-extended, so that its bits can be added.
    return ((upper.to(tl.uint32) << 16) + low.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)


@jit()
def split_fp32(x):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """Split an fp32 into the bits of the nearest bf16 (ties away from zero) and a signed 16-bit remainder.

    With ties to even 32,640 values could not be restored: they would need a remainder of +32,768.
    """
    bits = x.to(tl.uint32, bitcast=True)
    is_nan = x != x
    low = tl.where(is_nan, 0, bits & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True)
    return upper_half(bits + 0x8000, is_nan), low


@jit()
def random_16_bits(seed, step, start, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return 16 random bits for each of `BLOCK` elements of a tensor, from element `start` (a multiple of 8) on.

    A function of seed, step and position only: Philox 4x32 with 10 rounds, with the counter
    (position / 8, step, 0, 0) and the seed as key.
    """
    position = (start // DRAWS).to(tl.uint32) + tl.arange(0, BLOCK // DRAWS).to(tl.uint32)
    zero = position * 0
    word0, word1, word2, word3 = tl.philox(seed, position, zero + step.to(tl.uint32), zero, zero)
    words = tl.reshape(tl.join(tl.join(word0, word2), tl.join(word1, word3)), [BLOCK // 2])
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [BLOCK])


@jit()
def round_stochastically(x, random):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """Round stochastically to the bits of a neighbouring bf16: each with the probability that makes it unbiased."""
    return upper_half(x.to(tl.uint32, bitcast=True) + random, x != x)


@jit()
def block_pointers(ptr, start, BLOCK: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return pointers to `BLOCK` elements from `start` on, which a thread accesses `WIDTH` at a time; 1 is any address.

    The width is a hint to the compiler on the alignment of the sum: on `ptr` it would also apply to the masked path of
    the same kernel. A kernel with one width for all arrays has one layout: otherwise values of one thread would have to
    go to others through shared memory.
    """
    first = ptr + start
    if WIDTH > 1:
        first = tl.multiple_of(first, WIDTH * (ptr.dtype.element_ty.primitive_bitwidth // 8))
    return first + tl.arange(0, BLOCK)


@jit()
def block_mask(start, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the mask of `BLOCK` elements from `start` on that come before `length`."""
    return tl.arange(0, BLOCK) < length - start


@jit()
def load(pointers, mask):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """Load a block in its stored dtype. `mask` None is a full block; masked elements are zero."""
    return tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0)


@jit()
def load_fp32(pointers, mask):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """Load a block in fp32. `mask` None is a full block; masked elements are zero."""
    return to_fp32(load(pointers, mask))


@jit()
def store_fp32(pointers, x, mask):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """Round an fp32 block to the type of the pointers, and store it. `mask` None is a full block."""
    tl.store(pointers, from_fp32(x, pointers.dtype.element_ty), mask=mask)
