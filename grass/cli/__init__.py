"""The command line: `grass COMMAND`, or `python -m grass COMMAND`.

A command is a module here with ``add_parser(subparsers)``, which sets the default ``run``: a function from
the parsed arguments to the exit code, 0 (ok), 1 (failed) or 2 (wrong usage). Commands import what is slow to
import when they run.
"""

import argparse
import importlib
import pkgutil
from collections.abc import Sequence


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    import grass

    parser = argparse.ArgumentParser(
        prog="grass",
        description="Full-rank fine-tuning of large language models on small hardware.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"grass {grass.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in pkgutil.iter_modules(__path__):
        command = importlib.import_module(f"{__name__}.{module.name}")
        if hasattr(command, "add_parser"):
            command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        The exit code.
    """
    try:
        arguments = make_parser().parse_args(argv)
        return int(arguments.run(arguments))
    except SystemExit as leave:  # argparse's way to end after --help, --version and wrong usage
        return int(leave.code or 0)
