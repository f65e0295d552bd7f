"""Study A: which runs there are, which are missing, and running them. A row is a run."""

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import grass
from bench.kernels.rows import describe_environment
from bench.quality.methods import METHODS, make
from bench.quality.tasks import TASKS, Data
from bench.quality.training import Budget, base_model, fine_tune

Row = dict[str, Any]

RATES = (1e-3, 2e-3, 4e-3)
KEY = ("full", "uniform", "static", "grass", "shuffled")
"""Methods of the key contrast, of which most pairs are run."""
VALIDATION_BASES = (100, 101)
"""Bases on which learning rates are chosen; no result is of these."""


@dataclass(frozen=True)
class Job:
    """A run that is asked for.

    Args:
        task: name in `TASKS`.
        method: name in `METHODS`.
        lr: maximum learning rate.
        base: seed of the base model and of the problems.
        order: seed of the order of the data and of the method's draws.
    """

    task: str
    method: str
    lr: float
    base: int
    order: int

    def is_done_by(self, row: Row) -> bool:
        """Return True if a row is of this run."""
        return all(row[name] == value for name, value in asdict(self).items())


@dataclass(frozen=True)
class Design:
    """Size of the study.

    Args:
        bases: number of base models.
        orders: number of data orders on each base, for the methods of the key contrast.
        other_orders: the same for all other methods.
        second_orders: the same for the key contrast on the second task, on which no other method is run.
        budget: steps, batch and data of a run.
        methods: names of the methods.
    """

    bases: int = 4
    orders: int = 8
    other_orders: int = 2
    second_orders: int = 2
    budget: Budget = field(default_factory=Budget)
    methods: Sequence[str] = tuple(METHODS)

    def pairs(self, task: str, method: str) -> Iterator[tuple[int, int]]:
        """Yield base and order of each run of a method, first one order of every base."""
        if task == "arithmetic":
            orders = self.orders if method in KEY else self.other_orders
        else:
            orders = self.second_orders if method in KEY else 0
        for order in range(orders):
            for base in range(self.bases):
                yield base, order

    def jobs(self, rows: Sequence[Row]) -> list[Job]:
        """Return the runs that are missing and can be run: those of a method wait for its learning rate."""
        done = {_key(row) for row in rows}
        wanted: list[Job] = []
        for task in TASKS:
            for method in self.methods:
                if not any(True for _ in self.pairs(task, method)):
                    continue
                search = [Job(task, method, lr, base, 0) for lr in RATES for base in VALIDATION_BASES]
                missing = [job for job in search if _key(asdict(job)) not in done]
                lr = chosen_rate(rows, task, method)
                wanted += (
                    missing
                    if lr is None
                    else [Job(task, method, lr, *pair) for pair in self.pairs(task, method)]
                )
        missing = [job for job in wanted if _key(asdict(job)) not in done]
        return sorted(missing, key=lambda job: (job.task, job.order, job.method not in KEY))


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("task", "method", "lr", "base", "order"))


def chosen_rate(rows: Iterable[Row], task: str, method: str) -> float | None:
    """Return the rate with the lowest mean log-loss on the validation bases; None before all have been run."""
    losses: dict[float, list[float]] = {lr: [] for lr in RATES}
    for row in rows:
        if (
            (row["task"], row["method"]) == (task, method)
            and row["base"] in VALIDATION_BASES
            and row["lr"] in losses
        ):
            losses[row["lr"]].append(float("inf") if row["log_loss"] is None else row["log_loss"])
    if any(len(values) < len(VALIDATION_BASES) for values in losses.values()):
        return None
    return min(RATES, key=lambda lr: sum(losses[lr]))


def run_job(job: Job, budget: Budget, folder: Path) -> Row:
    """Run a job in this process, on one thread; return its row."""
    torch.set_num_threads(1)
    start = time.process_time()
    train, heldout = (Data(part) for part in TASKS[job.task](budget.train, budget.heldout, job.base))
    made = make(job.method, base_model(job.base, folder), train, job.order)
    trained = fine_tune(made.model, made.optimizer, train, heldout, job.lr, job.order, budget)
    row = asdict(job) | asdict(budget) | asdict(trained)
    row["log_loss"] = None if row["log_loss"] == float("inf") else row["log_loss"]  # JSON has no infinity
    environment = describe_environment(torch.device("cpu"))
    row |= {name: environment[name] for name in ("commit", "torch") if name in environment}
    return row | {"grass": grass.__version__, "processor_seconds": round(time.process_time() - start, 1)}


def run(design: Design, path: Path, folder: Path, workers: int, seconds: float) -> Iterator[tuple[Row, int]]:
    """Run what is missing, append each row to a file, and yield it with the number of runs that are known to be left.

    Args:
        design: the study.
        path: JSON lines; rows that are there are not run again.
        folder: keeps the base models.
        workers: number of processes.
        seconds: no run begins later.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, end = read_rows(path), time.monotonic() + seconds
    running: dict[Future[Row], Job] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        while True:
            waiting = [job for job in design.jobs(rows) if job not in running.values()]
            while waiting and len(running) < workers and time.monotonic() < end:
                job = waiting.pop(0)
                running[pool.submit(run_job, job, design.budget, folder)] = job
            if not running:
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                del running[future]
                row = future.result()
                rows.append(row)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row, allow_nan=False) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                yield row, len(design.jobs(rows))


def read_rows(path: Path) -> list[Row]:
    """Return all rows of a study; an empty list if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
