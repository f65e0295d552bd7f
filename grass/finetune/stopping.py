"""Stopping on request: Ctrl-C and SIGTERM end training after the step in hand, with a checkpoint."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):  # noqa: N818  a request that was fulfilled, not an error
    """Training was stopped on request; the run folder can be continued."""


class StopRequest:
    """Whether the user has asked to stop; the training loop looks at it after every step."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def on_signals(self, announce: Callable[[str], None]) -> Iterator[None]:
        """Take SIGINT and SIGTERM as a request while the block runs; a second one interrupts at once.

        Args:
            announce: shows a line to the user.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread receives signals
            return

        def request(_number: int, _frame: FrameType | None) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True
            announce("stopping after this step (again: at once, without a checkpoint)")

        before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
