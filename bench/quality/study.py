"""Study A: which runs there are, and running one. A row is a run."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import grass
from bench.kernels.rows import describe_environment
from bench.quality.methods import METHODS, RULES, SETTINGS, make
from bench.quality.tasks import TASKS, Data
from bench.quality.training import Budget, base_model, digest, fine_tune
from grass.errors import GrassError
from grass.reproduce.study import Job, Pair, Row, Search, missing_jobs

BUDGETS = {"arithmetic": Budget(steps=500), "relations": Budget(steps=900)}
"""Budgets with which full fine-tuning answers 40 to 90 % exactly."""
KEY = ("full", "uniform", "static", "grass", "shuffled")
"""Methods of the key contrast, of which most pairs are run."""
ALTERNATIVES = ("remeasured", "static-top")
"""Methods of the library that follow the rules that helped: run on the pairs of the key contrast."""
FURTHER = (*ALTERNATIVES, "remeasured-shuffled", "lowest")
"""These with two controls, permuted layers and the lowest ones, always: run on other bases and on the second task."""
FIXED = (
    "lowest", "highest", "signal-top", "noisy-top", "first-top", "progress-top", "decrease-top", "tau-0.05",
    "positions",
)  # fmt: skip
"""Rules and settings that may train the same layers for long, and so have learning rates of their own."""
CHOSEN = ("lowest", "signal-squared", "signal-top")
"""Rules that were run again on other bases, since the best of many on two bases look better than they are."""
SUGGESTED = ("noisy-top", "noisy-squared", "first-top", "tau-0.05", "static-top")
"""Rules and settings that the results of the others suggested, some on the bases on which they were run."""
REMOVED = ("reprobe", "reprobe-20")
"""Settings that did not help, and whose code is gone: their rows are compared, and not run again."""
SEARCH = Search(rates=(2e-3, 4e-3, 8e-3), orders=(1000,))
"""Learning rates are chosen by a run on each base of a part."""


def rate_of(method: str) -> str:
    """Return the method whose learning rate a method uses: its own, but for drawn rules and for settings."""
    if method in FIXED:
        return method
    if method in RULES:
        return "uniform"
    return "grass" if method in (*SETTINGS, *REMOVED) else method


@dataclass(frozen=True)
class Part:
    """Methods that are compared with each other, all on the same bases and orders.

    Bases are trained on the machine that runs a part, so a part is run by one machine.

    Args:
        task: name in `TASKS`.
        methods: names in `NAMES`.
        bases: seeds of the base models.
        orders: number of data orders on each base.
    """

    task: str
    methods: Sequence[str]
    bases: Sequence[int]
    orders: int

    @property
    def pairs(self) -> list[Pair]:
        """Base and order of each run of a method, first one order of every base."""
        return [(base, order) for order in range(self.orders) for base in self.bases]


@dataclass(frozen=True)
class Design:
    """The study.

    Args:
        parts: what is compared, the most decisive first.
        budgets: steps, batch and data of a run of each task.
    """

    parts: Mapping[str, Part]
    budgets: Mapping[str, Budget] = field(default_factory=lambda: BUDGETS)

    def matching(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows of runs with this study's budgets."""
        budgets = {task: asdict(budget).items() for task, budget in self.budgets.items()}
        return [
            row
            for row in rows
            if row["task"] in budgets and all(row[k] == v for k, v in budgets[row["task"]])
        ]

    def jobs(self, rows: Sequence[Row]) -> list[Job]:
        """Return the runs that are missing and can be run. Rows of other budgets do not count."""
        rows = self.matching(rows)
        wanted = [(part.task, method, part.pairs) for part in self.parts.values() for method in part.methods]
        return missing_jobs(rows, SEARCH, wanted, rate_of)


NEW_RULES = ("update", "hopeful-progress", "diminishing")
"""Rules that were added when the others had been run."""
UNITS = ("grass-floor", "uniform-inside", "grass-inside")
"""Methods that train nothing outside of the layers, or each layer with a floor."""
MODULES = ("modules-uniform", "modules-grass")
"""Methods that train modules of layers."""
CONTROLS = ("static-top-shuffled", "positions")
"""Controls that tell whether the norms matter, or that few layers train, or that these are the lowest ones."""
AGAIN = (*FURTHER, *CONTROLS, "progress-top")
"""Methods that helped and their controls, run on more bases, with a rule whose first runs were incomplete."""
OTHERS = tuple(name for name in METHODS if name not in (*KEY, *FURTHER, *UNITS, *MODULES, *CONTROLS))
STUDY = Design(
    {
        "key": Part("arithmetic", (*KEY, *ALTERNATIVES), range(4), orders=8),
        "relations": Part("relations", (*KEY, *FURTHER), range(4), orders=2),
        "further": Part("arithmetic", ("uniform", "grass", *FURTHER), range(50, 54), orders=2),
        "methods": Part(
            "arithmetic",
            ("full", "uniform", "grass", *OTHERS, "unseen", *NEW_RULES),
            range(10, 14),
            orders=2,
        ),
        "units": Part("arithmetic", ("uniform", "grass", *UNITS), range(60, 64), orders=2),
        "again": Part(
            "arithmetic", ("uniform", "cyclic", "grass", "shuffled", *AGAIN), range(70, 74), orders=2
        ),
        "rules": Part(
            "arithmetic",
            (
                "uniform",
                "grass",
                *(
                    n
                    for n in RULES
                    if n not in (*SUGGESTED, *NEW_RULES, *CONTROLS, "progress-top", "signal-top")
                ),
            ),
            range(20, 22),
            orders=4,
        ),
        "settings": Part(
            "arithmetic",
            (
                *("uniform", "grass", "static", "shuffled", "grass-inside", "lora-r32"),
                *MODULES,
                *(name for name in SETTINGS if name not in SUGGESTED),
            ),
            range(80, 84),
            orders=2,
        ),
        "first-settings": Part(
            "arithmetic",
            ("grass", *(name for name in SETTINGS if name not in (*SUGGESTED, "ahead-0"))),
            range(40, 44),
            orders=2,
        ),
        "confirmation": Part(
            "arithmetic", ("uniform", "grass", *CHOSEN, *SUGGESTED), range(30, 34), orders=4
        ),
    }
)
SMALL = Design(
    {
        "key": Part("arithmetic", KEY, range(2), orders=2),
        "rules": Part("arithmetic", ("cyclic", "signal-top", "tau-2"), range(2), orders=1),
    },
    {"arithmetic": Budget(steps=60)},
)
"""A study of less than ten minutes on two cores, too small to decide anything."""


def problems(task: str, budget: Budget, base: int, *, is_search: bool) -> tuple[Data, Data]:
    """Return the training problems of a base, and its held-out ones: for a search others than for results."""
    train, heldout = TASKS[task](budget.train, 2 * budget.heldout, seed=base)
    part = heldout[budget.heldout :] if is_search else heldout[: budget.heldout]
    return Data(train), Data(part)


@dataclass(frozen=True)
class RunJob:
    """Function that executes a run in this process, on one thread.

    Args:
        budgets: size of a run of each task.
        folder: keeps the base models.
        begun: digest of the base model with which runs of a task and base began; others may begin with any.
        environment: of the command, which began with this code.
    """

    budgets: Mapping[str, Budget]
    folder: Path
    begun: Mapping[tuple[str, int], str] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=lambda: describe_environment(torch.device("cpu")))

    def __call__(self, job: Job) -> Row:
        """Return the result of a run with its settings and origin.

        Raises:
            GrassError: the base model is not the one with which other runs began.
        """
        torch.set_num_threads(1)
        base, budget = int(job.base), self.budgets[job.task]
        model = base_model(base, self.folder)
        base_digest = digest(model)
        if self.begun.get((job.task, base), base_digest) != base_digest:
            raise GrassError(
                f"base model {base} in {self.folder} is not the one with which other runs on {job.task} began, and "
                "cannot be trained again on another machine: pass the folder of that one as --bases, or new --rows"
            )
        start = time.process_time()
        train, heldout = problems(job.task, budget, base, is_search=job.order in SEARCH.orders)
        optimizer = make(job.method, model, train, seed=1000 * base + job.order)
        trained = fine_tune(model, optimizer, train, heldout, job.lr, job.order, budget)
        return {
            "base_digest": base_digest,
            **asdict(budget),
            **asdict(trained),
            **{name: self.environment[name] for name in ("commit", "dirty", "device", "torch")},
            **{name: version(name) for name in ("transformers", "peft", "galore-torch")},
            "grass": grass.__version__,
            "processor_seconds": round(time.process_time() - start, 1),
        }
