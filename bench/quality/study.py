"""Study A: which runs there are, and running one. A row is a run."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import grass
from bench.kernels.rows import describe_environment
from bench.quality.methods import NAMES, RULES, SETTINGS, make
from bench.quality.tasks import TASKS, Data
from bench.quality.training import Budget, base_model, digest, fine_tune
from grass.reproduce.study import Job, Pair, Row, Search, missing_jobs

BUDGETS = {"arithmetic": Budget(steps=400), "relations": Budget(steps=600)}
"""Budgets with which full fine-tuning answers 40 to 90 % exactly."""
KEY = ("full", "uniform", "static", "grass", "shuffled")
"""Methods of the key contrast, of which most pairs are run."""
SEARCH = Search(rates=(1e-3, 2e-3, 4e-3), pairs=((100, 0), (101, 0)))
"""Learning rates are chosen on base models of their own; no result is of these."""


def rate_of(method: str) -> str:
    """Return the method whose learning rate a method uses: rules and settings change the choice of layers only."""
    return "uniform" if method in RULES else "grass" if method in SETTINGS else method


@dataclass(frozen=True)
class Design:
    """Size of the study.

    Args:
        bases: number of base models.
        orders: number of data orders on each base, for the methods of the key contrast.
        other_orders: the same for all other methods.
        second_orders: the same for the key contrast on the second task, on which no other method is run.
        budgets: steps, batch and data of a run of each task.
        methods: names of the methods.
    """

    bases: int = 4
    orders: int = 8
    other_orders: int = 2
    second_orders: int = 2
    budgets: Mapping[str, Budget] = field(default_factory=lambda: BUDGETS)
    methods: Sequence[str] = NAMES

    def pairs(self, task: str, method: str) -> list[Pair]:
        """Return base and order of each run of a method, first one order of every base."""
        if task == "arithmetic":
            orders = self.orders if method in KEY else self.other_orders
        else:
            orders = self.second_orders if method in KEY else 0
        return [(base, order) for order in range(orders) for base in range(self.bases)]

    def jobs(self, rows: Sequence[Row]) -> list[Job]:
        """Return the runs that are missing and can be run, the most decisive ones first."""
        wanted = [
            (task, method, pairs)
            for task in TASKS
            for method in self.methods
            if (pairs := self.pairs(task, method))
        ]
        jobs = missing_jobs(rows, SEARCH, wanted, rate_of)
        return sorted(jobs, key=self._rank)

    def _rank(self, job: Job) -> tuple[bool, ...]:
        is_key = job.method in KEY
        is_late = job.order >= self.other_orders
        return is_late, not is_key, job.task != "arithmetic", job.method in RULES or job.method in SETTINGS


@dataclass(frozen=True)
class RunJob:
    """Function that executes a run in this process, on one thread.

    Args:
        budgets: size of a run of each task.
        folder: keeps the base models.
    """

    budgets: Mapping[str, Budget]
    folder: Path

    def __call__(self, job: Job) -> Row:
        """Return what the run found."""
        torch.set_num_threads(1)
        base, budget = int(job.base), self.budgets[job.task]
        model = base_model(base, self.folder)
        start = time.process_time()
        train, heldout = (Data(part) for part in TASKS[job.task](budget.train, budget.heldout, seed=base))
        base_digest = digest(model)
        optimizer = make(job.method, model, train, seed=1000 * base + job.order)
        trained = fine_tune(model, optimizer, train, heldout, job.lr, job.order, budget)
        environment = describe_environment(torch.device("cpu"))
        return {
            "base_digest": base_digest,
            **asdict(budget),
            **asdict(trained),
            **{name: environment[name] for name in ("commit", "dirty", "device", "torch")},
            "grass": grass.__version__,
            "processor_seconds": round(time.process_time() - start, 1),
        }
