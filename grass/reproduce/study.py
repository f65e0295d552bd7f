"""A study: runs of several methods, each at its own best learning rate, on the same models and orders of the data.

A row describes a finished run and is a line of a file. What is missing is found by reading the rows, so a study can be
stopped at any time, and continued in any number of pieces.
"""

import math
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread
from typing import Any

from grass.errors import GrassError, first_line
from grass.finetune.run_folder import append_row, read_rows, write_rows

Row = dict[str, Any]
Pair = tuple[int | str, int]
"""A base model and the seed of an order of the data. Methods are compared on the same pairs."""


@dataclass(frozen=True)
class Job:
    """A run that is asked for.

    Args:
        task: name of the task.
        method: name of the method.
        lr: maximum learning rate.
        base: name or seed of the model that is fine-tuned.
        order: seed of the order of the data and of the method's draws.
    """

    task: str
    method: str
    lr: float
    base: int | str
    order: int


@dataclass(frozen=True)
class Search:
    """Search for the learning rate of a method, the same on all bases: a mean over bases has less noise.

    Args:
        rates: rates that are tried first, ascending, each twice the one before.
        orders: seeds of orders of the data of the search, which no result uses. Such runs are evaluated on validation
            records.
        factor: if the best rate is the smallest or the largest, the next half or double is tried as well, up to this
            factor below or above `rates`.
    """

    rates: Sequence[float]
    orders: Sequence[int]
    factor: float = 8.0

    def losses(
        self, rows: Iterable[Row], task: str, method: str, bases: Iterable[int | str]
    ) -> dict[float, float]:
        """Return the mean log-loss of each rate that was run on all bases and orders; infinity if a run diverged."""
        wanted = {(base, order) for base in bases for order in self.orders}
        values: dict[float, dict[Pair, float]] = {}
        for row in rows:
            pair = (row["base"], row["order"])
            if (row["task"], row["method"]) == (task, method) and pair in wanted:
                loss = float("inf") if row["log_loss"] is None else row["log_loss"]
                values.setdefault(row["lr"], {})[pair] = loss
        return {lr: sum(of.values()) / len(of) for lr, of in sorted(values.items()) if of.keys() == wanted}

    def next_rates(
        self, rows: Iterable[Row], task: str, method: str, bases: Iterable[int | str]
    ) -> tuple[float | None, list[float]]:
        """Return the chosen rate and no others, or None and the rates that have to be tried before."""
        losses = self.losses(rows, task, method, bases)
        missing = [lr for lr in self.rates if lr not in losses]
        if missing:
            return None, missing
        best = min(losses, key=lambda lr: losses[lr])
        if best == min(losses) and best > self.rates[0] / self.factor:
            return None, [best / 2]
        if best == max(losses) and best < self.rates[-1] * self.factor:
            return None, [best * 2]
        return best, []


def missing_jobs(
    rows: Sequence[Row],
    search: Search,
    wanted: Iterable[tuple[str, str, Iterable[Pair]]],
    rate_of: Callable[[str], str] = lambda method: method,
) -> list[Job]:
    """Return the runs that are missing and can be run now: those of a method wait for its learning rate.

    Args:
        rows: finished runs.
        search: how rates are chosen.
        wanted: task, method and pairs.
        rate_of: the method whose rate a method uses.

    Returns:
        First the runs of searches, one rate of all bases after the other, then one order after the other.
    """
    done = {Job(row["task"], row["method"], row["lr"], row["base"], row["order"]) for row in rows}
    searches: dict[Job, None] = {}  # sets in order
    results: dict[Job, None] = {}
    for task, method, pairs in wanted:
        orders: dict[int | str, list[int]] = {}
        for base, order in pairs:
            orders.setdefault(base, []).append(order)
        lr, rates = search.next_rates(rows, task, rate_of(method), orders)
        tried = [(rate, base, order) for rate in rates for base in orders for order in search.orders]
        searches |= {Job(task, rate_of(method), *job): None for job in tried}
        if lr is not None:
            results |= {Job(task, method, lr, base, order): None for base in orders for order in orders[base]}
    jobs = [*sorted(searches, key=lambda job: job.lr), *sorted(results, key=lambda job: job.order)]
    return [job for job in jobs if job not in done]


def run_missing(
    jobs: Callable[[Sequence[Row]], Sequence[Job]],
    run_job: Callable[[Job], Row],
    path: Path,
    workers: int = 1,
    seconds: float = float("inf"),
) -> Iterator[tuple[Row, int]]:
    """Run what is missing, append each row to a file, and yield it with the number of runs known to be left.

    After an error no further run begins; those of other processes are finished and kept, and then it is raised.

    Args:
        jobs: returns what is missing, in the order in which it is to be run.
        run_job: executes a run in a process of its own, and returns what to add to the row.
        path: JSON lines.
        workers: number of processes.
        seconds: no run begins later.

    Raises:
        GrassError: a run failed, or its process was killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, end = read_rows(path), time.monotonic() + seconds
    if path.exists():  # a row that was being written when the process was killed is incomplete
        write_rows(path, rows)
    idle: list[_Worker] = []
    running: dict[Any, tuple[_Worker, Job]] = {}  # by connection
    failure: GrassError | None = None
    try:
        while True:
            busy = {job for _, job in running.values()}
            waiting = [job for job in jobs(rows) if job not in busy]
            while waiting and len(running) < workers and time.monotonic() < end and failure is None:
                worker, job = idle.pop() if idle else _Worker(run_job), waiting.pop(0)
                worker.connection.send(job)
                running[worker.connection] = worker, job
            if not running:
                if failure is not None:
                    raise failure
                return
            for connection in wait(list(running)):
                worker, job = running.pop(connection)
                try:
                    result = worker.connection.recv()
                except EOFError:
                    result = GrassError(
                        f"the process of a run of {job.method} was killed; if memory is short, pass fewer --workers "
                        "(or to grass reproduce a smaller --micro-batch-size), "
                        "and repeat the command: finished runs are kept"
                    )
                if isinstance(result, GrassError):
                    failure = failure or result
                    continue
                idle.append(worker)
                row = asdict(job) | result
                if row["log_loss"] is not None and not math.isfinite(row["log_loss"]):
                    row["log_loss"] = None
                rows.append(row)
                append_row(path, row)
                yield row, len(jobs(rows))
    finally:
        for worker in [*idle, *(worker for worker, _ in running.values())]:
            worker.process.terminate()
            worker.process.join()


class _Worker:
    """Process that executes runs, one after the other, and ends when this process ends.

    Args:
        run_job: executes a run.

    Attributes:
        process: the process.
        connection: takes a job, and gives what the run returned, or a `GrassError`.
    """

    def __init__(self, run_job: Callable[[Job], Row]) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, run_job), daemon=True)
        # Ctrl-C reaches all processes of a terminal: this one alone is to act on it. The setting is inherited.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        theirs.close()


def _serve(connection: Connection, run_job: Callable[[Job], Row]) -> None:
    """Execute jobs until the other end of the connection is closed."""
    Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, BrokenPipeError):
        while True:
            job = connection.recv()
            try:
                result: Row | GrassError = run_job(job)
            except Exception as error:
                # Exceptions of libraries may not unpickle, and would end the process that waits for them.
                result = error if isinstance(error, GrassError) else _failed(job, error)
                result.add_note(traceback.format_exc())  # shown with --debug
            connection.send(result)


def _failed(job: Job, error: Exception) -> GrassError:
    return GrassError(
        f"a run of {job.method} failed ({type(error).__name__}: {first_line(error)}); finished runs are kept: repeat "
        "the command to go on, with --debug for the traceback"
    )


def _end_with_parent() -> None:
    """End this process when the one that started it ends, even if that was killed: a run may take hours."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
