"""The prologue of a step: increments step counters, and computes the coefficients of each parameter in double.

One program per parameter writes one row of fp32 for the main pass. It also decides by values on the device: whether a
layer is active, whether the step is skipped, and how much gradients are clipped.
"""

# ruff: noqa: N803 - constexpr arguments are in capitals, as everywhere in Triton

from grass_kernels._triton import constexpr, jit, tl
from grass_kernels.inputs import (
    BETA2,
    EPS,
    EXP_AVG_WEIGHT,
    HEADER,
    LOG_BETA1,
    LOG_BETA2,
    LR,
    LR_ADDRESS,
    LR_IS_DOUBLE,
    MAX_GRAD_NORM,
    ONE_MINUS_BETA2,
    SIGN,
    WEIGHT_DECAY,
)
from grass_kernels.sq_norm import tree_sum
from grass_kernels.table import COEFFICIENTS, GROUP, LAYER, ROW, STEP

# Columns of the coefficients of a parameter, fp32.
C_MODE = constexpr(0)
C_DECAY = constexpr(1)
C_EXP_AVG_WEIGHT = constexpr(2)
C_BETA2 = constexpr(3)
C_ONE_MINUS_BETA2 = constexpr(4)
C_STEP_SIZE = constexpr(5)
C_BIAS_CORRECTION2_SQRT = constexpr(6)
C_EPS = constexpr(7)
C_GRAD_FACTOR = constexpr(8)
C_STEP = constexpr(9)

# Modes of a parameter.
SKIP = constexpr(0.0)  # its layer is not active
NORM_ONLY = constexpr(1.0)  # the step is skipped: some gradient is not finite
UPDATE = constexpr(2.0)

CLIP_EPS = constexpr(1e-6)
"""Term added to the norm, as in `torch.nn.utils.clip_grad_norm_`."""


@jit()
def _hyperparameter(header, INDEX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load a double from a header."""
    return tl.load(header + INDEX).to(tl.float64, bitcast=True)


@jit()
def _learning_rate(header):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """Load the learning rate from a header, or from the address in it."""
    lr = _hyperparameter(header, LR)
    address = tl.load(header + LR_ADDRESS)
    if address != 0:
        if tl.load(header + LR_IS_DOUBLE) != 0:
            lr = tl.load(address.to(tl.pointer_type(tl.float64)))
        else:
            lr = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return lr


@jit()
def _total_norm(sq_norms_ptr, num_layers, NORM_BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compute the norm of all layers in double, bitwise the same in every program."""
    sums = tl.zeros((NORM_BLOCK,), dtype=tl.float32)
    for start in range(0, num_layers, NORM_BLOCK):
        index = start + tl.arange(0, NORM_BLOCK)
        sums += tl.load(sq_norms_ptr + index, mask=index < num_layers, other=0.0)
    return tl.sqrt(tree_sum(sums, NORM_BLOCK).to(tl.float64))


@jit(do_not_specialize=("headers_start", "num_layers"))
def _prologue_kernel(  # type: ignore[no-untyped-def]  # Triton types its own arguments
    table_ptr,  # int64, see table.py
    inputs_ptr,  # int64, see inputs.py
    coefficients_ptr,  # output: float32 [tensors, COEFFICIENTS]
    active_ptr,  # bool [num_layers] or None
    found_inf_ptr,  # any type [1] or None
    grad_scale_ptr,  # float32 [1] or None
    clip_coef_ptr,  # float32 [1] or None
    sq_norms_ptr,  # float32 [num_layers] to clip by, or None
    headers_start,  # first word of the headers in the inputs
    num_layers,
    NORM_BLOCK: tl.constexpr,
):
    """Increment the step counter, choose the mode and compute the coefficients of one parameter per program.

    Runs with one warp. With more, one could read the counter after another has incremented it; for the same
    reason the main pass, where many programs share a parameter, does not access counters.
    """
    tensor = tl.program_id(0).to(tl.int64)
    row = table_ptr + tensor * ROW
    header = inputs_ptr + headers_start + tl.load(row + GROUP) * HEADER
    mode = tl.full((), UPDATE, tl.float32)
    # Sign, loss scale and clipping in one factor, rounded once; 1 and -1 are exact.
    grad_factor = _hyperparameter(header, SIGN)
    if grad_scale_ptr is not None:
        grad_factor = grad_factor / tl.load(grad_scale_ptr).to(tl.float64)
    if clip_coef_ptr is not None:
        grad_factor = grad_factor * tl.load(clip_coef_ptr).to(tl.float64)
    if sq_norms_ptr is not None:
        norm = _total_norm(sq_norms_ptr, num_layers, NORM_BLOCK)
        grad_factor = grad_factor * tl.minimum(
            _hyperparameter(header, MAX_GRAD_NORM) / (norm + CLIP_EPS), 1.0
        )
        mode = tl.where(norm < float("inf"), mode, NORM_ONLY)  # false for inf and NaN
    if found_inf_ptr is not None:
        mode = tl.where(tl.load(found_inf_ptr) != 0, NORM_ONLY, mode)
    if active_ptr is not None:
        mode = tl.where(tl.load(active_ptr + tl.load(row + LAYER)) != 0, mode, SKIP)

    step_ptr = tl.load(row + STEP).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr) + 1.0
    tl.store(step_ptr, step, mask=mode == UPDATE)

    lr = _learning_rate(header)
    steps = step.to(tl.float64)
    # beta^steps: with the logarithm in double, the error of the power is about 1e-16.
    bias_correction1 = 1.0 - tl.exp(steps * _hyperparameter(header, LOG_BETA1))
    bias_correction2 = 1.0 - tl.exp(steps * _hyperparameter(header, LOG_BETA2))

    out = coefficients_ptr + tensor * COEFFICIENTS
    tl.store(out + C_MODE, mode)
    tl.store(out + C_DECAY, (1.0 - lr * _hyperparameter(header, WEIGHT_DECAY)).to(tl.float32))
    tl.store(out + C_EXP_AVG_WEIGHT, _hyperparameter(header, EXP_AVG_WEIGHT).to(tl.float32))
    tl.store(out + C_BETA2, _hyperparameter(header, BETA2).to(tl.float32))
    tl.store(out + C_ONE_MINUS_BETA2, _hyperparameter(header, ONE_MINUS_BETA2).to(tl.float32))
    tl.store(out + C_STEP_SIZE, (lr / bias_correction1).to(tl.float32))
    tl.store(out + C_BIAS_CORRECTION2_SQRT, tl.sqrt(bias_correction2).to(tl.float32))
    tl.store(out + C_EPS, _hyperparameter(header, EPS).to(tl.float32))
    tl.store(out + C_GRAD_FACTOR, grad_factor.to(tl.float32))
    tl.store(out + C_STEP, step)
