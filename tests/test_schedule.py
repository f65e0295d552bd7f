"""Failures these tests catch: a first draw that is not at the probe's end, a draw or a switch one step
early or late, a window that closes between draws, a switch without a draw before it, a schedule that needs
more than its step count to continue.
"""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from grass.schedule import Events, Schedule


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """T_p, T_s, T_u and d of a schedule."""
    period = draw(st.integers(1, 7))
    windows = draw(st.integers(1, 4))
    return draw(st.integers(0, 6)), period, windows * period, draw(st.integers(0, period - 1))


def expected(probe: int, period: int, update: int, ahead: int, steps: int) -> list[Events]:
    """Actions due after each step, counted by periods instead of remainders."""
    refresh, draw, switch = ({probe} if probe > 0 else set() for _ in range(3))
    for number in range(1, steps + 2):  # the period that begins after number * T_s adapt steps
        boundary = probe + number * period
        drawn_at = boundary - ahead
        if drawn_at > probe:
            draw.add(drawn_at)
            if (number * period) % update == 0:
                refresh.add(drawn_at)
        switch.add(boundary)
    return [Events(step in refresh, step in draw, step in switch) for step in range(1, steps + 1)]


@settings(max_examples=300)
@given(cases(), st.integers(0, 40))
@example((0, 1, 1, 0), 0)  # everything in every step
@example((4, 3, 9, 2), 4)  # drawn as early as may be, continued at the end of the probe
@example((1, 5, 10, 0), 7)  # drawn at the switch
def test_the_schedule(case: tuple[int, int, int, int], stop: int) -> None:
    probe, period, _, _ = case
    steps, schedule = 40, Schedule(*case)
    first, phases, events = schedule.start(), [], []
    for _ in range(steps):
        phases.append(schedule.phase)
        events.append(schedule.advance())

    # every event is where the periods put it
    assert events == expected(*case, steps)
    assert phases == ["probe"] * min(probe, steps) + ["adapt"] * (steps - probe)
    assert schedule.adapt_steps == steps - probe

    # one draw before each switch, refreshes only at draws
    pending = 0
    for now in (first, *events):
        pending += now.draw
        assert pending <= 1, "a second draw before the first was used"
        assert now.draw or not now.refresh
        if now.switch:
            assert pending == 1, "a switch without a draw"
            pending = 0

    # an active set lasts one period
    switches = [step for step, now in enumerate((first, *events)) if now.switch]
    assert switches == list(range(probe, steps + 1, period))

    # the step count is all there is to save
    resumed = Schedule(*case, step_count=stop)
    assert resumed.start() == (first if stop == 0 else Events(refresh=False, draw=False, switch=False))
    assert [resumed.advance() for _ in range(steps - stop)] == events[stop:]


def test_without_a_probe_the_first_draw_comes_before_the_first_step() -> None:
    assert Schedule(0, 5, 10, 1).start() == Events(refresh=False, draw=True, switch=True)
    assert Schedule(3, 5, 10, 1).start() == Events(refresh=False, draw=False, switch=False)
    # a schedule that continues has drawn before
    assert Schedule(0, 5, 10, 1, step_count=7).start() == Events(refresh=False, draw=False, switch=False)
