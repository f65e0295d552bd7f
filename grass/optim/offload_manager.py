"""OffloadManager: an optimizer's store and pipeline, and how they follow its parameters."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grass.config import GrassConfig
from grass.errors import OffloadError
from grass.offload.host import check_host_memory
from grass.offload.pipeline import Pipeline, ResidentPipeline, StreamedPipeline, Update
from grass.offload.store import Bucket, Store, takes_host_memory
from grass.offload.streams import CopyEngine, engine_for
from grass.offload.units import Unit, elements_in
from grass.optim.param_entry import ParamEntry
from grass.optim.states import KERNEL_DTYPES, KINDS, Options, has_remainder, moment_dtype, moment_keys

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


class OffloadManager:
    """States in host memory: where they are kept (`grass.optim.states.Home`) and how they are brought to the device
    while they are updated (`grass.optim.step_plan.Residency`).

    Args:
        buckets: of the store, from `buckets_of`.
        config: ``offload``, ``buffer_mb`` and ``buffer_count``.
        before: the manager that this one replaces; its traffic stays counted.
        engine: makes the copy engine of a device.

    Raises:
        OffloadError: parameters on several devices, or less host memory than the store may need.
        ConfigError: a buffer that holds less than a chunk.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        config: GrassConfig,
        before: "OffloadManager | None" = None,
        engine: Callable[[torch.device], CopyEngine] = engine_for,
    ) -> None:
        self._config, self._make_engine = config, engine
        self._params = [p for bucket in buckets for p in bucket.params]
        self._device = self._common_device()
        self.store = Store(buckets, pinned=self._device.type == "cuda")
        if config.offload == "streamed":
            for bucket in sorted(buckets, key=_width, reverse=True):
                if bucket.params:
                    elements_in(self._buffer_bytes, bucket.dtypes)
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

    # -- the step ---------------------------------------------------------------------------------------------

    def updating(self) -> AbstractContextManager[None]:
        """See `Pipeline`."""
        return self.pipeline.updating()

    def units(self, bucket: int) -> Sequence[Unit]:
        """See `Pipeline`."""
        return self.pipeline.units(bucket)

    def run(self, bucket: int, update: Update) -> None:
        """See `Pipeline`."""
        self.pipeline.run(bucket, update)

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """See `Pipeline`."""
        self.pipeline.keep(tensors)

    def join(self) -> None:
        """See `Pipeline`."""
        self.pipeline.join()

    def prefetch(self, buckets: Sequence[int], later: Sequence[int] | None) -> None:
        """Start to fetch the states of the next step's buckets; `later` are those of the next period, once known."""
        self.pipeline.begin(buckets)
        if later is not None:
            self.pipeline.announce(later)

    def drain(self) -> None:
        """Wait until the store holds all states as they are now."""
        if self._pipeline is not None:
            self._pipeline.drain()

    def invalidate(self, p: Tensor | None = None) -> None:
        """Prepare for writes by the host to the states of a parameter's bucket, or to all."""
        if self._pipeline is not None:
            self._pipeline.invalidate(None if p is None else self.store.bucket_of(p))

    def close(self) -> tuple[int, int, int]:
        """End the pipeline, with all states in the store; another is made when needed. Returns its `stats`."""
        if self._pipeline is None:
            return 0, 0, 0
        self._end()
        stats, self._pipeline = self._pipeline.stats, None
        return stats

    # -- where states are kept --------------------------------------------------------------------------------

    def __contains__(self, p: Tensor) -> bool:
        return p in self.store

    def clone_misplaced(self, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Copy states that lie in another parameter's place out of the store, before that place is written."""
        misplaced = []
        for p, state in states.items():
            for kind in self.store.kinds(p) if p in self.store else ():
                value = state.get(kind)
                if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
                    continue
                if self.store.holds(value) and value.data_ptr() != self.store.view(p, kind).data_ptr():
                    misplaced.append((state, kind))
        if misplaced:
            self.drain()
        for state, kind in misplaced:
            state[kind] = state[kind].clone()

    def place(self, p: Tensor, kind: str) -> Tensor:
        """See `grass.optim.states.Home`."""
        return self.store.view(p, kind)

    def zeros(self, p: Tensor, kind: str) -> Tensor:
        """See `grass.optim.states.Home`. Memory that was never written is zero, and stays untouched."""
        if self.store.is_fresh(p, kind):
            return self.store.view(p, kind)
        self.invalidate(p)
        return self.store.view(p, kind).zero_()

    def write(self, p: Tensor, kind: str, value: Tensor) -> Tensor:
        """See `grass.optim.states.Home`."""
        self.invalidate(p)
        place = self.store.view(p, kind)
        if value.untyped_storage().data_ptr() == place.untyped_storage().data_ptr():
            value = value.clone()  # the same memory, in another order
        return place.copy_(value)


def _width(bucket: Bucket) -> int:
    """Bytes of an element of all its states."""
    return sum(dtype.itemsize for dtype in bucket.dtypes.values())


def buckets_of(
    entries: Sequence[ParamEntry],
    groups: Sequence[dict[str, Any]],
    state: Mapping[Tensor, dict[str, Any]],
    options: Options,
) -> list[Bucket]:
    """Return what a store has to hold, by bucket: states of parameters that can train and take the kernels.

    Complex and float64 parameters, which only torch updates, keep their states beside them.
    """
    buckets = [Bucket([], {}) for _ in range(1 + max((entry.bucket for entry in entries), default=-1))]
    for entry in entries:
        group, p = groups[entry.group], entry.param
        if not entry.can_train or p.dtype not in KERNEL_DTYPES:
            continue
        params, dtypes = buckets[entry.bucket]
        params.append(p)
        for kind in KINDS:
            if kind in moment_keys(group) or kind in state.get(p, {}):
                dtypes[kind] = moment_dtype(group, p, options)
        if has_remainder(group, p, options):
            dtypes["remainder"] = torch.int16
    return buckets
