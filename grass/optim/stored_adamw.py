"""StoredAdamW: AdamW on parameters in slots, whose states may live in a store."""

from typing import Any

from torch import Tensor

from grass.config import GrassConfig
from grass.layers import LayerMap
from grass.offload.pipeline import Pipeline
from grass.optim.adamw import AdamW
from grass.optim.offloading import Offloading


class StoredAdamW(AdamW):
    """The part of `GrassAdamW` that knows where states live."""

    _config: GrassConfig
    _layers: LayerMap
    _slots: dict[Tensor, int]
    _offloading: Offloading | None

    def _make_offloading(self, flags: dict[Tensor, bool]) -> Offloading | None:
        self._states.home = None
        if self._config.offload != "none":
            groups = {p: group for group, p in self._members()}
            members: list[list[Tensor]] = [[] for _ in range(len(self._layers) + 1)]
            for p, trainable in flags.items():
                if trainable and self._slots[p] <= len(self._layers):
                    members[self._slots[p]].append(p)
            self._states.home = Offloading(members, groups, self._options, self._config)
        return self._states.home

    def _forget(self) -> None:
        super()._forget()
        self._states_written = 0  # the states' version counter, as the last step left it
        self._states.home = self.__dict__.get("_offloading")

    @property
    def _pipeline(self) -> Pipeline | None:  # type: ignore[override]
        return None if self._offloading is None else self._offloading.pipeline

    def _update(self, slot: int | None = None) -> Tensor | None:
        if self._offloading is None:
            return super()._update(slot)
        self._offloading.follow()
        counter = self._states.counter
        if counter._version != self._states_written and self._config.offload == "streamed":
            self._offloading.forget()  # somebody has written to states since they were fetched
        sq_norms = super()._update(slot)
        self._states_written = counter._version
        return sq_norms

    def _groups_of(self, slot: int) -> list[dict[str, Any]]:
        return [
            {**group, "params": [p for p in group["params"] if self._slots[p] == slot]}
            for group in self.param_groups
        ]
