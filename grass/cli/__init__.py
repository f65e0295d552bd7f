"""The command line: `grass COMMAND`, or `python -m grass COMMAND`.

A command is a module here with ``add_parser(subparsers)``, which sets the default ``run``: a function from
the parsed arguments to the exit code. Commands import what is slow to import when they run, and raise what goes
wrong: `run_command` turns errors into one line and an exit code; ``--debug`` shows the traceback as well.
"""

import argparse
import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from grass.cli.values import UsageError
from grass.errors import ConfigError, GrassError, RunFolderError, did_you_mean

OK, FAILED, WRONG_USAGE = 0, 1, 2
STOPPED = 130  # as shells report a command that Ctrl-C ended
BROKEN_PIPE = 141  # as shells report a command whose reader has gone


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line that suggests what may have been meant, and whose options are spelt out."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)
        self.set_defaults(prog=self.prog)  # the innermost command's, for its errors
        self.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,  # a command's default would replace what was given before the command
            help="show the traceback of an error",
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments. An unknown option is an error of this parser, and comes before a missing one."""
        given = list(sys.argv[1:] if args is None else args)
        for text in given:
            option = text.split("=", 1)[0]
            if text == "--" or (self._subparsers is not None and not text.startswith("-")):
                break  # the rest is positional, or the command's
            if text.startswith("--") and " " not in text and option not in self._option_string_actions:
                suggestion = did_you_mean(option, self._option_string_actions)
                self.error(f"unrecognized arguments: {option}{suggestion}")
        return super().parse_known_args(given, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            suggestion = did_you_mean(value, action.choices or ())
            error.message = error.message.replace(repr(value), f"{value!r}{suggestion}", 1)
            raise

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
    os.environ.setdefault(
        "HF_HUB_DISABLE_TELEMETRY", "1"
    )  # of TRL, which a user of this command does not know of
    return run_command(make_parser(), argv)


def run_command(parser: Parser, argv: Sequence[str] | None) -> int:
    """Parse arguments and run what they ask for. An error is one line on stderr.

    Args:
        parser: with commands that set ``run``.
        argv: the arguments; those of the process if None.

    Returns:
        0 (ok), 1 (failed), 2 (wrong usage), 130 (Ctrl-C) or 141 (nothing reads stdout).
    """
    prog, debug = parser.prog, False
    try:
        try:
            arguments, unknown = parser.parse_known_args(argv)
            prog, debug = arguments.prog, "debug" in arguments
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
        return _report(prog, error, WRONG_USAGE, debug)
    except (GrassError, OSError) as error:
        return _report(prog, error, FAILED, debug)
    except KeyboardInterrupt as reason:
        return _report(prog, str(reason) or "stopped", STOPPED)


def _report(prog: str, error: object, code: int, debug: bool = False) -> int:
    hint = ""
    if isinstance(error, BaseException) and debug:
        traceback.print_exception(error)
    elif isinstance(error, BaseException) and error.__cause__ is not None:  # a library's
        hint = "--debug shows the traceback"
    lines = (" ".join(line.split()) for line in (*str(error).splitlines(), hint))
    print(f"{prog}: {'; '.join(filter(None, lines))}", file=sys.stderr)
    return code
