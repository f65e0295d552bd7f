"""AdamW in float64, AdamW as plain torch does it, and the distance between results in units in the last place."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# Parameter, gradient, moments: every combination the kernels take.
COMBINATIONS = [
    (F32, F32, F32),
    (F32, F32, BF16),
    (BF16, BF16, F32),
    (BF16, BF16, BF16),
    (BF16, F32, F32),
    (BF16, F32, BF16),
    (F16, F16, F32),
    (F16, F16, BF16),
    (F16, F32, F32),
    (F16, F32, BF16),
]


def name(dtypes: tuple[torch.dtype, ...]) -> str:
    return "-".join({F32: "fp32", BF16: "bf16", F16: "fp16"}[d] for d in dtypes)


class State(NamedTuple):
    """One parameter and what belongs to it."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    step: Tensor


def exact(
    s: State,
    grad: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: float = 1.0,
    clip_coef: float = 1.0,
) -> State:
    """The update in float64, from the formula of the paper."""
    g = grad.double() / grad_scale * clip_coef * (-1 if maximize else 1)
    step = s.step.double() + 1
    p = s.param.double() - lr * weight_decay * s.param.double()
    m = betas[0] * s.exp_avg.double() + (1 - betas[0]) * g
    v = betas[1] * s.exp_avg_sq.double() + (1 - betas[1]) * g * g
    v_max = None if s.max_exp_avg_sq is None else torch.maximum(s.max_exp_avg_sq.double(), v)
    root = ((v if v_max is None else v_max) / (1 - betas[1] ** step)).sqrt()
    return State(p - lr * (m / (1 - betas[0] ** step)) / (root + eps), m, v, v_max, step)


def plain_torch(
    s: State,
    grad: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: float = 1.0,
    clip_coef: float = 1.0,
) -> State:
    """torch's own loop in fp32, its results rounded to the dtypes they are stored in."""
    p, m, v = s.param.float().clone(), s.exp_avg.float().clone(), s.exp_avg_sq.float().clone()
    v_max = None if s.max_exp_avg_sq is None else s.max_exp_avg_sq.float().clone()
    g, step = grad.float() / grad_scale * clip_coef, s.step.clone()
    adamw(
        [p], [g], [m], [v], [] if v_max is None else [v_max], [step], foreach=False, fused=False,
        amsgrad=v_max is not None, beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=weight_decay,
        eps=eps, maximize=maximize,
    )  # fmt: skip
    rounded = [p.to(s.param.dtype), m.to(s.exp_avg.dtype), v.to(s.exp_avg_sq.dtype)]
    return State(*rounded, None if v_max is None else v_max.to(s.max_exp_avg_sq.dtype), step)


def worst_ulps(result: Tensor, exact_result: Tensor, before: Tensor) -> float:
    """Largest error in units in the last place of the larger of old and new value."""
    if result.numel() == 0:
        return 0.0
    info = torch.finfo(result.dtype)
    scale = torch.maximum(exact_result.abs(), before.double().abs()).clamp_min(info.tiny)
    ulp = torch.exp2(torch.floor(torch.log2(scale))) * info.eps
    return float(((result.double() - exact_result).abs() / ulp).max())
