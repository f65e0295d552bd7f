"""Would catch: an order that is claimed though a run exists that breaks it, so that a race in the pipeline is called
safe; a safe program called a race; an event that stands for more, or less, than what its queue held when it was
last recorded; a log that changes what is computed.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.offload.order import conflicts
from bench.offload.recording import RecordingEngine
from grass.offload.streams import COMPUTE, D2H, H2D, HOST, Operation

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")

QUEUES = (H2D, D2H, COMPUTE, HOST, "another stream")


class Do(NamedTuple):
    queue: str
    reads: frozenset[str]
    writes: frozenset[str]


class Record(NamedTuple):
    queue: str
    event: int


class Wait(NamedTuple):
    queue: str
    event: int
    hazard: str


def record_program(program, ignore=frozenset()):
    engine, events = RecordingEngine(ignore=ignore), {}
    for number, action in enumerate(program):
        if isinstance(action, Do):
            operation = Operation("fetch", str(number), tuple(action.reads), tuple(action.writes))
            engine.note(action.queue, operation)
        elif isinstance(action, Record):
            events[action.event] = engine.record(action.queue, events.get(action.event))
        else:
            engine.wait(action.queue, events.get(action.event), action.hazard)
    return engine.log


class LazyMachine:
    """Runs a program as late as it can: a stream only moves when something that is needed waits for it.

    What it has not run when it is made to run an operation was not needed for that: an order of events that a real
    machine may take.
    """

    def __init__(self):
        self.streams = {queue: [] for queue in QUEUES}  # what is queued, in order
        self.moved = dict.fromkeys(QUEUES, 0)
        self.events = {}  # where it was last recorded: a stream, and how much was queued there
        self.over = set()

    def host(self, program, ignore):
        """Run a program on the host; yields when it has queued, or done, an operation."""
        for number, action in enumerate(program):
            if isinstance(action, Record):
                self.events[action.event] = (action.queue, len(self.streams[action.queue]))
            elif isinstance(action, Wait) and (action.event not in self.events or action.hazard in ignore):
                continue
            elif isinstance(action, Wait) and action.queue == HOST:
                self.move(*self.events[action.event])
            elif isinstance(action, Wait):
                self.streams[action.queue].append(self.events[action.event])
            elif action.queue == HOST:
                self.over.add(number)
                yield number
            else:
                self.streams[action.queue].append(number)
                yield number

    def move(self, queue, length):
        while self.moved[queue] < length:
            item = self.streams[queue][self.moved[queue]]
            self.moved[queue] += 1
            if isinstance(item, tuple):
                self.move(*item)
            else:
                self.over.add(item)


def can_overtake(program, first, second, ignore):
    """True if `second` can be run without `first`, in a program of which both are operations."""
    machine = LazyMachine()
    for number in machine.host(program, ignore):
        if number == second:
            queue = program[second].queue
            if queue != HOST:
                machine.move(queue, len(machine.streams[queue]))
            return first not in machine.over
    raise AssertionError("not in the program")


def conflicts_by_running(program, ignore=frozenset()):
    operations = [(n, action) for n, action in enumerate(program) if isinstance(action, Do)]
    return {
        (first, second)
        for first, a in operations
        for second, b in operations
        if first < second
        and (a.writes & (b.reads | b.writes) or a.reads & b.writes)
        and can_overtake(program, first, second, ignore)
    }


queues, memories = st.sampled_from(QUEUES), st.frozensets(st.sampled_from("ab"), max_size=2)
operations = st.builds(Do, queues, memories, memories)
programs = st.lists(
    st.one_of(
        operations,
        operations,
        st.builds(Record, queues, st.integers(0, 2)),
        st.builds(Wait, queues, st.integers(0, 2), st.sampled_from(["H1", "H2"])),
    ),
    max_size=16,
)


@settings(max_examples=400, deadline=None)
@given(programs, st.frozensets(st.sampled_from(["H1", "H2"]), max_size=1))
def test_conflicts_are_those_that_some_run_has(program, ignore):
    found = conflicts(record_program(program, ignore))
    numbers = [(int(c.first.operation.label), int(c.second.operation.label)) for c in found]
    assert len(numbers) == len(set(numbers))
    assert set(numbers) == conflicts_by_running(program, ignore)
    for conflict in found:
        assert any(conflict.memory in memories for memories in conflict.first.operation[2:4])
        assert any(conflict.memory in memories for memories in conflict.second.operation[2:4])


def do(queue, reads="", writes=""):
    return Do(queue, frozenset(reads), frozenset(writes))


FETCH, UPDATE, WRITE_BACK = do(H2D, "s", "b"), do(COMPUTE, "b", "b"), do(D2H, "b", "s")
FETCHED, UPDATED, WRITTEN = Record(H2D, 0), Record(COMPUTE, 1), Record(D2H, 2)
H1, H2, H3, H5 = Wait(COMPUTE, 0, "H1"), Wait(D2H, 1, "H2"), Wait(H2D, 2, "H3"), Wait(HOST, 2, "H5")
ROUND = [FETCH, FETCHED, H1, UPDATE, UPDATED, H2, WRITE_BACK, WRITTEN]


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        pytest.param(ROUND, set(), id="a round in order"),
        pytest.param([*ROUND, H3, *ROUND], set(), id="two rounds"),
        pytest.param([a for a in ROUND if a != H1], {(0, 2), (0, 5)}, id="an update that does not wait"),
        pytest.param([a for a in ROUND if a != H2], {(3, 5), (0, 5)}, id="a write-back that does not wait"),
        pytest.param([*ROUND, FETCH], {(3, 8), (6, 8)}, id="a fetch that does not wait"),
        pytest.param([*ROUND, H5, do(HOST, "s")], set(), id="a host that waits"),
        pytest.param([*ROUND, do(HOST, "s")], {(6, 8)}, id="a host that does not wait"),
        pytest.param([*ROUND, H5, FETCH], set(), id="a fetch queued when the host has waited"),
        pytest.param([do(HOST, "", "s"), FETCH], set(), id="a fetch of what the host wrote before"),
        pytest.param([FETCH, do(HOST, "", "s")], {(0, 1)}, id="a host that writes below a fetch"),
        pytest.param([do(H2D, "s", "b"), do(D2H, "s", "c")], set(), id="two that only read"),
        pytest.param([do(H2D, "", "b"), do(D2H, "", "b")], {(0, 1)}, id="two that only write"),
        pytest.param([FETCHED, FETCH, H1, UPDATE], {(1, 3)}, id="an event recorded too early"),
        pytest.param([FETCH, H1, FETCHED, UPDATE], {(0, 3)}, id="a wait before the event was recorded"),
        pytest.param(
            [FETCH, FETCHED, H1, do(H2D, "", "b"), FETCHED, UPDATE],
            {(3, 5)},
            id="an event recorded anew after the wait",
        ),
        pytest.param(
            [FETCH, FETCHED, Wait(D2H, 0, "H1"), Record(D2H, 1), Wait(COMPUTE, 1, "H1"), UPDATE],
            set(),
            id="a wait handed on by a queue that did nothing",
        ),
        pytest.param(
            [FETCH, FETCHED, Wait(HOST, 0, "H6"), Record(D2H, 1), Wait(COMPUTE, 1, "H1"), UPDATE],
            set(),
            id="an event recorded after the host has waited",
        ),
    ],
)
def test_known_programs(program, expected):
    assert conflicts_by_running(program) == expected
    found = conflicts(record_program(program))
    assert {(int(c.first.operation.label), int(c.second.operation.label)) for c in found} == expected


def test_a_hazard_can_be_ignored_by_the_queue_of_its_event():
    assert conflicts(record_program(ROUND, {"H1"}))
    assert conflicts(record_program(ROUND, {"H1:h2d"}))
    assert not conflicts(record_program(ROUND, {"H1:d2h", "H3"}))


def test_the_log_has_the_waits_that_are_in_force():
    log = record_program(ROUND, {"H2"})
    assert [(w.queue, w.hazard, w.source, w.clock[H2D], w.operations) for w in log.waits] == [
        (COMPUTE, "H1", H2D, 1, 1)
    ]


def test_a_conflict_says_where_and_between_whom():
    (conflict,) = conflicts(record_program([*ROUND, do(HOST, "s")]))
    assert str(conflict) == (
        "s: fetch 6 (number 1 of d2h, writes) and fetch 8 (number 1 of host, reads) are in no order"
    )


class Counting:
    """An inner engine that counts what reaches it."""

    def __init__(self):
        self.calls = []

    def copy(self, queue, targets, sources, operation):
        self.calls.append("copy")

    def note(self, queue, operation):
        self.calls.append("note")

    def record(self, queue, event):
        self.calls.append(f"record {event}")
        return 7

    def wait(self, queue, event, hazard):
        self.calls.append(f"wait {event}")


@pytest.mark.parametrize("ignore", [frozenset(), frozenset({"H1"})])
def test_the_inner_engine_is_asked_for_everything(ignore):
    inner = Counting()
    engine = RecordingEngine(inner, ignore)
    operation = Operation("fetch", "0.0", (), ())
    engine.copy(H2D, [], [], operation)
    event = engine.record(H2D, None)
    assert engine.record(H2D, event) is event
    engine.wait(COMPUTE, event, "H1")
    engine.wait(COMPUTE, None, "H1")
    engine.note(COMPUTE, operation)
    assert inner.calls == ["copy", "record None", "record 7", "wait 7", "note"]


def test_copies_are_made_unless_there_is_no_inner_engine():
    source, operation = torch.arange(3.0), Operation("fetch", "0.0", (), ())
    target = torch.zeros(3)
    RecordingEngine(None).copy(H2D, [target], [source], operation)
    assert target.tolist() == [0, 0, 0]
    RecordingEngine().copy(H2D, [target], [source], operation)
    assert target.tolist() == [0, 1, 2]
