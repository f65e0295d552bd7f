"""Failures these tests catch: a first draw that is not at the probe's end, a draw or a switch one step
early or late, a window that closes between draws, a switch without a draw before it, a clock that needs
more than its step count to continue.
"""

from itertools import pairwise, product

import pytest

from grass.schedule import Events, Schedule

# (T_p, T_s, T_u, d): every legal combination of small numbers
CASES = [
    (probe, period, windows * period, ahead)
    for probe, period, windows in product((0, 1, 4), (1, 2, 3, 5), (1, 2, 3))
    for ahead in range(period)
]


def expected(probe: int, period: int, update: int, ahead: int, steps: int) -> dict[str, set[int]]:
    """Steps after which something happens, counted by periods instead of remainders."""
    events: dict[str, set[int]] = {"refresh": set(), "draw": set(), "switch": set()}
    if probe > 0:
        for kind in events:
            events[kind].add(probe)
    for number in range(1, steps + 2):  # the period that begins after number * T_s adapt steps
        boundary = probe + number * period
        drawn_at = boundary - ahead
        if drawn_at > probe:
            events["draw"].add(drawn_at)
            if (number * period) % update == 0:
                events["refresh"].add(drawn_at)
        events["switch"].add(boundary)
    return {kind: {step for step in found if step <= steps} for kind, found in events.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_event_is_where_periods_put_it(case: tuple[int, int, int, int]) -> None:
    schedule = Schedule(*case)
    wanted = expected(*case, steps=40)
    for step in range(1, 41):
        phase = schedule.phase
        events = schedule.advance()
        assert phase == ("probe" if step <= case[0] else "adapt")
        for kind in ("refresh", "draw", "switch"):
            assert getattr(events, kind) == (step in wanted[kind]), (kind, step)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_draw_before_each_switch_and_refreshes_only_at_draws(case: tuple[int, int, int, int]) -> None:
    schedule = Schedule(*case)
    pending = 0
    for events in [schedule.start()] + [schedule.advance() for _ in range(40)]:
        pending += events.draw
        assert pending <= 1, "a second draw before the first was used"
        assert events.draw or not events.refresh
        if events.switch:
            assert pending == 1, "a switch without a draw"
            pending = 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_active_sets_last_one_period(case: tuple[int, int, int, int]) -> None:
    schedule = Schedule(*case)
    switches = [0] if schedule.start().switch else []
    switches += [step for step in range(1, 41) if schedule.advance().switch]
    gaps = {later - earlier for earlier, later in pairwise(switches)}
    assert switches[0] == case[0]
    assert gaps == {case[1]}


def test_without_a_probe_the_first_draw_comes_before_the_first_step() -> None:
    assert Schedule(0, 5, 10, 1).start() == Events(refresh=False, draw=True, switch=True)
    assert Schedule(3, 5, 10, 1).start() == Events(refresh=False, draw=False, switch=False)
    # a clock that continues has drawn before
    assert Schedule(0, 5, 10, 1, step_count=7).start() == Events(refresh=False, draw=False, switch=False)


@pytest.mark.parametrize("stop", range(12))
def test_the_step_count_is_all_there_is_to_save(stop: int) -> None:
    whole = Schedule(2, 3, 6, 1)
    events = [whole.advance() for _ in range(12)]
    first = Schedule(2, 3, 6, 1)
    for _ in range(stop):
        first.advance()
    resumed = Schedule(2, 3, 6, 1, step_count=first.step_count)
    assert [resumed.advance() for _ in range(12 - stop)] == events[stop:]
    assert resumed.adapt_steps == 10
