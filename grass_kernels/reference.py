"""The operations in plain torch: the specification of the kernels.

Every function has the signature and the order of operations of its kernel, in fp32 with one rounding per operation. In
Triton's interpreter the kernels are bitwise equal. Only :func:`adamw_` is fast: it is also used on the CPU, in pieces
that fit a cache.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from grass_kernels import arguments, layout, rounding
from grass_kernels.table import BLOCK, CHUNK, LAYER_BLOCK

NORM_BLOCK = 1024
"""Block size of the sum of squared norms over layers."""
PIECE = 8 * CHUNK
"""Elements per piece: half a MiB of fp32. bf16 gradients are never copied as a whole."""


def tree_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, a power of two: first neighbours, then neighbouring pairs, and so on."""
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def _add_rows(x: Tensor, width: int) -> Tensor:
    """Split the last dimension into rows of `width`, padded with zeros, and add them in order."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % width)).unflatten(-1, (-1, width))
    if x.shape[-2] == 1:
        return x[..., 0, :]
    total = x[..., 0, :] + x[..., 1, :]
    for row in range(2, x.shape[-2]):
        total.add_(x[..., row, :])
    return total


def chunk_sq_norms(grad: Tensor) -> Tensor:
    """Return the sums of squares of the chunks of a gradient, in storage order: float32 ``[chunks]``."""
    grad = layout.flat(grad if layout.is_dense(grad) else grad.contiguous())
    sums = [torch.empty(0, dtype=torch.float32, device=grad.device)]
    for piece in grad.split(PIECE) if grad.numel() else ():
        x = piece.float()
        x = torch.nn.functional.pad(x * x, (0, -len(x) % CHUNK))  # zeros change no sum
        sums.append(tree_sum(_add_rows(x.view(-1, CHUNK), BLOCK)))
    return torch.cat(sums)


def layer_sq_norms(
    grads: Sequence[Tensor],
    layer_index: Sequence[int] | Tensor,
    num_layers: int,
    *,
    grad_scale: Tensor | None = None,
) -> Tensor:
    """Compute squared norms by layer: see :func:`grass_kernels.layer_sq_norms`."""
    layers = arguments.layer_list(layer_index, len(grads), num_layers)
    partials: dict[int, list[Tensor]] = {}
    for grad, layer in zip(grads, layers, strict=True):
        partials.setdefault(layer, []).append(chunk_sq_norms(grad))
    device = grads[0].device if grads else torch.device("cpu")
    sq_norms = torch.zeros(num_layers, dtype=torch.float32, device=device)
    for layer, sums in partials.items():
        of_layer = torch.cat(sums)
        if of_layer.numel():
            sq_norms[layer] = tree_sum(_add_rows(of_layer, LAYER_BLOCK))
    if grad_scale is not None:
        inverse = 1 / grad_scale
        sq_norms = sq_norms * inverse * inverse
    return sq_norms


class Coefficients(NamedTuple):
    """Coefficients of the update of one parameter: computed in double, rounded to fp32 once."""

    decay: float  # 1 - lr * weight_decay
    exp_avg_weight: float  # see `exp_avg_weight` and `adamw_`
    beta2: float
    one_minus_beta2: float
    step_size: float  # lr / (1 - beta1^step)
    bias_correction2_sqrt: float  # sqrt(1 - beta2^step)
    eps: float


def exp_avg_weight(beta1: float) -> float:
    """Return ``1 - beta1``, or ``-beta1`` for `beta1` up to one half: `lerp` starts from the nearer end.

    With ``m + (1 - beta1)(g - m)`` and a small `beta1` the low bits of the gradient would be lost in a large old
    moment. `torch.lerp` does the same.
    """
    return 1 - beta1 if 1 - beta1 < 0.5 else -beta1


def coefficients(
    step: float, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> Coefficients:
    """Compute the coefficients of update number `step`, counted from 1, in double."""
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


class Tensors(NamedTuple):
    """One parameter, its gradient and states as flat arrays, or the same range of all."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None = None
    remainder: Tensor | None = None  # int16, with master weights

    def pieces(self) -> Iterator["Tensors"]:
        """Iterate over ranges of at most `PIECE` elements, which fit a cache."""
        if self.param.numel() <= PIECE:
            return iter([self])
        columns = [repeat(None) if t is None else t.split(PIECE) for t in self]
        return (Tensors(*row) for row in zip(*columns, strict=False))  # columns of None are endless


def grad_factor(maximize: bool, grad_scale: Tensor | None, clip_coef: Tensor | None) -> Tensor:
    """Return the factor of the gradients, an fp32 scalar: sign, loss scale and clipping, rounded once."""
    factor = torch.tensor(-1.0 if maximize else 1.0, dtype=torch.float64, device="cpu")
    if grad_scale is not None:
        factor = factor.to(grad_scale.device) / grad_scale.double()
    if clip_coef is not None:
        factor = factor.to(clip_coef.device) * clip_coef.double()
    return factor.float().squeeze()


def clip_coefficient(sq_norms: Tensor, max_grad_norm: float) -> tuple[Tensor, Tensor]:
    """Compute the coefficient that clips the norm of gradients to `max_grad_norm`.

    ``min(1, max_grad_norm / (sqrt(sum(sq_norms)) + 1e-6))``, as in `torch.nn.utils.clip_grad_norm_`.

    Args:
        sq_norms: Squared norms by layer of all gradients, float32 ``[num_layers]``.
        max_grad_norm: Maximum norm.

    Returns:
        The coefficient, float64; and whether the norm is not finite, so that the step must be skipped, bool. Both
        have shape ``()`` and are on the device of `sq_norms`.
    """
    norm = (
        tree_sum(_add_rows(sq_norms, NORM_BLOCK)).double().sqrt()
        if sq_norms.numel()
        else sq_norms.sum().double()
    )
    return (max_grad_norm / (norm + 1e-6)).clamp(max=1.0), ~torch.isfinite(norm)


def adamw_(t: Tensors, c: Coefficients, grad_factor: Tensor, random: Tensor | None = None) -> None:
    """Perform one AdamW update in place, in fp32; each result is rounded once, when it is stored.

    Args:
        t: Parameter, gradient and states, 1-D of equal length.
        c: Coefficients of the step.
        grad_factor: Factor of the gradient, fp32 scalar.
        random: 16 random bits per element, int64, for stochastic rounding of a bf16 parameter.
    """
    g = t.grad.float() * grad_factor.to(t.grad.device)
    p = (t.param.float() if t.remainder is None else rounding.join_fp32(t.param, t.remainder)) * _fp32(
        c.decay
    )
    m, v = t.exp_avg.float(), t.exp_avg_sq.float()
    start = g if c.exp_avg_weight <= 0 else m
    m = start + (g - m) * _fp32(c.exp_avg_weight)
    v = v * _fp32(c.beta2) + _fp32(c.one_minus_beta2) * g * g
    t.exp_avg.copy_(m)
    t.exp_avg_sq.copy_(v)
    if t.max_exp_avg_sq is not None:
        v = torch.maximum(t.max_exp_avg_sq.float(), v)
        t.max_exp_avg_sq.copy_(v)
    denominator = _sqrt(v) / _fp32(c.bias_correction2_sqrt) + _fp32(c.eps)
    store_param(t, p - _fp32(c.step_size) * m / denominator, random)


def store_param(t: Tensors, value: Tensor, random: Tensor | None = None) -> None:
    """Store the fp32 value of a parameter: with a remainder, stochastically or rounded to nearest."""
    if t.remainder is not None:
        param, remainder = rounding.split_fp32(value)
        t.param.copy_(param)
        t.remainder.copy_(remainder)
    elif random is not None:
        t.param.copy_(rounding.round_stochastically(value, random))
    else:
        t.param.copy_(value)


def _sqrt(x: Tensor) -> Tensor:
    """Return the square root, rounded to nearest fp32. `torch.sqrt` is sometimes one bit off on some CPUs."""
    return x.double().sqrt().float()


def _fp32(x: float) -> Tensor:
    """Return `x` as an fp32 scalar tensor, valid for any device, so that torch does not compute in double."""
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
    remainders: Sequence[Tensor | None] | None = None,
    rounding_seeds: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip_coef: Tensor | None = None,
) -> None:
    """Compute masked AdamW: see :func:`grass_kernels.masked_adamw_`."""
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
    factor = grad_factor(maximize, grad_scale, clip_coef)
    for i in indices:
        steps[i].add_(1)
        step = steps[i].item()
        c = coefficients(step, lr=float(lr), betas=betas, eps=eps, weight_decay=weight_decay)
        t = Tensors(
            params[i],
            grads[i],
            exp_avgs[i],
            exp_avg_sqs[i],
            None if max_exp_avg_sqs is None else max_exp_avg_sqs[i],
            None if remainders is None else remainders[i],
        )
        random = None
        if rounding_seeds is not None and params[i].dtype == torch.bfloat16:
            flat = params[i].view(-1)
            random = rounding.random_16_bits(rounding_seeds[i], int(step), 0, flat.numel(), flat.device)
            random = random.view(params[i].shape)
        adamw_(t, c, factor, random)
