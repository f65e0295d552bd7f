"""`grass bench kernels` and `grass bench offload`: the benchmarks of the source tree, which is where they live.

The package `bench` stands beside `grass` in a clone and is not installed with it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from grass.cli.values import count, positive, require_matplotlib, writable
from grass.errors import GrassError

STOPPED = 130  # what shells report for a command that Ctrl-C ended
LARGEST_SIZE = 10**11

_DESCRIPTION = """\
Time one AdamW step on the kernels, beside torch's optimizers and those of other installed libraries, and
beside a copy on the device, whose bandwidth is the most that can be had. Variants are interleaved and caches
cold. On a machine without a GPU the small cases run through torch's CPU paths.
"""

_EXAMPLES = """\
examples:
  grass bench kernels
  grass bench kernels --sizes 1e6,1e8 --seconds 120 --out rows.jsonl --plot chart.png
  grass bench kernels --list
"""


_OFFLOAD_DESCRIPTION = """\
Time a training step whose moments live in host memory, with updates inside backward: one unit of states after
the other, and overlapped. Measured where there is a CUDA device, beside a simulation of the same steps; on
other machines the simulation alone. Copies and updates are real, forward and backward stood in for. How near a
step comes to its floor depends on which layers train, on how long it computes, and on the ring of buffers.
"""

_OFFLOAD_EXAMPLES = """\
examples:
  grass bench offload
  grass bench offload --layers 0,1
  grass bench offload --model llama3-8b --pcie-gbs 24 --duplex-factor 0.5 --plot step.png
  grass bench offload --model 32x4096x11008x32000 --buffer-count 3 --out rows.jsonl
"""


class BenchError(GrassError):
    """A benchmark that cannot run here."""


def add_parser(subparsers: Any) -> None:
    """Registers the command with the `subparsers` of an `argparse.ArgumentParser`."""
    parser = subparsers.add_parser(
        "bench",
        help="run benchmarks (in a clone of the source)",
        description="Run a benchmark of the source tree.",
        allow_abbrev=False,
    )
    suites = parser.add_subparsers(metavar="SUITE", required=True)
    kernels = suites.add_parser(
        "kernels",
        help="one AdamW step: ours, torch's, other libraries', and a copy",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kernels.add_argument(
        "--sizes",
        nargs="+",
        type=_sizes,
        metavar="N",
        help="parameters of the cases, such as 1e6,1e8 [1e5 to 2e9; 1e5 and 1e6 on a CPU]",
    )
    kernels.add_argument(
        "--seconds",
        type=positive,
        metavar="N",
        help="time for the whole run, the most telling cases first [1200; 60 on a CPU]",
    )
    _add_output_options(kernels, plot="draw a chart (PNG): size against %% of the copy")
    kernels.add_argument("--list", action="store_true", help="print cases and variants, and run nothing")
    kernels.set_defaults(run=run_kernels)
    offload = suites.add_parser(
        "offload",
        help="a step with moments in host memory: measured, simulated, and what is the least",
        description=_OFFLOAD_DESCRIPTION,
        epilog=_OFFLOAD_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_offload_options(offload)
    _add_output_options(offload, plot="draw a step (PNG): compute and both copies over time")
    offload.set_defaults(run=run_offload)


def _add_offload_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="llama2-7b",
        metavar="MODEL",
        help="tinyllama-1.1b, llama2-7b, llama3-8b, llama2-13b, or layers x hidden x intermediate x vocab, such as "
        "32x4096x11008x32000 [llama2-7b]",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--active-layers", type=count, metavar="N", help="how many layers train, evenly spread [2]"
    )
    which.add_argument(
        "--layers",
        type=_layers,
        metavar="I,J",
        help="which layers train; the lowest, such as 0,1, take longest: their states move when backward has ended",
    )
    parser.add_argument("--tokens", type=count, default=4096, metavar="N", help="in a step [4096]")
    parser.add_argument(
        "--tflops", type=positive, default=200.0, metavar="X", help="that forward and backward reach [200]"
    )
    parser.add_argument(
        "--pcie-gbs",
        type=positive,
        metavar="X",
        help="GB/s of the link to simulate, each way [measured; without a CUDA device 50]",
    )
    parser.add_argument(
        "--duplex-factor",
        type=_share,
        metavar="X",
        help="share of it that each direction has while both copy, 0.5 if they take turns [measured; 1]",
    )
    parser.add_argument(
        "--hbm-gbs", type=positive, metavar="X", help="GB/s of the device's memory [measured; 2000]"
    )
    parser.add_argument("--buffer-mb", type=positive, default=64.0, metavar="X", help="MiB of a buffer [64]")
    parser.add_argument("--buffer-count", type=count, default=2, metavar="N", help="buffers [2]")


def _add_output_options(parser: argparse.ArgumentParser, *, plot: str) -> None:
    parser.add_argument("--out", metavar="FILE", help="write a JSON object a line, as soon as it is known")
    parser.add_argument("--plot", metavar="FILE", help=plot)
    parser.add_argument("--json", action="store_true", help="print the rows as a JSON list, not a table")


def run_kernels(arguments: argparse.Namespace) -> int:
    """Run `grass bench kernels`; the exit code."""
    return _guarded(arguments, _kernels)


def run_offload(arguments: argparse.Namespace) -> int:
    """Run `grass bench offload`; the exit code."""
    return _guarded(arguments, _offload)


def _guarded(arguments: argparse.Namespace, command: Callable[[argparse.Namespace], int]) -> int:
    try:
        return command(arguments)
    except (GrassError, OSError) as error:
        print(f"grass bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("grass bench: stopped", file=sys.stderr)
        return STOPPED


@contextlib.contextmanager
def _outputs(arguments: argparse.Namespace) -> Iterator[tuple[Callable[[dict[str, Any]], None], Path | None]]:
    """Where rows go, one by one, and where the picture; both are known to be writable before anything runs."""
    plot = None if arguments.plot is None else writable(arguments.plot, "--plot")
    if plot is not None:
        require_matplotlib()
    with contextlib.ExitStack() as stack:
        out: IO[str] | None = None
        if arguments.out is not None:
            out = stack.enter_context(writable(arguments.out, "--out").open("w", encoding="utf-8"))

        def write(row: dict[str, Any]) -> None:
            if out is not None:
                out.write(json.dumps(row, allow_nan=False) + "\n")
                out.flush()

        yield write, plot


def _offload(arguments: argparse.Namespace) -> int:
    rows = _import_from_the_source("bench.offload.rows")
    task, link, hbm = _import_from_the_source("bench.offload.arguments").read(arguments)
    with _outputs(arguments) as (write, plot):
        outcome = rows.run(task, link, hbm, report=write)
        if arguments.json:
            print(json.dumps(outcome.rows, allow_nan=False, indent=1))
        else:
            print("\n".join(_import_from_the_source("bench.offload.table").lines_of(outcome.rows)))
        if plot is not None:
            _import_from_the_source("bench.offload.picture").draw(outcome, plot)
    return 0


def _kernels(arguments: argparse.Namespace) -> int:
    plans = _import_from_the_source("bench.kernels.plan")
    sizes = sorted({size for group in arguments.sizes or () for size in group})
    plan = plans.make_plan(sizes or None)
    if arguments.list:
        _print_plan(plan, as_json=arguments.json)
        return 0
    with _outputs(arguments) as (write, plot):
        return _run(plans, plan, arguments, write, plot)


def _run(
    plans: Any,
    plan: Any,
    arguments: argparse.Namespace,
    write: Callable[[dict[str, Any]], None],
    plot: Path | None,
) -> int:
    text = _import_from_the_source("bench.kernels.table")
    table = text.Table()

    def report(row: dict[str, Any]) -> None:
        write(row)
        if not arguments.json:
            for line in table.lines(row):
                print(line, flush=True)

    outcome = plans.run_plan(plan, seconds=arguments.seconds, report=report)
    if arguments.json:
        print(json.dumps(outcome.rows, allow_nan=False, indent=1))
    else:
        print(f"\n{text.LEGEND}")
        _print_lines("could not measure", outcome.missing)
    if plot is not None:
        _import_from_the_source("bench.kernels.chart").draw_chart(outcome.rows, plot)
    for failure in outcome.failures:
        print(f"grass bench: failed: {failure}", file=sys.stderr)
    return 1 if outcome.failures or not any(row["measured"] for row in outcome.rows) else 0


def _import_from_the_source(name: str) -> Any:
    """A module of the package `bench` that stands beside this `grass`."""
    import grass

    root = Path(grass.__file__).resolve().parent.parent
    if not root.joinpath(*name.split(".")).with_suffix(".py").is_file():
        raise BenchError(
            "the benchmarks are not installed with the library: run this from a clone of the source"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    module = importlib.import_module(name)
    if not Path(module.__file__ or "").resolve().is_relative_to(root):
        raise BenchError(f"another package is in the way of {root / 'bench'}: {module.__file__}")
    return module


def _sizes(text: str) -> list[int]:
    """Sizes given with commas; exponents are welcome."""
    sizes = []
    for part in filter(None, text.split(",")):
        try:
            value = float(part)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is not a number") from None
        if not (math.isfinite(value) and value == int(value) and 1 <= value <= LARGEST_SIZE):
            raise argparse.ArgumentTypeError(f"{part!r} is not a whole number from 1 to {LARGEST_SIZE:.0e}")
        sizes.append(int(value))
    if not sizes:
        raise argparse.ArgumentTypeError("no size is given")
    return sizes


def _layers(text: str) -> tuple[int, ...]:
    """Numbers of layers, in order."""
    parts = text.split(",")
    for part in parts:
        if not (part.isascii() and part.isdigit()):
            raise argparse.ArgumentTypeError(f"{part!r} is not a layer's number")
    layers = sorted(map(int, parts))
    if len(set(layers)) < len(layers):
        raise argparse.ArgumentTypeError(f"a layer is named twice: {text}")
    return tuple(layers)


def _share(text: str) -> float:
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be at most 1, not {text}")
    return value


def _print_plan(plan: Any, *, as_json: bool) -> None:
    variants = [variant.name for variant in plan.variants] + ["copy"]
    if as_json:
        cases = [str(case) for case in plan.cases]
        print(json.dumps({"cases": cases, "variants": variants, "missing": plan.missing}, indent=1))
        return
    _print_lines("cases, in this order", [str(case) for case in plan.cases], first=True)
    _print_lines("variants", variants)
    _print_lines("cannot be measured here", plan.missing)


def _print_lines(head: str, lines: list[str], *, first: bool = False) -> None:
    if lines:
        print("\n".join([*([] if first else [""]), f"{head}:", *(f"  {line}" for line in lines)]))
