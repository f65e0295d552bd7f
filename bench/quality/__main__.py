"""``python -m bench.quality run``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.quality.study import Design, RunJob
from bench.quality.tasks import TASKS
from bench.quality.training import Budget
from grass.cli import Parser, run_command
from grass.cli.values import count, positive
from grass.reproduce.study import Row, run_missing

ROWS = Path(__file__).parents[1] / "results" / "quality" / "rows.jsonl"
SMALL = Design(
    bases=2, orders=2, other_orders=1, second_orders=1, budgets={task: Budget(steps=60) for task in TASKS}
)


def make_parser() -> Parser:
    """Return the parser of the study's commands."""
    parser = Parser(prog="python -m bench.quality", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    parser_run = commands.add_parser("run", help="run what is missing of the study; a stopped one goes on")
    parser_run.add_argument("--rows", type=Path, default=ROWS, metavar="FILE", help="rows of the study")
    parser_run.add_argument(
        "--bases", type=Path, default=Path("runs/quality"), metavar="DIR", help="keeps base models"
    )
    parser_run.add_argument(
        "--workers", type=count, default=2, metavar="N", help="processes, one thread each [2]"
    )
    parser_run.add_argument("--minutes", type=positive, default=1e6, metavar="X", help="no run begins later")
    parser_run.add_argument("--small", action="store_true", help="few and short runs, to try the study")
    parser_run.set_defaults(run=_run)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    design = SMALL if arguments.small else Design()
    arguments.bases.mkdir(parents=True, exist_ok=True)
    run_job = RunJob(design.budgets, arguments.bases)
    seconds = 60 * arguments.minutes
    for row, left in run_missing(design.jobs, run_job, arguments.rows, arguments.workers, seconds):
        print(_line(row, left), flush=True)
    return 0


def _line(row: Row, left: int) -> str:
    loss = "diverged" if row["log_loss"] is None else f"{row['log_loss']:.4f}"
    return (
        f"{row['task']:<11}{row['method']:<16}lr {row['lr']:<7g}base {row['base']:<4}order {row['order']:<3}"
        f"log-loss {loss}  exact {row['exact']:.1%}  {row['processor_seconds']:.0f} s, {left} left"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    return run_command(make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
