"""Chunk tables: many tensors, one launch.

A table is one int64 buffer on the device, uploaded once and used until the tensors it lists change::

    rows      tensors x ROW       addresses, numel, layer, ... of each tensor, see COLUMNS
    layers    num_layers + 1      where each layer's partial sums begin
    chunks    one word a chunk    tensor << 32 | chunk within the tensor

What changes from step to step, gradients' addresses and hyperparameters, is in a second, small buffer, the
inputs (:mod:`grass_kernels.inputs`). A program takes one word of `chunks` and finds everything else from
there, so a launch has one grid whatever the number of tensors. Chunks are counted from each tensor's
first element in storage order and have `CHUNK` elements: what a chunk holds, hence its sum of squares,
depends on the tensor alone, not on its neighbours. Partial sums are numbered layer by layer, so a
layer's are one run, in the order of the lists.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grass_kernels._triton import constexpr

CHUNK = 16384
"""Elements of a chunk, what one program works through. One size for every dtype."""
BLOCK = 2048
"""Elements a program holds at a time. `CHUNK` is a multiple, so only a tensor's last block is partial."""
LAYER_BLOCK = 4096
"""Partial sums a program that adds up a layer holds at a time."""

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

# The same for kernels, which may read constexpr globals only (and are recompiled when one changes).
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
"""fp32 words that a step's prologue leaves for each tensor: a 64-byte line."""

_CPU = torch.device("cpu")  # named everywhere: the user may have set another default device


class Piece(NamedTuple):
    """Some chunks of a tensor."""

    tensor: int
    first_chunk: int
    num_chunks: int
    key: Hashable  # pieces with equal keys go into one launch


class ChunkRun(NamedTuple):
    """The chunks of the tensors that share a kernel: one launch."""

    key: Hashable  # what these tensors have in common
    start: int  # word of the table
    num_chunks: int


class Table(NamedTuple):
    """A table on the device, and what the host must know of it to launch."""

    data: Tensor  # int64
    num_tensors: int
    num_partials: int  # one a chunk
    num_layers: int
    layers_start: int  # word of the table
    runs: list[ChunkRun]


def build_table(
    *,
    numels: Sequence[int],
    keys: Sequence[Hashable],
    layers: Sequence[int],
    num_layers: int,
    device: torch.device,
    columns: Mapping[str, Sequence[int]] | None = None,
    pieces: Sequence[Piece] | None = None,
) -> Table:
    """Describe tensors, and upload the description.

    Args:
        numels: Elements of each tensor.
        keys: Tensors with equal keys go into one launch; not looked at where there are `pieces`.
        layers: The layer of each tensor, in ``[0, num_layers)``.
        num_layers: Number of layers.
        device: Where the tensors are and the table goes.
        columns: Further columns of `COLUMNS` by name, one entry a tensor; those left out are 0.
        pieces: How tensors are divided into launches; None is each in one piece.

    Returns:
        The table. The upload is queued on the device's current stream; nothing waits for it.
    """
    count = len(numels)
    numel = torch.tensor(numels, dtype=torch.int64, device=_CPU)
    layer = torch.tensor(layers, dtype=torch.int64, device=_CPU)
    chunks = (numel + (CHUNK - 1)) // CHUNK
    num_chunks = int(chunks.sum())

    layers_start = count * len(COLUMNS)
    chunks_start = layers_start + num_layers + 1
    # Pinned, so that the upload does not block; torch's pinned allocator keeps the memory from reuse
    # until the copy, which it sees on its stream, has finished.
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

    if pieces is None:
        pieces = [Piece(i, 0, n, key) for i, (n, key) in enumerate(zip(chunks.tolist(), keys, strict=True))]
    runs = _write_chunks(words[chunks_start:], pieces, chunks_start)
    data = words.to(device, non_blocking=True)
    return Table(data, count, num_chunks, num_layers, layers_start, runs)


def _write_chunks(out: Tensor, pieces: Sequence[Piece], start: int) -> list[ChunkRun]:
    """Fill `out` with the chunk words, key by key, and say which run of it is whose."""
    pieces_of: dict[Hashable, list[Piece]] = {}
    for piece in pieces:
        pieces_of.setdefault(piece.key, []).append(piece)
    runs, filled = [], 0
    for key, members in pieces_of.items():
        tensors = torch.tensor([piece.tensor for piece in members], device=_CPU)
        firsts = torch.tensor([piece.first_chunk for piece in members], device=_CPU)
        counts = torch.tensor([piece.num_chunks for piece in members], device=_CPU)
        total = int(counts.sum())
        if total:
            before = counts.cumsum(0) - counts
            within = torch.arange(total, device=_CPU) + (firsts - before).repeat_interleave(counts)
            out[filled : filled + total] = (tensors.repeat_interleave(counts) << 32) | within
            runs.append(ChunkRun(key, start + filled, total))
            filled += total
    return runs
