"""A copy engine that records every operation, and which operations are sure to be over before it.

The order follows from few rules. A queue runs its operations one after another, and the host is a queue too. A queued
operation comes after all that the host has done and waited for by then. A wait for an event comes after the operations
in the event's queue when it was last recorded, and after those that this queue had waited for. Nothing else is
guaranteed: neither that a short copy is over, nor that the host is slower than the device.

`bench.offload.order` finds in the log what conflicts; `bench.offload.timeline` finds how long it takes.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor

from grass.offload.streams import HOST, CopyEngine, InlineEngine, Operation

Clock = Mapping[str, int]
"""By queue, how many of its operations are over: the first so many, since a queue keeps its order. None if missing."""

_INLINE = InlineEngine()


class Wait(NamedTuple):
    """One queue's wait for another.

    Args:
        queue: that waits.
        hazard: the reason, "H1" to "H11".
        source: the queue in which the event was last recorded.
        clock: what is over when the event has come.
        operations: how many there are in the log before the wait.
    """

    queue: str
    hazard: str
    source: str
    clock: Clock
    operations: int


class Entry(NamedTuple):
    """An operation in a log.

    Args:
        queue: that does it.
        position: in the queue, from 1.
        operation: what it does.
        before: what is over when it begins. Of its own queue that is all that comes earlier.
    """

    queue: str
    position: int
    operation: Operation
    before: Clock

    def follows(self, other: "Entry") -> bool:
        """Return True if the other one is over when this one begins."""
        return self.before.get(other.queue, 0) >= other.position


class Log(NamedTuple):
    """Operations that an engine was asked for, in that order.

    Args:
        entries: operations.
        waits: those that are in force.
    """

    entries: list[Entry]
    waits: list[Wait]


class Event:
    """A moment of a queue.

    Attributes:
        source: the queue.
        clock: what is over when the event has come.
        inner: the event of the engine that copies.
    """

    def __init__(self, source: str, clock: Clock, inner: Any) -> None:
        self.source, self.clock, self.inner = source, clock, inner


class RecordingEngine:
    """Record a log, and pass the work on to another engine.

    Args:
        inner: the engine that copies; None for no copies at all, as with tensors on the meta device.
        ignore: hazards whose waits are left out of the order as if nobody had written them, while the inner engine
            still keeps them: ``"H3"`` for all of a hazard, ``"H3:d2h"`` for those whose events are of one queue.

    Attributes:
        log: so far.
    """

    def __init__(self, inner: CopyEngine | None = _INLINE, ignore: Collection[str] = frozenset()) -> None:
        self._inner, self._ignore = inner, frozenset(ignore)
        self._clocks: defaultdict[str, dict[str, int]] = defaultdict(dict)
        self.log = Log([], [])

    def copy(
        self, queue: str, targets: Sequence[Tensor], sources: Sequence[Tensor], operation: Operation
    ) -> None:
        """See `CopyEngine`."""
        self._write_down(queue, operation)
        if self._inner is not None:
            self._inner.copy(queue, targets, sources, operation)

    def note(self, queue: str, operation: Operation) -> None:
        """See `CopyEngine`."""
        self._write_down(queue, operation)
        if self._inner is not None:
            self._inner.note(queue, operation)

    def on(self, queue: str) -> AbstractContextManager[Any]:
        """See `CopyEngine`."""
        return nullcontext() if self._inner is None else self._inner.on(queue)

    def record(self, queue: str, event: Any) -> Event:
        """See `CopyEngine`."""
        inner = None if event is None else event.inner
        if self._inner is not None:
            inner = self._inner.record(queue, inner)
        clock = dict(self._after_the_host(queue))
        if event is None:
            return Event(queue, clock, inner)
        event.source, event.clock, event.inner = queue, clock, inner
        return event

    def wait(self, queue: str, event: Any, hazard: str) -> None:
        """See `CopyEngine`."""
        if event is None:
            return
        if self._inner is not None:
            self._inner.wait(queue, event.inner, hazard)
        if self._ignore.isdisjoint((hazard, f"{hazard}:{event.source}")):
            self.log.waits.append(Wait(queue, hazard, event.source, event.clock, len(self.log.entries)))
            _join(self._after_the_host(queue), event.clock)

    def _write_down(self, queue: str, operation: Operation) -> None:
        clock = self._after_the_host(queue)
        before = dict(clock)
        clock[queue] = clock.get(queue, 0) + 1
        self.log.entries.append(Entry(queue, clock[queue], operation, before))

    def _after_the_host(self, queue: str) -> dict[str, int]:
        """The clock of a queue, for what is queued now: the host has come so far."""
        clock = self._clocks[queue]
        if queue != HOST:
            _join(clock, self._clocks[HOST])
        return clock


def _join(clock: dict[str, int], other: Clock) -> None:
    for queue, count in other.items():
        clock[queue] = max(clock.get(queue, 0), count)
