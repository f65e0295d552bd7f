"""``python -m bench figures``: the cases that figures are read from, and nothing else.

Rows are those of the kernels' suite, after one of suite "memory".
"""

import argparse
import gc
import sys
from dataclasses import replace
from typing import Any

import torch

import grass
from bench.gpu.candidates import CANDIDATES, variant_of
from bench.gpu.figures import LARGE, PARTS, SHARES, figure_cases
from bench.kernels.cases import Case
from bench.kernels.plan import Plan, run_plan
from bench.kernels.rows import describe_environment
from bench.kernels.table import Table
from bench.kernels.variants import GRASS, GRASS_KERNELS, TORCH_FUSED
from bench.output import Row, add_output_options, output_of
from grass.cli.values import count, positive

TRIED = "candidates"
"""The part that measures candidates beside ours, interleaved, in a process of their own, since they may crash."""


def measure_memory(case: Case, device: torch.device) -> Row:
    """Measure what an optimizer keeps beside its moments after two steps, by the allocator's own count.

    Args:
        case: of which only the tensors matter.
        device: of type cuda.
    """
    dtype = case.mixture.param
    params = [torch.nn.Parameter(torch.zeros(size, dtype=dtype, device=device)) for size in case.tensor_sizes]
    for p in params:
        p.grad = torch.zeros_like(p)
    before = torch.cuda.memory_allocated(device)
    optimizer = grass.AdamW(params)
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize(device)
    kept = torch.cuda.memory_allocated(device) - before
    state_bytes = 2 * case.numel * case.mixture.state.itemsize
    return {
        "suite": "memory",
        "case": str(case),
        "numel": case.numel,
        "tensors": case.tensors,
        "state_bytes": state_bytes,
        "extra_bytes": kept - state_bytes,
        **describe_environment(device),
    }


def tried_cases(largest: int = LARGE.numel) -> list[Case]:
    """Return the cases in which candidates are compared: the largest of each part, few layers of it, and zeros.

    Args:
        largest: see `figure_cases`.
    """
    few = replace(LARGE, numel=min(LARGE.numel, largest), active_share=min(SHARES))
    first, *others = (figure_cases(part, largest)[0] for part in PARTS)
    return [first, few, replace(first, zeros=True), *others]


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "figures",
        help="the kernels' cases that the promised figures are read from",
        description="Measure the cases that the promised figures are read from, and nothing else.",
    )
    parser.add_argument(
        "--seconds", type=positive, default=150.0, metavar="N", help="for the whole run [150]"
    )
    parser.add_argument(
        "--largest",
        type=count,
        default=LARGE.numel,
        metavar="N",
        help=f"parameters of the largest case [{LARGE.numel}]",
    )
    parser.add_argument(
        "--part",
        choices=(*PARTS, TRIED),
        nargs="+",
        default=list(PARTS),
        metavar="PART",
        help=f"{', '.join(PARTS)}, or {TRIED}: variants of the kernels that are being tried [{' '.join(PARTS)}]",
    )
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure; 1 if one of our own variants failed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table()
    with output_of(arguments) as output:

        def report(row: Row) -> None:
            output.write(row)
            for line in table.lines(row):
                output.say(line)

        failures: list[str] = []
        for part in arguments.part:
            if part == TRIED:
                for candidate in CANDIDATES:
                    output.say(f"{candidate.name}, expected: {candidate.expected}")
                variants = [GRASS_KERNELS, *map(variant_of, CANDIDATES)]
                cases = tried_cases(arguments.largest)
            else:
                variants = [GRASS_KERNELS, GRASS, TORCH_FUSED]
                cases = figure_cases(part, arguments.largest)
            plan = Plan(device, cases, variants, [])
            outcome = run_plan(plan, seconds=arguments.seconds / len(arguments.part), report=report)
            failures += outcome.failures
        if device.type == "cuda" and PARTS[0] in arguments.part:
            gc.collect()
            torch.cuda.empty_cache()
            output.write(measure_memory(Case(min(LARGE.numel, arguments.largest)), device))
    for failure in failures:
        print(f"{arguments.prog}: failed: {failure}", file=sys.stderr)
    return 1 if failures else 0
