"""Order: finds operations of a log that could access the same memory at the same time.

Two operations conflict if both touch a memory, at least one of them writes there, and neither is sure to be over
when the other begins. A log without conflicts has one result, however fast copies, updates and the host are.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from bench.offload.recording import Entry, Log


class Conflict(NamedTuple):
    """Two operations that could meet.

    Args:
        first, second: as they were asked for.
        memory: where they meet; the first name in the alphabet if there are several.
    """

    first: Entry
    second: Entry
    memory: str

    def __str__(self) -> str:
        first, second = (_describe(entry, self.memory) for entry in (self.first, self.second))
        return f"{self.memory}: {first} and {second} are in no order"


def conflicts(log: Log) -> list[Conflict]:
    """The pairs of operations that conflict, in the order of the second.

    Nothing that is asked for later can be over before what was asked for earlier: events are recorded before they are
    waited for. So of each pair one direction is looked at.

    Args:
        log: of a `RecordingEngine`.
    """
    readers: defaultdict[str, list[int]] = defaultdict(list)
    writers: defaultdict[str, list[int]] = defaultdict(list)
    found = []
    for number, second in enumerate(log.entries):
        met: dict[int, str] = {}
        for memory, others in _opponents(second, readers, writers):
            for other in others:
                if not second.follows(log.entries[other]):
                    met[other] = min(memory, met.get(other, memory))
        found += [Conflict(log.entries[other], second, met[other]) for other in sorted(met)]
        for memory in second.operation.reads:
            readers[memory].append(number)
        for memory in second.operation.writes:
            writers[memory].append(number)
    return found


def _opponents(
    entry: Entry, readers: dict[str, list[int]], writers: dict[str, list[int]]
) -> Iterator[tuple[str, list[int]]]:
    """Memories that an operation touches, with those before it that it must not meet there."""
    for memory in entry.operation.reads:
        yield memory, writers[memory]
    for memory in entry.operation.writes:
        yield memory, writers[memory]
        yield memory, readers[memory]


def _describe(entry: Entry, memory: str) -> str:
    does = "writes" if memory in entry.operation.writes else "reads"
    name = f"{entry.operation.kind} {entry.operation.label}".strip()
    return f"{name} (number {entry.position} of {entry.queue}, {does})"
