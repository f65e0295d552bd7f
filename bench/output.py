"""Output of a benchmark: a table or JSON on stdout, rows in a file, a plot."""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from grass.cli.values import require_matplotlib, writable
from grass.errors import GrassError

Row = dict[str, Any]


def replace_between(path: Path, begin: str, end: str, new: str) -> str:
    """Return the text of a file with a new part between two marks.

    Raises:
        GrassError: a mark is missing.
    """
    text = path.read_text(encoding="utf-8")
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise GrassError(f"{path.name} has no part between {begin} and {end}")
    return f"{before}{begin}\n\n{new}\n\n{end}{after}"


def add_output_options(parser: argparse.ArgumentParser, *, plot: str | None = None) -> None:
    """Add ``--out`` and ``--json``, and ``--plot`` with a help text."""
    parser.add_argument(
        "--out", metavar="FILE", help="write one JSON object per line, as soon as it is known"
    )
    parser.add_argument("--json", action="store_true", help="print the rows as a JSON list, not a table")
    if plot is not None:
        parser.add_argument("--plot", metavar="FILE", help=plot)


class Output:
    """Writer of rows and lines of a table.

    Args:
        file: file for rows, or None.
        as_json: whether rows are printed instead of lines.
        plot: path of a plot, or None.
    """

    def __init__(self, file: IO[str] | None, as_json: bool, plot: Path | None) -> None:
        self.rows: list[Row] = []
        self.plot = plot
        self._file, self._as_json = file, as_json

    def write(self, row: Row) -> None:
        """Write a row to the file, and flush it: a run may be killed."""
        self.rows.append(row)
        if self._file is not None:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()

    def say(self, *lines: str) -> None:
        """Print lines of a table, unless rows are printed as JSON."""
        if not self._as_json:
            print(*lines, sep="\n", flush=True)


@contextlib.contextmanager
def output_of(arguments: argparse.Namespace) -> Iterator[Output]:
    """Open the output files, so that errors appear before anything runs.

    Raises:
        UsageError: a file cannot be written.
        MissingPackageError: a plot needs matplotlib, which is not installed.
    """
    plot = getattr(arguments, "plot", None)
    path = None if plot is None else writable(plot, "--plot")
    if path is not None:
        require_matplotlib()
    out = None if arguments.out is None else writable(arguments.out, "--out")
    with contextlib.nullcontext() if out is None else out.open("w", encoding="utf-8") as file:
        output = Output(file, arguments.json, path)
        yield output
    if arguments.json:
        print(json.dumps(output.rows, allow_nan=False, indent=1))
