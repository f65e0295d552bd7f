"""Rows of a run: one for each way to take a step, measured and simulated, with the same keys always."""

import datetime
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from bench.kernels.rows import describe_environment
from bench.offload import measure
from bench.offload.bound import bound_seconds
from bench.offload.steps import Step, Task, log_of, seconds_of, simulated, steady
from bench.offload.timeline import Link
from grass.errors import GrassError
from grass.offload.streams import COMPUTE, D2H, H2D

Row = dict[str, Any]

VARIANTS = ("overlapped", "vanilla")  # the most important first: a run may be killed
NEEDS_CUDA = "needs a CUDA device"
KEYS = (
    "suite", "model", "layers", "active_layers", "tokens", "flops", "flops_measured", "buffer_bytes", "buffer_count",
    "update_priority", "variant", "source", "measured", "reason", "seconds", "floor_seconds", "above_floor",
    "bound_seconds", "above_bound",
    "compute_seconds", "h2d_seconds", "d2h_seconds", "exposed_seconds", "hidden_share", "h2d_bytes", "d2h_bytes",
    "h2d_bytes_per_second", "d2h_bytes_per_second", "duplex_factor", "hbm_bytes_per_second", "hop_seconds",
    "link_measured", "device",
    "driver", "torch", "triton", "python", "commit", "dirty", "timestamp",
)  # fmt: skip
"""Every row's keys, in this order.

`source` is "device" or "simulation". `above_floor` is seconds / floor_seconds - 1, and so on;
the bound is that of `bench.offload.bound`. Exposed is the time in which nothing
is computed; `hidden_share` is what of the copies' own time, as short as it can be, lies behind compute.
"""


DEFAULT_LINK = Link(50e9, 50e9)
DEFAULT_HBM = 2e12
DEFAULT_HOP = 10e-6


class Outcome(NamedTuple):
    """The results of a run.

    Args:
        rows: of all variants and sources.
        steps: those that there are, by (variant, source).
    """

    rows: list[Row]
    steps: dict[tuple[str, str], Step]


def run(
    task: Task,
    link: Link | None = None,
    hbm: float | None = None,
    hop: float | None = None,
    report: Callable[[Row], None] = lambda row: None,
    *,
    measures_flops: bool = False,
) -> Outcome:
    """Measure what can be measured here, and simulate all of it.

    Args:
        task: what to train.
        link: to simulate; None is this machine's, and without a CUDA device `DEFAULT_LINK`.
        hbm: bytes a second of the device's memory that an update reaches in the simulation, likewise.
        hop: seconds from an operation to the next in another queue in the simulation, likewise.
        report: told each row as soon as it is known.
        measures_flops: on a CUDA device take the rate of its matrix products, in place of that of the task.
    """
    has_device = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if has_device else torch.device("cpu")
    link_measured = has_device and link is None
    link = link or (measure.measure_link(device) if has_device else DEFAULT_LINK)
    hbm = hbm or (measure.measure_hbm(device) if has_device else DEFAULT_HBM)
    if hop is None:
        hop = measure.measure_hop(device) if has_device else DEFAULT_HOP
    measures_flops = measures_flops and has_device
    if measures_flops:
        flops = measure.Products(task, device).flops_per_second
        task = task._replace(compute=task.compute._replace(flops=flops))
    shared = {
        "suite": "offload",
        "model": task.shape.name,
        "layers": task.shape.layers,
        "active_layers": list(task.active),
        "tokens": task.compute.tokens,
        "flops": task.compute.flops,
        "flops_measured": measures_flops,
        "buffer_bytes": task.buffer_bytes,
        "buffer_count": task.buffer_count,
        "update_priority": task.update_priority,
        "h2d_bytes_per_second": link.h2d,
        "d2h_bytes_per_second": link.d2h,
        "duplex_factor": link.duplex_factor,
        "hbm_bytes_per_second": hbm,
        "hop_seconds": hop,
        "link_measured": link_measured,
        **describe_environment(device),
    }
    bound = bound_seconds(task, link, hbm)
    outcome = Outcome([], {})
    for variant in VARIANTS:
        vanilla = variant == "vanilla"
        found: dict[str, Step | None] = {"device": None}
        reason = NEEDS_CUDA
        if has_device:
            seconds = seconds_of(task, log_of(task, vanilla=vanilla), hbm)
            try:
                spans = measure.measure_steps(task, device, vanilla=vanilla)
                found["device"] = steady(spans, link, seconds)
            except (RuntimeError, GrassError) as error:  # the simulation is worth having all the same
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
        found["simulation"] = simulated(task, link, hbm, hop=hop, vanilla=vanilla)
        for source, step in found.items():
            row = _row(shared, link, bound, variant, source, step, reason)
            if step is not None:
                outcome.steps[variant, source] = step
            outcome.rows.append(row)
            report(row)
    return outcome


def _row(
    shared: Row, link: Link, bound: float, variant: str, source: str, step: Step | None, reason: str
) -> Row:
    row: Row = dict.fromkeys(KEYS)
    row.update(
        shared,
        variant=variant,
        source=source,
        measured=source == "device" and step is not None,
        reason=reason if step is None else None,
        timestamp=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    if step is not None:
        copies = link.least_seconds(step.num_bytes[H2D], step.num_bytes[D2H])
        row.update(
            seconds=step.seconds,
            floor_seconds=step.floor,
            above_floor=step.seconds / step.floor - 1,
            bound_seconds=bound,
            above_bound=step.seconds / bound - 1,
            compute_seconds=step.busy[COMPUTE],
            h2d_seconds=step.busy[H2D],
            d2h_seconds=step.busy[D2H],
            exposed_seconds=step.exposed,
            hidden_share=max(0.0, 1 - step.exposed / copies),
            h2d_bytes=step.num_bytes[H2D],
            d2h_bytes=step.num_bytes[D2H],
        )
    return row
