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
DRAWS = constexpr(8)
"""Elements that share one call of the random generator: it gives 128 bits, each element takes 16."""


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
def upper_half(bits, is_nan):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """The upper 16 of 32 bits, a bf16; where it is a NaN, the quiet one (a sum could leave its exponent)."""
    return tl.where(is_nan, 0x7FC0, bits >> 16).to(tl.uint16)


@jit()
def from_fp32(x, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """An fp32 block in the type a pointer stores, rounded to the nearest, ties to even; NaN stays NaN."""
    if DTYPE == tl.uint16:
        bits = x.to(tl.uint32, bitcast=True)
        # Adding just under half a unit of the kept bits, plus their last bit, carries exactly when the
        # nearest value is the upper one.
        narrow = upper_half(bits + 0x7FFF + ((bits >> 16) & 1), x != x)
    else:
        narrow = x.to(DTYPE)
    return narrow


@jit()
def join_fp32(upper, remainder):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """The fp32 that a bf16 (its bits) and a signed 16-bit remainder stand for: their sum, modulo 2^32.

    At ±0 a negative remainder counts as 0, and at ±inf every one: see rounding.join_fp32.
    """
    magnitude = upper & 0x7FFF
    low = remainder.to(tl.int32)
    low = tl.where(magnitude == 0, tl.maximum(low, 0), low)
    low = tl.where(magnitude == 0x7F80, 0, low)
    # Widened with its sign: its bits then add as any others.
    return ((upper.to(tl.uint32) << 16) + low.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)


@jit()
def split_fp32(x):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """The nearest bf16 (its bits; ties away from zero), and what it lacks, as a signed 16-bit remainder.

    With ties to even 32,640 values could not come back: theirs would be a remainder of +32,768.
    """
    bits = x.to(tl.uint32, bitcast=True)
    is_nan = x != x
    low = tl.where(is_nan, 0, bits & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True)
    return upper_half(bits + 0x8000, is_nan), low


@jit()
def random_16_bits(seed, step, start, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """16 random bits for each of `BLOCK` elements of a tensor, from element `start` (a multiple of 8) on.

    A function of seed, step and the element's place alone: Philox 4x32 with 10 rounds, whose counter is
    (place / 8, step, 0, 0) and whose key is the seed.
    """
    place = (start // DRAWS).to(tl.uint32) + tl.arange(0, BLOCK // DRAWS).to(tl.uint32)
    zero = place * 0
    word0, word1, word2, word3 = tl.philox(seed, place, zero + step.to(tl.uint32), zero, zero)
    words = tl.reshape(tl.join(tl.join(word0, word2), tl.join(word1, word3)), [BLOCK // 2])
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [BLOCK])


@jit()
def round_stochastically(x, random):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """One of the two neighbouring bf16 (its bits): the farther from zero as often as `x` is near it."""
    return upper_half(x.to(tl.uint32, bitcast=True) + random, x != x)


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
def load(pointers, mask):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """Load a block as it is stored. `mask` None is a full block; masked-off elements are zero."""
    return tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0)


@jit()
def load_fp32(pointers, mask):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """Load a block, in fp32. `mask` None is a full block; masked-off elements are zero."""
    return to_fp32(load(pointers, mask))


@jit()
def store_fp32(pointers, x, mask):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """Round an fp32 block to the pointers' own type and store it. `mask` None is a full block."""
    tl.store(pointers, from_fp32(x, pointers.dtype.element_ty), mask=mask)
