"""A reproduction from beginning to end: check, run what is missing, report."""

import hashlib
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
        f"{len(prepared.train):,} records to train on, {len(prepared.validation):,} to choose learning rates"
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
        count = prepared.num_wrong[task]
        wrong = f", {count:,} others are wrong" if count else ""
        outputs = f"log-loss of {len(prepared.tests[task]):,} outputs{wrong}"
        screen.say(f"{task}: {len(records):,} test records{limit}{note}; {outputs}")
    if data.absent:
        screen.say(f"tasks of the paper without files: {', '.join(data.absent)}")
    if prepared.num_cut:
        screen.say(
            f"the beginning of {prepared.num_cut:,} questions is cut, as the model has no more positions"
        )
    path = Path(options.output) / f"{options.table}.jsonl"
    settings = settings_of(options, config, weights_of(options.model), data.digests)
    _check_rows(path, settings)
    methods = as_tuple(options.methods)

    def jobs(rows: Sequence[Row]) -> list[Job]:
        return missing_jobs(
            rows, options.search, [(options.table, method, options.pairs) for method in methods]
        )

    run = partial(run_job, options, config, {**(origin or {}), "settings": digest_of(settings)})
    for row, left in run_missing(jobs, run, path, options.workers, 60 * options.minutes):
        screen.say(_line(row, left))
    return make_report(read_rows(path), options)


_FREE = {
    *("methods", "seeds", "workers", "threads", "minutes", "output", "data_dir"),
    *("micro_batch_size", "eval_batch_size", "activation_checkpointing"),
    *("offload", "buffer_mb", "buffer_count", "fused_backward"),
}
"""Options that may differ between pieces of a reproduction, since they do not change what is computed."""


def settings_of(
    options: ReproduceOptions, config: GrassConfig, weights: str, records: Mapping[str, str]
) -> dict[str, Any]:
    """Return all that rows must have in common to be compared, as JSON has it.

    Args:
        options: what is reproduced; the model is the name of its folder, which may be moved.
        config: configuration of the sampling of layers.
        weights: what tells the model's weights from others, of `weights_of`.
        records: digests of the training records and of each task's.
    """
    settings = {k: v for k, v in (asdict(options) | asdict(config)).items() if k not in _FREE}
    settings |= {"model": options.base, "weights": weights, "records": dict(records)}
    as_json: dict[str, Any] = json.loads(json.dumps(settings))  # tuples become lists
    return as_json


def digest_of(settings: Mapping[str, Any]) -> str:
    """Return a short digest of settings, which each row carries."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def weights_of(model: str) -> str:
    """Return the SHA-256 of the configuration and weights in a model's folder; a name on the hub as it is."""
    folder, digest = Path(model), hashlib.sha256()
    if not folder.is_dir():
        return model
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _check_rows(path: Path, settings: dict[str, Any]) -> None:
    """Check that all rows were made with these settings, and write the settings beside them.

    Raises:
        ConfigError: rows were made with others: another option, model or records.
    """
    file = path.with_suffix(".settings.json")
    if any(row.get("settings") != digest_of(settings) for row in read_rows(path)):
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else settings
        others = [name for name, value in settings.items() if before.get(name) != value]
        if not others:
            was = "other settings"
        elif others[0] in ("weights", "records"):
            was = f"other {others[0]}"
        else:
            was = f"--{others[0].replace('_', '-')} {before.get(others[0])}"
        raise ConfigError(f"{path.parent} has runs with {was}: pass another --output")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)


def _line(row: Row, left: int) -> str:
    loss = "diverged" if row["log_loss"] is None else f"log-loss {row['log_loss']:.4f}"
    return (
        f"{row['method']:<16}lr {row['lr']:<8g}order {row['order']:<5}{loss}  {row['seconds']:.0f} s, "
        f"at least {left} runs left"
    )
