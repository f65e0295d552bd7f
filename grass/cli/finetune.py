"""`grass finetune`: the main job. Without arguments, the built-in demo."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grass.cli.dataclass_options import add_dataclass_options, given_options
from grass.cli.values import MissingPackageError, UsageError, input_file, model_name
from grass.config import GrassConfig
from grass.errors import GrassError, LayerDiscoveryError, first_line
from grass.finetune.options import FinetuneOptions
from grass.finetune.run_folder import RunFolder, check_is_free

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_DESCRIPTION = """\
Fine-tune a causal language model by GRASS: all weights of a few layers at a time, chosen by their gradients.

Without --model and --data it runs a demo that needs no network: a small Llama learns plain sums, is then
fine-tuned on arithmetic word problems, and is evaluated on held-out ones. All other options apply to it too.
"""

_EXAMPLES = """\
examples:
  grass finetune
  grass finetune --model ./my-llama --data train.jsonl --eval heldout.jsonl --active-layers 4 --lr 2e-5
  grass finetune --resume runs/2026-01-31-120000
"""


def add_parser(subparsers: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "finetune",
        usage="grass finetune [--model MODEL --data FILE] [options]\n       grass finetune --resume RUN_DIR",
        help="fine-tune a model (without arguments: a demo that needs no network)",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    parser.add_argument("--resume", metavar="RUN_DIR", help="continue a stopped run with its saved settings")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")
    types = {"model": model_name, "data": input_file, "eval": input_file}
    add_dataclass_options(parser, "the run", FinetuneOptions, types=types)
    seed = "random seed of the order of the data, the choice of held-out records, and the draws of layers"
    add_dataclass_options(parser, "the method (GrassConfig)", GrassConfig, {"seed": seed})
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    given = given_options(arguments, FinetuneOptions)
    given_config = given_options(arguments, GrassConfig)
    if arguments.resume is not None and (given or given_config):
        first = next(iter({**given, **given_config})).replace("_", "-")
        raise UsageError(f"--resume continues with the saved settings; leave out --{first}")
    if given.get("eval_fraction") and not given.get("data"):
        raise UsageError("--eval-fraction needs --model and --data as well")
    if given.get("steps") and given.get("epochs"):
        raise UsageError("--steps and --epochs exclude each other: pass one of them")
    # What can be wrong is told before torch and transformers are imported.
    config = GrassConfig(**given_config)
    options = FinetuneOptions(**given)
    if arguments.resume is not None:
        RunFolder.open(Path(arguments.resume))
    elif options.output:
        check_is_free(Path(options.output))
    try:
        from grass.finetune.screen import Screen, quiet_libraries

        with quiet_libraries():
            results = _run_job(arguments.resume, given, options, config, Screen())
    except ImportError as error:
        raise MissingPackageError(
            f"{error}; install with: pip install 'grass-optim[transformers]'"
        ) from error
    except LayerDiscoveryError as error:
        if options.pattern:
            raise UsageError(f"--pattern: {error}") from None
        raise
    except RuntimeError as error:
        import torch

        if not isinstance(error, torch.OutOfMemoryError):
            raise
        raise GrassError(
            f"{first_line(error)} Pass a smaller --batch-size or --context, or --offload; `grass plan` predicts the "
            "memory"
        ) from error
    from grass.finetune.summary import format_table

    print(json.dumps(results) if arguments.json else f"\n{format_table(results)}\n\nrun: {results['run']}")
    return 0


def _run_job(
    resume: str | None, given: dict[str, Any], options: FinetuneOptions, config: GrassConfig, screen: Any
) -> dict[str, Any]:
    from grass.finetune.demo import DEMO_OPTIONS
    from grass.finetune.job import resume_run, start_run
    from grass.finetune.stopping import Stopped

    try:
        if resume is not None:
            return resume_run(Path(resume), screen)
        if options.is_demo:
            options = dataclasses.replace(DEMO_OPTIONS, **given)
        return start_run(options, config, screen, command=sys.argv)
    except Stopped as reason:
        raise KeyboardInterrupt(str(reason)) from None
