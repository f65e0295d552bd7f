"""An update of states that pass through the device in units: `grass.optim.update` for rows with a pipeline."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from grass.offload.pipeline import Pipeline
from grass.offload.units import Unit
from grass.optim.work import Row, Work
from grass_kernels import Shifts, States, TensorLists, TorchPlan


class Scales(NamedTuple):
    """What gradients are multiplied with, and whether the step is skipped; on the device, or None."""

    grad_scale: Tensor | None
    found_inf: Tensor | None
    clip_by: Tensor | None  # squared norms, for plans
    clip_coef: Tensor | None  # the same for torch
    skip: Tensor | None


def run_units(
    work: Work,
    pipeline: Pipeline,
    groups: Sequence[dict[str, Any]],
    state: dict[Tensor, dict[str, Any]],
    scales: Scales,
    norms: bool,
) -> None:
    """Update all rows whose states are in the store.

    Args:
        work: the rows, of one device.
        pipeline: of their states.
        groups: the optimizer's.
        state: the optimizer's.
        scales: for all.
        norms: let plans take the norms on the way.
    """
    plans = [planned.plan for planned in work.planned]
    for plan in plans:
        plan.begin(clip_by=scales.clip_by, grad_scale=scales.grad_scale, found_inf=scales.found_inf)
    rows = [row for members in work.by_function.values() for row in members]
    rest = _begin_rest(work, rows, groups, state, scales) if rows else None

    def states_of(unit: Unit, views: dict[str, Tensor], row: Row) -> States:
        piece = next(piece for piece in unit.pieces if piece.param is row.param)
        start = piece.start - unit.start
        found = {
            kind: views[kind][start : start + piece.numel]
            for kind in state[row.param]
            if kind in views and (kind != "max_exp_avg_sq" or groups[row.group]["amsgrad"])
        }
        return States(*(found.get(kind) for kind in States._fields))  # type: ignore[arg-type]

    def update(unit: Unit, views: dict[str, Tensor]) -> None:
        number = work.unit_numbers[unit]
        for plan in plans:
            shifts = {kind: views[kind].data_ptr() - unit.host[kind].data_ptr() for kind in views}
            plan.run(number, norms=norms, shifts=Shifts(**shifts))
        if rest is not None:
            parts = rest.parts_of(number)
            rest.run(number, [states_of(unit, views, rows[part.tensor]) for part in parts])

    for slot in work.slots:
        pipeline.run(slot, update)


def _begin_rest(
    work: Work,
    rows: Sequence[Row],
    groups: Sequence[dict[str, Any]],
    state: dict[Tensor, dict[str, Any]],
    scales: Scales,
) -> TorchPlan:
    """The rows that no plan of the kernels updates, with their counters advanced."""
    states = [state[row.param] for row in rows]
    lists = TensorLists(
        params=[row.param for row in rows],
        grads=[row.param.grad for row in rows],  # type: ignore[misc]
        exp_avgs=[s["exp_avg"] for s in states],
        exp_avg_sqs=[s["exp_avg_sq"] for s in states],
        max_exp_avg_sqs=[None] * len(rows),
        remainders=[s.get("remainder") for s in states],
        steps=[s["step"] for s in states],
        layers=[row.layer for row in rows],
        seeds=[row.seed if work.options.stochastic_rounding else None for row in rows],
    )
    plan = TorchPlan(lists, [row.group for row in rows], work.parts_of(rows))
    plan.begin(
        [_hyperparameters(group) for group in groups],
        grad_scale=scales.grad_scale,
        found_inf=scales.skip,
        clip_coef=scales.clip_coef,
    )
    return plan


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    beta1, beta2 = group["betas"]
    return {
        "lr": float(group["lr"]),
        "betas": (float(beta1), float(beta2)),
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
        "maximize": group["maximize"],
    }
