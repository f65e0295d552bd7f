"""The Triton kernel of masked AdamW: the main pass, which reads and writes every element once."""

# ruff: noqa: N803 - constexpr arguments are in capitals, as everywhere in Triton

import torch

from grass_kernels._triton import THREADS, constexpr, jit, tl
from grass_kernels.conversions import (
    block_mask,
    block_pointers,
    join_fp32,
    load,
    load_fp32,
    pointer,
    random_16_bits,
    round_stochastically,
    split_fp32,
    store_fp32,
    to_fp32,
)
from grass_kernels.prologue import (
    C_BETA2,
    C_BIAS_CORRECTION2_SQRT,
    C_DECAY,
    C_EPS,
    C_EXP_AVG_WEIGHT,
    C_GRAD_FACTOR,
    C_MODE,
    C_ONE_MINUS_BETA2,
    C_STEP,
    C_STEP_SIZE,
    SKIP,
    UPDATE,
)
from grass_kernels.sq_norm import chunk_range, find_chunk, tree_sum
from grass_kernels.table import (
    COEFFICIENTS,
    EXP_AVG,
    EXP_AVG_SQ,
    FIRST_PARTIAL,
    MAX_EXP_AVG_SQ,
    PARAM,
    REMAINDER,
    SEED,
)

NARROW_BLOCK = 2 * THREADS
"""Block size for accesses with a mask."""
MAX_REGISTERS = 80
"""Registers per thread: three programs of 256 threads fit the 65,536 of a multiprocessor."""
MORE_REGISTERS = 128
"""The same for two programs: for the largest kernels, which would spill with some versions of Triton."""


def max_registers(state_dtype: torch.dtype, amsgrad: bool, norms: bool) -> int:
    """Return the register limit that a kernel is compiled with."""
    return MORE_REGISTERS if amsgrad and norms and state_dtype == torch.bfloat16 else MAX_REGISTERS


SHIFTS = ("exp_avg_shift", "exp_avg_sq_shift", "max_exp_avg_sq_shift", "remainder_shift")

# Rounding of a parameter.
NEAREST = constexpr(0)
MASTER = constexpr(1)  # bf16 with a remainder: master weights
STOCHASTIC = constexpr(2)  # bf16, rounded stochastically


@jit()
def _adamw_block(  # type: ignore[no-untyped-def]  # Triton types its own arguments
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    max_exp_avg_sq_ptr,
    remainder_ptr,
    start,  # first element, relative to the pointers
    length,  # number of valid elements, relative to the pointers
    sums,  # fp32 [full block]: squares of gradients so far
    seed,
    step,
    chunk_start,  # first element of the chunk in its tensor
    grad_factor,
    decay,
    exp_avg_weight,
    beta2,
    one_minus_beta2,
    step_size,
    bias_correction2_sqrt,
    eps,
    ROUNDING: tl.constexpr,
    AMSGRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,  # elements of an access: more than 1 for a full block at 16-byte aligned addresses
    NORMS: tl.constexpr,
):
    """Update one block. Returns `sums`, plus the squares of its gradients before clipping if it is full."""
    FULL: tl.constexpr = WIDTH > 1
    mask = None if FULL else block_mask(start, length, BLOCK)
    param_block = block_pointers(param_ptr, start, BLOCK, WIDTH)
    exp_avg_block = block_pointers(exp_avg_ptr, start, BLOCK, WIDTH)
    exp_avg_sq_block = block_pointers(exp_avg_sq_ptr, start, BLOCK, WIDTH)

    grad = load_fp32(block_pointers(grad_ptr, start, BLOCK, WIDTH), mask)
    stored = load(param_block, mask)
    if ROUNDING == MASTER:
        remainder_block = block_pointers(remainder_ptr, start, BLOCK, WIDTH)
        param = join_fp32(stored, load(remainder_block, mask))
    else:
        param = to_fp32(stored)
    exp_avg = load_fp32(exp_avg_block, mask)
    exp_avg_sq = load_fp32(exp_avg_sq_block, mask)

    if FULL and NORMS:
        sums += grad * grad
    grad = grad * grad_factor
    param = param * decay
    nearer = tl.where(exp_avg_weight <= 0, grad, exp_avg)  # see reference.exp_avg_weight
    exp_avg = nearer + exp_avg_weight * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    store_fp32(exp_avg_block, exp_avg, mask)
    store_fp32(exp_avg_sq_block, exp_avg_sq, mask)
    if AMSGRAD:
        max_exp_avg_sq_block = block_pointers(max_exp_avg_sq_ptr, start, BLOCK, WIDTH)
        max_exp_avg_sq = load_fp32(max_exp_avg_sq_block, mask)
        # NaN on either side propagates, as in torch.maximum.
        replace = (exp_avg_sq > max_exp_avg_sq) | (exp_avg_sq != exp_avg_sq)
        exp_avg_sq = tl.where(replace, exp_avg_sq, max_exp_avg_sq)
        store_fp32(max_exp_avg_sq_block, exp_avg_sq, mask)
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), bias_correction2_sqrt) + eps
    param = param - tl.div_rn(step_size * exp_avg, denominator)
    if ROUNDING == MASTER:
        upper, remainder = split_fp32(param)
        tl.store(param_block, upper, mask=mask)
        tl.store(remainder_block, remainder, mask=mask)
    elif ROUNDING == STOCHASTIC:
        random = random_16_bits(seed, step, chunk_start + start, BLOCK)
        tl.store(param_block, round_stochastically(param, random), mask=mask)
    else:
        store_fp32(param_block, param, mask)
    return sums


@jit(do_not_specialize=("chunks_start", *SHIFTS))
def _masked_adamw_kernel(  # type: ignore[no-untyped-def]  # Triton types its own arguments
    table_ptr,  # int64, see table.py
    inputs_ptr,  # int64, see inputs.py
    coefficients_ptr,  # float32 [tensors, COEFFICIENTS], from the prologue
    partials_ptr,  # out: float32 [chunks], or None
    chunks_start,  # first word of this launch's chunks
    # Bytes from the state addresses of the table to the current ones. With a fixed type: otherwise the type would
    # depend on the value, and the kernel would be compiled for each.
    exp_avg_shift: "i64",  # type: ignore  # noqa: F821
    exp_avg_sq_shift: "i64",  # type: ignore  # noqa: F821
    max_exp_avg_sq_shift: "i64",  # type: ignore  # noqa: F821
    remainder_shift: "i64",  # type: ignore  # noqa: F821
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    AMSGRAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    NARROW_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,  # elements of an access, see access_width
):
    """Update one chunk per program: full aligned blocks first, then the rest with masks."""
    tensor, chunk, row = find_chunk(table_ptr + chunks_start + tl.program_id(0), table_ptr)
    param_address = tl.load(row + PARAM)
    grad_address = tl.load(inputs_ptr + tensor)
    exp_avg_address = tl.load(row + EXP_AVG) + exp_avg_shift
    exp_avg_sq_address = tl.load(row + EXP_AVG_SQ) + exp_avg_sq_shift
    max_exp_avg_sq_address = tl.load(row + MAX_EXP_AVG_SQ) + max_exp_avg_sq_shift
    remainder_address = tl.load(row + REMAINDER) + remainder_shift
    addresses = param_address | grad_address | exp_avg_address | exp_avg_sq_address
    addresses = addresses | max_exp_avg_sq_address | remainder_address  # 0 where there is none
    start, length, full = chunk_range(row, chunk, addresses, CHUNK, BLOCK)
    partial = tl.load(row + FIRST_PARTIAL) + chunk
    param_ptr = pointer(param_address, PARAM_DTYPE) + start
    grad_ptr = pointer(grad_address, GRAD_DTYPE) + start
    exp_avg_ptr = pointer(exp_avg_address, STATE_DTYPE) + start
    exp_avg_sq_ptr = pointer(exp_avg_sq_address, STATE_DTYPE) + start
    max_exp_avg_sq_ptr = pointer(max_exp_avg_sq_address, STATE_DTYPE) + start
    remainder_ptr = pointer(remainder_address, tl.int16) + start
    seed = tl.load(row + SEED)

    c_ptr = coefficients_ptr + tensor * COEFFICIENTS
    mode = tl.load(c_ptr + C_MODE)
    grad_factor = tl.load(c_ptr + C_GRAD_FACTOR)
    decay = tl.load(c_ptr + C_DECAY)
    exp_avg_weight = tl.load(c_ptr + C_EXP_AVG_WEIGHT)
    beta2 = tl.load(c_ptr + C_BETA2)
    one_minus_beta2 = tl.load(c_ptr + C_ONE_MINUS_BETA2)
    step_size = tl.load(c_ptr + C_STEP_SIZE)
    bias_correction2_sqrt = tl.load(c_ptr + C_BIAS_CORRECTION2_SQRT)
    eps = tl.load(c_ptr + C_EPS)
    step = tl.load(c_ptr + C_STEP)

    NORMS: tl.constexpr = partials_ptr is not None
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    squared = tl.where(mode == SKIP, length, 0)  # squares before this element are in `sums`, or not needed
    if mode == UPDATE:
        for block in range(0, full, BLOCK):
            sums = _adamw_block(
                param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, max_exp_avg_sq_ptr, remainder_ptr,
                block, length, sums, seed, step, start,
                grad_factor, decay, exp_avg_weight, beta2, one_minus_beta2, step_size, bias_correction2_sqrt, eps,
                ROUNDING, AMSGRAD, BLOCK, WIDTH, NORMS,
            )  # fmt: skip
        # Narrow blocks: masks and element-wise accesses on full ones would triple the registers of the kernel.
        for block in range(full, length, NARROW_BLOCK):
            sums = _adamw_block(
                param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, max_exp_avg_sq_ptr, remainder_ptr,
                block, length, sums, seed, step, start,
                grad_factor, decay, exp_avg_weight, beta2, one_minus_beta2, step_size, bias_correction2_sqrt, eps,
                ROUNDING, AMSGRAD, NARROW_BLOCK, 1, NORMS,
            )  # fmt: skip
        squared = full
    if NORMS:
        # Squares of the rest, in full blocks again, so that sums are bitwise independent of the alignment. These
        # gradients are read a second time, from the cache.
        for block in range(squared, length, BLOCK):
            mask = block_mask(block, length, BLOCK)
            grad = load_fp32(block_pointers(grad_ptr, block, BLOCK, 1), mask)
            sums += grad * grad
        tl.store(partials_ptr + partial, tree_sum(sums, BLOCK))
