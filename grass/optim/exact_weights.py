"""Exact weights: which parameters somebody else has written since their remainders were.

A remainder belongs to the bfloat16 value beside it. Who writes to the parameter advances its version counter, or gives
it another address; its remainder is then zero, for the exact value is what was written.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from grass.optim.states import StateMaker
from grass.optim.work import Work


class OutsideWrites:
    """Versions and addresses of parameters with remainders, as the optimizer left them."""

    def __init__(self) -> None:
        self._left: dict[Tensor, tuple[int, int]] = {}  # by works that are gone, or at the last save
        self._begun = False

    def begin(self, params: Iterable[Tensor]) -> None:
        """Remember how parameters with remainders are before the first step, those that it does not update too."""
        if not self._begun:
            self._begun = True
            self._left = {p: (p._version, p.data_ptr()) for p in params} | self._left

    def drop_stale(self, work: Work, state: dict[Tensor, dict[str, Any]], maker: StateMaker) -> None:
        """Start parameters of a work anew that somebody else has written."""
        now = work.versions()
        if now == work.versions_written:
            return
        for place, p in enumerate(work.with_remainder):
            found = (now[place], work.remainder_addresses[place])
            if work.versions_written is None:  # its first step: what did earlier ones leave?
                left = self._left.get(p, found)
            else:
                left = (work.versions_written[place], work.remainder_addresses[place])
            if found != left:
                maker.zero_remainder(state[p], p)

    def drop_all(self, works: Iterable[Work], state: dict[Tensor, dict[str, Any]], maker: StateMaker) -> None:
        """The same for all parameters, between steps: what is saved now is what the next step would begin with."""
        for work in works:
            if work.versions_written is not None:
                self.leave(work)
        for p, left in self._left.items():
            if (p._version, p.data_ptr()) != left and "remainder" in state.get(p, ()):
                maker.zero_remainder(state[p], p)
                self._left[p] = (p._version, p.data_ptr())
        for work in works:
            if work.versions_written is not None:
                work.versions_written = work.versions()

    def leave(self, work: Work) -> None:
        """Remember what a work left."""
        if work.versions_written is not None:
            entries = zip(work.versions_written, work.remainder_addresses, strict=True)
            self._left.update(zip(work.with_remainder, entries, strict=True))

    def keep_only(self, params: set[Tensor]) -> None:
        """Forget parameters that are no longer the optimizer's."""
        self._left = {p: left for p, left in self._left.items() if p in params}


def refuse_shared_counters(params: Sequence[Tensor], names: Sequence[str]) -> None:
    """Refuse parameters of which the update of one looks like somebody's write to another.

    Raises:
        ValueError: two of them share a version counter.
    """
    with torch.autograd._unsafe_preserve_version_counter(tuple(params)):
        before = [p._version for p in params]
        torch.autograd.graph.increment_version(params)
        for p, name, version in zip(params, names, before, strict=True):
            if p._version == version + 1:
                continue
            before = [other._version for other in params]
            torch.autograd.graph.increment_version([p])
            others = [
                other
                for other, q, version in zip(names, params, before, strict=True)
                if q is not p and q._version != version
            ]
            raise ValueError(
                f"master_weights needs to know who writes to a parameter, and {name} shares its version counter with "
                f"{', '.join(others[:3])}, as views of one buffer do: give each its own, with "
                "p = nn.Parameter(torch.empty(0, dtype=torch.bfloat16)); p.data = buffer[start:stop]"
            )
