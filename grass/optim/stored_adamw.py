"""StoredAdamW: AdamW on parameters in slots, whose states may live in a store.

What is updated together has one home: a layer; or one parameter of those in no layer, as their gradients are
complete at the two ends of backward. With L layers the homes are 0 to L - 1, and L and more.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from grass.config import GrassConfig
from grass.layers import LayerMap
from grass.offload.pipeline import Pipeline
from grass.optim.adamw import AdamW
from grass.optim.offloading import Offloading
from grass.optim.work import Row


class StoredAdamW(AdamW):
    """The part of `GrassAdamW` that knows where states live."""

    _config: GrassConfig
    _layers: LayerMap
    _slots: dict[Tensor, int]
    _offloading: Offloading | None
    _homes: dict[Tensor, int]
    _found_homes: set[int]  # of what the user lets train
    _order_seen: list[int]

    def _find_homes(self) -> dict[Tensor, int]:
        """The home of every parameter that can train."""
        homes, outside = {}, len(self._layers)
        for _, p in self._members():
            if self._slots[p] < len(self._layers):
                homes[p] = self._slots[p]
            elif self._slots[p] == len(self._layers):
                homes[p] = outside
                outside += 1
        return homes

    def _move_in(self, flags: dict[Tensor, bool]) -> None:
        """Give every parameter its home, and its states their place; all or nothing."""
        if self._offloading is not None:
            self._offloading.drain()
        before = self.__dict__.get("_homes", {})
        self._homes = self._find_homes()
        try:
            self._offloading = self._make_offloading(flags)
        except Exception:
            self._homes, self._states.home = before, self._offloading
            raise
        self._order_seen = []
        self._found_homes = {home for p, home in self._homes.items() if flags[p]}

    def _order(self, active: Sequence[int]) -> list[int]:
        """The homes of what trains, in the order of updates: as seen last, or as backward will probably have it."""
        found = {home for p, home in self._homes.items() if home in active or home >= len(self._layers)}
        found &= self._found_homes
        outside = sorted((home for home in found if home >= len(self._layers)), reverse=True)
        order = [*outside[:-1], *sorted(found.intersection(active), reverse=True), *outside[-1:]]
        return self._order_seen if sorted(self._order_seen) == sorted(order) else order

    def _make_offloading(self, flags: dict[Tensor, bool]) -> Offloading | None:
        self._states.home = None
        if self._config.offload != "none":
            groups = {p: group for group, p in self._members()}
            members: list[list[Tensor]] = [[] for _ in range(1 + max(self._homes.values(), default=-1))]
            for p, trainable in flags.items():
                if trainable and p in self._homes:
                    members[self._homes[p]].append(p)
            made = Offloading(members, groups, self._options, self._config)
            if self._offloading is not None:
                made.go_on_from(self._offloading)
            self._states.home = made
            return made
        return None

    def _forget(self) -> None:
        super()._forget()
        self._states_written = 0  # the states' version counter, as the last step left it
        self._states.home = self.__dict__.get("_offloading")

    @property
    def _pipeline(self) -> Pipeline | None:  # type: ignore[override]
        return None if self._offloading is None else self._offloading.pipeline

    def _slots_of_states(self, rows: list[Row]) -> list[int]:
        stored = {
            self._homes[row.param] for row in rows if self._offloading and row.param in self._offloading
        }
        order = self._order(range(len(self._layers)))
        return [home for home in order if home in stored]

    def _update(self, home: int | None = None) -> Tensor | None:
        if self._offloading is None:
            return super()._update(home)
        self._offloading.follow()
        counter = self._states.counter
        if counter._version != self._states_written and self._config.offload == "streamed":
            self._offloading.forget()  # somebody has written to states since they were fetched
        sq_norms = super()._update(home)
        if home is None:
            self._offloading.pipeline.join()
        self._states_written = counter._version
        return sq_norms

    def _groups_of(self, home: int) -> list[dict[str, Any]]:
        return [
            {**group, "params": [p for p in group["params"] if self._homes.get(p) == home]}
            for group in self.param_groups
        ]
