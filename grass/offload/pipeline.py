"""Pipelines: fetch units of states to the device, update them there, and write them back.

*Streamed*: every unit passes through a ring of few buffers in every step. While one is updated, the next is fetched and
the last is written back. *Resident*: the states of active buckets stay on the device; those of the next set are
fetched before the switch.

Every wait names the hazard that it prevents: see the table in docs/architecture.md.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from grass.choices import Offload
from grass.offload.store import ALIGNMENT, Bucket, Store
from grass.offload.streams import COMPUTE, D2H, H2D, HOST, UPDATE, CopyEngine, Operation
from grass.offload.units import Unit, cut, elements_in

MAX_HELD = 1.25
"""Gradients that may be held for updates when a bucket is complete, in units of the largest bucket."""

Update = Callable[[Unit, dict[str, Tensor]], None]
"""Update a unit, given its sections as 1-D tensors on the device, by work on the current stream: `UPDATE`."""


class Buffer:
    """Device memory that holds one unit at a time.

    Attributes:
        unit: unit in the buffer, or being fetched into it.
        updated: event of the unit's update.
        freed: event of the previous unit's write-back.
    """

    def __init__(self, name: str, memory: Tensor) -> None:
        self.name, self.memory = name, memory
        self.unit: Unit | None = None
        self.updated: Any = None
        self.freed: Any = None


class Pipeline(Protocol):
    """Interface between an optimizer and its states on the device. Buckets are numbers, as in the store."""

    def begin(self, buckets: Sequence[int]) -> None:
        """Start to fetch the buckets that are updated next, in this order."""

    def announce(self, buckets: Sequence[int]) -> None:
        """Announce the buckets of the next period."""

    def units(self, bucket: int) -> Sequence[Unit]:
        """Return the units of a bucket, in the order of updates."""

    def updating(self) -> contextlib.AbstractContextManager[None]:
        """Return the context for `run`: updates are queued on their own stream, after the current stream's work."""

    def run(self, bucket: int, update: Update) -> None:
        """Update a bucket by calling `update` for every unit."""

    def hold(self, bucket: int, grads: Sequence[Tensor]) -> None:
        """Hold gradients of a bucket until the current stream has waited for its updates, which have been queued.

        It waits in `join`, or earlier if `MAX_HELD` of the largest bucket is exceeded: when a bucket follows, but not
        if that is a small one, such as a norm.
        """

    def join(self) -> None:
        """Make the current stream wait for all updates, and drop the gradients that are held."""

    def drain(self) -> None:
        """Wait on the host until the store holds the current states."""

    def invalidate(self, bucket: int | None = None) -> None:
        """Wait on the host until it may write to the states of a bucket, or to all; they are fetched again."""

    def close(self) -> None:
        """Wait on the host until store and buffers are no longer used, so that both may be freed."""

    @property
    def stats(self) -> tuple[int, int, int]:
        """Bytes fetched, bytes written back, and bytes of device memory."""


class _PipelineBase:
    def __init__(self, store: Store, engine: CopyEngine) -> None:
        self._store, self._engine = store, engine
        self._units: dict[int, list[Unit]] = {}
        self._capacity: int | None = None
        self._moved = [0, 0]  # bytes to and from the device
        self._grads_ready: Any = None  # events
        self._updates_done: Any = None
        # Gradients that updates may still read: bucket, gradients, event of the updates; the oldest first.
        self._held: deque[tuple[int, Sequence[Tensor], Any]] = deque()
        self._max_held = MAX_HELD * store.largest_bucket  # elements

    def units(self, bucket: int) -> Sequence[Unit]:
        """See `Pipeline`."""
        if bucket not in self._units:
            self._units[bucket] = cut(bucket, self._store.slab(bucket), self._capacity)
        return self._units[bucket]

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """See `Pipeline`."""
        engine = self._engine
        self._grads_ready = engine.record(COMPUTE, self._grads_ready)
        engine.wait(UPDATE, self._grads_ready, "H7")  # updates read gradients of the current stream
        try:
            with engine.on(UPDATE):
                yield
        finally:  # an update that fails has queued others
            self._updates_done = engine.record(
                UPDATE, None
            )  # not reused: `hold` keeps those of several buckets

    def hold(self, bucket: int, grads: Sequence[Tensor]) -> None:
        """See `Pipeline`."""
        self._held.append((bucket, grads, self._updates_done))
        while (
            len(self._held) > 1 and sum(g.numel() for _, held, _ in self._held for g in held) > self._max_held
        ):
            self._engine.wait(COMPUTE, self._held[0][2], "H11")  # the current stream uses their memory again
            self._drop_oldest()

    def join(self) -> None:
        """See `Pipeline`."""
        self._engine.wait(COMPUTE, self._updates_done, "H8")  # the next forward reads updated parameters
        while self._held:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        bucket, _, _ = self._held.popleft()
        self._engine.note(COMPUTE, Operation("free", str(bucket), (), (f"gradients {bucket}",)))

    def _fetch(self, unit: Unit, buffer: Buffer) -> None:
        engine = self._engine
        engine.wait(H2D, buffer.freed, "H3")  # the previous unit has been written back
        engine.wait(H2D, unit.written, "H4")  # so has this unit, from any buffer
        what = Operation("fetch", unit.label, (_store_name(unit),), (buffer.name,), unit.num_bytes)
        engine.copy(H2D, _tensors(unit.views(buffer.memory)), _tensors(unit.host), what)
        unit.ready = engine.record(H2D, unit.ready)
        buffer.unit = unit
        self._moved[0] += unit.num_bytes

    def _update(self, unit: Unit, buffer: Buffer, update: Update) -> None:
        engine = self._engine
        engine.wait(UPDATE, unit.ready, "H1")  # its states have been fetched
        update(unit, unit.views(buffer.memory))
        reads, writes = (buffer.name, f"gradients {unit.bucket}"), (buffer.name, f"weights {unit.bucket}")
        engine.note(UPDATE, Operation("update", unit.label, reads, writes, unit.num_bytes))
        buffer.updated = engine.record(UPDATE, buffer.updated)

    def _write_back(self, unit: Unit, buffer: Buffer) -> None:
        engine = self._engine
        engine.wait(D2H, buffer.updated, "H2")  # it has been updated
        what = Operation("write-back", unit.label, (buffer.name,), (_store_name(unit),), unit.num_bytes)
        engine.copy(D2H, _tensors(unit.host), _tensors(unit.views(buffer.memory)), what)
        unit.written = buffer.freed = engine.record(D2H, unit.written)
        self._moved[1] += unit.num_bytes

    def _units_of(self, bucket: int | None) -> Iterator[Unit]:
        """Iterate over the units of a bucket, or of all buckets, that were ever used."""
        for units in self._units.values() if bucket is None else [self._units.get(bucket, [])]:
            yield from units

    def _wait_to_read(self) -> None:
        for unit in self._units_of(None):
            self._engine.wait(HOST, unit.written, "H5")
        self._note_host("host read")

    def _wait_to_write(self, bucket: int | None, buffers: Sequence[Buffer] = ()) -> None:
        """Wait until the host may write to the store, or free it together with `buffers`."""
        for unit in self._units_of(bucket):
            self._engine.wait(HOST, unit.written, "H6")
            self._engine.wait(HOST, unit.ready, "H6")  # a fetch still reads what the host will write
        self._note_host("host write", bucket, tuple(buffer.name for buffer in buffers))

    def _note_host(self, kind: str, bucket: int | None = None, buffers: tuple[str, ...] = ()) -> None:
        touched = (*map(_store_name, self._units_of(bucket)), *buffers)
        reads, writes = (touched, ()) if kind == "host read" else ((), touched)
        self._engine.note(HOST, Operation(kind, "", reads, writes))


class StreamedPipeline(_PipelineBase):
    """Pipeline in which every unit passes through a ring of buffers in every step.

    Args:
        store: states in host memory.
        engine: copy engine of the device.
        device: device of the buffers.
        buffer_bytes: bytes of each buffer.
        buffer_count: number of buffers; at least 2 for copies and updates to overlap.
    """

    def __init__(
        self,
        store: Store,
        engine: CopyEngine,
        device: torch.device,
        buffer_bytes: int,
        buffer_count: int,
    ) -> None:
        super().__init__(store, engine)
        self._capacity = buffer_bytes
        self._free = [
            Buffer(f"buffer {i}", torch.empty(buffer_bytes, dtype=torch.uint8, device=device))
            for i in range(buffer_count)
        ]  # buffers without a unit, the least recently used first
        for buffer in self._free:
            buffer.freed = engine.record(COMPUTE, None)  # earlier work may still use this memory
        self._buffer_of: dict[Unit, Buffer] = {}
        self._expected: list[Unit] = []  # units that are updated next, in order
        self._ring_bytes = buffer_bytes * buffer_count

    def begin(self, buckets: Sequence[int]) -> None:
        """See `Pipeline`. Units that were fetched but are not among the next ones are dropped."""
        self._expected = [unit for bucket in buckets for unit in self.units(bucket)]
        expected = set(self._expected[: len(self._free) + len(self._buffer_of)])
        for unit in [unit for unit in self._buffer_of if unit not in expected]:
            self._release(unit)
        self._fetch_ahead()

    def announce(self, buckets: Sequence[int]) -> None:
        """See `Pipeline`. Does nothing: the ring holds only the next units."""

    def run(self, bucket: int, update: Update) -> None:
        """See `Pipeline`. A bucket may be out of order: if no buffer is free, the last fetched unit is dropped."""
        for unit in self.units(bucket):
            if unit in self._expected:
                self._expected.remove(unit)
            if unit not in self._buffer_of:
                if not self._free:
                    self._release(next(reversed(self._buffer_of)))
                self._start_fetch(unit)
            self._fetch_ahead()
            buffer = self._buffer_of[unit]
            self._update(unit, buffer, update)
            self._write_back(unit, buffer)
            self._release(unit)
            self._fetch_ahead()

    def _start_fetch(self, unit: Unit) -> None:
        buffer = self._free.pop(0)
        self._fetch(unit, buffer)
        self._buffer_of[unit] = buffer

    def _release(self, unit: Unit) -> None:
        buffer = self._buffer_of.pop(unit)
        buffer.unit = None
        self._free.append(buffer)

    def _fetch_ahead(self) -> None:
        for unit in self._expected:
            if not self._free:
                break
            if unit not in self._buffer_of:
                self._start_fetch(unit)

    def drain(self) -> None:
        """See `Pipeline`."""
        self._wait_to_read()

    def invalidate(self, bucket: int | None = None) -> None:
        """See `Pipeline`. The next `begin` fetches again."""
        for unit in [unit for unit in self._buffer_of if bucket in (None, unit.bucket)]:
            self._release(unit)
        self._expected = [unit for unit in self._expected if bucket not in (None, unit.bucket)]
        self._wait_to_write(bucket)

    def close(self) -> None:
        """See `Pipeline`."""
        self._wait_to_write(None, (*self._free, *self._buffer_of.values()))

    @property
    def stats(self) -> tuple[int, int, int]:
        """See `Pipeline`."""
        return self._moved[0], self._moved[1], self._ring_bytes


class ResidentPipeline(_PipelineBase):
    """Pipeline in which the states of active buckets stay on the device.

    A buffer holds a bucket. Buffers are reused; there are at most enough for two disjoint sets of buckets (H10).

    Args:
        store: states in host memory.
        engine: copy engine of the device.
        device: device of the buffers.
    """

    def __init__(self, store: Store, engine: CopyEngine, device: torch.device) -> None:
        super().__init__(store, engine)
        self._device = device
        self._buffers: list[Buffer] = []
        self._buffer_of: dict[int, Buffer] = {}
        self._modified: set[int] = set()  # buckets that must be written back
        self._announced: set[int] = set()

    def begin(self, buckets: Sequence[int]) -> None:
        """See `Pipeline`. Buckets neither in this set nor in the announced one are written back."""
        wanted = self._announced.union(buckets)
        for bucket in [bucket for bucket in self._buffer_of if bucket not in wanted]:
            self._write_back_bucket(bucket)
            self._buffer_of.pop(bucket).unit = None
        for bucket in buckets:
            self._ensure_fetched(bucket)

    def announce(self, buckets: Sequence[int]) -> None:
        """See `Pipeline`. Buckets in both sets are not copied. Those that are not pinned yet are fetched later."""
        self._announced = set(buckets)
        for bucket in buckets:
            if self._store.is_ready(bucket):
                self._ensure_fetched(bucket)

    def run(self, bucket: int, update: Update) -> None:
        """See `Pipeline`."""
        self._ensure_fetched(bucket)
        for unit in self.units(bucket):
            self._update(unit, self._buffer_of[bucket], update)
            self._modified.add(bucket)

    def _ensure_fetched(self, bucket: int) -> None:
        for unit in self.units(bucket):
            if bucket in self._buffer_of:
                continue
            size = sum(-(-t.numel() * t.itemsize // ALIGNMENT) * ALIGNMENT for t in unit.host.values())
            fitting = [b for b in self._buffers if b.unit is None and b.memory.numel() >= size]
            if fitting:
                buffer = min(fitting, key=lambda b: b.memory.numel())
            else:
                memory = torch.empty(size, dtype=torch.uint8, device=self._device)
                buffer = Buffer(f"slab {len(self._buffers)}", memory)
                self._buffers.append(buffer)
                buffer.freed = self._engine.record(COMPUTE, None)  # as in the ring
            self._fetch(unit, buffer)
            self._buffer_of[bucket] = buffer

    def _write_back_bucket(self, bucket: int) -> None:
        if bucket in self._modified:
            for unit in self.units(bucket):
                self._write_back(unit, self._buffer_of[bucket])
            self._modified.discard(bucket)

    def drain(self) -> None:
        """See `Pipeline`. Active buckets are written back, and stay on the device."""
        for bucket in self._buffer_of:
            self._write_back_bucket(bucket)
        self._wait_to_read()

    def invalidate(self, bucket: int | None = None) -> None:
        """See `Pipeline`."""
        for held in [held for held in self._buffer_of if bucket in (None, held)]:
            self._write_back_bucket(held)
            self._buffer_of.pop(held).unit = None
        self._announced = {other for other in self._announced if bucket not in (None, other)}
        self._wait_to_write(bucket)

    def close(self) -> None:
        """See `Pipeline`. Modified buckets are written back first."""
        for bucket in self._buffer_of:
            self._write_back_bucket(bucket)
        self._wait_to_write(None, self._buffers)

    @property
    def stats(self) -> tuple[int, int, int]:
        """See `Pipeline`."""
        held = sum(buffer.memory.numel() for buffer in self._buffers)
        return self._moved[0], self._moved[1], held


def make_pipeline(
    mode: Offload,
    store: Store,
    engine: CopyEngine,
    device: torch.device,
    buffer_bytes: int,
    buffer_count: int,
) -> Pipeline:
    """Construct the pipeline of a mode; the last two arguments are those of `StreamedPipeline`."""
    if mode == "resident":
        return ResidentPipeline(store, engine, device)
    return StreamedPipeline(store, engine, device, buffer_bytes, buffer_count)


def check_buffers(mode: Offload, buckets: Sequence[Bucket], buffer_bytes: int) -> None:
    """Check that a buffer holds a unit of every bucket, the widest first.

    Raises:
        ConfigError: a buffer smaller than a chunk.
    """
    if mode == "streamed":
        widths = [(sum(dtype.itemsize for dtype in b.dtypes.values()), b.dtypes) for b in buckets if b.params]
        for _, dtypes in sorted(widths, key=itemgetter(0), reverse=True):
            elements_in(buffer_bytes, dtypes)


def _tensors(views: dict[str, Tensor]) -> list[Tensor]:
    return list(views.values())


def _store_name(unit: Unit) -> str:
    return f"store {unit.label}"
