"""Masked AdamW over many tensors, with squared gradient norms by layer as a by-product."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grass_kernels import arguments, layout, reference
from grass_kernels._triton import runs_triton
from grass_kernels.adamw_kernel import Options, TensorLists, launch_masked_adamw


def _masked_adamw_torch(lists: TensorLists, options: Options) -> None:
    """The same without Triton: torch's fused AdamW on the CPU, the reference elsewhere and for AMSGrad.

    torch's wants one dtype and gradients as they are. What is neither goes through it in pieces, by way of
    fp32 copies that fit a cache.
    """
    if options.sq_norms is not None:
        norms = reference.layer_sq_norms(
            lists.grads, lists.layers, options.num_layers, grad_scale=options.grad_scale
        )
        options.sq_norms.copy_(norms)
    if not lists.params or (options.found_inf is not None and bool(options.found_inf != 0)):
        return
    torch._foreach_add_(list(lists.steps), 1)
    as_they_are = options.grad_scale is None and options.clip_coef is None
    whole: dict[torch.dtype, list[list[Tensor]]] = {}  # param, grad, moments, step of each tensor
    for i, dtypes in enumerate(lists.keys()):
        columns = [lists.params[i], lists.grads[i], lists.exp_avgs[i], lists.exp_avg_sqs[i]]
        flat = [layout.flat(t) for t in [*columns, *lists.max_exp_avg_sqs[i : i + 1]]]
        # torch's fused kernel forgets a NaN in the running maximum.
        if flat[0].device.type != "cpu" or lists.max_exp_avg_sqs:
            _update_pieces_by_reference(flat, lists.steps[i], options)
        elif as_they_are and len(set(dtypes)) == 1:
            whole.setdefault(dtypes[0], []).append([*flat, lists.steps[i]])
        else:
            _update_pieces_in_fp32(flat, lists.steps[i], options)
    for tensors in whole.values():
        _fused_adamw(tensors, options)


def _fused_adamw(tensors: Sequence[Sequence[Tensor]], options: Options) -> None:
    """Run torch's fused AdamW on rows of param, grad, exp_avg, exp_avg_sq and step."""
    params, grads, exp_avgs, exp_avg_sqs, steps = map(list, zip(*tensors, strict=True))
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=float(options.lr),
        beta1=options.betas[0],
        beta2=options.betas[1],
        weight_decay=options.weight_decay,
        eps=options.eps,
        amsgrad=False,
        maximize=options.maximize,
    )


def _update_pieces_in_fp32(flat: Sequence[Tensor], step: Tensor, options: Options) -> None:
    for pieces in zip(*(t.split(reference.PIECE) for t in flat), strict=True):
        wide = [piece.float() for piece in pieces]
        if options.grad_scale is not None:
            wide[1] = wide[1] / options.grad_scale
        if options.clip_coef is not None:
            wide[1] = wide[1] * options.clip_coef
        _fused_adamw([[*wide, step]], options)
        for position, (piece, updated) in enumerate(zip(pieces, wide, strict=True)):
            if position != 1 and updated is not piece:
                piece.copy_(updated)


def _update_pieces_by_reference(flat: Sequence[Tensor], step: Tensor, options: Options) -> None:
    c = reference.coefficients(
        step.item(),
        lr=float(options.lr),
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
    )
    factor = (1.0 if options.clip_coef is None else options.clip_coef) * (-1.0 if options.maximize else 1.0)
    for p, g, m, v, *v_max in zip(*(t.split(reference.PIECE) for t in flat), strict=True):
        reference.adamw_(p, g, m, v, v_max[0] if v_max else None, c, options.grad_scale, factor)


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
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip_coef: Tensor | None = None,
) -> None:
    """AdamW on the parameters of the active layers, in place; their gradients' norms on the way.

    For each parameter ``p`` with gradient ``grads[i]`` whose layer is active, with
    ``g = clip_coef * grads[i] / grad_scale`` (negated by `maximize`)::

        t  += 1
        p  *= 1 - lr * weight_decay
        m  += (1 - beta1) * (g - m)
        v   = beta2 * v + (1 - beta2) * g * g
        p  -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    where ``m, v, t`` are `exp_avgs`, `exp_avg_sqs`, `steps`; with `max_exp_avg_sqs` the root is of the
    running maximum of ``v``. Computed in fp32, each result rounded once, when it is stored; ``1 - beta``
    and the corrections by ``beta^t`` in double. Of a layer that is not active nothing changes by one bit,
    counters included.

    Any strides are right. Fast are parameters without gaps (contiguous, channels_last, transposed) whose
    gradients and moments have the same strides, at addresses that are multiples of 16 bytes. Gradients are
    only read. Tensors must not overlap. On a GPU the host waits for nothing.

    Args:
        params: Parameters, fp32, bf16 or fp16, mixed as they come, on one device. Updated.
        grads: Gradients, of the parameter's dtype or fp32 (:func:`is_supported`), shapes as `params`.
        exp_avgs: First moments, fp32 or of the parameter's dtype. Updated.
        exp_avg_sqs: Second moments, of the first's dtype. Updated.
        steps: Updates so far, one float32 tensor of shape ``()`` a parameter, on its device. Advanced by one.
        layer_index: The layer of each parameter, integers in ``[0, num_layers)``; None is all 0.
        active: Which layers to update, ``[num_layers]``; None is all. A sequence of bools or a bool tensor
            on the CPU is known to the host: inactive layers cost nothing. A bool tensor on the
            parameters' device is read there, without waiting for it.
        sq_norms: float32 ``[num_layers]``, overwritten with the squared gradient norm of each active layer,
            of ``grads / grad_scale`` before `clip_coef`; 0 for the others. The same bits as from
            :func:`layer_sq_norms`, if gradients have their parameters' strides.
        lr: Learning rate: a number, or a floating-point tensor of one element.
        betas: Decay rates of the moments, in ``[0, 1)``.
        eps: Added to the denominator, in fp32.
        weight_decay: Decoupled weight decay, in units of `lr`.
        maximize: Ascend instead.
        max_exp_avg_sqs: Running maxima of the second moments, for AMSGrad. Updated.
        grad_scale: Gradients are divided by it: one float32 on their device. None is 1.
        found_inf: One element on the device; if it is not zero, nothing changes but `sq_norms`.
        clip_coef: Gradients are multiplied by it: one float32 on their device. None is 1.

    Raises:
        KernelArgumentError: Lengths, shapes, dtypes or devices that do not fit, an index out of range,
            sparse or complex gradients, expanded parameters. Nothing has been changed then.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019), in torch.optim.AdamW's
    order of operations; there a low-precision parameter needs moments of its own dtype.
    """
    device = arguments.check_adamw_lists(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
    num_layers = arguments.layer_count(layer_index, active, sq_norms)
    layers = arguments.layer_list(layer_index, len(params), num_layers)
    arguments.check_hyperparameters(lr, betas, device)
    arguments.check_sq_norms(sq_norms, device)
    host_active, device_active = arguments.split_mask(active, device)
    options = Options(
        num_layers=num_layers,
        sq_norms=sq_norms,
        lr=lr if isinstance(lr, Tensor) and lr.device == device and device.type != "cpu" else float(lr),
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
        grad_scale=arguments.device_scalar("grad_scale", grad_scale, device),
        found_inf=arguments.device_scalar("found_inf", found_inf, device, dtype=None),
        clip_coef=arguments.device_scalar("clip_coef", clip_coef, device),
    )
    with_triton = runs_triton(device)
    if device_active is not None and not with_triton:
        host_active = device_active.tolist()

    columns: list[Sequence[Tensor]] = [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs or [], steps]
    if host_active is not None:
        kept = [i for i, layer in enumerate(layers) if host_active[layer]]
        columns = [[column[i] for i in kept] if column else [] for column in columns]
        layers = [layers[i] for i in kept]
    of = layout.Layout(columns[0])
    lists = TensorLists(
        of.params,
        of.read(columns[1]),
        of.update(columns[2]),
        of.update(columns[3]),
        of.update(columns[4]) if columns[4] else [],
        columns[5],
        layers,
    )
    if with_triton:
        launch_masked_adamw(lists, options, device, device_active)
    else:
        _masked_adamw_torch(lists, options)
    of.write_back()
    # Autograd sees no write through an address, and torch's fused kernel reports its first list only.
    # Without this, backward through a tensor saved before the call would silently use what stands there now.
    mutated = [*lists.params, *lists.exp_avgs, *lists.exp_avg_sqs, *lists.max_exp_avg_sqs, *lists.steps]
    torch.autograd.graph.increment_version(mutated if sq_norms is None else [*mutated, sq_norms])


def masked_adamw_bytes(
    numel: int,
    param_dtype: torch.dtype,
    *,
    grad_dtype: torch.dtype | None = None,
    state_dtype: torch.dtype = torch.float32,
    amsgrad: bool = False,
) -> int:
    """Bytes :func:`masked_adamw_` must move to update `numel` parameters, norms included.

    Parameter and moments are read and written, the gradient is read. 22 bytes a parameter for bf16 with
    fp32 moments, 28 for fp32.
    """
    moments = 3 if amsgrad else 2
    grad = (grad_dtype or param_dtype).itemsize
    return numel * (2 * param_dtype.itemsize + grad + 2 * moments * state_dtype.itemsize)
