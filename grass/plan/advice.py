"""Advice: choose a method from the rows of a plan, and give the command that trains by it."""

import shlex
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from grass.config import GrassConfig
from grass.finetune.options import FinetuneOptions
from grass.plan.prediction import ADAMW, FUSED, PROBING, Row

ONLY_COMPARED = ("lora", "lisa", "full")  # shown for comparison; `grass finetune` does not have them


def choose(rows: Sequence[Row], gpu_gib: float, host_gib: float | None = None) -> Row | None:
    """Return the row of the cheapest method that fits, None if nothing fits.

    The cheapest method has the lowest bound of the step time (within 1 %), then the least traffic, then the earlier
    row. A method fits if device memory holds its step and its probe, and host memory its states.

    Args:
        rows: rows of a plan, with methods of `grass finetune` among them.
        gpu_gib: device memory, GiB.
        host_gib: host memory for states, GiB; None for no limit.
    """
    fitting = [row for row, gib in _needs(rows, host_gib).items() if gib <= gpu_gib]
    fastest = min((row.step_floor_ms for row in fitting), default=0.0)
    return min(
        (row for row in fitting if row.step_floor_ms <= 1.01 * fastest),
        key=lambda row: row.h2d_gib_per_step + row.d2h_gib_per_step,
        default=None,
    )


def advise(rows: Sequence[Row], gpu_gib: float, host_gib: float | None = None) -> str:
    """Return a line with the method that `choose` returns, and the next larger one.

    Args:
        rows, gpu_gib, host_gib: as for `choose`.
    """
    needs = _needs(rows, host_gib)
    larger = sorted((row for row in needs if needs[row] > gpu_gib), key=lambda row: needs[row])
    best = choose(rows, gpu_gib, host_gib)
    if best is None:
        if not larger:
            least = min(row.states_host_gib for row in _needs(rows, None))
            return f"Nothing fits {host_gib:g} GiB of host memory: states need at least {least:.1f} GiB."
        return (
            f"Nothing fits {gpu_gib:g} GiB: {larger[0].method} needs the least, {needs[larger[0]]:.1f} GiB; shorter "
            "sequences, a smaller batch or fewer active layers need less."
        )
    host = f", {best.states_host_gib:.1f} in host memory" if best.states_host_gib else ""
    memory = f"{needs[best]:.1f} of {gpu_gib:g} GiB{host}"
    chosen = f"Use {best.method}: {memory}, at least {best.step_floor_ms:.0f} ms per step."
    if not larger:
        return f"{chosen} All methods of GRASS fit."
    return f"{chosen} The next larger is {larger[0].method}, with {needs[larger[0]]:.1f} GiB."


def finetune_command(method: str, options: FinetuneOptions, config: GrassConfig) -> str:
    """Return the command line of `grass finetune` that trains by a method, with the options that differ from defaults.

    Args:
        method: name of a row that `choose` returns.
        options: with the settings of the plan, model and data.
        config: with the settings of the plan.
    """
    if method == ADAMW:
        options, config = replace(options, method="full"), GrassConfig()
    else:
        fused, place = FUSED in method, method.removesuffix(FUSED).removeprefix("grass").strip("-")
        if fused and FinetuneOptions.max_grad_norm:
            options = replace(
                options, max_grad_norm=0.0
            )  # gradients are clipped by default, which excludes it
        config = replace(config, offload=place or "none", fused_backward=fused)  # type: ignore[arg-type]
        if place != "streamed":
            config = replace(config, buffer_mb=GrassConfig.buffer_mb, buffer_count=GrassConfig.buffer_count)
    return shlex.join(["grass", "finetune", *_differing(options), *_differing(config)])


def _differing(options: Any) -> list[str]:
    """Return the options of a command line for the fields of a dataclass that are not at their defaults."""
    words = []
    for field in fields(options):
        value, name = getattr(options, field.name), field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    return words


def _needs(rows: Sequence[Row], host_gib: float | None) -> dict[Row, float]:
    """Return the GiB of device memory, probe included, of each method whose states host memory holds."""
    return {
        row: max(other.peak_gib for other in rows if other.method in (row.method, row.method + PROBING))
        for row in rows
        if not row.method.endswith(PROBING)
        and not row.method.startswith(ONLY_COMPARED)
        and (host_gib is None or row.states_host_gib <= host_gib)
    }
