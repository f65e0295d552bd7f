"""A command with a time limit, and its growing files: what it has written is passed on while it runs."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

GRACE = 5.0
"""Seconds between being asked to stop and being stopped: time for pytest to write what failed."""
MOST_BYTES = 15 * 2**20
"""Of a file that is passed on to: what comes later is left out."""
HEAD_BYTES, LAST_BYTES = 512 * 2**10, 128 * 2**10
"""Of the output of one command: its beginning, and its end."""

# A group of its own, to be stopped with all that it has started; not a session, which would outlive this process where
# a machine ends the processes of the session that it runs.
_OWN_GROUP: dict[str, Any] = (
    {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
)


class RowTail:
    """Pass on complete lines of a growing file; half a line, where its writer was killed, is dropped.

    Args:
        source: file to read, which may not exist yet.
        target: file to append to.
    """

    def __init__(self, source: Path, target: Path) -> None:
        self._source, self._target = source, target
        self._read = 0
        self.lines = 0

    def pass_on(self) -> None:
        """Pass on new lines."""
        new = self._new()
        end = new.rfind(b"\n") + 1
        if end:
            self._read += end
            lines = new[:end].splitlines(keepends=True)
            self.lines += len(lines)
            self._append(lines)

    def end(self) -> None:
        """Pass on the last lines."""
        self.pass_on()

    def _new(self) -> bytes:
        if not self._source.exists():
            return b""
        with self._source.open("rb") as source:
            source.seek(self._read)
            return source.read()

    def _append(self, lines: Sequence[bytes]) -> None:
        text = b"".join(lines)
        size = self._target.stat().st_size if self._target.exists() else 0
        if text and size + len(text) <= MOST_BYTES:
            with self._target.open("ab") as target:
                target.write(text)


class LogTail(RowTail):
    """Pass on the output of a command, each line after the command's name: of a long output its beginning and its end.

    Args:
        source: file to read, which may not exist yet.
        target: file to append to.
        name: of the command.
    """

    def __init__(self, source: Path, target: Path, name: str) -> None:
        super().__init__(source, target)
        self._prefix = f"{name}| ".encode()
        self._written = self._kept_bytes = 0
        self._kept: deque[bytes] = deque()
        self._left_out = 0
        self.last_line = ""

    def end(self) -> None:
        """Pass on the last lines, and half a line too."""
        super().end()
        rest = self._new()
        if rest:
            self._append([rest + b"\n"])
        if self._left_out:
            super()._append([self._prefix + f"... {self._left_out} lines left out ...\n".encode()])
        super()._append(self._kept)

    def _append(self, lines: Sequence[bytes]) -> None:
        head = []
        for line in lines:
            if line.strip():
                self.last_line = line.decode(errors="replace").strip()
            marked = self._prefix + line
            if not self._kept and self._written + len(marked) <= HEAD_BYTES:
                self._written += len(marked)
                head.append(marked)
                continue
            self._kept.append(marked)
            self._kept_bytes += len(marked)
            while self._kept_bytes > LAST_BYTES:
                self._kept_bytes -= len(self._kept.popleft())
                self._left_out += 1
        super()._append(head)


class Process:
    """A command that runs, to its end or to its limit.

    Args:
        command: command line, run in its own process group.
        log: file for its output.
        cwd: working directory.
        environment: all environment variables.
        deadline: after which it is stopped, on `clock`.
        clock: seconds that pass.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        cwd: Path,
        environment: Mapping[str, str],
        deadline: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock, self._deadline = clock, deadline
        self.killed = False
        self._asked = 0.0
        self._start = time.monotonic()
        with log.open("wb") as out, _heeding_interrupts():
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=cwd,
                env=dict(environment), **_OWN_GROUP,
            )  # fmt: skip

    def has_ended(self) -> bool:
        """Return if it has ended, and stop it if its time is over: first with a signal that it can handle."""
        if self._process.poll() is not None:
            self._signal(signal.SIGKILL)  # what it has started and left behind
            return True
        now = time.monotonic()
        if not self.killed and self._clock() > self._deadline:
            self.killed, self._asked = True, now
            self._signal(signal.SIGINT)
        elif self.killed and now > self._asked + GRACE:
            self._signal(signal.SIGKILL)
        return False

    def stop(self) -> None:
        """End it at once."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    @property
    def returncode(self) -> int:
        """Exit code; negative is the number of a signal."""
        return self._process.wait()

    @property
    def seconds(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._start

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # nobody is left
            os.killpg(self._process.pid, number)


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
