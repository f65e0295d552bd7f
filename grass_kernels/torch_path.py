"""Masked AdamW without Triton: torch's fused AdamW on the CPU, the reference elsewhere and for AMSGrad.

torch's wants one dtype, gradients as they are and parameters in one piece. What is neither goes through it
in pieces, by way of fp32 copies that fit a cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from grass_kernels import layout, reference, rounding
from grass_kernels.plan import TensorLists
from grass_kernels.reference import Tensors


def masked_adamw_torch(
    lists: TensorLists,
    *,
    num_layers: int,
    sq_norms: Tensor | None,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip_coef: Tensor | None,
) -> None:
    """Arguments as of :func:`grass_kernels.masked_adamw_`, checked."""
    if sq_norms is not None:
        sq_norms.copy_(reference.layer_sq_norms(lists.grads, lists.layers, num_layers, grad_scale=grad_scale))
    if not lists.params or (found_inf is not None and bool(found_inf != 0)):
        return
    torch._foreach_add_(list(lists.steps), 1)
    hyper = {"lr": float(lr), "betas": betas, "eps": eps, "weight_decay": weight_decay}
    as_they_are = grad_scale is None and clip_coef is None
    factor = reference.grad_factor(maximize, grad_scale, clip_coef)
    whole: dict[torch.dtype, list[tuple[Tensors, Tensor]]] = {}
    for i, step in enumerate(lists.steps):
        t = _flat(lists, i)
        seed = lists.seeds[i] if t.param.dtype == torch.bfloat16 else None
        # torch's fused kernel forgets a NaN in the running maximum.
        if t.param.device.type != "cpu" or t.max_exp_avg_sq is not None:
            _update_by_reference(t, step, factor, seed, hyper)
        elif as_they_are and seed is None and t.remainder is None and len({x.dtype for x in t[:4]}) == 1:
            whole.setdefault(t.param.dtype, []).append((t, step))
        else:
            _update_in_fp32(t, step, factor, seed, hyper)
    for rows in whole.values():
        _fused_adamw(rows, hyper, maximize)


def _flat(lists: TensorLists, i: int) -> Tensors:
    columns = (
        lists.params,
        lists.grads,
        lists.exp_avgs,
        lists.exp_avg_sqs,
        lists.max_exp_avg_sqs,
        lists.remainders,
    )
    return Tensors(*(None if column[i] is None else layout.flat(column[i]) for column in columns))  # type: ignore


def _fused_adamw(rows: Sequence[tuple[Tensors, Tensor]], hyper: dict, maximize: bool = False) -> None:
    """Run torch's fused AdamW on tensors and their step counters."""
    params, grads, exp_avgs, exp_avg_sqs = (
        list(column) for column in zip(*(t[:4] for t, _ in rows), strict=True)
    )
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [step for _, step in rows],
        lr=hyper["lr"],
        beta1=hyper["betas"][0],
        beta2=hyper["betas"][1],
        weight_decay=hyper["weight_decay"],
        eps=hyper["eps"],
        amsgrad=False,
        maximize=maximize,
    )


def _update_in_fp32(t: Tensors, step: Tensor, factor: Tensor, seed: int | None, hyper: dict) -> None:
    start = 0
    for piece in t.pieces():
        param = (
            piece.param.float()
            if piece.remainder is None
            else rounding.join_fp32(piece.param, piece.remainder)
        )
        wide = Tensors(param, piece.grad.float() * factor, piece.exp_avg.float(), piece.exp_avg_sq.float())
        _fused_adamw([(wide, step)], hyper)
        for stored, updated in ((piece.exp_avg, wide.exp_avg), (piece.exp_avg_sq, wide.exp_avg_sq)):
            if updated is not stored:
                stored.copy_(updated)
        reference.store_param(piece, param, _random(seed, step, start, piece))
        start += len(param)


def _update_by_reference(t: Tensors, step: Tensor, factor: Tensor, seed: int | None, hyper: dict) -> None:
    c = reference.coefficients(step.item(), **hyper)
    start = 0
    for piece in t.pieces():
        reference.adamw_(piece, c, factor, _random(seed, step, start, piece))
        start += len(piece.param)


def _random(seed: int | None, step: Tensor, start: int, piece: Tensors) -> Tensor | None:
    if seed is None:
        return None
    return rounding.random_16_bits(seed, int(step), start, len(piece.param), piece.param.device)
