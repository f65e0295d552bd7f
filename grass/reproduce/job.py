"""A reproduction from beginning to end: check, run what is missing, report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from grass.config import GrassConfig
from grass.errors import ConfigError
from grass.finetune.options import as_tuple
from grass.finetune.run_folder import read_rows, write_json
from grass.finetune.screen import Screen
from grass.reproduce.options import ReproduceOptions
from grass.reproduce.preparation import check_methods, prepare
from grass.reproduce.report import make_report
from grass.reproduce.study import Job, Row, missing_jobs, run_missing
from grass.reproduce.training import run_job


def reproduce(
    options: ReproduceOptions, config: GrassConfig, screen: Screen, origin: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Run what is missing of a reproduction; return its report.

    Args:
        options: what is reproduced.
        config: configuration of the sampling of layers.
        screen: shows progress.
        origin: what to add to each row, such as a commit.

    Raises:
        ConfigError: a method is unknown, needs a package, or does not fit the model; the model is no folder of one; or
            the output has runs with other settings.
        DataError: a file is missing or malformed.
    """
    check_methods(options, config)
    prepared = prepare(options)
    data = prepared.data
    screen.say(
        f"{len(prepared.train):,} records to train on, {len(data.validation):,} to choose learning rates"
    )
    if data.num_skipped:
        screen.say(f"{data.num_skipped:,} training records cannot be used and are left out")
    if prepared.num_long:
        screen.say(
            f"{prepared.num_long:,} longer than {prepared.encoder.context} tokens are left out (--context)"
        )
    for task, records in data.tests.items():
        shared = data.shared[task]
        note = f"; {shared:,} others are among the training records" if shared else ""
        limit = f", {options.eval_limit:,} are used" if len(records) > options.eval_limit else ""
        screen.say(f"{task}: {len(records):,} test records{limit}{note}")
    if data.absent:
        screen.say(f"tasks of the paper without files: {', '.join(data.absent)}")
    if prepared.num_cut:
        screen.say(
            f"the beginning of {prepared.num_cut:,} questions is cut, as the model has no more positions"
        )
    path = Path(options.output) / f"{options.table}.jsonl"
    _check_settings(path, options, config, data.digests)
    methods = as_tuple(options.methods)

    def jobs(rows: Sequence[Row]) -> list[Job]:
        return missing_jobs(
            rows, options.search, [(options.table, method, options.pairs) for method in methods]
        )

    run = partial(run_job, options, config, origin or {})
    for row, left in run_missing(jobs, run, path, options.workers, 60 * options.minutes):
        screen.say(_line(row, left))
    return make_report(read_rows(path), options)


_FREE = {
    *("methods", "seeds", "workers", "threads", "minutes", "output", "data_dir"),
    *("micro_batch_size", "eval_batch_size", "activation_checkpointing"),
    *("offload", "buffer_mb", "buffer_count", "fused_backward"),
}
"""Options that may differ between pieces of a reproduction, since they do not change what is computed."""


def _check_settings(
    path: Path, options: ReproduceOptions, config: GrassConfig, digests: dict[str, str]
) -> None:
    """Write the settings beside the rows; rows of other settings are not comparable.

    Raises:
        ConfigError: the rows that are there were made with other settings, another model or other records.
    """
    settings = {k: v for k, v in (asdict(options) | asdict(config)).items() if k not in _FREE}
    if Path(options.model).exists():
        settings["model"] = str(Path(options.model).resolve())
    settings = json.loads(json.dumps(settings | {"records": digests}))  # tuples become lists
    file = path.with_suffix(".settings.json")
    if file.exists() and read_rows(path):
        before = json.loads(file.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if before.get(name) != value:
                was = (
                    "other records" if name == "records" else f"--{name.replace('_', '-')} {before.get(name)}"
                )
                raise ConfigError(f"{path.parent} has runs with {was}: pass another --output")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)


def _line(row: Row, left: int) -> str:
    loss = "diverged" if row["log_loss"] is None else f"log-loss {row['log_loss']:.4f}"
    return (
        f"{row['method']:<16}lr {row['lr']:<8g}order {row['order']:<5}{loss}  {row['seconds']:.0f} s, "
        f"at least {left} runs left"
    )
