"""Units: ranges of a bucket that pass through one device buffer at a time.

A unit is a range of chunks of a bucket: the same elements of every section of its slab. Cuts are at chunk boundaries
only, so that norms and stochastic rounding, which go by chunks, do not depend on the buffer size.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import grass_kernels
from grass.errors import ConfigError
from grass.offload.store import ALIGNMENT, Slab
from grass_kernels.table import CHUNK


class Part(NamedTuple):
    """A range of chunks of a parameter."""

    param: Tensor
    first_chunk: int
    num_chunks: int
    start: int  # first element in the sections of the slab
    numel: int


class Unit:
    """A range of a slab.

    Attributes:
        bucket: bucket of the slab.
        label: name in logs: "3.1" is the second unit of bucket 3.
        parts: ranges of chunks in the unit.
        start: first element in the sections.
        host: 1-D views of the sections in host memory, by kind.
        num_bytes: bytes of all sections, without padding.
        ready, written: events of the last fetch and the last write-back.
    """

    def __init__(self, bucket: int, index: int, slab: Slab, parts: Sequence[Part]) -> None:
        self.bucket, self.label, self.parts = bucket, f"{bucket}.{index}", tuple(parts)
        self.start = parts[0].start
        stop = parts[-1].start + parts[-1].numel
        self.host = {kind: section[self.start : stop] for kind, section in slab.sections.items()}
        self.num_bytes = sum(t.numel() * t.itemsize for t in self.host.values())
        self.ready: object = None
        self.written: object = None

    def for_kernels(self, indices: Mapping[Tensor, int]) -> grass_kernels.Unit:
        """Return the unit as the kernels take it.

        Args:
            indices: index of each parameter in the lists of the kernels; parts of other parameters are left out.
        """
        parts = [
            grass_kernels.Part(
                indices[part.param], part.first_chunk, part.num_chunks, part.start - self.start
            )
            for part in self.parts
            if part.param in indices
        ]
        return grass_kernels.Unit(parts, self.host)

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """Return 1-D views of its sections in a uint8 buffer, each aligned to `ALIGNMENT` bytes."""
        views, offset = {}, 0
        for kind, section in self.host.items():
            size = section.numel() * section.itemsize
            views[kind] = memory[offset : offset + size].view(section.dtype)
            offset += -(-size // ALIGNMENT) * ALIGNMENT
        return views


def cut(bucket: int, slab: Slab, capacity: int | None) -> list[Unit]:
    """Cut a slab into units.

    Args:
        bucket: bucket of the slab.
        slab: slab to cut.
        capacity: bytes of a buffer; None makes one unit.
    """
    if not slab.starts:
        return []
    dtypes = {kind: section.dtype for kind, section in slab.sections.items()}
    limit = slab.numel if capacity is None else elements_in(capacity, dtypes)
    units: list[Unit] = []
    parts: list[Part] = []

    def close() -> None:
        if parts:
            units.append(Unit(bucket, len(units), slab, parts))
            parts.clear()

    for p, start in slab.starts.items():
        done, total = 0, -(-p.numel() // CHUNK)
        while done < total:
            begin = start + done * CHUNK
            room = limit - (begin - parts[0].start if parts else 0)
            rest = p.numel() - done * CHUNK
            taken = rest if rest <= room else room // CHUNK * CHUNK
            if taken <= 0:
                close()
                continue
            parts.append(Part(p, done, -(-taken // CHUNK), begin, taken))
            done += -(-taken // CHUNK)
    close()
    return units


def elements_in(capacity: int, dtypes: Mapping[str, torch.dtype]) -> int:
    """Return the number of elements per section that a buffer of `capacity` bytes holds.

    Raises:
        ConfigError: fewer than a chunk.
    """
    width = sum(dtype.itemsize for dtype in dtypes.values())
    elements = (capacity - len(dtypes) * ALIGNMENT) // width
    if elements < CHUNK:
        least = CHUNK * width + len(dtypes) * ALIGNMENT
        raise ConfigError(
            f"buffer_mb is {capacity:,} bytes, and the smallest unit of states has {least:,}: pass buffer_mb of at "
            f"least {math.ceil(100 * least / 2**20) / 100}"
        )
    return elements
