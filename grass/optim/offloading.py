"""Offloading: an optimizer's store and pipeline, and how they follow its parameters."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grass.config import GrassConfig
from grass.errors import OffloadError
from grass.offload.host import check_host_memory
from grass.offload.pipeline import Pipeline, ResidentPipeline, StreamedPipeline
from grass.offload.store import Slot, Store, takes_host_memory
from grass.offload.streams import CopyEngine, engine_for
from grass.offload.units import elements_in

MEBIBYTE = 2**20


class TransferStats(NamedTuple):
    """What offloading has moved and holds, in bytes."""

    h2d_bytes: int
    """Copied to the device since construction."""
    d2h_bytes: int
    """Copied from the device since construction."""
    store_bytes: int
    """Of the store in host memory, so far."""
    ring_bytes: int
    """Of device memory for states."""

    def keys(self) -> tuple[str, ...]:
        """Names of the figures, so that ``dict(stats)`` works."""
        return self._fields

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)

    def __iter__(self) -> Iterator[Any]:
        return tuple.__iter__(self)


class Offloading:
    """The home of an optimizer's states, and their way to the device.

    Args:
        slots: what the store holds. Complex and float64 parameters, which only torch updates, keep their states
            beside them.
        config: ``offload``, ``buffer_mb`` and ``buffer_count``.
        before: whose states move in, drained; what it has moved is counted on.
        engine: copies; None is the device's own.

    Raises:
        OffloadError: parameters on several devices, or less host memory than the store may need.
        ConfigError: a buffer that holds less than a chunk.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        config: GrassConfig,
        before: "Offloading | None" = None,
        engine: Callable[[torch.device], CopyEngine] = engine_for,
    ) -> None:
        self._config, self._make_engine = config, engine
        self._params = [p for slot in slots for p in slot.params]
        self._device = self._common_device()
        self.store = Store(slots, pinned=self._device.type == "cuda")
        if config.offload == "streamed":
            for slot in sorted(slots, key=_width, reverse=True):
                if slot.params:
                    elements_in(self._buffer_bytes, slot.dtypes)
        held = 0 if before is None else before.store.num_bytes
        if takes_host_memory():
            check_host_memory(self.store.most_bytes - held)
        # by pipelines of devices that the parameters have left, and to stores that states have
        self._moved_before = (0, 0) if before is None else before.stats[:2]
        self._pipeline: Pipeline | None = None

    @property
    def _buffer_bytes(self) -> int:
        return int(self._config.buffer_mb * MEBIBYTE)

    def _common_device(self) -> torch.device:
        devices = {p.device for p in self._params}
        if len(devices) > 1:
            raise OffloadError(
                f"the parameters are on several devices ({', '.join(sorted(map(str, devices)))}), and states are "
                "fetched to one: put the model on one device, or use offload='none'"
            )
        return devices.pop() if devices else torch.device("cpu")

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline to the device where the parameters are."""
        if self._pipeline is None:
            store, engine = self.store, self._make_engine(self._device)
            if self._config.offload == "resident":
                self._pipeline = ResidentPipeline(store, engine, self._device)
            else:
                self._pipeline = StreamedPipeline(
                    store, engine, self._device, self._buffer_bytes, self._config.buffer_count
                )
            # copies that are under way must not outlive what they read and write
            self._end = weakref.finalize(self, self._pipeline.close)
            self._end.atexit = False
        return self._pipeline

    def follow(self) -> None:
        """Go where the parameters have gone: a model may be moved after its optimizer was made.

        Raises:
            OffloadError: to several devices.
        """
        device = self._common_device()
        if device == self._device:
            return
        if self._pipeline is not None:
            h2d, d2h, _ = self.close()
            self._moved_before = (self._moved_before[0] + h2d, self._moved_before[1] + d2h)
        self._device = device
        if device.type == "cuda":
            self.store.pin()

    @property
    def stats(self) -> TransferStats:
        """What has moved, and what is held."""
        h2d, d2h, held = (0, 0, 0) if self._pipeline is None else self._pipeline.stats
        before = self._moved_before
        return TransferStats(before[0] + h2d, before[1] + d2h, self.store.num_bytes, held)

    def drain(self) -> None:
        """Let the store hold all states as they are now."""
        if self._pipeline is not None:
            self._pipeline.drain()

    def forget(self, p: Tensor | None = None) -> None:
        """Let the host write to the states of a parameter and those that lie beside them, or to all."""
        if self._pipeline is not None:
            self._pipeline.forget(None if p is None else self.store.slot_of(p))

    def close(self) -> tuple[int, int, int]:
        """End the pipeline, with all states at home; another is made when it is needed. Returns its `stats`."""
        if self._pipeline is None:
            return 0, 0, 0
        self._end()
        stats, self._pipeline = self._pipeline.stats, None
        return stats

    # -- the home of states, as `StateMaker` knows it ---------------------------------------------------------

    def __contains__(self, p: Tensor) -> bool:
        return p in self.store

    def place(self, p: Tensor, kind: str) -> Tensor:
        """See `grass.optim.states.Home`."""
        return self.store.view(p, kind)

    def zeros(self, p: Tensor, kind: str) -> Tensor:
        """See `grass.optim.states.Home`. Memory that was never written is zero, and stays untouched."""
        if self.store.is_fresh(p, kind):
            return self.store.view(p, kind)
        self.forget(p)
        return self.store.view(p, kind).zero_()

    def write(self, p: Tensor, kind: str, value: Tensor) -> Tensor:
        """See `grass.optim.states.Home`."""
        self.forget(p)
        place = self.store.view(p, kind)
        if value.untyped_storage().data_ptr() == place.untyped_storage().data_ptr():
            value = value.clone()  # the same memory, in another order
        return place.copy_(value)


def _width(slot: Slot) -> int:
    """Bytes of an element of all its states."""
    return sum(dtype.itemsize for dtype in slot.dtypes.values())
