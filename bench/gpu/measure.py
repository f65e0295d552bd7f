"""The cases that figures are read from, and nothing else: ``python -m bench.gpu.measure --seconds 150 --out FILE``.

Rows are those of the kernels' suite, after one of suite "memory".
"""

import argparse
import gc
import json
import sys
from collections.abc import Sequence

import torch

import grass
from bench.gpu.figures import LARGE, Row, figure_cases
from bench.kernels.cases import Case
from bench.kernels.plan import Plan, run_plan
from bench.kernels.rows import describe_environment
from bench.kernels.table import Table
from bench.kernels.variants import GRASS, GRASS_KERNELS, TORCH_FUSED


def measure_memory(case: Case, device: torch.device) -> Row:
    """What an optimizer keeps beside its moments after two steps, from the allocator's own count.

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write rows as they come; 1 if one of our own variants failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.measure", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=150.0, help="for all [150]")
    parser.add_argument("--out", required=True, help="a file for the rows, JSON lines")
    parser.add_argument(
        "--largest", type=int, default=LARGE.numel, help="parameters of the largest case [1e9]"
    )
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table()
    with open(options.out, "w", encoding="utf-8") as out:

        def report(row: Row) -> None:
            out.write(json.dumps(row, allow_nan=False) + "\n")
            out.flush()
            if row["suite"] == "kernels":
                for line in table.lines(row):
                    print(line, flush=True)

        if device.type == "cuda":
            report(measure_memory(Case(min(LARGE.numel, options.largest)), device))
            gc.collect()
            torch.cuda.empty_cache()
        plan = Plan(device, figure_cases(options.largest), [GRASS_KERNELS, GRASS, TORCH_FUSED], [])
        outcome = run_plan(plan, seconds=options.seconds, report=report)
    for failure in outcome.failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
