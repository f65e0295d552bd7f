"""``python -m bench kernels``."""

import argparse
import json
import math
import sys
from typing import Any

from bench.kernels import plan as plans
from bench.kernels.chart import draw_chart
from bench.kernels.plan import Plan
from bench.kernels.table import LEGEND, Table
from bench.output import Row, add_output_options, output_of
from grass.cli.values import positive

LARGEST_SIZE = 10**11

_DESCRIPTION = """\
Time one AdamW step on the kernels, beside torch's optimizers and those of other installed libraries, and
beside a copy on the device, whose bandwidth is the most that can be had. Variants are interleaved and caches
cold. On a machine without a GPU the small cases run through torch's CPU paths.
"""

_EXAMPLES = """\
examples:
  python -m bench kernels
  python -m bench kernels --sizes 1e6,1e8 --seconds 120 --out rows.jsonl --plot chart.png
  python -m bench kernels --list
"""


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "kernels",
        help="one AdamW step: ours, torch's, other libraries', and a copy",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=sizes,
        metavar="N",
        help="parameters of the cases, such as 1e6,1e8 [1e5 to 2e9; 1e5 and 1e6 on a CPU]",
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        metavar="N",
        help="time for the whole run, the most telling cases first [1200; 60 on a CPU]",
    )
    parser.add_argument("--list", action="store_true", help="print cases and variants, and run nothing")
    add_output_options(parser, plot="draw a chart (PNG): size against %% of the copy")
    parser.set_defaults(run=run)


def sizes(text: str) -> list[int]:
    """Return sizes given with commas; exponents are welcome."""
    found = []
    for part in filter(None, text.split(",")):
        try:
            value = float(part)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is not a number") from None
        if not (math.isfinite(value) and value == int(value) and 1 <= value <= LARGEST_SIZE):
            raise argparse.ArgumentTypeError(f"{part!r} is not a whole number from 1 to {LARGEST_SIZE:.0e}")
        found.append(int(value))
    if not found:
        raise argparse.ArgumentTypeError("no size is given")
    return found


def run(arguments: argparse.Namespace) -> int:
    """Run it; 1 if one of our own variants failed, or nothing was measured."""
    plan = plans.make_plan(sorted({size for group in arguments.sizes or () for size in group}) or None)
    if arguments.list:
        _print_plan(plan, as_json=arguments.json)
        return 0
    table = Table()
    with output_of(arguments) as output:

        def report(row: Row) -> None:
            output.write(row)
            for line in table.lines(row):
                output.say(line)

        outcome = plans.run_plan(plan, seconds=arguments.seconds, report=report)
        output.say("", LEGEND, *_block("could not measure", outcome.missing))
        if output.plot is not None:
            draw_chart(outcome.rows, output.plot)
    for failure in outcome.failures:
        print(f"{arguments.prog}: failed: {failure}", file=sys.stderr)
    return 1 if outcome.failures or not any(row["measured"] for row in outcome.rows) else 0


def _print_plan(plan: Plan, *, as_json: bool) -> None:
    cases = [str(case) for case in plan.cases]
    variants = [variant.name for variant in plan.variants] + ["copy"]
    if as_json:
        print(json.dumps({"cases": cases, "variants": variants, "missing": plan.missing}, indent=1))
        return
    lines = [*_block("cases, in this order", cases), *_block("variants", variants)]
    print("\n".join([*lines, *_block("cannot be measured here", plan.missing)][1:]))


def _block(head: str, lines: list[str]) -> list[str]:
    return ["", f"{head}:", *(f"  {line}" for line in lines)] if lines else []
