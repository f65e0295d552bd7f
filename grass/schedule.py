"""When things happen: probe, periods, refreshes. Pure Python, no tensors, no layers.

One clock drives everything: the number of steps taken. With ``T_p`` probe steps, sampling interval
``T_s``, update interval ``T_u`` and draws ``d`` steps ahead, and ``a`` adapt steps taken::

    end of the probe      refresh, draw, switch
    (a + d) % T_s == 0    draw the next period's set;  if (a + d) % T_u == 0, refresh before it
    a % T_s == 0          switch to the set drawn last

Source: paper, "sampling" and "adaptation"; where a window closes is our decision.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Events(NamedTuple):
    """What is due at the end of a step, in the order in which it is done."""

    refresh: bool
    draw: bool
    switch: bool


@dataclass
class Schedule:
    """The clock of the method.

    Args:
        probe_steps: T_p; 0 for samplers that measure nothing before the first draw.
        sample_interval: T_s.
        update_interval: T_u, a multiple of T_s.
        draw_ahead: d, at most T_s - 1.
        step_count: steps taken so far; the only thing that changes, and all there is to save.
    """

    probe_steps: int
    sample_interval: int
    update_interval: int
    draw_ahead: int
    step_count: int = 0

    @property
    def phase(self) -> str:
        """``"probe"`` or ``"adapt"``: of the step about to be taken."""
        return "probe" if self.step_count < self.probe_steps else "adapt"

    @property
    def adapt_steps(self) -> int:
        """Adapt steps taken so far."""
        return max(0, self.step_count - self.probe_steps)

    def start(self) -> Events:
        """What is due before the first step: without a probe, the first draw."""
        first_draw = self.step_count == 0 and self.probe_steps == 0
        return Events(refresh=False, draw=first_draw, switch=first_draw)

    def advance(self) -> Events:
        """Count a step that has been taken, and say what is due at its end."""
        self.step_count += 1
        if self.step_count < self.probe_steps:
            return Events(refresh=False, draw=False, switch=False)
        if self.step_count == self.probe_steps:
            return Events(refresh=True, draw=True, switch=True)
        ahead = self.adapt_steps + self.draw_ahead
        return Events(
            refresh=ahead % self.update_interval == 0,
            draw=ahead % self.sample_interval == 0,
            switch=self.adapt_steps % self.sample_interval == 0,
        )
