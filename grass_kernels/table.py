"""Chunk tables: many tensors, one launch.

A table is one int64 buffer on the device, uploaded once and used until the tensors it lists change::

    rows      tensors x ROW         addresses, numel, layer, ... of each tensor, see COLUMNS
    layers    num_layers + 1        first partial sum of each layer
    chunks    one word per chunk    tensor << 32 | chunk within the tensor

Inputs that change between steps, addresses of gradients and hyperparameters, are in a second, small buffer
(:mod:`grass_kernels.inputs`). A program reads one word of `chunks`, which leads to everything else, so a launch has one
grid for any number of tensors. Chunks have `CHUNK` elements, counted from the first element of each tensor in storage
order: a chunk, and hence its sum of squares, depends on its tensor only. Partial sums are numbered layer by layer, so
those of a layer are contiguous, in the order of the lists.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grass_kernels._triton import constexpr

CHUNK = 16384
"""Elements of a chunk, which one program processes. The same for every dtype."""
BLOCK = 2048
"""Elements of a block, which a program holds in registers. `CHUNK` is a multiple: only the last block of a tensor is
partial."""
LAYER_BLOCK = 4096
"""Block size of the sum of partial sums of a layer."""

COLUMNS = (
    "param",
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "remainder",
    "step",
    "numel",
    "layer",
    "first_partial",
    "group",
    "seed",
)

# The same for kernels, which can read only constexpr globals, and are recompiled when one changes.
ROW = constexpr(len(COLUMNS))
PARAM = constexpr(COLUMNS.index("param"))
EXP_AVG = constexpr(COLUMNS.index("exp_avg"))
EXP_AVG_SQ = constexpr(COLUMNS.index("exp_avg_sq"))
MAX_EXP_AVG_SQ = constexpr(COLUMNS.index("max_exp_avg_sq"))
REMAINDER = constexpr(COLUMNS.index("remainder"))
STEP = constexpr(COLUMNS.index("step"))
NUMEL = constexpr(COLUMNS.index("numel"))
LAYER = constexpr(COLUMNS.index("layer"))
FIRST_PARTIAL = constexpr(COLUMNS.index("first_partial"))
GROUP = constexpr(COLUMNS.index("group"))
SEED = constexpr(COLUMNS.index("seed"))

COEFFICIENTS = constexpr(16)
"""fp32 words that the prologue writes for each tensor: a 64-byte line."""

_CPU = torch.device("cpu")  # explicit everywhere: the user may have set another default device


class Part(NamedTuple):
    """A range of chunks of a tensor, in a unit."""

    tensor: int  # index in the lists
    first_chunk: int
    num_chunks: int
    start: int = 0  # first element in the sections of the unit


class ChunkRun(NamedTuple):
    """The chunks of one launch."""

    key: Hashable
    start: int  # first word in the table
    num_chunks: int


class Table(NamedTuple):
    """A table on the device, and its sizes for launches."""

    data: Tensor  # int64
    num_tensors: int
    num_partials: int  # one per chunk
    num_layers: int
    layers_start: int  # first word of the layers
    runs: list[ChunkRun]


def build_table(
    *,
    numels: Sequence[int],
    keys: Sequence[Hashable],
    layers: Sequence[int],
    num_layers: int,
    device: torch.device,
    columns: Mapping[str, Sequence[int]] | None = None,
    parts: Sequence[tuple[Part, Hashable]] | None = None,
) -> Table:
    """Build a table of tensors, and upload it.

    Args:
        numels: Number of elements of each tensor.
        keys: Key of each tensor: tensors with equal keys are one launch. Ignored with `parts`.
        layers: Layer of each tensor, in ``[0, num_layers)``.
        num_layers: Number of layers.
        device: Device of the tensors and the table.
        columns: Further columns of `COLUMNS` by name, one entry per tensor; others are 0.
        parts: Parts and their keys: parts with equal keys are one launch; None is one part per tensor.

    Returns:
        The table. The upload is queued on the device's current stream, without a device sync.
    """
    count = len(numels)
    numel = torch.tensor(numels, dtype=torch.int64, device=_CPU)
    layer = torch.tensor(layers, dtype=torch.int64, device=_CPU)
    chunks = (numel + (CHUNK - 1)) // CHUNK
    num_chunks = int(chunks.sum())

    layers_start = count * len(COLUMNS)
    chunks_start = layers_start + num_layers + 1
    # Pinned, so that the upload does not block; torch's pinned allocator does not reuse the memory before the copy
    # on its stream has finished.
    pinned = device.type == "cuda"
    words = torch.empty(chunks_start + num_chunks, dtype=torch.int64, device=_CPU, pin_memory=pinned)

    first_of_layer = words[layers_start:chunks_start]
    first_of_layer.zero_()
    first_of_layer[1:].index_add_(0, layer, chunks).cumsum_(0)
    # Number the partial sums by layer, then in the order of the lists.
    by_layer = torch.argsort(layer, stable=True)
    sorted_chunks = chunks[by_layer]
    first_partial = torch.empty_like(chunks)
    first_partial[by_layer] = sorted_chunks.cumsum(0) - sorted_chunks

    rows = words[:layers_start].view(count, len(COLUMNS))
    rows.zero_()
    known: dict[str, Tensor] = {"numel": numel, "layer": layer, "first_partial": first_partial}
    for name, values in (columns or {}).items():
        known[name] = torch.tensor(values, dtype=torch.int64, device=_CPU)
    for name, column in known.items():
        rows[:, COLUMNS.index(name)] = column

    if parts is None:
        parts = list(zip(whole_parts(numels), keys, strict=True))
    runs = _write_chunks(words[chunks_start:], parts, chunks_start)
    data = words.to(device, non_blocking=True)
    return Table(data, count, num_chunks, num_layers, layers_start, runs)


def whole_parts(numels: Sequence[int]) -> list[Part]:
    """Return the parts of whole tensors, one each, with these numbers of elements."""
    return [Part(i, 0, -(-numel // CHUNK)) for i, numel in enumerate(numels)]


def _write_chunks(out: Tensor, parts: Sequence[tuple[Part, Hashable]], start: int) -> list[ChunkRun]:
    """Fill `out` with the chunk words, key by key, and return the run of each key."""
    parts_of: dict[Hashable, list[Part]] = {}
    for part, key in parts:
        parts_of.setdefault(key, []).append(part)
    runs, filled = [], 0
    for key, members in parts_of.items():
        tensors = torch.tensor([part.tensor for part in members], device=_CPU)
        firsts = torch.tensor([part.first_chunk for part in members], device=_CPU)
        counts = torch.tensor([part.num_chunks for part in members], device=_CPU)
        total = int(counts.sum())
        if total:
            before = counts.cumsum(0) - counts
            within = torch.arange(total, device=_CPU) + (firsts - before).repeat_interleave(counts)
            out[filled : filled + total] = (tensors.repeat_interleave(counts) << 32) | within
            runs.append(ChunkRun(key, start + filled, total))
            filled += total
    return runs
