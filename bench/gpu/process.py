"""A command with a time limit: its output goes to a file, and its rows are copied while it runs."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_POLL = 0.1  # seconds
_GRACE = 5.0
"""Seconds between being asked to stop and being stopped: time for pytest to write its report."""


class Ended(NamedTuple):
    """The end of a command."""

    returncode: int
    killed: bool  # at its limit
    seconds: float


class RowTail:
    """Copy complete lines of a growing file to another.

    Args:
        source: file to read, which may not exist yet; None has no lines.
        target: file to append to.
    """

    def __init__(self, source: Path | None, target: Path) -> None:
        self._source, self._target = source, target
        self._read = 0
        self.lines = 0

    def pass_on(self) -> None:
        """Copy new lines."""
        if self._source is None or not self._source.exists():
            return
        with self._source.open("rb") as source:
            source.seek(self._read)
            new = source.read()
        end = new.rfind(b"\n") + 1
        if end:
            with self._target.open("ab") as target:
                target.write(new[:end])
            self._read += end
            self.lines += new[:end].count(b"\n")


def run(
    command: Sequence[str],
    *,
    log: Path,
    limit: float,
    cwd: Path,
    environment: Mapping[str, str],
    rows: RowTail,
) -> Ended:
    """Run a command to its end, or to its limit.

    Args:
        command: command line, run in its own process group.
        log: file for its output.
        limit: time limit in seconds.
        cwd: working directory.
        environment: all environment variables.
        rows: rows that are copied while it runs.
    """
    start = time.monotonic()
    killed = False
    with log.open("wb") as out:
        with _heeding_interrupts():
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=cwd,
                env=dict(environment), start_new_session=True,
            )  # fmt: skip
        try:
            while process.poll() is None:
                rows.pass_on()
                if time.monotonic() - start > limit:
                    killed = True
                    break
                time.sleep(_POLL)
        finally:
            _stop(process)
            rows.pass_on()
    return Ended(process.wait(), killed, time.monotonic() - start)


@contextlib.contextmanager
def _heeding_interrupts() -> Iterator[None]:
    """Have the started process react to SIGINT, also where this one ignores it (as behind a shell's ``&``)."""
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process group: first with a signal that it can handle, then by force."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # nobody is left
            break
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
