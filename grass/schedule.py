"""Schedule: the steps at which importance is refreshed, layers are drawn, and active layers change.

The schedule depends on the number of steps taken only; it knows neither tensors nor layers. With ``T_p`` probe
steps, sampling interval ``T_s``, update interval ``T_u``, draws ``d`` steps ahead, and ``a`` steps after the probe::

    end of the probe      refresh, draw, switch
    (a + d) % T_s == 0    draw the layers of the next period;  if (a + d) % T_u == 0, refresh first
    a % T_s == 0          switch to the layers drawn last

Source: paper, "sampling" and "adaptation". A measurement window closes at a draw, which the paper leaves open.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Events(NamedTuple):
    """Actions due at the end of a step, in order of execution."""

    refresh: bool
    draw: bool
    switch: bool


@dataclass
class Schedule:
    """Schedule of refreshes, draws and switches. Its only state is ``step_count``.

    Args:
        probe_steps: T_p; 0 for samplers that measure nothing before the first draw.
        sample_interval: T_s.
        update_interval: T_u, a multiple of T_s.
        draw_ahead: d, at most T_s - 1.
        step_count: number of steps taken so far.
    """

    probe_steps: int
    sample_interval: int
    update_interval: int
    draw_ahead: int
    step_count: int = 0

    @property
    def phase(self) -> str:
        """Phase of the next step, ``"probe"`` or ``"adapt"``."""
        return "probe" if self.step_count < self.probe_steps else "adapt"

    @property
    def adapt_steps(self) -> int:
        """Number of steps taken after the probe."""
        return max(0, self.step_count - self.probe_steps)

    @property
    def refreshes_next(self) -> bool:
        """True if the next step is not of the probe, and the importance is refreshed at its end."""
        return self.phase == "adapt" and (self.adapt_steps + 1 + self.draw_ahead) % self.update_interval == 0

    @property
    def begins_period(self) -> bool:
        """True if the next step is the first of a period."""
        return self.phase == "adapt" and self.adapt_steps % self.sample_interval == 0

    def start(self) -> Events:
        """Return the actions due before the first step: the first draw, if there is no probe."""
        first_draw = self.step_count == 0 and self.probe_steps == 0
        return Events(refresh=False, draw=first_draw, switch=first_draw)

    def advance(self) -> Events:
        """Count a step and return the actions due at its end."""
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
