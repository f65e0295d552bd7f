"""Store: the home of optimizer states, in host memory.

A bucket of parameters (a layer, or one parameter that is in no layer) has one slab: a stretch of memory with a section
for each kind of state, in which every parameter has the same place, counted in elements. So a range of elements is one
copy a section, whatever parameters it holds.
"""

import contextlib
import ctypes
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grass.errors import OffloadError
from grass_kernels import layout

ALIGNMENT = 256
"""Bytes to which every parameter's segment is aligned in every section: what a copy engine likes, and kernels need."""
_ELEMENTS = 128
"""The same in elements of two bytes, the smallest that a section has."""


class _Memory(mmap.mmap):
    """Anonymous pages: zero, not rounded up, and none of it taken before it is written; pinned if asked for."""

    _address = 0

    def pin(self) -> None:
        if self._address:
            return
        address = ctypes.addressof(ctypes.c_char.from_buffer(self))
        error = torch.cuda.cudart().cudaHostRegister(address, len(self), 0)
        if int(error) != 0:
            raise OffloadError(
                f"{len(self):,} bytes of host memory could not be pinned (CUDA error {int(error)}): raise the limit "
                "of locked memory (ulimit -l), or use a machine with more memory"
            )
        self._address = address

    def __del__(self) -> None:
        if self._address:
            torch.cuda.cudart().cudaHostUnregister(self._address)


def _map_memory(num_bytes: int, pinned: bool) -> _Memory:
    memory = _Memory(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if pinned:
        memory.pin()
    return memory


def _section(memory: _Memory | Tensor, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
    """A part of memory, which it keeps alive; a storage of its own, as files have one dtype a storage."""
    if numel == 0:
        return torch.empty(0, dtype=dtype, device="cpu")
    if isinstance(memory, Tensor):
        return memory[offset : offset + numel * dtype.itemsize].view(dtype)
    return torch.frombuffer(memory, dtype=dtype, count=numel, offset=offset)


_allocate: Callable[[int, bool], _Memory | Tensor] = _map_memory


@contextlib.contextmanager
def allocating(function: Callable[[int, bool], Tensor]) -> Iterator[None]:
    """Let slabs be allocated by another function meanwhile: from bytes, and whether pinned, to zeroed uint8."""
    global _allocate
    before, _allocate = _allocate, function
    try:
        yield
    finally:
        _allocate = before


def takes_host_memory() -> bool:
    """Whether slabs are what they say: not while `allocating`."""
    return _allocate is _map_memory


class Bucket(NamedTuple):
    """Parameters whose states lie together.

    Args:
        params: dense, in the order of their places.
        dtypes: of their states, by kind.
    """

    params: list[Tensor]
    dtypes: dict[str, torch.dtype]


class Slab:
    """The states of one bucket.

    Args:
        params: dense parameters, each with the kinds of its states.
        dtypes: of the sections, by kind.
        pinned: see `Store`.

    Attributes:
        starts: element of the sections at which each parameter begins.
        numel: elements of every section.
        sections: 1-D, by kind.
        num_bytes: of all sections.
    """

    def __init__(self, params: Sequence[Tensor], dtypes: Mapping[str, torch.dtype], pinned: bool) -> None:
        self.starts, self.numel = place(params)
        self.num_bytes = self.numel * sum(dtype.itemsize for dtype in dtypes.values())
        self._memory = _allocate(max(1, self.num_bytes), pinned)
        self.sections: dict[str, Tensor] = {}
        self._given: set[tuple[Tensor, str]] = set()
        offset = 0
        for kind, dtype in dtypes.items():
            self.sections[kind] = _section(self._memory, offset, self.numel, dtype)
            offset += self.numel * dtype.itemsize

    def view(self, p: Tensor, kind: str) -> Tensor:
        """The place of a parameter's state, in the parameter's shape and strides."""
        section = self.sections[kind]
        self._given.add((p, kind))
        return section.as_strided(p.shape, p.stride(), section.storage_offset() + self.starts[p])

    def pin(self) -> None:
        """Let copy engines read and write it without the host."""
        if isinstance(self._memory, _Memory):
            self._memory.pin()

    def was_given(self, p: Tensor, kind: str) -> bool:
        """Whether `view` was called for it: what never was is still zero."""
        return (p, kind) in self._given


def place(params: Sequence[Tensor]) -> tuple[dict[Tensor, int], int]:
    """Where each parameter begins in a section, and how many elements a section has."""
    starts, numel = {}, 0
    for p in params:
        if not layout.is_dense(p):
            raise OffloadError(
                f"a parameter of shape {tuple(p.shape)} and strides {p.stride()} has gaps in memory, and its states "
                "could not be copied in one piece: make it contiguous, or use offload='none'"
            )
        starts[p] = numel
        numel += -(-p.numel() // _ELEMENTS) * _ELEMENTS
    return starts, numel


class Store:
    """The slabs of an optimizer, each made when it is first asked for.

    Args:
        buckets: all that can ever train.
        pinned: let copy engines read and write it without the host.
    """

    def __init__(self, buckets: Sequence[Bucket], pinned: bool) -> None:
        self._buckets = buckets
        self._bucket = {p: number for number, bucket in enumerate(buckets) for p in bucket.params}
        self._numels = {p: p.numel() for p in self._bucket}
        self._slabs: dict[int, Slab] = {}
        self._pinned = pinned

    def __contains__(self, p: Tensor) -> bool:
        return p in self._bucket

    def bucket_of(self, p: Tensor) -> int:
        """The number of the bucket a parameter is in."""
        return self._bucket[p]

    def kinds(self, p: Tensor) -> list[str]:
        """Kinds of states that a parameter has a place for."""
        return list(self._buckets[self._bucket[p]].dtypes)

    def has_room_for(self, buckets: Sequence[Bucket]) -> bool:
        """Whether it holds these parameters, none else, and has a place for each kind of their states."""
        if {p: number for number, bucket in enumerate(buckets) for p in bucket.params} != self._bucket:
            return False
        if not all(p.numel() == numel and layout.is_dense(p) for p, numel in self._numels.items()):
            return False  # other data has been put in
        return all(
            mine.dtypes.items() >= bucket.dtypes.items()
            for mine, bucket in zip(self._buckets, buckets, strict=True)
        )

    def slab(self, bucket: int) -> Slab:
        """The slab of a bucket; its memory is taken at the first call."""
        if bucket not in self._slabs:
            self._slabs[bucket] = Slab(*self._buckets[bucket], self._pinned)
        return self._slabs[bucket]

    def view(self, p: Tensor, kind: str) -> Tensor:
        """Where a parameter's state lives."""
        return self.slab(self._bucket[p]).view(p, kind)

    def holds(self, t: Tensor) -> bool:
        """Return if a tensor is a view of a slab."""
        address = t.untyped_storage().data_ptr()
        sections = (section for slab in self._slabs.values() for section in slab.sections.values())
        return any(address == section.untyped_storage().data_ptr() for section in sections)

    def pin(self) -> None:
        """Pin what there is and what is to come: the parameters have moved to a GPU."""
        self._pinned = True
        for slab in self._slabs.values():
            slab.pin()

    def is_fresh(self, p: Tensor, kind: str) -> bool:
        """Whether nothing was ever written to a parameter's state: it is zero."""
        return not self.slab(self._bucket[p]).was_given(p, kind)

    @property
    def num_bytes(self) -> int:
        """Bytes taken so far."""
        return sum(slab.num_bytes for slab in self._slabs.values())

    @property
    def most_bytes(self) -> int:
        """Bytes when every bucket has been drawn."""
        total = 0
        for bucket in self._buckets:
            total += place(bucket.params)[1] * sum(dtype.itemsize for dtype in bucket.dtypes.values())
        return total
