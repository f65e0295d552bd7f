"""Pipelines: how units of states come to the device, are updated there, and go home.

*Streamed*: every unit passes through a ring of few buffers in every step. While one is updated, the next is fetched
and the last is written back. *Resident*: the buckets that train keep their states on the device until others
take their place; those are fetched before the switch.

Every wait has the number of the hazard it is there for: see the table in docs/architecture.md.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from grass.offload.store import ALIGNMENT, Store
from grass.offload.streams import COMPUTE, D2H, H2D, HOST, UPDATE, CopyEngine, Operation
from grass.offload.units import Unit, cut

Update = Callable[[Unit, dict[str, Tensor]], None]
"""Updates a unit whose sections are in these 1-D tensors on the device, by work on the current stream: `UPDATE`."""


class Buffer:
    """Device memory that units take turns in.

    Attributes:
        tenant: the unit that is in it, or on its way.
        updated, freed: events: the tenant's update, and the write-back of its predecessor.
    """

    def __init__(self, name: str, memory: Tensor) -> None:
        self.name, self.memory = name, memory
        self.tenant: Unit | None = None
        self.updated: Any = None
        self.freed: Any = None


class Pipeline(Protocol):
    """What an optimizer asks for. Buckets are numbers, as in the store."""

    def begin(self, buckets: Sequence[int]) -> None:
        """Say which buckets are updated next, in which order; their states start to come."""

    def announce(self, buckets: Sequence[int]) -> None:
        """Say which buckets will be updated when those of now are done with."""

    def units(self, bucket: int) -> Sequence[Unit]:
        """The units of a bucket, in the order of updates."""

    def updating(self) -> contextlib.AbstractContextManager[None]:
        """Where `run` is called: work of now goes beside the current stream, after what that has been given."""

    def run(self, bucket: int, update: Update) -> None:
        """Update a bucket, by calling `update` for every unit."""

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Let the memory of tensors be free only when the updates of now are done with it."""

    def join(self) -> None:
        """Let the current stream wait for all updates."""

    def drain(self) -> None:
        """Let the host wait until the store holds all states as they are now."""

    def invalidate(self, bucket: int | None = None) -> None:
        """Let the host wait until it may write to a bucket's states, or to all; what it writes is fetched anew."""

    def close(self) -> None:
        """Let the host wait until nothing uses the store, nor the memory of buffers: both may then be freed."""

    @property
    def stats(self) -> tuple[int, int, int]:
        """Bytes fetched and written back so far, and bytes of device memory held."""


class _Base:
    def __init__(self, store: Store, engine: CopyEngine) -> None:
        self._store, self._engine = store, engine
        self._units: dict[int, list[Unit]] = {}
        self._capacity: int | None = None
        self._moved = [0, 0]  # bytes to and from the device
        self._given: Any = None  # events: gradients are complete; updates are done
        self._done: Any = None

    def units(self, bucket: int) -> Sequence[Unit]:
        """See `Pipeline`."""
        if bucket not in self._units:
            self._units[bucket] = cut(bucket, self._store.slab(bucket), self._capacity)
        return self._units[bucket]

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """See `Pipeline`."""
        engine = self._engine
        self._given = engine.record(COMPUTE, self._given)
        engine.wait(UPDATE, self._given, "H7")  # gradients are complete
        with engine.on(UPDATE):
            yield
        self._done = engine.record(UPDATE, self._done)

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """See `Pipeline`."""
        self._engine.keep(UPDATE, tensors)

    def join(self) -> None:
        """See `Pipeline`."""
        self._engine.wait(COMPUTE, self._done, "H8")  # the next forward reads what was updated

    def _fetch(self, unit: Unit, buffer: Buffer) -> None:
        engine = self._engine
        engine.wait(H2D, buffer.freed, "H3")  # the last tenant has gone home
        engine.wait(H2D, unit.written, "H4")  # the unit itself has, from whichever buffer it was in
        what = Operation("fetch", unit.label, (_home(unit),), (buffer.name,), unit.num_bytes)
        engine.copy(H2D, _tensors(unit.views(buffer.memory)), _tensors(unit.host), what)
        unit.ready = engine.record(H2D, unit.ready)
        buffer.tenant = unit
        self._moved[0] += unit.num_bytes

    def _update(self, unit: Unit, buffer: Buffer, update: Update) -> None:
        engine = self._engine
        engine.wait(UPDATE, unit.ready, "H1")  # its states have come
        update(unit, unit.views(buffer.memory))
        reads, writes = (buffer.name, f"gradients {unit.bucket}"), (buffer.name, f"weights {unit.bucket}")
        engine.note(UPDATE, Operation("update", unit.label, reads, writes, unit.num_bytes))
        buffer.updated = engine.record(UPDATE, buffer.updated)

    def _write_back(self, unit: Unit, buffer: Buffer) -> None:
        engine = self._engine
        engine.wait(D2H, buffer.updated, "H2")  # it has been updated
        what = Operation("write-back", unit.label, (buffer.name,), (_home(unit),), unit.num_bytes)
        engine.copy(D2H, _tensors(unit.host), _tensors(unit.views(buffer.memory)), what)
        unit.written = buffer.freed = engine.record(D2H, unit.written)
        self._moved[1] += unit.num_bytes

    def _units_of(self, bucket: int | None) -> Iterator[Unit]:
        """The units of a bucket, or all, that have ever been on the way."""
        for units in self._units.values() if bucket is None else [self._units.get(bucket, [])]:
            yield from units

    def _wait_to_read(self) -> None:
        for unit in self._units_of(None):
            self._engine.wait(HOST, unit.written, "H5")
        self._note_host("host read")

    def _wait_to_write(self, bucket: int | None, buffers: Sequence[Buffer] = ()) -> None:
        """Into what units have at home; or to free it, and buffers, that others may be given their memory."""
        for unit in self._units_of(bucket):
            self._engine.wait(HOST, unit.written, "H6")
            self._engine.wait(HOST, unit.ready, "H6")  # a fetch still reads what the host will write
        self._note_host("host write", bucket, tuple(buffer.name for buffer in buffers))

    def _note_host(self, kind: str, bucket: int | None = None, buffers: tuple[str, ...] = ()) -> None:
        touched = (*map(_home, self._units_of(bucket)), *buffers)
        reads, writes = (touched, ()) if kind == "host read" else ((), touched)
        self._engine.note(HOST, Operation(kind, "", reads, writes))


class StreamedPipeline(_Base):
    """States visit the device in every step.

    Args:
        store: their home.
        engine: copies.
        device: where buffers are; all are made here.
        buffer_bytes: of each.
        buffer_count: at least 2, for anything to overlap.
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
        ]  # those without a tenant, the longest free first
        for buffer in self._free:
            buffer.freed = engine.record(COMPUTE, None)  # the allocator's memory may still be in use there
        self._taken: dict[Unit, Buffer] = {}
        self._coming: list[Unit] = []  # in the order in which they are expected
        self._ring_bytes = buffer_bytes * buffer_count

    def begin(self, buckets: Sequence[int]) -> None:
        """See `Pipeline`. What was fetched and is not expected first makes room."""
        self._coming = [unit for bucket in buckets for unit in self.units(bucket)]
        expected = set(self._coming[: len(self._free) + len(self._taken)])
        for unit in [unit for unit in self._taken if unit not in expected]:
            self._give_up(unit)
        self._fetch_ahead()

    def announce(self, buckets: Sequence[int]) -> None:
        """See `Pipeline`. The ring has no room for a set to come."""

    def run(self, bucket: int, update: Update) -> None:
        """See `Pipeline`. A bucket may come out of turn: buffers that wait for others then make room."""
        for unit in self.units(bucket):
            if unit in self._coming:
                self._coming.remove(unit)
            if unit not in self._taken:
                if not self._free:
                    self._give_up(next(reversed(self._taken)))
                self._take(unit)
            self._fetch_ahead()
            buffer = self._taken[unit]
            self._update(unit, buffer, update)
            self._write_back(unit, buffer)
            self._give_up(unit)
            self._fetch_ahead()

    def _take(self, unit: Unit) -> None:
        buffer = self._free.pop(0)
        self._fetch(unit, buffer)
        self._taken[unit] = buffer

    def _give_up(self, unit: Unit) -> None:
        buffer = self._taken.pop(unit)
        buffer.tenant = None
        self._free.append(buffer)

    def _fetch_ahead(self) -> None:
        for unit in self._coming:
            if not self._free:
                break
            if unit not in self._taken:
                self._take(unit)

    def drain(self) -> None:
        """See `Pipeline`."""
        self._wait_to_read()

    def invalidate(self, bucket: int | None = None) -> None:
        """See `Pipeline`. What is expected next is fetched by the next `begin`."""
        for unit in [unit for unit in self._taken if bucket in (None, unit.bucket)]:
            self._give_up(unit)
        self._coming = [unit for unit in self._coming if bucket not in (None, unit.bucket)]
        self._wait_to_write(bucket)

    def close(self) -> None:
        """See `Pipeline`."""
        self._wait_to_write(None, (*self._free, *self._taken.values()))

    @property
    def stats(self) -> tuple[int, int, int]:
        """See `Pipeline`."""
        return self._moved[0], self._moved[1], self._ring_bytes


class ResidentPipeline(_Base):
    """States stay on the device as long as their buckets train.

    A buffer holds a bucket. Buffers are kept and used again: as many as two sets have that share nothing (H10).

    Args:
        store: their home.
        engine: copies.
        device: where buffers are.
    """

    def __init__(self, store: Store, engine: CopyEngine, device: torch.device) -> None:
        super().__init__(store, engine)
        self._device = device
        self._buffers: list[Buffer] = []
        self._held: dict[int, Buffer] = {}
        self._changed: set[int] = set()  # buckets whose home is behind
        self._announced: set[int] = set()

    def begin(self, buckets: Sequence[int]) -> None:
        """See `Pipeline`. Who is neither in this set nor in the announced one goes home."""
        wanted = self._announced.union(buckets)
        for bucket in [bucket for bucket in self._held if bucket not in wanted]:
            self._send_home(bucket)
            self._held.pop(bucket).tenant = None
        for bucket in buckets:
            self._bring(bucket)

    def announce(self, buckets: Sequence[int]) -> None:
        """See `Pipeline`. A bucket of both sets does not move."""
        self._announced = set(buckets)
        for bucket in buckets:
            self._bring(bucket)

    def run(self, bucket: int, update: Update) -> None:
        """See `Pipeline`."""
        self._bring(bucket)
        for unit in self.units(bucket):
            self._update(unit, self._held[bucket], update)
            self._changed.add(bucket)

    def _bring(self, bucket: int) -> None:
        for unit in self.units(bucket):
            if bucket in self._held:
                continue
            size = sum(-(-t.numel() * t.itemsize // ALIGNMENT) * ALIGNMENT for t in unit.host.values())
            fitting = [b for b in self._buffers if b.tenant is None and b.memory.numel() >= size]
            if fitting:
                buffer = min(fitting, key=lambda b: b.memory.numel())
            else:
                memory = torch.empty(size, dtype=torch.uint8, device=self._device)
                buffer = Buffer(f"slab {len(self._buffers)}", memory)
                self._buffers.append(buffer)
                buffer.freed = self._engine.record(COMPUTE, None)  # as in the ring
            self._fetch(unit, buffer)
            self._held[bucket] = buffer

    def _send_home(self, bucket: int) -> None:
        if bucket in self._changed:
            for unit in self.units(bucket):
                self._write_back(unit, self._held[bucket])
            self._changed.discard(bucket)

    def drain(self) -> None:
        """See `Pipeline`. What trains stays, and a copy goes home."""
        for bucket in self._held:
            self._send_home(bucket)
        self._wait_to_read()

    def invalidate(self, bucket: int | None = None) -> None:
        """See `Pipeline`."""
        for held in [held for held in self._held if bucket in (None, held)]:
            self._send_home(held)
            self._held.pop(held).tenant = None
        self._announced = {other for other in self._announced if bucket not in (None, other)}
        self._wait_to_write(bucket)

    def close(self) -> None:
        """See `Pipeline`. What is on the device only goes home first."""
        for bucket in self._held:
            self._send_home(bucket)
        self._wait_to_write(None, self._buffers)

    @property
    def stats(self) -> tuple[int, int, int]:
        """See `Pipeline`."""
        held = sum(buffer.memory.numel() for buffer in self._buffers)
        return self._moved[0], self._moved[1], held


def _tensors(views: dict[str, Tensor]) -> list[Tensor]:
    return list(views.values())


def _home(unit: Unit) -> str:
    return f"store {unit.label}"
