"""OffloadManager: the store and the pipeline of an optimizer."""

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

import grass_kernels
from grass.choices import Offload
from grass.config import GrassConfig
from grass.errors import OffloadError
from grass.offload.host import available_bytes, check_host_memory
from grass.offload.pipeline import Pipeline, Update, check_buffers, make_pipeline
from grass.offload.store import Bucket, Store, allocates_host_memory
from grass.offload.streams import CopyEngine, engine_for
from grass.offload.units import Unit
from grass.optim.param_entry import ParamEntry
from grass.optim.states import KINDS, Options, has_remainder, moment_dtype, moment_keys, own_keys
from grass_kernels.conversions import DTYPES

_logger = logging.getLogger(__name__)

MEBIBYTE = 2**20


class TransferStats(NamedTuple):
    """Traffic and memory of offloading, in bytes."""

    h2d_bytes: int
    """Bytes copied to the device since construction."""
    d2h_bytes: int
    """Bytes copied from the device since construction."""
    store_bytes: int
    """Host memory of the store so far."""
    ring_bytes: int
    """Device memory for states."""

    def keys(self) -> tuple[str, ...]:
        """Return the field names, so that ``dict(stats)`` works."""
        return self._fields

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)

    def __iter__(self) -> Iterator[Any]:
        return tuple.__iter__(self)


def choose_offload(buckets: Sequence[Bucket], takes_kernels: bool) -> Offload:
    """Return where ``offload="auto"`` keeps states: in host memory for a model on one GPU, if they fit there.

    Args:
        buckets: from `buckets_of`.
        takes_kernels: whether all parameters of the buckets can be updated by the kernels.
    """
    devices = {p.device for bucket in buckets for p in bucket.params}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        return "none"
    if not takes_kernels:
        _logger.info("offload: none, since the kernels do not support these settings")
        return "none"
    needed = Store(buckets, pinned=False).max_bytes
    available = available_bytes()
    if available is not None and needed > available:
        _logger.warning(
            "offload: none, since the states of all layers will take %.1f GiB, and %.1f GiB of host memory are "
            "available: they stay on the GPU",
            needed / 2**30,
            available / 2**30,
        )
        return "none"
    _logger.info("offload: resident, up to %.1f GiB of states in host memory", needed / 2**30)
    return "resident"


class OffloadManager:
    """States in host memory: a storage of states (`grass.optim.states.StateStorage`) and a residency
    (`grass.optim.step_plan.Residency`), which brings them to the device for updates.

    Args:
        buckets: buckets of the store, from `buckets_of`.
        config: for ``buffer_mb`` and ``buffer_count``, and for ``offload``, which is resident or streamed.
        before: manager that this one replaces; its traffic stays counted.
        engine: function that makes the copy engine of a device.

    Raises:
        OffloadError: parameters on several devices, or too little host memory for the full store.
        ConfigError: buffers smaller than a chunk.
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
        self._mode = cast(Offload, config.offload)
        check_buffers(self._mode, buckets, self._buffer_bytes)
        held = 0 if before is None else before.store.num_bytes
        if allocates_host_memory():
            check_host_memory(self.store.max_bytes - held)
        # bytes moved by earlier pipelines, and by the manager before
        self._moved_before = (0, 0) if before is None else before.stats[:2]
        self._pipeline: Pipeline | None = None

    @property
    def _buffer_bytes(self) -> int:
        return int(self._config.buffer_mb * MEBIBYTE)

    def _common_device(self) -> torch.device:
        devices = {p.device for p in self._params}
        if len(devices) > 1:
            raise OffloadError(
                f"the parameters are on several devices ({', '.join(sorted(map(str, devices)))}), and states can be "
                "fetched to one only: put the model on one device, or use offload='none'"
            )
        return devices.pop() if devices else torch.device("cpu")

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline to the device of the parameters, made when first needed."""
        if self._pipeline is None:
            config, engine = self._config, self._make_engine(self._device)
            self._pipeline = make_pipeline(
                self._mode, self.store, engine, self._device, self._buffer_bytes, config.buffer_count
            )
            # copies in flight must not outlive the memory they read and write
            self._end = weakref.finalize(self, _close, self._pipeline, self.store)
            self._end.atexit = False
        return self._pipeline

    def update_device(self) -> None:
        """Change the device if the parameters have moved: a model may be moved after construction.

        Raises:
            OffloadError: the parameters are on several devices.
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
        """Traffic since construction, and memory now."""
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

    def parts(self, unit: Unit, indices: Mapping[Tensor, int]) -> grass_kernels.Unit:
        """See `grass.optim.step_plan.Residency`."""
        return unit.for_kernels(indices)

    def run(self, bucket: int, update: Update) -> None:
        """See `Pipeline`."""
        self.pipeline.run(bucket, update)

    def hold(self, bucket: int, grads: Sequence[Tensor]) -> None:
        """See `Pipeline`."""
        self.pipeline.hold(bucket, grads)

    def join(self) -> None:
        """See `Pipeline`."""
        if self._pipeline is not None:
            self._pipeline.join()

    def prefetch(self, buckets: Sequence[int], later: Sequence[int] | None) -> None:
        """Start to fetch the states of the next step's buckets; `later`: those of the next period, if drawn."""
        self.pipeline.begin(buckets)
        if later is not None:
            self.pipeline.announce(later)

    def drain(self) -> None:
        """Wait until the store holds the current states."""
        if self._pipeline is not None:
            self._pipeline.drain()

    def invalidate(self, p: Tensor | None = None) -> None:
        """Wait until the host may write to the states of a parameter's bucket, or to all states."""
        if self._pipeline is not None:
            self._pipeline.invalidate(None if p is None else self.store.bucket_of(p))

    def close(self) -> tuple[int, int, int]:
        """Close the pipeline, with all states in the store, and return its `stats`; another is made when needed."""
        if self._pipeline is None:
            return 0, 0, 0
        self._end()
        stats, self._pipeline = self._pipeline.stats, None
        return stats

    # -- storage of states --------------------------------------------------------------------------------

    def __contains__(self, p: Tensor) -> bool:
        return p in self.store

    def clone_misplaced(self, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Clone states that are views of another parameter's part of the store, before that part is written."""
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

    def view(self, p: Tensor, kind: str) -> Tensor:
        """See `grass.optim.states.StateStorage`."""
        return self.store.view(p, kind)

    def zeros(self, p: Tensor, kind: str) -> Tensor:
        """See `grass.optim.states.StateStorage`. Memory that was never written is zero already."""
        if self.store.is_fresh(p, kind):
            return self.store.view(p, kind)
        self.invalidate(p)
        return self.store.view(p, kind).zero_()

    @torch.no_grad()
    def write(self, p: Tensor, kind: str, value: Tensor) -> Tensor:
        """See `grass.optim.states.StateStorage`."""
        self.invalidate(p)
        view = self.store.view(p, kind)
        if value.untyped_storage().data_ptr() == view.untyped_storage().data_ptr():
            value = value.clone()  # source and target may overlap
        return view.copy_(value)


def _close(pipeline: Pipeline, store: Store) -> None:
    """Close a pipeline, except in a forked process: copies and memory are those of the process that made them."""
    if not store.is_absent:
        pipeline.close()


def buckets_of(
    entries: Sequence[ParamEntry],
    groups: Sequence[dict[str, Any]],
    state: Mapping[Tensor, dict[str, Any]],
    options: Options,
) -> list[Bucket]:
    """Return the buckets of a store: trainable parameters of dtypes that the kernels support.

    Other parameters, such as complex and float64 ones, keep their states on their device.
    """
    buckets = [Bucket([], {}) for _ in range(1 + max((entry.bucket for entry in entries), default=-1))]
    for entry in entries:
        group, p = groups[entry.group], entry.shard
        if not entry.can_train or p.dtype not in DTYPES:
            continue
        params, dtypes = buckets[entry.bucket]
        params.append(p)
        for kind in KINDS:
            if kind in moment_keys(group) or kind in own_keys(state.get(entry.param, {}), group, p, options):
                dtypes[kind] = moment_dtype(group, p, options)
        if has_remainder(group, p, options):
            dtypes["remainder"] = torch.int16
    return buckets
