"""StoredAdamW: AdamW on parameters in slots, whose states may live in a store.

What is updated together has one home: a layer; or one parameter of those in no layer, as their gradients are
complete at the two ends of backward. With L layers the homes are 0 to L - 1, and L and more.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grass.config import GrassConfig
from grass.layers import LayerMap
from grass.offload.pipeline import Pipeline
from grass.offload.store import Slot
from grass.optim.adamw import AdamW
from grass.optim.checks import check_shapes
from grass.optim.offloading import Offloading
from grass.optim.states import KERNEL_DTYPES, KINDS, has_remainder, moment_dtype, moment_keys
from grass.optim.work import Row, Work


class StoredAdamW(AdamW):
    """The part of `GrassAdamW` that knows where states live."""

    _config: GrassConfig
    _layers: LayerMap
    _slots: dict[Tensor, int]
    _offloading: Offloading | None
    _homes: dict[Tensor, int]
    _trainable: dict[Tensor, bool]  # what the user lets train
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
        homes = self._find_homes()
        if self._config.offload != "none":
            before = self._offloading
            if before is not None:
                before.drain()
            made = Offloading(self._plan_store(homes, flags), self._config, before)
            self._offloading = self._states.home = made
            if before is not None:
                before.close()
        self._homes, self._trainable, self._order_seen = homes, flags, []
        for home in list(self._works):
            self._leave_work(home)
        for group, p in self._members():
            if "step" in self.state.get(p, ()):
                self._states.follow(self.state[p], group, p)

    def _plan_store(self, homes: dict[Tensor, int], flags: dict[Tensor, bool]) -> list[Slot]:
        """What the store has to hold, by home: states of what can train and takes the kernels' path."""
        slots = [Slot([], {}) for _ in range(1 + max(homes.values(), default=-1))]
        for group, p in self._members():
            if flags[p] and p in homes and p.dtype in KERNEL_DTYPES:
                slots[homes[p]].params.append(p)
                kept = self.state.get(p, {})
                for kind in KINDS:
                    if kind in kept or kind in moment_keys(group):
                        slots[homes[p]].dtypes[kind] = moment_dtype(p, self._options)
                if has_remainder(p, self._options):
                    slots[homes[p]].dtypes["remainder"] = torch.int16
        return slots

    def _settle(self) -> None:
        """Move into another store if this one has no place for a state: groups or dtypes have changed since."""
        if self._offloading is not None:
            wanted = self._plan_store(self._homes, self._trainable)
            if not self._offloading.store.has_room_for(wanted):
                for seed, (_, p) in enumerate(self._members()):
                    check_shapes(self.state.get(p, {}), p, seed)
                self._move_in(self._trainable)

    def _arrange(self, groups: list[dict[str, Any]], home: int | None) -> Work:
        self._settle()
        return super()._arrange(groups, home)

    def _restore(self, saved: dict[str, Any]) -> None:
        self._settle()
        super()._restore(saved)

    def _order(self, active: Sequence[int]) -> list[int]:
        """The homes of what trains, in the order of updates: as seen last, or as backward will probably have it."""
        found = {
            home
            for p, home in self._homes.items()
            if self._trainable[p] and (home in active or home >= len(self._layers))
        }
        outside = sorted((home for home in found if home >= len(self._layers)), reverse=True)
        order = [*outside[:-1], *sorted(found.intersection(active), reverse=True), *outside[-1:]]
        return self._order_seen if sorted(self._order_seen) == sorted(order) else order

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

    def _groups_of(self, home: int | None) -> list[dict[str, Any]]:
        if home is None:
            return self.param_groups
        return [
            {**group, "params": [p for p in group["params"] if self._homes.get(p) == home]}
            for group in self.param_groups
        ]
