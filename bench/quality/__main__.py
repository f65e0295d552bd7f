"""``python -m bench.quality run``."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from difflib import unified_diff
from pathlib import Path

import torch

from bench.kernels.rows import describe_environment
from bench.quality.comparison import NORMS, summarize
from bench.quality.evidence import written_pages
from bench.quality.figures import check_figures, draw_all
from bench.quality.real import CONFIG, TASKS, options_for
from bench.quality.stability import measure
from bench.quality.study import BUDGETS, SMALL, STUDY, RunJob
from grass.cli import Parser, run_command
from grass.cli.values import UsageError, count, positive
from grass.errors import GrassError
from grass.finetune.run_folder import read_rows, write_rows
from grass.reproduce.study import Row, run_missing

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "quality"
FIGURES = ROOT / "docs" / "evidence"
ROWS, STABILITY = RESULTS / "study.jsonl", RESULTS / "stability.jsonl"


def make_parser() -> Parser:
    """Return the parser of the study's commands."""
    parser = Parser(prog="python -m bench.quality", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    parser_run = commands.add_parser("run", help="run what is missing of the study; a stopped one goes on")
    parser_run.add_argument("--rows", type=Path, metavar="FILE", help=f"rows of the study [{ROWS.name}]")
    parser_run.add_argument(
        "--bases", type=Path, default=Path("runs/quality"), metavar="DIR", help="keeps base models"
    )
    parser_run.add_argument(
        "--workers", type=count, default=2, metavar="N", help="processes, one thread each [2]"
    )
    parser_run.add_argument("--minutes", type=positive, default=1e6, metavar="X", help="no run begins later")
    parser_run.add_argument(
        "--part", choices=tuple(STUDY.parts), metavar="NAME", help=f"run one of {', '.join(STUDY.parts)}"
    )
    parser_run.add_argument("--small", action="store_true", help="few and short runs, to try the study")
    parser_run.set_defaults(run=_run)
    parser_stability = commands.add_parser(
        "stability", help="measure the norms of layers along a run of GRASS"
    )
    parser_stability.add_argument(
        "--lr", type=positive, default=4e-3, metavar="X", help="learning rate [0.004]"
    )
    for option in ("--rows", "--bases"):
        default = STABILITY if option == "--rows" else Path("runs/quality")
        parser_stability.add_argument(option, type=Path, default=default, metavar="PATH", help=f"[{default}]")
    parser_stability.set_defaults(run=_stability)
    parser_verify = commands.add_parser(
        "verify", help="compare the pages with the rows that they are written from"
    )
    parser_verify.add_argument("--write", action="store_true", help="write the pages")
    parser_verify.set_defaults(run=_verify)
    parser_figures = commands.add_parser("figures", help="draw the paper's figures from the rows")
    parser_figures.add_argument(
        "--output", type=Path, default=FIGURES, metavar="DIR", help="folder of the figures"
    )
    parser_figures.set_defaults(run=_figures)
    parser_real = commands.add_parser("real", help="run what is missing of study B, on a real model")
    parser_real.add_argument(
        "--table", choices=tuple(TASKS), required=True, help="which of the paper's tables"
    )
    parser_real.add_argument(
        "--workers", type=count, default=2, metavar="N", help="processes, one thread each [2]"
    )
    parser_real.add_argument("--minutes", type=positive, default=1e6, metavar="X", help="no run begins later")
    parser_real.set_defaults(run=_real)
    parser_norms = commands.add_parser(
        "norms", help="measure the norms of a real model's layers, by task and stage"
    )
    for parser_of_model in (parser_real, parser_norms):
        parser_of_model.add_argument(
            "--model", required=True, metavar="DIR", help="folder of SmolLM2-135M-Instruct"
        )
        parser_of_model.add_argument(
            "--data-dir", required=True, metavar="DIR", help="folder of LLM-Adapters' files"
        )
    parser_norms.add_argument("--lr", type=positive, default=2e-4, metavar="X", help="learning rate [0.0002]")
    parser_norms.set_defaults(run=_norms)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    design = SMALL if arguments.small else STUDY
    if arguments.part:
        if arguments.part not in design.parts:
            raise UsageError(f"--small has no part {arguments.part}: choose of {', '.join(design.parts)}")
        design = replace(design, parts={arguments.part: design.parts[arguments.part]})
    arguments.bases.mkdir(parents=True, exist_ok=True)
    rows = arguments.rows or (ROWS.with_name("small.jsonl") if arguments.small else ROWS)
    begun = {(row["task"], row["base"]): row["base_digest"] for row in design.matching(read_rows(rows))}
    run_job = RunJob(design.budgets, arguments.bases, begun)
    seconds = 60 * arguments.minutes
    for row, left in run_missing(design.jobs, run_job, rows, arguments.workers, seconds):
        print(_line(row, left), flush=True)
    finished = design.matching(read_rows(rows))
    for part in design.parts.values():
        print(
            f"\n{part.task}, {len(part.bases)} bases x {part.orders} orders: held-out log-loss, exact match"
        )
        for method in part.methods:
            of = summarize(finished, part, method)
            if of is not None:
                print(f"{method:<20}{of.log_loss:.4f}  {of.exact:.1f}%  {of.runs} runs at {of.rate:g}")
    return 0


def _stability(arguments: argparse.Namespace) -> int:
    arguments.bases.mkdir(parents=True, exist_ok=True)
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    budget = BUDGETS["arithmetic"]
    rows = [
        row
        for base in STUDY.parts["key"].bases
        for row in measure(base, arguments.lr, budget, arguments.bases)
    ]
    write_rows(arguments.rows, (row | _origin() for row in rows))
    print(f"{len(rows)} rows: {arguments.rows}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    pages = written_pages(RESULTS, ROOT)
    if arguments.write:
        for path, text in pages.items():
            path.write_text(text, encoding="utf-8")
        return 0
    for path, text in pages.items():
        lines = list(
            unified_diff(path.read_text(encoding="utf-8").splitlines(), text.splitlines(), lineterm="", n=0)
        )
        if lines:
            raise GrassError(
                f"{path.name} is not what the rows say, run python -m bench.quality verify --write: "
                f"{' '.join(lines[3:5])}"
            )
        print(f"{path.name}: as the rows say")
    check_figures(RESULTS, FIGURES)
    print("figures: as drawn from the rows")
    return 0


def _figures(arguments: argparse.Namespace) -> int:
    for path in draw_all(RESULTS, arguments.output):
        print(path)
    return 0


def _real(arguments: argparse.Namespace) -> int:
    from grass.finetune.screen import Screen, quiet_libraries
    from grass.reproduce.job import reproduce
    from grass.reproduce.report import format_report

    options = options_for(
        arguments.table,
        arguments.model,
        arguments.data_dir,
        str(RESULTS),
        arguments.workers,
        arguments.minutes,
    )
    with quiet_libraries():
        print(format_report(reproduce(options, CONFIG, Screen(), _origin())))
    return 0


def _norms(arguments: argparse.Namespace) -> int:
    from bench.quality.norms import measure as measure_norms
    from grass.finetune.screen import quiet_libraries

    rows = []
    with quiet_libraries():
        for row in measure_norms(arguments.model, arguments.data_dir, arguments.lr):
            print(row["panel"], row["name"], flush=True)
            rows.append(row)
    write_rows(RESULTS / NORMS, (row | _origin() for row in rows))
    return 0


def _origin() -> Row:
    """Return commit, device and version of torch, for rows."""
    environment = describe_environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {name: environment[name] for name in ("commit", "dirty", "device", "torch")}


def _line(row: Row, left: int) -> str:
    loss = "diverged" if row["log_loss"] is None else f"{row['log_loss']:.4f}"
    return (
        f"{row['task']:<11}{row['method']:<20}lr {row['lr']:<7g}base {row['base']:<4}order {row['order']:<5}"
        f"log-loss {loss}  exact {row['exact']:.1%}  {row['processor_seconds']:.0f} s, {left} left"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    return run_command(make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
