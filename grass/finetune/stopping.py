"""Stopping on request: after Ctrl-C or SIGTERM, training ends with the current step and a checkpoint."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):  # noqa: N818  not an error
    """Training was stopped on request; the run can be continued."""


class StopRequest:
    """Request to stop, which the training loop checks after every step.

    Attributes:
        requested: True if the user has asked to stop.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def on_signals(self, announce: Callable[[str], None]) -> Iterator[None]:
        """Treat SIGINT and SIGTERM as requests inside the context; a second signal interrupts immediately.

        Args:
            announce: called with a line for the user.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread receives signals
            return

        def request(_number: int, _frame: FrameType | None) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True
            announce("stopping after this step (press Ctrl-C again to stop now, without a checkpoint)")

        before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
