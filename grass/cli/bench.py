"""`grass bench kernels`: the benchmarks of the source tree, which is where they live.

The package `bench` stands beside `grass` in a clone and is not installed with it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from pathlib import Path
from typing import IO, Any

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
        type=_seconds,
        metavar="N",
        help="time for the whole run, the most telling cases first [1200; 60 on a CPU]",
    )
    kernels.add_argument("--out", metavar="FILE", help="write a JSON object a line, as soon as it is known")
    kernels.add_argument("--plot", metavar="FILE", help="draw a chart (PNG): size against %% of the copy")
    kernels.add_argument("--json", action="store_true", help="print the rows as a JSON list, not a table")
    kernels.add_argument("--list", action="store_true", help="print cases and variants, and run nothing")
    kernels.set_defaults(run=run_kernels)


def run_kernels(arguments: argparse.Namespace) -> int:
    """Run `grass bench kernels`; the exit code."""
    out: IO[str] | None = None
    try:
        plans = _import_from_the_source("bench.kernels.plan")
        sizes = sorted({size for group in arguments.sizes or () for size in group})
        plan = plans.make_plan(sizes or None)
        if arguments.list:
            _print_plan(plan, as_json=arguments.json)
            return 0
        plot = None if arguments.plot is None else _writable(arguments.plot, "--plot")
        if plot is not None:
            _require_matplotlib()
        if arguments.out is not None:
            out = _writable(arguments.out, "--out").open("w", encoding="utf-8")
        return _run(plans, plan, arguments, out, plot)
    except (GrassError, OSError) as error:
        print(f"grass bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("grass bench: stopped", file=sys.stderr)
        return STOPPED
    finally:
        if out is not None:
            out.close()


def _run(plans: Any, plan: Any, arguments: argparse.Namespace, out: IO[str] | None, plot: Path | None) -> int:
    text = _import_from_the_source("bench.kernels.table")
    table = text.Table()

    def report(row: dict[str, Any]) -> None:
        if out is not None:
            out.write(json.dumps(row, allow_nan=False) + "\n")
            out.flush()
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


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be more than 0, not {text}")
    return value


def _writable(name: str, option: str) -> Path:
    """The path, if a file can be written there; nothing is left behind."""
    path = Path(name)
    existed = path.exists()
    try:
        with path.open("a"):
            pass
    except OSError as error:
        raise BenchError(f"{option} {name} cannot be written: {error.strerror}") from None
    if not existed:
        path.unlink()
    return path


def _require_matplotlib() -> None:
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise BenchError("--plot needs matplotlib; install with: pip install 'grass-optim[plots]'") from None


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
