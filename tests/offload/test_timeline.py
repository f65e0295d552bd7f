"""Would catch: a step predicted shorter than its queues have work, or than an order that must hold allows; copies of
both directions that cost nothing to each other on a link where they do; a faster link that predicts a slower step.
"""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bench.offload.recording import RecordingEngine
from bench.offload.timeline import Link, simulate
from grass.offload.streams import COMPUTE, D2H, H2D, HOST, Operation

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")


class Writer:
    """Makes logs: operations of given sizes, each waiting for events by name."""

    def __init__(self):
        self.engine, self.events, self.seconds = RecordingEngine(None), {}, {}

    def do(self, queue, name, size, after=()):
        """`size` is bytes of a copy, seconds of anything else."""
        for other in after:
            self.engine.wait(queue, self.events[other], "H1")
        is_copy = queue in (H2D, D2H)
        operation = Operation("fetch", name, (), (), size if is_copy else 0)
        self.engine.copy(queue, [], [], operation)
        self.seconds[name] = size
        self.events[name] = self.engine.record(queue, None)

    def run(self, link, hop=0.0):
        return simulate(self.engine.log, link, lambda operation: self.seconds[operation.label], hop)


def times(timeline):
    return {span.operation.label: (span.start, span.end) for span in timeline.spans}


def ring_of_two(count):
    """`count` units of 10 bytes through two buffers, with updates of 1 second."""
    writer = Writer()
    for i in range(count):
        writer.do(H2D, f"f{i}", 10, [f"w{i - 2}"] if i >= 2 else [])
        writer.do(COMPUTE, f"u{i}", 1, [f"f{i}"])
        writer.do(D2H, f"w{i}", 10, [f"u{i}"])
    return writer


def test_a_ring_of_two_by_hand():
    timeline = ring_of_two(3).run(Link(10.0, 5.0))
    assert times(timeline) == {
        "f0": (0, 1),
        "u0": (1, 2),
        "w0": (2, 4),
        "f1": (1, 2),
        "u1": (2, 3),
        "w1": (4, 6),
        "f2": (4, 5),
        "u2": (5, 6),
        "w2": (6, 8),
    }
    assert timeline.makespan == 8
    assert timeline.busy == {H2D: 3, COMPUTE: 3, D2H: 6}
    assert timeline.floor == 6  # of the write-backs


def test_a_hop_comes_before_what_waits_for_another_queue_by_hand():
    writer = Writer()
    writer.do(H2D, "in", 10)
    writer.do(H2D, "next in", 10)  # follows at once: the same queue
    writer.do(COMPUTE, "update", 1, ["in"])
    writer.do(D2H, "out", 10, ["update"])
    writer.do(COMPUTE, "late", 1, ["in"])  # its event has come long ago
    timeline = writer.run(Link(10.0, 10.0), hop=0.25)
    assert times(timeline) == {
        "in": (0, 1),
        "next in": (1, 2),
        "update": (1.25, 2.25),
        "out": (2.5, 3.5),
        "late": (2.25, 3.25),
    }


def test_two_copies_share_the_link_by_hand():
    writer = Writer()
    writer.do(H2D, "in", 10)
    writer.do(COMPUTE, "before", 0.5)
    writer.do(D2H, "out", 10, ["before"])
    timeline = writer.run(Link(10.0, 10.0, duplex_factor=0.5))
    # Half a second alone, 5 of 10 bytes; the other 5 take 1 second beside "out", which then has 5 left, alone.
    assert times(timeline) == {"in": (0, 1.5), "before": (0, 0.5), "out": (0.5, 2.0)}
    assert timeline.floor == 2


def test_what_compute_takes_is_a_floor():
    writer = Writer()
    writer.do(H2D, "in", 10)
    writer.do(COMPUTE, "a", 3)
    writer.do(COMPUTE, "b", 4)
    timeline = writer.run(Link(10.0, 10.0))
    assert (timeline.floor, timeline.makespan) == (7, 7)


def test_an_empty_log_takes_no_time():
    timeline = Writer().run(Link(1.0, 1.0))
    assert (timeline.makespan, timeline.floor) == (0, 0)


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        (Link(10.0, 10.0), 3.0),
        (Link(10.0, 5.0), 4.0),
        (Link(10.0, 10.0, 0.8), 2 / 0.8 + 1),  # both at once for the shorter, the rest alone
        (Link(10.0, 10.0, 0.5), 5.0),
        (Link(10.0, 10.0, 0.3), 5.0),  # better one after the other
    ],
)
def test_what_copies_take_at_least(link, expected):
    assert link.least_seconds(30, 20) == pytest.approx(expected)


sizes = st.sampled_from([0, 1, 2, 3, 5, 8, 13])
steps = st.lists(
    st.tuples(st.sampled_from([H2D, D2H, COMPUTE]), sizes, st.sets(st.integers(0, 30), max_size=3)),
    min_size=1,
    max_size=24,
)
rates = st.sampled_from([0.5, 1.0, 3.0, 7.0])
factors = st.sampled_from([0.3, 0.5, 0.7, 1.0])


def written(program):
    writer = Writer()
    for number, (queue, size, others) in enumerate(program):
        writer.do(queue, str(number), size, [str(other) for other in others if other < number])
    return writer


@settings(max_examples=200, deadline=None)
@given(steps, rates, rates, factors)
def test_every_order_is_kept_and_no_floor_broken(program, h2d, d2h, factor):
    writer = written(program)
    link = Link(h2d, d2h, factor)
    timeline = writer.run(link)
    assert timeline.makespan >= timeline.floor * (1 - 1e-9)
    entries = writer.engine.log.entries
    for j, second in enumerate(timeline.spans):
        for i, first in enumerate(timeline.spans[:j]):
            if entries[j].follows(entries[i]):
                assert second.start >= first.end
    for span in timeline.spans:
        if span.queue == COMPUTE:
            assert span.end - span.start == pytest.approx(writer.seconds[span.operation.label])
        else:
            alone = span.operation.num_bytes / link.rate(span.queue, both=False)
            assert alone * (1 - 1e-9) <= span.end - span.start <= alone / factor * (1 + 1e-9)


@settings(max_examples=200, deadline=None)
@given(steps, rates, rates)
def test_directions_that_do_not_share_go_by_the_longest_path(program, h2d, d2h):
    writer = written(program)
    link = Link(h2d, d2h)
    ends: dict[int, float] = {}
    last: dict[str, int] = {}
    for number, (queue, size, others) in enumerate(program):
        before = [ends[other] for other in others if other < number]
        if queue in last:
            before.append(ends[last[queue]])
        taken = size if queue == COMPUTE else size / link.rate(queue, both=False)
        ends[number] = max(before, default=0.0) + taken
        last[queue] = number
    found = {int(label): end for label, (_, end) in times(writer.run(link)).items()}
    assert found == pytest.approx(ends)


@settings(max_examples=100, deadline=None)
@given(steps, rates, rates, st.sampled_from([1.0, 1.5, 4.0]), st.sampled_from([1.0, 1.5, 4.0]))
def test_a_faster_link_is_never_slower(program, h2d, d2h, faster_in, faster_out):
    writer = written(program)
    slow, fast = writer.run(Link(h2d, d2h)), writer.run(Link(h2d * faster_in, d2h * faster_out))
    assert fast.makespan <= slow.makespan * (1 + 1e-9)
    assert fast.floor <= slow.floor * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(steps, rates, factors)
def test_a_link_without_sharing_is_never_slower_than_the_same_with(program, rate, factor):
    writer = written(program)
    assume(any(queue != COMPUTE for queue, _, _ in program))
    alone, shared = writer.run(Link(rate, rate)), writer.run(Link(rate, rate, factor))
    assert alone.makespan <= shared.makespan * (1 + 1e-9)
    assert alone.floor <= shared.floor * (1 + 1e-9)


def test_the_host_is_a_queue_too():
    writer = Writer()
    writer.do(H2D, "in", 10)
    writer.do(HOST, "read", 2, ["in"])
    writer.do(H2D, "more", 10)  # asked for when the host has read
    timeline = writer.run(Link(10.0, math.inf))
    assert times(timeline) == {"in": (0, 1), "read": (1, 3), "more": (3, 4)}
