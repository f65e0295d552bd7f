"""`grass reproduce`: the paper's tables on a user's model and files."""

import argparse
import json
from typing import TYPE_CHECKING

from grass.cli.dataclass_options import add_dataclass_options, given_options
from grass.cli.values import MissingPackageError
from grass.config import GrassConfig

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_DESCRIPTION = """\
Fine-tune a model by every method of a table of the paper, and print that table beside the paper's.

Each method is first run at three learning rates or more, and evaluated on training records that were held out; then at
the best rate with several orders of the data, and evaluated on the test records. Finished runs are kept: stop it at any
time, and repeat the command to go on.
"""

_EXAMPLES = """\
example:
  grass reproduce --model ./TinyLlama --data-dir LLM-Adapters/dataset --table arithmetic --active-layers 2
"""


def add_parser(subparsers: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    # Its defaults are read from a class whose module needs no torch.
    from grass.reproduce.options import ReproduceOptions

    parser = subparsers.add_parser(
        "reproduce",
        help="run the paper's comparison of methods on your model and files",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    parser.add_argument("--json", action="store_true", help="print the table as one JSON object")
    add_dataclass_options(parser, "the study", ReproduceOptions)
    add_dataclass_options(parser, "sampling of layers (GrassConfig)", GrassConfig)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    from grass.reproduce.options import ReproduceOptions

    options = ReproduceOptions(**given_options(arguments, ReproduceOptions))
    config = GrassConfig(**given_options(arguments, GrassConfig))
    try:
        from grass.finetune.screen import Screen, quiet_libraries
        from grass.reproduce.job import reproduce
        from grass.reproduce.report import format_report
    except ImportError as error:
        raise MissingPackageError(f"{error}; install with: pip install 'grass-optim[reproduce]'") from error
    try:
        with quiet_libraries():
            report = reproduce(options, config, Screen())
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; finished runs are kept: repeat the command to go on") from None
    print(json.dumps(report) if arguments.json else format_report(report))
    return 0
