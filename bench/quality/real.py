"""Study B: `grass reproduce` on SmolLM2-135M-Instruct, small enough for a CPU.

Weights are float32, since bfloat16 is ten times slower on processors without instructions for it (AVX512-BF16). A step
takes 2 to 5 s on a core, and a table one to two and a half hours of two cores.
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from grass.config import GrassConfig
from grass.errors import GrassError
from grass.finetune.run_folder import read_rows
from grass.reproduce.job import digest_of, settings_of
from grass.reproduce.options import ReproduceOptions, TableName
from grass.reproduce.report import make_report, results_of

METHODS: dict[TableName, tuple[str, ...]] = {
    "arithmetic": ("full", "lora-r8", "uniform", "static", "static-top", "grass", "shuffled", "remeasured"),
    "commonsense": ("full", "uniform", "static", "grass", "shuffled", "remeasured"),
}
TASKS: dict[TableName, tuple[str, ...]] = {
    "arithmetic": ("MultiArith", "AddSub", "SingleEq", "SVAMP"),
    "commonsense": ("ARC-Easy", "openbookqa"),
}
STEPS, BATCH, CONTEXT, RECORDS, SEEDS = 80, 4, 96, 50, 3
STAGES = tuple(STEPS * quarter // 4 for quarter in range(4))
"""Steps of a run after which norms are measured."""
VALIDATION: dict[TableName, int] = {"arithmetic": 200, "commonsense": 50}
"""Of which those that are not longer than the context choose the rates: a quarter in arithmetic."""
GUESSED: dict[TableName, int] = {"commonsense": 25}
"""Percentage of guesses that are right, of tasks with options."""
NEW_TOKENS: dict[TableName, int] = {"arithmetic": 96, "commonsense": 16}
CONFIG = GrassConfig(active_layers=6, probe_steps=10, sample_interval=10, update_interval=10)
"""A fifth of 30 layers. Importance is refreshed before each draw: in short runs `grass` would else be `static`."""


def options_for(
    table: TableName, model: str, data_dir: str, output: str, workers: int, minutes: float
) -> ReproduceOptions:
    """Return the options of study B."""
    return ReproduceOptions(
        model=model,
        data_dir=data_dir,
        table=table,
        tasks=TASKS[table],
        methods=METHODS[table],
        seeds=SEEDS,
        rates=("1e-4", "2e-4", "4e-4"),
        steps=STEPS,
        search_steps=STEPS // 2,
        batch_size=BATCH,
        context=CONTEXT,
        template="plain",
        dtype="float32",
        validation=VALIDATION[table],
        eval_limit=RECORDS,
        eval_batch_size=RECORDS,
        max_new_tokens=NEW_TOKENS[table],
        workers=workers,
        threads=1,
        minutes=minutes,
        output=output,
    )


class Report(NamedTuple):
    """A table of study B.

    Attributes:
        methods: report of each method, as of `make_report`; empty without rows.
        differences: of each other method, the differences GRASS - method of log-loss and of average accuracy in
            points, for each order of the data that both finished.
        num_examples: number of training records that are short enough.
        hours: time of all runs on two cores.
        edges: methods whose best learning rate is the smallest or the largest that was tried.
    """

    methods: dict[str, Any]
    differences: dict[str, list[tuple[float, float]]]
    num_examples: int
    hours: float
    edges: list[str]


def report_of(folder: Path, name: TableName) -> Report:
    """Return a table of study B, from its rows and the file of their settings.

    Raises:
        GrassError: the rows were made with other settings than `options_for` gives.
    """
    rows = read_rows(folder / f"{name}.jsonl")
    if not rows:
        return Report({}, {}, 0, 0.0, [])
    settings = json.loads((folder / f"{name}.settings.json").read_text(encoding="utf-8"))
    options = options_for(name, settings["model"], "data", "", 1, 1.0)
    expected = settings_of(options, CONFIG, settings["weights"], settings["records"])
    if settings != expected or {row["settings"] for row in rows} != {digest_of(settings)}:
        raise GrassError(
            f"the rows of {name} were made with other settings than those of `bench.quality real`: remove "
            f"{folder / name}.jsonl and its settings, and run it again"
        )
    methods: dict[str, Any] = make_report(rows, options)["methods"]
    values = {
        method: {
            row["order"]: (row["log_loss"], 100 * mean(row["accuracies"].values()))
            for row in results_of(rows, options, method)[1]
            if row["log_loss"] is not None
        }
        for method in methods
    }
    grass = values.pop("grass")
    differences = {
        method: [
            (grass[order][0] - loss, grass[order][1] - accuracy)
            for order, (loss, accuracy) in of.items()
            if order in grass
        ]
        for method, of in values.items()
    }
    hours = sum(row["seconds"] for row in rows) / 3600 / 2
    edges = [
        method
        for method, of in methods.items()
        if (losses := options.search.losses(rows, name, method, [options.base]))
        and of["lr"] in (min(losses), max(losses))
    ]
    return Report(methods, differences, rows[0]["num_examples"], hours, edges)
