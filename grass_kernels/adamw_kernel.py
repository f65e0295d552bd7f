"""The Triton kernels of masked AdamW, and their launcher.

A call is a few launches, whatever the number of tensors: a prologue advances the step counters and works
out the coefficients in double; one main pass a combination of dtypes updates; and, if norms are wanted, a
last one adds their partial sums. The host waits for none of them.
"""

# ruff: noqa: N803 - constexpr arguments are in capitals, as everywhere in Triton

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grass_kernels import reference
from grass_kernels._triton import THREADS, constexpr, jit, launch, tl, tl_dtype
from grass_kernels.conversions import block_mask, block_pointers, load_fp32, pointer, store_fp32
from grass_kernels.sq_norm import chunk_range, find_chunk, launch_sum_layers, load_grad, tree_sum
from grass_kernels.table import (
    BLOCK,
    CHUNK,
    EXP_AVG,
    EXP_AVG_SQ,
    FIRST_PARTIAL,
    GRAD,
    HEADER,
    LAYER,
    MAX_EXP_AVG_SQ,
    PARAM,
    ROW,
    STEP,
    build_table,
)

NARROW_BLOCK = 2 * THREADS
"""Elements a program holds at a time where it must mask."""
MAX_REGISTERS = 80
"""Of a thread: three programs of 256 threads fit a multiprocessor's 65,536."""

# Words of the table's header, doubles. A kernel's float arguments would arrive as fp32.
HYPERPARAMETERS = (
    "lr",
    "weight_decay",
    "log_beta1",
    "log_beta2",
    "exp_avg_weight",
    "beta2",
    "one_minus_beta2",
    "eps",
    "sign",
)
LR = constexpr(HYPERPARAMETERS.index("lr"))
WEIGHT_DECAY = constexpr(HYPERPARAMETERS.index("weight_decay"))
LOG_BETA1 = constexpr(HYPERPARAMETERS.index("log_beta1"))
LOG_BETA2 = constexpr(HYPERPARAMETERS.index("log_beta2"))
EXP_AVG_WEIGHT = constexpr(HYPERPARAMETERS.index("exp_avg_weight"))
BETA2 = constexpr(HYPERPARAMETERS.index("beta2"))
ONE_MINUS_BETA2 = constexpr(HYPERPARAMETERS.index("one_minus_beta2"))
EPS = constexpr(HYPERPARAMETERS.index("eps"))
SIGN = constexpr(HYPERPARAMETERS.index("sign"))

# What the prologue leaves for each parameter: one row of fp32, a 64-byte line.
COEFFICIENTS = constexpr(16)
C_MODE = constexpr(0)
C_DECAY = constexpr(1)
C_EXP_AVG_WEIGHT = constexpr(2)
C_BETA2 = constexpr(3)
C_ONE_MINUS_BETA2 = constexpr(4)
C_STEP_SIZE = constexpr(5)
C_BIAS_CORRECTION2_SQRT = constexpr(6)
C_EPS = constexpr(7)
C_GRAD_FACTOR = constexpr(8)

# What is to be done with a parameter.
SKIP = constexpr(0.0)  # its layer is not active
NORM_ONLY = constexpr(1.0)  # a gradient somewhere is not finite: the call changes nothing
UPDATE = constexpr(2.0)


@jit()
def _hyperparameter(table_ptr, INDEX: tl.constexpr):  # type: ignore[no-untyped-def]
    """A double of the table's header."""
    return tl.load(table_ptr + INDEX).to(tl.float64, bitcast=True)


@jit()
def _prologue_kernel(  # type: ignore[no-untyped-def]  # Triton types its own arguments
    table_ptr,  # int64, see table.py
    coefficients_ptr,  # out: float32 [tensors, COEFFICIENTS]
    active_ptr,  # bool [num_layers] or None
    found_inf_ptr,  # any type [1] or None
    clip_coef_ptr,  # float32 [1] or None
    lr_ptr,  # floating point [1] or None: then lr is in the header
):
    """One program a parameter: advance its counter, decide, and compute its coefficients in double.

    Runs with one warp. With more, one could read the counter after another has advanced it; for the same
    reason no program of the main pass, where many share a parameter, touches a counter.
    """
    tensor = tl.program_id(0).to(tl.int64)
    row = table_ptr + HEADER + tensor * ROW
    mode = tl.full((), UPDATE, tl.float32)
    if found_inf_ptr is not None:
        mode = tl.where(tl.load(found_inf_ptr) != 0, NORM_ONLY, mode)
    if active_ptr is not None:
        mode = tl.where(tl.load(active_ptr + tl.load(row + LAYER)) != 0, mode, SKIP)

    step_ptr = tl.load(row + STEP).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr) + 1.0
    tl.store(step_ptr, step, mask=mode == UPDATE)

    lr = _hyperparameter(table_ptr, LR) if lr_ptr is None else tl.load(lr_ptr).to(tl.float64)
    steps = step.to(tl.float64)
    # beta^steps: with the logarithm in double, the error of the power is some 1e-16 of 1.
    bias_correction1 = 1.0 - tl.exp(steps * _hyperparameter(table_ptr, LOG_BETA1))
    bias_correction2 = 1.0 - tl.exp(steps * _hyperparameter(table_ptr, LOG_BETA2))
    # x * 1 and x * -1 are exact: neither the absent clipping nor the direction needs a kernel of its own.
    grad_factor = _hyperparameter(table_ptr, SIGN).to(tl.float32)
    if clip_coef_ptr is not None:
        grad_factor = grad_factor * tl.load(clip_coef_ptr)

    out = coefficients_ptr + tensor * COEFFICIENTS
    tl.store(out + C_MODE, mode)
    tl.store(out + C_DECAY, (1.0 - lr * _hyperparameter(table_ptr, WEIGHT_DECAY)).to(tl.float32))
    tl.store(out + C_EXP_AVG_WEIGHT, _hyperparameter(table_ptr, EXP_AVG_WEIGHT).to(tl.float32))
    tl.store(out + C_BETA2, _hyperparameter(table_ptr, BETA2).to(tl.float32))
    tl.store(out + C_ONE_MINUS_BETA2, _hyperparameter(table_ptr, ONE_MINUS_BETA2).to(tl.float32))
    tl.store(out + C_STEP_SIZE, (lr / bias_correction1).to(tl.float32))
    tl.store(out + C_BIAS_CORRECTION2_SQRT, tl.sqrt(bias_correction2).to(tl.float32))
    tl.store(out + C_EPS, _hyperparameter(table_ptr, EPS).to(tl.float32))
    tl.store(out + C_GRAD_FACTOR, grad_factor)


@jit()
def _adamw_block(  # type: ignore[no-untyped-def]  # Triton types its own arguments
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    max_exp_avg_sq_ptr,
    start,  # first element, counted from where the pointers stand
    length,  # of what may be touched from there
    sums,  # fp32, as wide as a full block: squares of gradients so far
    grad_scale_ptr,  # float32 [1] or None
    grad_factor,
    decay,
    exp_avg_weight,
    beta2,
    one_minus_beta2,
    step_size,
    bias_correction2_sqrt,
    eps,
    AMSGRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,  # a full block at 16-byte aligned addresses
):
    """Update one block. Returns `sums`, with its gradients' squares (unscaled, not yet clipped) if it is full."""
    mask = None if FULL else block_mask(start, length, BLOCK)
    param_block = block_pointers(param_ptr, start, BLOCK, FULL)
    exp_avg_block = block_pointers(exp_avg_ptr, start, BLOCK, FULL)
    exp_avg_sq_block = block_pointers(exp_avg_sq_ptr, start, BLOCK, FULL)

    grad = load_grad(grad_ptr, start, mask, grad_scale_ptr, BLOCK, FULL)
    param = load_fp32(param_block, mask)
    exp_avg = load_fp32(exp_avg_block, mask)
    exp_avg_sq = load_fp32(exp_avg_sq_block, mask)

    if FULL:
        sums += grad * grad
    grad = grad * grad_factor
    param = param * decay
    nearer = tl.where(exp_avg_weight <= 0, grad, exp_avg)  # see reference.exp_avg_weight
    exp_avg = nearer + exp_avg_weight * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    store_fp32(exp_avg_block, exp_avg, mask)
    store_fp32(exp_avg_sq_block, exp_avg_sq, mask)
    if AMSGRAD:
        max_exp_avg_sq_block = block_pointers(max_exp_avg_sq_ptr, start, BLOCK, FULL)
        max_exp_avg_sq = load_fp32(max_exp_avg_sq_block, mask)
        # NaN on either side wins, as in torch.maximum.
        replace = (exp_avg_sq > max_exp_avg_sq) | (exp_avg_sq != exp_avg_sq)
        exp_avg_sq = tl.where(replace, exp_avg_sq, max_exp_avg_sq)
        store_fp32(max_exp_avg_sq_block, exp_avg_sq, mask)
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), bias_correction2_sqrt) + eps
    param = param - tl.div_rn(step_size * exp_avg, denominator)
    store_fp32(param_block, param, mask)
    return sums


@jit(do_not_specialize=("chunks_start",))
def _masked_adamw_kernel(  # type: ignore[no-untyped-def]  # Triton types its own arguments
    table_ptr,  # int64, see table.py
    coefficients_ptr,  # float32 [tensors, COEFFICIENTS], from the prologue
    partials_ptr,  # out: float32 [chunks], or None
    grad_scale_ptr,  # float32 [1] or None
    chunks_start,  # first word of this launch's chunks
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    NARROW_BLOCK: tl.constexpr,
):
    """One program a chunk: its full aligned blocks first, then what is left of it under masks."""
    tensor, chunk, row = find_chunk(table_ptr + chunks_start + tl.program_id(0), table_ptr)
    start, length, full = chunk_range(row, chunk, CHUNK, BLOCK)
    partial = tl.load(row + FIRST_PARTIAL) + chunk
    param_ptr = pointer(tl.load(row + PARAM), PARAM_DTYPE) + start
    grad_ptr = pointer(tl.load(row + GRAD), GRAD_DTYPE) + start
    exp_avg_ptr = pointer(tl.load(row + EXP_AVG), STATE_DTYPE) + start
    exp_avg_sq_ptr = pointer(tl.load(row + EXP_AVG_SQ), STATE_DTYPE) + start
    max_exp_avg_sq_ptr = pointer(tl.load(row + MAX_EXP_AVG_SQ), STATE_DTYPE) + start

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

    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    squared = tl.where(mode == SKIP, length, 0)  # gradients before it are in `sums`, or not asked for
    if mode == UPDATE:
        for block in range(0, full, BLOCK):
            sums = _adamw_block(
                param_ptr,
                grad_ptr,
                exp_avg_ptr,
                exp_avg_sq_ptr,
                max_exp_avg_sq_ptr,
                block,
                length,
                sums,
                grad_scale_ptr,
                grad_factor,
                decay,
                exp_avg_weight,
                beta2,
                one_minus_beta2,
                step_size,
                bias_correction2_sqrt,
                eps,
                AMSGRAD,
                BLOCK,
                True,
            )
        # Narrow blocks: masks and single elements on full ones would triple the kernel's registers.
        for block in range(full, length, NARROW_BLOCK):
            sums = _adamw_block(
                param_ptr,
                grad_ptr,
                exp_avg_ptr,
                exp_avg_sq_ptr,
                max_exp_avg_sq_ptr,
                block,
                length,
                sums,
                grad_scale_ptr,
                grad_factor,
                decay,
                exp_avg_weight,
                beta2,
                one_minus_beta2,
                step_size,
                bias_correction2_sqrt,
                eps,
                AMSGRAD,
                NARROW_BLOCK,
                False,
            )
        squared = full
    if partials_ptr is not None:
        # Their squares in full blocks again, since sums have the same bits whatever the alignment. Read
        # a second time, these gradients come from the cache.
        for block in range(squared, length, BLOCK):
            mask = block_mask(block, length, BLOCK)
            grad = load_grad(grad_ptr, block, mask, grad_scale_ptr, BLOCK, False)
            sums += grad * grad
        tl.store(partials_ptr + partial, tree_sum(sums, BLOCK))


class TensorLists(NamedTuple):
    """Dense tensors, one entry a parameter, all those of a parameter of equal strides."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    max_exp_avg_sqs: Sequence[Tensor]  # empty without amsgrad
    steps: Sequence[Tensor]
    layers: Sequence[int]

    def keys(self) -> list[tuple[torch.dtype, torch.dtype, torch.dtype]]:
        """The dtypes of parameter, gradient and moments: what decides a kernel."""
        columns = zip(self.params, self.grads, self.exp_avgs, strict=True)
        return [(p.dtype, g.dtype, m.dtype) for p, g, m in columns]


class Options(NamedTuple):
    """The other arguments of a call."""

    num_layers: int
    sq_norms: Tensor | None
    lr: float | Tensor  # a tensor is read on the device
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool
    grad_scale: Tensor | None
    found_inf: Tensor | None
    clip_coef: Tensor | None


def launch_masked_adamw(
    lists: TensorLists, options: Options, device: torch.device, device_active: Tensor | None = None
) -> None:
    """Queue prologue, main passes and norms. `device_active`: bool [num_layers], read by the prologue."""
    beta1, beta2 = options.betas
    lr_on_device = isinstance(options.lr, Tensor)
    hyperparameters = {
        "lr": 0.0 if lr_on_device else float(options.lr),
        "weight_decay": options.weight_decay,
        "log_beta1": math.log(beta1) if beta1 else -math.inf,
        "log_beta2": math.log(beta2) if beta2 else -math.inf,
        "exp_avg_weight": reference.exp_avg_weight(beta1),
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "eps": options.eps,
        "sign": -1.0 if options.maximize else 1.0,
    }
    table = build_table(
        params=lists.params,
        grads=lists.grads,
        exp_avgs=lists.exp_avgs,
        exp_avg_sqs=lists.exp_avg_sqs,
        max_exp_avg_sqs=lists.max_exp_avg_sqs,
        steps=lists.steps,
        keys=lists.keys(),
        layers=lists.layers,
        num_layers=options.num_layers,
        header=[hyperparameters[name] for name in HYPERPARAMETERS],
        device=device,
    )
    coefficients = torch.empty(table.num_tensors * COEFFICIENTS.value, dtype=torch.float32, device=device)
    partials = None
    if options.sq_norms is not None:
        partials = torch.empty(table.num_partials, dtype=torch.float32, device=device)
    launch(
        _prologue_kernel,
        table.num_tensors,
        device,
        threads=1,
        table_ptr=table.data,
        coefficients_ptr=coefficients,
        active_ptr=device_active,
        found_inf_ptr=options.found_inf,
        clip_coef_ptr=options.clip_coef,
        lr_ptr=options.lr if lr_on_device else None,
    )
    for (param_dtype, grad_dtype, state_dtype), start, count in table.runs:
        launch(
            _masked_adamw_kernel,
            count,
            device,
            max_registers=MAX_REGISTERS,
            table_ptr=table.data,
            coefficients_ptr=coefficients,
            partials_ptr=partials,
            grad_scale_ptr=options.grad_scale,
            chunks_start=start,
            PARAM_DTYPE=tl_dtype(param_dtype),
            GRAD_DTYPE=tl_dtype(grad_dtype),
            STATE_DTYPE=tl_dtype(state_dtype),
            AMSGRAD=bool(lists.max_exp_avg_sqs),
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            NARROW_BLOCK=NARROW_BLOCK,
        )
    if options.sq_norms is not None and partials is not None:
        launch_sum_layers(table, partials, options.sq_norms)
