"""Timeline: begin and end of each operation of a log, and a lower bound of any schedule.

A simulation of queues, not of a device: an operation begins when the previous one in its queue and all that it waits
for are over, the latter for the time of a hop, and the host is always far enough ahead. Copies in both directions share
the link by its duplex factor.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from bench.offload.recording import Log
from grass.offload.streams import D2H, H2D, Operation

Seconds = Callable[[Operation], float]
"""Time of an operation that is not a copy, in seconds."""

_SAME_TIME = 1e-12  # of the shortest rest: sums of floats that mean the same moment


class Link(NamedTuple):
    """The link between host and device.

    Args:
        h2d, d2h: bandwidth of each direction alone, in bytes per second.
        duplex_factor: share of it for each direction while both copy: 1 if they are independent, 0.5 if they take
            turns.
    """

    h2d: float
    d2h: float
    duplex_factor: float = 1.0

    def rate(self, queue: str, *, both: bool) -> float:
        """Bytes a second of a direction."""
        return (self.h2d if queue == H2D else self.d2h) * (self.duplex_factor if both else 1.0)

    def least_seconds(self, h2d_bytes: float, d2h_bytes: float) -> float:
        """Return the least time of copies, however they are arranged."""
        shorter, longer = sorted((h2d_bytes / self.h2d, d2h_bytes / self.d2h))
        if self.duplex_factor <= 0.5:
            return shorter + longer  # one after the other is as fast as both at once, or faster
        return shorter / self.duplex_factor + (longer - shorter)


class Span(NamedTuple):
    """Begin and end of an operation.

    Args:
        queue: queue of the operation.
        operation: operation.
        start, end: times in seconds.
    """

    queue: str
    operation: Operation
    start: float
    end: float


class Timeline(NamedTuple):
    """The times in which all operations of a log ran.

    Args:
        spans: in the order of the log.
        floor: seconds that no schedule of the same operations could beat: the longest of compute, of the host, and of
            the copies.
    """

    spans: tuple[Span, ...]
    floor: float

    @property
    def makespan(self) -> float:
        """Seconds from the beginning to the end of the last operation."""
        return max((span.end for span in self.spans), default=0.0)

    @property
    def busy(self) -> defaultdict[str, float]:
        """Seconds in which each queue was at work."""
        return busy_seconds(self.spans)


def busy_seconds(spans: Iterable[Span]) -> defaultdict[str, float]:
    """Seconds in which each queue was at work."""
    totals: defaultdict[str, float] = defaultdict(float)
    for span in spans:
        totals[span.queue] += span.end - span.start
    return totals


def floor_seconds(operations: Iterable[tuple[str, Operation]], link: Link, seconds: Seconds) -> float:
    """Return a lower bound of the time of any schedule: every queue runs one operation at a time.

    Args:
        operations: operations with their queues.
        link: link for the time of copies.
        seconds: function for the time of other operations.
    """
    totals: defaultdict[str, float] = defaultdict(float)
    for queue, operation in operations:
        totals[queue] += operation.num_bytes if queue in (H2D, D2H) else seconds(operation)
    copies = link.least_seconds(totals.pop(H2D, 0.0), totals.pop(D2H, 0.0))
    return max([copies, *totals.values()])


def simulate(log: Log, link: Link, seconds: Seconds, hop: float = 0.0) -> Timeline:
    """Run a log against the clock.

    Args:
        log: of a `RecordingEngine`.
        link: for operations on `H2D` and `D2H`, by their bytes.
        seconds: for all others.
        hop: seconds from the end of an operation to the beginning of one that waits for it in another queue.
    """
    waiting: defaultdict[str, list[int]] = defaultdict(list)  # numbers of its operations, by queue
    for number, entry in enumerate(log.entries):
        waiting[entry.queue].append(number)
    over = dict.fromkeys(waiting, 0)
    rest: dict[str, float] = {}  # of what runs now: bytes of a copy, or seconds
    starts, ends = [0.0] * len(log.entries), [0.0] * len(log.entries)
    now = 0.0
    hopping: dict[str, float] = {}  # queues whose next operation begins at this time

    def begin_what_can() -> None:
        hopping.clear()
        for queue, numbers in waiting.items():
            if queue not in rest and over[queue] < len(numbers):
                number = numbers[over[queue]]
                entry = log.entries[number]
                others = [(other, count) for other, count in entry.before.items() if other != queue and count]
                if all(over.get(other, 0) >= count for other, count in others):
                    earliest = max(
                        (ends[waiting[other][count - 1]] + hop for other, count in others), default=0.0
                    )
                    if earliest > now:
                        hopping[queue] = earliest
                        continue
                    starts[number] = now
                    is_copy = queue in (H2D, D2H)
                    rest[queue] = entry.operation.num_bytes if is_copy else seconds(entry.operation)

    begin_what_can()
    while rest or hopping:
        both = H2D in rest and D2H in rest
        rates = {queue: link.rate(queue, both=both) if queue in (H2D, D2H) else 1.0 for queue in rest}
        passing = min(rest[queue] / rates[queue] for queue in rest) if rest else math.inf
        hopped = min(hopping.values(), default=math.inf)
        if hopped < now + passing:
            passing, now = hopped - now, hopped
        else:
            now += passing
        for queue in list(rest):
            if rest[queue] / rates[queue] <= passing * (1 + _SAME_TIME):
                del rest[queue]
                ends[waiting[queue][over[queue]]] = now
                over[queue] += 1
            else:
                rest[queue] -= passing * rates[queue]
        begin_what_can()
    assert all(over[queue] == len(numbers) for queue, numbers in waiting.items())  # later waits for earlier
    spans = tuple(
        Span(entry.queue, entry.operation, start, end)
        for entry, start, end in zip(log.entries, starts, ends, strict=True)
    )
    return Timeline(spans, floor_seconds(((e.queue, e.operation) for e in log.entries), link, seconds))
