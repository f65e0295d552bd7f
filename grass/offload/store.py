"""Store: the optimizer states in host memory.

A bucket of parameters (a layer, or one parameter outside) has one slab: a block of memory with a section for each kind
of state. A parameter begins at the same element of every section, so a range of elements takes one copy per section,
whichever parameters it holds.
"""

import contextlib
import ctypes
import functools
import math
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grass.errors import OffloadError
from grass_kernels import layout

ALIGNMENT = 256
"""Alignment in bytes of every parameter in every section, for fast copies; kernels require 16."""
_ELEMENTS = 128
"""The same in elements of two bytes, the smallest of a section."""


class _Memory(mmap.mmap):
    """Anonymous pages: zero, allocated by the system when first written, and pinned by `pin`."""

    _address = 0
    _process = 0  # that has asked for it to be pinned

    @property
    def is_pinned(self) -> bool:
        return self._address != 0

    def pin(self) -> None:
        cudart = torch.cuda.cudart()
        self._process = os.getpid()
        # A fork copies pinned pages at once instead of on write: leave them out of child processes.
        advice = getattr(mmap, "MADV_DONTFORK", None)
        if advice is not None:
            with contextlib.suppress(OSError):
                self.madvise(advice)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self))
        error = cudart.cudaHostRegister(address, len(self), 0)
        if int(error) != 0:
            _clear_last_error(cudart)
            raise OffloadError(
                f"{len(self):,} bytes of host memory could not be pinned (CUDA error {int(error)}): raise the limit "
                "of locked memory (ulimit -l), or use a machine with more memory"
            )
        self._address = address

    def __del__(self) -> None:
        if self._process not in (0, os.getpid()):
            # In a forked process these addresses are free, or belong to other memory. Freeing the object would unmap
            # them: keep it for ever.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
        elif self._address:
            torch.cuda.cudart().cudaHostUnregister(self._address)


def _clear_last_error(cudart: Any) -> None:
    """Clear the error of a failed call, which the next check after a kernel launch would report as its own."""
    if hasattr(cudart, "cudaGetLastError"):
        cudart.cudaGetLastError()
        return
    # A torch without this binding clears the error all the same, when it checks the launch of a kernel and raises.
    with contextlib.suppress(RuntimeError):
        torch.ones((), device="cuda")


def _map_memory(num_bytes: int, pinned: bool) -> _Memory:
    memory = _Memory(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if pinned:
        memory.pin()
    return memory


def zeros_on_demand(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return zeros on the CPU, contiguous, that take no memory until they are written."""
    numel = math.prod(shape)
    memory = _map_memory(max(1, numel * dtype.itemsize), pinned=False)
    return _section(memory, 0, numel, dtype).view(shape)


def _section(memory: _Memory | Tensor, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Return a part of memory as a tensor with its own storage, since a saved storage has one dtype."""
    if numel == 0:
        return torch.empty(0, dtype=dtype, device="cpu")
    if isinstance(memory, Tensor):
        return memory[offset : offset + numel * dtype.itemsize].view(dtype)
    return torch.frombuffer(memory, dtype=dtype, count=numel, offset=offset)


_allocate: Callable[[int, bool], _Memory | Tensor] = _map_memory


@contextlib.contextmanager
def allocating(function: Callable[[int, bool], Tensor]) -> Iterator[None]:
    """Replace the allocator of slabs inside this context: (bytes, pinned) -> zeroed uint8 tensor."""
    global _allocate
    before, _allocate = _allocate, function
    try:
        yield
    finally:
        _allocate = before


def allocates_host_memory() -> bool:
    """Return if slabs are allocated in host memory: False inside `allocating`."""
    return _allocate is _map_memory


class Bucket(NamedTuple):
    """Parameters whose states are stored together.

    Args:
        params: dense parameters, in the order of their states in a section.
        dtypes: dtypes of their states, by kind.
    """

    params: list[Tensor]
    dtypes: dict[str, torch.dtype]


class Slab:
    """The states of one bucket.

    Args:
        params: dense parameters.
        dtypes: dtypes of the sections, by kind.
        pinned: see `Store`.

    Attributes:
        starts: first element of each parameter in every section.
        numel: number of elements of every section.
        sections: 1-D tensors by kind.
        num_bytes: bytes of all sections.
    """

    def __init__(self, params: Sequence[Tensor], dtypes: Mapping[str, torch.dtype], pinned: bool) -> None:
        self.starts, self.numel = section_layout(params)
        self.num_bytes = self.numel * sum(dtype.itemsize for dtype in dtypes.values())
        self._memory = _allocate(max(1, self.num_bytes), pinned)
        self._lock = threading.Lock()
        self.sections: dict[str, Tensor] = {}
        self._viewed: set[tuple[Tensor, str]] = set()
        offset = 0
        for kind, dtype in dtypes.items():
            self.sections[kind] = _section(self._memory, offset, self.numel, dtype)
            offset += self.numel * dtype.itemsize

    def view(self, p: Tensor, kind: str) -> Tensor:
        """Return the state of a parameter, in the parameter's shape and strides."""
        section = self.sections[kind]
        self._viewed.add((p, kind))
        return section.as_strided(p.shape, p.stride(), section.storage_offset() + self.starts[p])

    @property
    def is_pinned(self) -> bool:
        """True if the memory is pinned, or was replaced inside `allocating`."""
        return not isinstance(self._memory, _Memory) or self._memory.is_pinned

    def pin(self) -> None:
        """Pin the memory, for asynchronous copies, or wait while another thread pins it."""
        if isinstance(self._memory, _Memory) and not self._memory.is_pinned:
            torch.cuda.cudart()  # raises in a forked process, where the thread that has the lock does not exist
            with self._lock:
                if not self._memory.is_pinned:
                    self._memory.pin()

    def was_viewed(self, p: Tensor, kind: str) -> bool:
        """Return if `view` was called for a state; otherwise it is still zero."""
        return (p, kind) in self._viewed


def section_layout(params: Sequence[Tensor]) -> tuple[dict[Tensor, int], int]:
    """Return the first element of each parameter in a section, and the number of elements of a section."""
    starts, numel = {}, 0
    for p in params:
        if not layout.is_dense(p):
            raise OffloadError(
                f"a parameter of shape {tuple(p.shape)} and strides {p.stride()} has gaps in memory, so its states "
                "cannot be copied as one range: make it contiguous, or use offload='none'"
            )
        starts[p] = numel
        numel += -(-p.numel() // _ELEMENTS) * _ELEMENTS
    return starts, numel


class Store:
    """The slabs of an optimizer, each allocated when first used, and pinned before the first copy.

    Args:
        buckets: buckets of all trainable parameters.
        pinned: pin the memory, for asynchronous copies.
    """

    def __init__(self, buckets: Sequence[Bucket], pinned: bool) -> None:
        self._buckets = buckets
        self._bucket = {p: number for number, bucket in enumerate(buckets) for p in bucket.params}
        self._numels = {p: p.numel() for p in self._bucket}
        self._slabs: dict[int, Slab] = {}
        self._pinned = pinned
        self._process = os.getpid()

    def __contains__(self, p: Tensor) -> bool:
        return p in self._bucket

    def bucket_of(self, p: Tensor) -> int:
        """Return the bucket of a parameter."""
        return self._bucket[p]

    @property
    def largest_bucket(self) -> int:
        """Number of elements of the largest bucket's parameters."""
        return max((sum(map(Tensor.numel, bucket.params)) for bucket in self._buckets), default=0)

    def kinds(self, p: Tensor) -> list[str]:
        """Return the kinds of states that are stored for a parameter."""
        return list(self._buckets[self._bucket[p]].dtypes)

    def has_room_for(self, buckets: Sequence[Bucket]) -> bool:
        """Return if the store holds exactly these parameters, and all kinds of their states."""
        if {p: number for number, bucket in enumerate(buckets) for p in bucket.params} != self._bucket:
            return False
        if not all(p.numel() == numel and layout.is_dense(p) for p, numel in self._numels.items()):
            return False  # the data of a parameter has been replaced
        return all(
            mine.dtypes.items() >= bucket.dtypes.items()
            for mine, bucket in zip(self._buckets, buckets, strict=True)
        )

    def slab(self, bucket: int) -> Slab:
        """Return the slab of a bucket, ready for copies: allocated at the first call, and pinned if the store is.

        Raises:
            OffloadError: memory that could not be pinned.
        """
        if bucket not in self._slabs:
            self._slabs[bucket] = Slab(*self._buckets[bucket], self._pinned)
        elif self._pinned:
            self._slabs[bucket].pin()
        return self._slabs[bucket]

    def is_ready(self, bucket: int) -> bool:
        """Return if `slab` will neither pin memory nor wait. A new slab is pinned in the background."""
        return not self._pinned or self._slab_for_host(bucket).is_pinned

    def _slab_for_host(self, bucket: int) -> Slab:
        """Return the slab of a bucket, for reads and writes by the host; a new one is pinned in the background."""
        if bucket not in self._slabs:
            slab = self._slabs[bucket] = Slab(*self._buckets[bucket], pinned=False)
            if self._pinned and not slab.is_pinned:
                self._background.submit(slab.pin)  # `slab` tries again after an error, and raises it
        return self._slabs[bucket]

    @functools.cached_property
    def _background(self) -> ThreadPoolExecutor:
        """One thread, on the current device, that pins slabs in the order of their first use."""
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
        executor = ThreadPoolExecutor(1, "grass-pin", torch.cuda.set_device, (device,))
        weakref.finalize(self, executor.shutdown, wait=False, cancel_futures=True)
        return executor

    def view(self, p: Tensor, kind: str) -> Tensor:
        """Return the state of a parameter, in the parameter's shape and strides."""
        return self._slab_for_host(self._bucket[p]).view(p, kind)

    def holds(self, t: Tensor) -> bool:
        """Return if a tensor is a view of a slab."""
        address = t.untyped_storage().data_ptr()
        sections = (section for slab in self._slabs.values() for section in slab.sections.values())
        return any(address == section.untyped_storage().data_ptr() for section in sections)

    def pin(self) -> None:
        """Pin all slabs, present and future, after the parameters have moved to a GPU."""
        self._pinned, self._process = True, os.getpid()
        for slab in self._slabs.values():
            slab.pin()

    @property
    def is_absent(self) -> bool:
        """True in a process that was forked after the memory was pinned: it does not exist there."""
        return self._pinned and self._process != os.getpid()

    def is_fresh(self, p: Tensor, kind: str) -> bool:
        """Return if a state was never handed out, hence never written: it is zero."""
        return not self._slab_for_host(self._bucket[p]).was_viewed(p, kind)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated so far."""
        return sum(slab.num_bytes for slab in self._slabs.values())

    @property
    def max_bytes(self) -> int:
        """Bytes once every bucket has been drawn."""
        total = 0
        for bucket in self._buckets:
            total += section_layout(bucket.params)[1] * sum(
                dtype.itemsize for dtype in bucket.dtypes.values()
            )
        return total
