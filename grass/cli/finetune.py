"""`grass finetune`: the main job. Without arguments, the built-in demo."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grass.cli.dataclass_options import add_dataclass_options, given_options
from grass.cli.values import MissingPackageError, UsageError, model_name
from grass.config import GrassConfig
from grass.errors import DataError, GrassError, LayerDiscoveryError, did_you_mean, first_line
from grass.finetune.data import check_source
from grass.finetune.options import FinetuneOptions, as_tuple
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
  grass finetune --model ./my-llama --data openai/gsm8k:main --eval openai/gsm8k:main:test --report-to tensorboard
  grass finetune --config run.yaml --lr 5e-5
  grass finetune --resume runs/2026-01-31-120000

A configuration file is YAML or JSON with the names of options (sample_interval: 25). The run.json of an earlier run is
one, too: it runs again what that run did. Options on the command line take precedence.
"""


def add_parser(subparsers: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "finetune",
        usage="grass finetune [--model MODEL --data DATA] [options]\n       grass finetune --resume RUN_DIR",
        help="fine-tune a model (without arguments: a demo that needs no network)",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    parser.add_argument("--resume", metavar="RUN_DIR", help="continue a stopped run with its saved settings")
    parser.add_argument(
        "--config", metavar="FILE", help="read options from a YAML or JSON file, or a run.json"
    )
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")
    add_dataclass_options(parser, "the run", FinetuneOptions, types={"model": model_name})
    seed = "random seed of the order of the data, the choice of held-out records, and the draws of layers"
    add_dataclass_options(parser, "the method (GrassConfig)", GrassConfig, {"seed": seed})
    parser.set_defaults(run=lambda arguments: run(arguments, parser))


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the command; the exit code."""
    given = given_options(arguments, FinetuneOptions)
    given_config = given_options(arguments, GrassConfig)
    if arguments.config is not None:
        if arguments.resume is not None:
            raise UsageError("--resume continues with the saved settings; leave out --config")
        in_file = _parse_config(Path(arguments.config), parser)
        # The command line has the last word, also where an option excludes another.
        for one, other in (("steps", "epochs"), ("eval", "eval_fraction")):
            if given.keys() & {one, other}:
                in_file = {name: value for name, value in in_file.items() if name not in (one, other)}
        fields = {field.name for field in dataclasses.fields(GrassConfig)}
        given = {name: value for name, value in in_file.items() if name not in fields} | given
        given_config = {name: value for name, value in in_file.items() if name in fields} | given_config
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
        for source in (*as_tuple(options.data), *as_tuple(options.eval)):
            check_source(source)
    except DataError as error:
        raise UsageError(str(error)) from None
    try:
        from grass.finetune.screen import Screen, quiet_libraries

        with quiet_libraries():
            results = _run_job(arguments.resume, given, options, config, Screen())
    except ImportError as error:
        raise MissingPackageError(f"{error}; install with: pip install 'grass-optim[finetune]'") from error
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


def _parse_config(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return the options of a configuration file, parsed as those of a command line."""
    prog, parser.prog = parser.prog, f"{parser.prog} --config {path}"  # for errors
    try:
        namespace = parser.parse_args(read_config(path))
    finally:
        parser.prog = prog
    return given_options(namespace, FinetuneOptions) | given_options(namespace, GrassConfig)


def read_config(path: Path) -> list[str]:
    """Return the options of a configuration file as arguments of the command line, which checks them.

    Args:
        path: a YAML or JSON file: an object with names of options, or a ``run.json``, of which the folder is left out.

    Raises:
        UsageError: it cannot be read, or is no such object.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML, too
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not valid YAML or JSON: {first_line(error)}") from None
    if isinstance(content, dict) and "options" in content and "config" in content:
        saved = {**content["options"], **content["config"], "output": ""}
        if saved["steps"] is not None:
            del saved["epochs"]
        content = {name: value for name, value in saved.items() if value != ""}
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: expected names of options with values, such as lr: 2e-5")
    fields = (*dataclasses.fields(FinetuneOptions), *dataclasses.fields(GrassConfig))
    known = [field.name for field in fields]
    for name in content:
        if name not in known:
            raise UsageError(f"--config {path}: there is no option {name!r}{did_you_mean(name, known)}")
    return [argument for name, value in content.items() for argument in _arguments(str(name), value)]


def _arguments(name: str, value: Any) -> list[str]:
    """Return an option as arguments of the command line; none if it has no value."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, list):
        return [argument for element in value for argument in _arguments(name, element)]
    return [] if value is None else [f"{flag}={value}"]


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
