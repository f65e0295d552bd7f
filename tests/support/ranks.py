"""Processes that train together: each is a rank of a gloo process group on the CPU, and runs what it is sent."""

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class RankError(AssertionError):
    """A function failed on a rank, or did not end in time."""


class RankPool:
    """A process group that lives over several tests. After a failure the next run starts new processes.

    Args:
        size: number of processes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.processes: list[Any] = []
        self._connections: list[Connection] = []

    def _start(self) -> None:
        context = get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="grass-ranks-")
        store = Path(self._folder.name) / "store"
        for rank in range(self.size):
            own, other = context.Pipe()
            process = context.Process(target=_serve, args=(other, rank, self.size, str(store)), daemon=True)
            process.start()
            other.close()
            self.processes.append(process)
            self._connections.append(own)

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = 240) -> list[Any]:
        """Return what ``function(*args)`` returns on each rank.

        Args:
            function: a function of a module.
            seconds: time after which the processes are stopped.

        Raises:
            RankError: an error on a rank, with its traceback, or no answer in time.
        """
        answers = self.run_all(function, *args, seconds=seconds, waits=False)
        errors = [answer for answer in answers if isinstance(answer, RankError)]
        if errors:
            raise max(errors, key=lambda error: len(str(error)))
        return answers

    def run_all(
        self, function: Callable[..., Any], *args: Any, seconds: float = 240, waits: bool = True
    ) -> list[Any]:
        """Return what ``function(*args)`` returns on each rank, a `RankError` where it fails.

        Args:
            function, seconds: as for `run`.
            waits: after an error on one rank, wait for the others, too.
        """
        if not all(process.is_alive() for process in self.processes):  # killed between two runs
            self.stop()
        if not self.processes:
            self._start()
        for connection in self._connections:
            connection.send((function, args))
        found: dict[int, Any] = {}
        end = time.monotonic() + seconds
        while len(found) < self.size:
            left = {c: rank for rank, c in enumerate(self._connections) if rank not in found}
            has_failed = any(isinstance(answer, RankError) for answer in found.values())
            patience = 0.5 if has_failed and not waits else end - time.monotonic()
            ready = wait(list(left), timeout=max(0.0, patience))
            if not ready:
                found |= {rank: RankError(f"rank {rank}: no answer") for rank in left.values()}
            for connection in ready:
                rank = left[connection]
                try:
                    is_ok, answer = connection.recv()
                except EOFError:
                    is_ok, answer = False, "the process has died"
                found[rank] = answer if is_ok else RankError(f"rank {rank}: {answer}")
        if any(isinstance(answer, RankError) for answer in found.values()):
            self.stop()
        return [found[rank] for rank in range(self.size)]

    def stop(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        if self.processes:
            self._folder.cleanup()
        self.processes, self._connections = [], []


def _serve(connection: Connection, rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            answer = True, function(*args)
        except Exception:
            answer = False, traceback.format_exc()
        connection.send(answer)
