"""A reproduction from beginning to end: check, run what is missing, report."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grass.config import GrassConfig
from grass.errors import ConfigError, did_you_mean
from grass.finetune.model import check_model
from grass.finetune.options import as_tuple
from grass.finetune.run_folder import read_rows, write_json
from grass.finetune.screen import Screen
from grass.reproduce.methods import METHODS
from grass.reproduce.options import ReproduceOptions
from grass.reproduce.report import make_report
from grass.reproduce.study import Job, Row, missing_jobs, run_missing
from grass.reproduce.tables import read_table
from grass.reproduce.training import run_job


def reproduce(options: ReproduceOptions, config: GrassConfig, screen: Screen) -> dict[str, Any]:
    """Run what is missing of a reproduction; return its report.

    Args:
        options: what is reproduced.
        config: configuration of the sampling of layers.
        screen: shows progress.

    Raises:
        ConfigError: a method is unknown, needs a package, or does not fit the model; the model is no folder of one; or
            the output has runs with other settings.
        DataError: a file is missing or malformed.
    """
    methods = as_tuple(options.methods)
    for method in methods:
        if method not in METHODS:
            raise ConfigError(
                f"there is no method {method!r}{did_you_mean(method, METHODS)}; there are {', '.join(METHODS)}"
            )
    check_model(options.model)
    _check_methods(methods, options, config)
    data = read_table(Path(options.data_dir), options.table, as_tuple(options.tasks), options.validation)
    screen.say(f"{len(data.train):,} records to train on, {len(data.validation):,} to choose learning rates")
    if data.num_skipped:
        screen.say(f"{data.num_skipped:,} training records cannot be used and are left out")
    for task, records in data.tests.items():
        shared = data.shared[task]
        note = f"; {shared:,} others are among the training records" if shared else ""
        screen.say(f"{task}: {len(records):,} test records{note}")
    if data.absent:
        screen.say(f"tasks of the paper without files: {', '.join(data.absent)}")
    path = Path(options.output) / f"{options.table}.jsonl"
    _check_settings(path.with_suffix(".settings.json"), options, config)

    def jobs(rows: Sequence[Row]) -> list[Job]:
        return missing_jobs(
            rows, options.search, [(options.table, method, options.pairs) for method in methods]
        )

    run = partial(run_job, options, config)
    for row, left in run_missing(jobs, run, path, options.workers, 60 * options.minutes):
        screen.say(_line(row, left))
    return make_report(read_rows(path), options)


def _check_methods(methods: Sequence[str], options: ReproduceOptions, config: GrassConfig) -> None:
    """Make each optimizer for the model without its weights, so that what cannot work is known before the first run."""
    for method in methods:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model))
        METHODS[method](model, config.for_run(options.steps))


_FREE = (
    "methods",
    "seeds",
    "workers",
    "threads",
    "minutes",
    "micro_batch_size",
    "output",
    "model",
    "data_dir",
)
"""Options that may differ between pieces of a reproduction; rows have the name of the model."""


def _check_settings(path: Path, options: ReproduceOptions, config: GrassConfig) -> None:
    """Write the settings beside the rows; rows of other settings are not comparable.

    Raises:
        ConfigError: the rows that are there were made with other settings.
    """
    settings = {k: v for k, v in asdict(options).items() if k not in _FREE} | asdict(config)
    settings = json.loads(json.dumps(settings))  # tuples become lists
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if before.get(name, value) != value:
                raise ConfigError(
                    f"{path.parent} has runs with --{name.replace('_', '-')} {before[name]}, not {value}: pass another "
                    "--output"
                )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def _line(row: Row, left: int) -> str:
    loss = "diverged" if row["log_loss"] is None else f"log-loss {row['log_loss']:.4f}"
    return (
        f"{row['method']:<16}lr {row['lr']:<8g}order {row['order']:<5}{loss}  {row['seconds']:.0f} s, "
        f"at least {left} runs left"
    )
