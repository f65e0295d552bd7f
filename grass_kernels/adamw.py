"""Masked AdamW over many tensors, together with squared gradient norms by layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grass_kernels import _triton, arguments, layout, operators
from grass_kernels.inputs import Hyperparameters, split_lr
from grass_kernels.plan import AdamWPlan, TensorLists, Unit
from grass_kernels.torch_plan import TorchPlan


def make_plan(
    lists: TensorLists,
    num_layers: int,
    device: torch.device,
    groups: Sequence[int] | None = None,
    num_groups: int = 1,
    capturable: bool = False,
    units: Sequence[Unit] | None = None,
) -> AdamWPlan | TorchPlan:
    """Return the plan of a step: Triton's where it runs, otherwise torch's. The arguments are those of `AdamWPlan`."""
    if _triton.runs_triton(device) and not operators.is_needed(lists.params):
        return AdamWPlan(lists, num_layers, device, groups, num_groups, capturable, units)
    return TorchPlan(lists, num_layers, device, groups, units)


@torch.no_grad()
def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    layer_index: Sequence[int] | Tensor | None = None,
    active: Sequence[bool] | Tensor | None = None,
    sq_norms: Tensor | None = None,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    max_exp_avg_sqs: Sequence[Tensor] | None = None,
    remainders: Sequence[Tensor | None] | None = None,
    rounding_seeds: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip_coef: Tensor | None = None,
) -> None:
    """Update the parameters of active layers by AdamW, in place, and compute the norms of their gradients.

    For each parameter ``p`` with gradient ``grads[i]`` whose layer is active, with
    ``g = clip_coef * grads[i] / grad_scale`` (negated by `maximize`)::

        t  += 1
        p  *= 1 - lr * weight_decay
        m  += (1 - beta1) * (g - m)
        v   = beta2 * v + (1 - beta2) * g * g
        p  -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    where ``m, v, t`` are `exp_avgs`, `exp_avg_sqs`, `steps`; with `max_exp_avg_sqs` the root is of the
    running maximum of ``v``. Computed in fp32, and each result is rounded once, when it is stored; ``1 - beta``,
    the bias corrections and the factor of the gradients are computed in double. Layers that are not active are
    bitwise unchanged, step counters included.

    All strides are supported. Fast are parameters without gaps (contiguous, channels_last, transposed) whose
    gradients and moments have the same strides, at addresses that are multiples of 16 bytes. Gradients are
    only read. Tensors must not overlap. On a GPU there is no device sync.

    Args:
        params: Parameters, fp32, bf16 or fp16 in any mixture, on one device. Updated.
        grads: Gradients, of the parameter's dtype or fp32 (:func:`is_supported`), of the shapes of `params`.
        exp_avgs: First moments, fp32 or bf16. Updated.
        exp_avg_sqs: Second moments, of the same dtype as the first. Updated.
        steps: Step counters, one float32 tensor of shape ``()`` per parameter, on its device. Incremented.
        layer_index: The layer of each parameter, integers in ``[0, num_layers)``; None is all 0. Without `active`
            and `sq_norms` layers have no effect, and any index of at least 0 is valid.
        active: Mask of the layers to update, ``[num_layers]``; None is all. Its length, or that of `sq_norms`, is the
            number of layers; a layer may have no parameters. With a sequence of bools or a bool tensor on the
            CPU inactive layers cost nothing. A bool tensor on the parameters' device is read there, without a
            device sync.
        sq_norms: float32 ``[num_layers]``, overwritten with the squared gradient norm of each active layer,
            of ``grads / grad_scale`` before `clip_coef`; 0 for the others. Bitwise equal to
            :func:`layer_sq_norms`, if gradients have their parameters' strides.
        lr: Learning rate: a number, or a floating-point tensor of one element.
        betas: Decay rates of the moments, in ``[0, 1)``.
        eps: Term added to the denominator, in fp32.
        weight_decay: Decoupled weight decay, multiplied by `lr`.
        maximize: Maximize the objective instead of minimizing it.
        max_exp_avg_sqs: Running maxima of the second moments, for AMSGrad. Updated.
        remainders: Remainders of master weights, int16 tensors of the shapes of their bf16 parameters: a parameter
            is the nearest bf16 of an fp32 value, its remainder is the difference, and the update is bitwise that
            of fp32. Initially zeros. None, or None for a parameter: no master weights. Updated.
        rounding_seeds: Integers in ``[0, 2^63)``, one per parameter, for stochastic rounding of bf16 parameters,
            which is unbiased. Random bits depend only on seed, step and position in the tensor.
        grad_scale: Divisor of the gradients, one float32 on their device. None is 1.
        found_inf: One element on the device; if it is not zero, the update is skipped, and only `sq_norms` is written.
        clip_coef: Factor of the gradients, one float32 on their device. None is 1.

    Raises:
        KernelArgumentError: Lengths, shapes, dtypes or devices that do not match, an index out of range,
            sparse or complex gradients, parameters or states whose elements overlap, tensors without memory of
            their own (DTensor). Nothing has been changed then.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019), in the order of operations of
    `torch.optim.AdamW`, where moments of a low-precision parameter have its dtype.
    """
    if operators.is_needed(params):
        options = {
            "layer_index": layer_index, "active": active, "sq_norms": sq_norms, "lr": lr, "betas": betas, "eps": eps,
            "weight_decay": weight_decay, "maximize": maximize, "max_exp_avg_sqs": max_exp_avg_sqs,
            "remainders": remainders, "rounding_seeds": rounding_seeds, "grad_scale": grad_scale,
            "found_inf": found_inf, "clip_coef": clip_coef,
        }  # fmt: skip
        torch.ops.grass_kernels.masked_adamw_(
            params, grads, exp_avgs, exp_avg_sqs, steps, **operators.pack(options)
        )
        return
    device = arguments.check_adamw_lists(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, remainders, rounding_seeds
    )
    arguments.check_sq_norms(sq_norms, device)
    host_active, device_active = arguments.split_mask(active, device)
    found_layers = arguments.layer_count(active, sq_norms)
    layers = arguments.layer_list(layer_index, len(params), found_layers)
    num_layers = 1 if found_layers is None else found_layers
    arguments.check_hyperparameters(lr, betas, eps, weight_decay, device)
    arguments.check_flag("maximize", maximize)
    lr = lr.resolve_neg() if isinstance(lr, Tensor) else float(lr)
    betas, eps, weight_decay = (float(betas[0]), float(betas[1])), float(eps), float(weight_decay)
    grad_scale = arguments.device_scalar("grad_scale", grad_scale, device)
    found_inf = arguments.device_scalar("found_inf", found_inf, device, dtype=None)
    clip_coef = arguments.device_scalar("clip_coef", clip_coef, device)
    if device_active is not None and not _triton.runs_triton(device):
        host_active, device_active = device_active.tolist(), None

    columns: list[Sequence] = [params, grads, exp_avgs, exp_avg_sqs, steps, layers]
    columns += [column or [None] * len(params) for column in (max_exp_avg_sqs, remainders, rounding_seeds)]
    if host_active is not None:
        kept = [i for i, layer in enumerate(layers) if host_active[layer]]
        columns = [[column[i] for i in kept] for column in columns]
    params, grads, exp_avgs, exp_avg_sqs, steps, kept_layers, maxima, remainders, seeds = columns
    common = layout.Layout(params)
    lists = TensorLists(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        maxima,
        remainders,
        steps,
        kept_layers,
        seeds,
    ).in_layout(common)
    plan = make_plan(lists, num_layers, device)
    plan.upload(lists, [Hyperparameters(*split_lr(lr, device), betas, eps, weight_decay, maximize)])
    plan.begin(
        norms=sq_norms is not None,
        active=device_active,
        grad_scale=grad_scale,
        found_inf=found_inf,
        clip_coef=clip_coef,
    )
    plan.run()
    plan.finish(sq_norms, grad_scale)
    common.write_back()
    # Autograd does not see writes by address, and torch's fused kernel reports its first list only. Without this,
    # backward through a tensor saved before the call would silently use the new values.
    optional = [t for t in (*lists.max_exp_avg_sqs, *lists.remainders, sq_norms) if t is not None]
    torch.autograd.graph.increment_version(
        [*lists.params, *lists.exp_avgs, *lists.exp_avg_sqs, *lists.steps, *optional]
    )


def masked_adamw_bytes(
    numel: int,
    param_dtype: torch.dtype,
    *,
    grad_dtype: torch.dtype | None = None,
    state_dtype: torch.dtype = torch.float32,
    amsgrad: bool = False,
    remainders: bool = False,
) -> int:
    """Return the bytes that :func:`masked_adamw_` must move to update `numel` parameters, including norms.

    Parameter, moments and remainders are read and written, the gradient is read. 22 bytes a parameter for
    bf16 with fp32 moments, 26 with remainders, 28 for fp32.
    """
    moments = 3 if amsgrad else 2
    grad = (grad_dtype or param_dtype).itemsize
    param = param_dtype.itemsize + (2 if remainders else 0)
    return numel * (2 * param + grad + 2 * moments * state_dtype.itemsize)
