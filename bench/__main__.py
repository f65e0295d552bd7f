"""``python -m bench COMMAND``: a command per benchmark, and one that writes the page of results."""

import sys
from collections.abc import Sequence

from bench import host, integration, report, scale
from bench.gpu import measure, smoke, suite, training
from bench.kernels import command as kernels
from bench.offload import command as offload
from grass.cli import Parser, run_command

_EPILOG = """\
smoke, figures and training are stages of gpu. The most important cases of kernels, in pytest-benchmark:

  pytest bench/ --benchmark-only
"""


def make_parser() -> Parser:
    """Return the parser of all benchmarks."""
    parser = Parser(prog="python -m bench", description="Benchmarks of the source tree.", epilog=_EPILOG)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (kernels, offload, host, integration, suite, smoke, measure, training, scale, report):
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark, and return the exit code of `grass.cli.run_command`."""
    return run_command(make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
