"""The command line: `grass COMMAND`, or `python -m grass COMMAND`.

A command is a module here with ``add_parser(subparsers)``, which sets the default ``run``: a function from
the parsed arguments to the exit code. Commands import what is slow to import when they run, and raise what goes
wrong: `run_command` turns errors into one line and an exit code.
"""

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from grass.cli.values import UsageError
from grass.errors import ConfigError, GrassError, RunFolderError

OK, FAILED, WRONG_USAGE = 0, 1, 2
STOPPED = 130  # as shells report a command that Ctrl-C ended
BROKEN_PIPE = 141  # as shells report a command whose reader has gone


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose options are spelt out."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)
        self.set_defaults(prog=self.prog)  # the innermost command's, for its errors

    def error(self, message: str) -> NoReturn:
        """Exit with one line on stderr."""
        self.exit(WRONG_USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


def make_parser() -> Parser:
    """Return the parser of the whole command line."""
    import grass

    parser = Parser(
        prog="grass", description="Full-rank fine-tuning of large language models on small hardware."
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
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # a line for each retry otherwise
    return run_command(make_parser(), argv)


def run_command(parser: Parser, argv: Sequence[str] | None) -> int:
    """Parse arguments and run what they ask for. An error is one line on stderr.

    Args:
        parser: with commands that set ``run``.
        argv: the arguments; those of the process if None.

    Returns:
        0 (ok), 1 (failed), 2 (wrong usage), 130 (Ctrl-C) or 141 (nothing reads stdout).
    """
    prog = parser.prog
    try:
        try:
            arguments, unknown = parser.parse_known_args(argv)
            prog = arguments.prog
            if unknown:
                raise UsageError(f"unrecognized arguments: {' '.join(unknown)}; see {prog} --help")
            code = int(arguments.run(arguments))
        except SystemExit as leave:  # argparse's way to end after --help, --version and wrong usage
            code = int(leave.code or OK)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python would otherwise flush the buffer again at exit, and fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (UsageError, ConfigError, RunFolderError) as error:
        return _report(prog, error, WRONG_USAGE)
    except (GrassError, OSError) as error:
        return _report(prog, error, FAILED)
    except KeyboardInterrupt as reason:
        return _report(prog, str(reason) or "stopped", STOPPED)


def _report(prog: str, error: object, code: int) -> int:
    lines = (" ".join(line.split()) for line in str(error).splitlines())
    print(f"{prog}: {'; '.join(filter(None, lines))}", file=sys.stderr)
    return code
