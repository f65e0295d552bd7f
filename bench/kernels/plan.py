"""A whole run on the machine at hand: which sizes and variants, and what could not be measured here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.kernels.cases import SIZES, Case, make_cases, size_name
from bench.kernels.peers import peer_variants
from bench.kernels.rows import Row
from bench.kernels.runner import Runner
from bench.kernels.timing import ROOF_BYTES, Roof, make_clock
from bench.kernels.variants import Variant, own_variants

CPU_SIZES = (100_000, 1_000_000)
SECONDS = {"cuda": 1200.0, "cpu": 60.0}


@dataclass(frozen=True)
class Plan:
    """A run on this machine.

    Args:
        device: the best there is.
        cases: in the order they run.
        variants: to compare.
        missing: what cannot be measured here and why, a line each.
    """

    device: torch.device
    cases: list[Case]
    variants: list[Variant]
    missing: list[str]


@dataclass(frozen=True)
class Outcome:
    """The results of a run.

    Args:
        rows: all of them.
        missing: what could not be measured and why, a line each.
        failures: errors of our own variants; none is as it should be.
    """

    rows: list[Row]
    missing: list[str]
    failures: list[str]


def make_plan(sizes: Sequence[int] | None = None) -> Plan:
    """Plan a run on this machine.

    Args:
        sizes: parameters of the cases; None is all on a CUDA device, and the small ones on a CPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    variants, missing = peer_variants(device)
    if device.type == "cpu":
        missing.append("peak memory: needs a CUDA device")
        if sizes is None:
            left_out = ", ".join(size_name(size) for size in SIZES if size not in CPU_SIZES)
            missing.append(f"sizes {left_out}: need a CUDA device")
    chosen = sizes or (CPU_SIZES if device.type == "cpu" else SIZES)
    return Plan(device, make_cases(chosen), [*own_variants(device), *variants], missing)


def run_plan(
    plan: Plan, *, seconds: float | None = None, roof_bytes: int | None = None, report: Callable[[Row], None]
) -> Outcome:
    """Run it.

    Args:
        plan: from :func:`make_plan`.
        seconds: for the whole run; None is 1200 on a CUDA device, 60 on a CPU.
        roof_bytes: of the buffer whose copy is the roof; None is 1 GiB on a CUDA device, 256 MiB on a CPU.
        report: gets each row as soon as it is known.
    """
    kind = plan.device.type
    roof = Roof(plan.device, roof_bytes or ROOF_BYTES[kind])
    threads = torch.get_num_threads()
    if kind == "cpu":  # with more, waiting threads spin, and a machine that does anything else gives noise
        torch.set_num_threads(1)
    try:
        runner = Runner(plan.variants, make_clock(), roof, seconds or SECONDS[kind])
        rows = []
        for row in runner.run(plan.cases):
            report(row)
            rows.append(row)
    finally:
        torch.set_num_threads(threads)
    return Outcome(rows, plan.missing + _unmeasured(rows), runner.failures)


def _unmeasured(rows: Sequence[Row]) -> list[str]:
    """A line for each reason, with the variants and the number of cases it stopped."""
    reasons: dict[str, list[Row]] = {}
    for row in rows:
        if not row["measured"]:
            reasons.setdefault(row["reason"], []).append(row)
    lines = []
    for reason, stopped in reasons.items():
        cases = list(dict.fromkeys(row["case"] for row in stopped))
        variants = list(dict.fromkeys(row["variant"] for row in stopped))
        where = cases[0] if len(cases) == 1 else f"{len(cases)} cases"
        lines.append(f"{', '.join(variants)} in {where}: {reason}")
    return lines
