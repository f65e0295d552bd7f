"""The mathematics in plain torch: what the kernels must equal.

Every function here has its kernel's signature and its order of operations, one rounding an operation, all
in fp32. In Triton's interpreter the kernels give the same bits. Nothing here is fast, except
:func:`chunk_sq_norms` and :func:`adamw_`, which also serve the CPU and work in pieces that fit a cache.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grass_kernels import arguments, layout
from grass_kernels.table import BLOCK, CHUNK, LAYER_BLOCK

PIECE = 8 * CHUNK
"""Elements worked on at a time: half a MiB of fp32. No full-size copy of a bf16 gradient is ever made."""


def tree_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, a power of two: neighbours first, then neighbouring pairs, and so on."""
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def _add_rows(x: Tensor, width: int) -> Tensor:
    """Cut the last dimension into rows of `width`, padded with zeros, and add them from the first on."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % width)).unflatten(-1, (-1, width))
    total = x[..., 0, :]
    for row in range(1, x.shape[-2]):
        total = total + x[..., row, :]
    return total


def chunk_sq_norms(grad: Tensor, grad_scale: Tensor | None = None) -> Tensor:
    """Sums of squares of the chunks of one gradient in storage order: float32 ``[chunks]``."""
    grad = layout.flat(grad if layout.is_dense(grad) else grad.contiguous())
    sums = [torch.empty(0, dtype=torch.float32, device=grad.device)]
    for piece in grad.split(PIECE):
        x = piece.float()
        if grad_scale is not None:
            x = x / grad_scale
        x = x * x
        if x.numel() % CHUNK:
            x = torch.nn.functional.pad(x, (0, -x.numel() % CHUNK))
        sums.append(tree_sum(_add_rows(x.view(-1, CHUNK), BLOCK)))
    return torch.cat(sums)


def layer_sq_norms(
    grads: Sequence[Tensor],
    layer_index: Sequence[int] | Tensor,
    num_layers: int,
    *,
    grad_scale: Tensor | None = None,
) -> Tensor:
    """Squared norms by layer: see :func:`grass_kernels.layer_sq_norms`."""
    layers = arguments.layer_list(layer_index, len(grads), num_layers)
    partials: dict[int, list[Tensor]] = {}
    for grad, layer in zip(grads, layers, strict=True):
        partials.setdefault(layer, []).append(chunk_sq_norms(grad, grad_scale))
    device = grads[0].device if grads else torch.device("cpu")
    sq_norms = torch.zeros(num_layers, dtype=torch.float32, device=device)
    for layer, sums in partials.items():
        of_layer = torch.cat(sums)
        if of_layer.numel():
            sq_norms[layer] = tree_sum(_add_rows(of_layer, LAYER_BLOCK))
    return sq_norms


class Coefficients(NamedTuple):
    """What the update of one parameter multiplies with: computed in double, rounded to fp32 once."""

    decay: float  # 1 - lr * weight_decay
    exp_avg_weight: float  # of the gradient in the first moment, see `adamw_`
    beta2: float
    one_minus_beta2: float
    step_size: float  # lr / (1 - beta1^step)
    bias_correction2_sqrt: float  # sqrt(1 - beta2^step)
    eps: float


def exp_avg_weight(beta1: float) -> float:
    """``1 - beta1``, or ``-beta1`` below one half: `lerp` starts from the end it is nearer to.

    With ``m + (1 - beta1)(g - m)`` and a small `beta1` the gradient would lose its low bits in a large old
    moment that is about to be forgotten. `torch.lerp` does the same.
    """
    return 1 - beta1 if 1 - beta1 < 0.5 else -beta1


def coefficients(
    step: float, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> Coefficients:
    """The coefficients of the `step`-th update, counted from 1, in double precision."""
    beta1, beta2 = betas
    return Coefficients(
        decay=1 - lr * weight_decay,
        exp_avg_weight=exp_avg_weight(beta1),
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        step_size=lr / (1 - beta1**step),
        bias_correction2_sqrt=math.sqrt(1 - beta2**step),
        eps=eps,
    )


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    c: Coefficients,
    grad_scale: Tensor | None = None,
    grad_factor: Tensor | float = 1.0,
) -> None:
    """One AdamW update in place, element by element, in fp32, each result rounded once when it is stored."""
    g = grad.float()
    if grad_scale is not None:
        g = g / grad_scale
    g = g * grad_factor
    p = param.float() * _fp32(c.decay)
    m, v = exp_avg.float(), exp_avg_sq.float()
    start = g if c.exp_avg_weight <= 0 else m
    m = start + (g - m) * _fp32(c.exp_avg_weight)
    v = v * _fp32(c.beta2) + _fp32(c.one_minus_beta2) * g * g
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    if max_exp_avg_sq is not None:
        v = torch.maximum(max_exp_avg_sq.float(), v)
        max_exp_avg_sq.copy_(v)
    denominator = _sqrt(v) / _fp32(c.bias_correction2_sqrt) + _fp32(c.eps)
    param.copy_(p - _fp32(c.step_size) * m / denominator)


def _sqrt(x: Tensor) -> Tensor:
    """The square root rounded to the nearest fp32. torch's own is, on some CPUs, one bit off at times."""
    return x.double().sqrt().float()


def _fp32(x: float) -> Tensor:
    """`x` as a scalar tensor, which goes with any device, so that torch does not compute with the double."""
    return torch.tensor(x, dtype=torch.float32, device="cpu")


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
    """Masked AdamW: see :func:`grass_kernels.masked_adamw_`."""
    layers = [0] * len(params) if layer_index is None else [int(i) for i in layer_index]
    mask = None if active is None else [bool(a) for a in active]
    indices = [i for i, layer in enumerate(layers) if mask is None or mask[layer]]
    if sq_norms is not None:
        of_active = [grads[i] for i in indices]
        sq_norms.copy_(
            layer_sq_norms(of_active, [layers[i] for i in indices], sq_norms.numel(), grad_scale=grad_scale)
        )
    if found_inf is not None and bool(found_inf != 0):
        return
    grad_factor = (1.0 if clip_coef is None else clip_coef) * (-1.0 if maximize else 1.0)
    for i in indices:
        steps[i].add_(1)
        c = coefficients(steps[i].item(), lr=float(lr), betas=betas, eps=eps, weight_decay=weight_decay)
        max_exp_avg_sq = None if max_exp_avg_sqs is None else max_exp_avg_sqs[i]
        adamw_(params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], max_exp_avg_sq, c, grad_scale, grad_factor)
