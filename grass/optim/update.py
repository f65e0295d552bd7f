"""Update: one step of AdamW on parameters that have been divided, each by its way."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

import grass_kernels
from grass.offload.pipeline import Pipeline
from grass.optim.in_units import Scales, run_units
from grass.optim.work import Row, Work, kernel_lr
from grass_kernels import layout, reference


class Scaler(NamedTuple):
    """What a GradScaler leaves for the step; on a device, or None."""

    grad_scale: Tensor | None
    found_inf: Tensor | None


def update(
    work: Work,
    groups: Sequence[dict[str, Any]],
    state: dict[Tensor, dict[str, Any]],
    scaler: Scaler,
    pipeline: Pipeline | None = None,
) -> tuple[Tensor, list[object]]:
    """Update all rows. The host waits for nothing, unless torch's functional AdamW does.

    Args:
        work: the rows and their ways, as they are now.
        groups: the optimizer's.
        state: the optimizer's.
        scaler: the GradScaler's part.
        pipeline: if states live in a store: what brings them to the device.

    Returns:
        float32 [layers], the squared norms of the gradients by layer; and, if the step was captured in a graph,
        what must live as long as that.
    """
    if pipeline is not None:
        with pipeline.updating():
            return _update_in_units(work, groups, state, scaler, pipeline), []
    kept = [
        planned.plan.upload(planned.of_bytes(work.grads), work.hyperparameters) for planned in work.planned
    ]
    kept = [entry for entry in kept if entry is not None]
    measured = None
    if work.options.max_grad_norm is not None:
        measured = _measure(work, scaler.grad_scale)
    sq_norms = measured
    for planned in work.planned:
        device = planned.plan.device
        planned.plan.update(
            planned.sq_norms if measured is None else None,
            clip_by=_to(measured, device),
            grad_scale=_to(scaler.grad_scale, device),
            found_inf=_to(scaler.found_inf, device),
        )
        if measured is None:
            sq_norms = _plus(sq_norms, planned.sq_norms)
    if work.by_function or work.by_torch:
        others = _update_others(work, groups, state, scaler, measured)
        sq_norms = measured if others is None else _plus(sq_norms, others)
    assert sq_norms is not None
    return sq_norms, kept


@torch.no_grad()
def _measure(work: Work, grad_scale: Tensor | None) -> Tensor:
    """Squared norms of all rows by layer, in a pass that only reads gradients."""
    total: Tensor | None = None
    for planned in work.planned:
        planned.plan.measure(planned.sq_norms, _to(grad_scale, planned.plan.device))
        total = _plus(total, planned.sq_norms)
    for (_, device), rows in work.by_function.items():
        norms = grass_kernels.layer_sq_norms(
            [row.param.grad for row in rows],  # type: ignore[misc]
            [row.layer for row in rows],
            work.num_layers,
            grad_scale=_to(grad_scale, device),
        )
        total = _plus(total, norms)
    for rows in work.by_torch.values():
        total = _plus(total, _sq_norms_of(rows, work.num_layers))
    assert total is not None
    return total


def _update_others(
    work: Work,
    groups: Sequence[dict[str, Any]],
    state: dict[Tensor, dict[str, Any]],
    scaler: Scaler,
    measured: Tensor | None,
) -> Tensor | None:
    """Update what no plan does. Returns its squared norms by layer, unless they are in `measured`."""
    grad_scale, found_inf = scaler
    clip_coef, skip = _clip(work, measured, found_inf)
    found_inf = found_inf if measured is None else skip
    total: Tensor | None = None
    for (index, device), rows in work.by_function.items():
        norms = None
        if measured is None:
            norms = torch.empty(work.num_layers, dtype=torch.float32, device=device)
        _update_by_function(
            work,
            groups[index],
            rows,
            [state[row.param] for row in rows],
            norms,
            grad_scale=_to(grad_scale, device),
            found_inf=_to(found_inf, device),
            clip_coef=_to(clip_coef, device),
        )
        if norms is not None:
            total = _plus(total, norms)
    others = _update_by_torch_all(work, groups, state, measured, clip_coef, skip)
    return total if others is None else _plus(total, others)


def _update_by_torch_all(
    work: Work,
    groups: Sequence[dict[str, Any]],
    state: dict[Tensor, dict[str, Any]],
    measured: Tensor | None,
    clip_coef: Tensor | None,
    skip: Tensor | None,
) -> Tensor | None:
    """Update what only torch's functional AdamW can. Returns its squared norms by layer, unless in `measured`."""
    total: Tensor | None = None
    for index, rows in work.by_torch.items():
        if measured is None:
            total = _plus(total, _sq_norms_of(rows, work.num_layers))
        elif bool(skip):  # torch's functional AdamW decides on the host
            continue
        params = [row.param for row in rows]
        _update_by_torch(groups[index], params, [state[p] for p in params], clip_coef)
    return total


def _clip(
    work: Work, measured: Tensor | None, found_inf: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What gradients are multiplied with to be clipped, and whether the step is skipped."""
    if measured is None:
        return None, found_inf
    assert work.options.max_grad_norm is not None
    clip_coef, skip = reference.clip_coefficient(measured, work.options.max_grad_norm)
    if found_inf is not None:
        skip = skip | found_inf.to(skip.device).squeeze().bool()
    return clip_coef.float(), skip


def _update_in_units(
    work: Work,
    groups: Sequence[dict[str, Any]],
    state: dict[Tensor, dict[str, Any]],
    scaler: Scaler,
    pipeline: Pipeline,
) -> Tensor:
    """`update` of states that live in a store; what torch updates has its states beside it."""
    for planned in work.planned:
        planned.plan.upload(planned.of_bytes(work.grads), work.hyperparameters)
    measured = None if work.options.max_grad_norm is None else _measure(work, scaler.grad_scale)
    rest = []
    for (_, device), rows in work.by_function.items() if measured is None else ():
        norms = grass_kernels.layer_sq_norms(
            layout.Layout([row.param for row in rows]).read([row.param.grad for row in rows]),  # type: ignore[misc]
            [row.layer for row in rows],
            work.num_layers,
            grad_scale=_to(scaler.grad_scale, device),
        )
        rest.append(norms)
    clip_coef, skip = _clip(work, measured, scaler.found_inf)
    scales = Scales(scaler.grad_scale, scaler.found_inf, measured, clip_coef, skip)
    run_units(work, pipeline, groups, state, scales, norms=measured is None)
    sq_norms = measured
    if measured is None:  # added up in the order of `update`, for the same bits
        for planned in work.planned:
            planned.plan.finish(planned.sq_norms, scaler.grad_scale)
            sq_norms = _plus(sq_norms, planned.sq_norms)
        for norms in rest:
            sq_norms = _plus(sq_norms, norms)
    if work.by_torch:
        others = _update_by_torch_all(work, groups, state, measured, clip_coef, skip)
        sq_norms = measured if others is None else _plus(sq_norms, others)
    assert sq_norms is not None
    return sq_norms


def _update_by_function(
    work: Work,
    group: dict[str, Any],
    rows: list[Row],
    states: list[dict[str, Any]],
    sq_norms: Tensor | None,
    **scales: Tensor | None,
) -> None:
    beta1, beta2 = group["betas"]
    grass_kernels.masked_adamw_(
        [row.param for row in rows],
        [row.param.grad for row in rows],  # type: ignore[misc]
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [s["step"] for s in states],
        layer_index=None if sq_norms is None else [row.layer for row in rows],
        sq_norms=sq_norms,
        lr=kernel_lr(group["lr"], rows[0].param.device),
        betas=(float(beta1), float(beta2)),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        maximize=bool(group["maximize"]),
        max_exp_avg_sqs=[s["max_exp_avg_sq"] for s in states] if group["amsgrad"] else None,
        remainders=[s.get("remainder") for s in states] if work.options.master_weights else None,
        rounding_seeds=[row.seed for row in rows] if work.options.stochastic_rounding else None,
        **scales,
    )


def _update_by_torch(
    group: dict[str, Any], params: list[Tensor], states: list[dict[str, Any]], clip_coef: Tensor | None
) -> None:
    grads = [p.grad.resolve_conj() for p in params if p.grad is not None]
    beta1, beta2 = group["betas"]
    with torch.set_grad_enabled(group["differentiable"]):
        if clip_coef is not None:
            grads = [g * clip_coef.to(g.device) for g in grads]
        torch_adamw(
            params,
            grads,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [s["max_exp_avg_sq"] for s in states] if group["amsgrad"] else [],
            [s["step"] for s in states],
            foreach=group["foreach"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            fused=group["fused"],
            has_complex=any(torch.is_complex(p) for p in params),
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )


def _to(t: Tensor | None, device: torch.device) -> Tensor | None:
    return t if t is None or t.device == device else t.to(device, non_blocking=True)


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    """The sum on the first part's device; of one part that part itself."""
    return part if total is None else total + part.to(total.device, non_blocking=True)


@torch.no_grad()
def _sq_norms_of(rows: list[Row], num_layers: int) -> Tensor:
    """Squared gradient norms, by layer, of parameters that torch updates: float32 [num_layers]."""
    sq_norms = torch.zeros(num_layers, dtype=torch.float32, device=rows[0].param.device)
    for row in rows:
        assert row.param.grad is not None
        sq_norms[row.layer] += sq_norm(row.param.grad).to(sq_norms.device, non_blocking=True)
    return sq_norms


@torch.no_grad()
def sq_norm(grad: Tensor) -> Tensor:
    """Squared norm of one gradient: float32, shape (), on its device; the kernels' own where they can."""
    if grass_kernels.is_supported(grad.dtype, grad.dtype, torch.float32):
        return grass_kernels.layer_sq_norms([grad], [0], 1)[0]
    return torch.linalg.vector_norm(grad).square().float()
