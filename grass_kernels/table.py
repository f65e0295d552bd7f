"""Pointer and chunk tables: many tensors, one launch.

A table is one int64 buffer on the device, uploaded in one copy::

    header    HEADER words        hyperparameters, as bit patterns of doubles (AdamW only)
    rows      tensors x ROW       addresses, numel and layer of each tensor, see COLUMNS
    layers    num_layers + 1      where each layer's partial sums begin
    chunks    one word a chunk    tensor << 32 | chunk within the tensor

A program takes one word of `chunks` and finds everything else from there, so a launch has one grid
whatever the number of tensors. Chunks are counted from each tensor's first element in storage order and
have `CHUNK` elements: what a chunk holds, hence its sum of squares, depends on the tensor alone, not
on its neighbours. Partial sums are numbered layer by layer, so a layer's are one run, in the order of
the lists.
"""

from collections.abc import Sequence
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
VECTOR_BYTES = 16
"""Alignment of a 128-bit access."""

COLUMNS = (
    "param",
    "grad",
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "step",
    "numel",
    "layer",
    "first_partial",
    "aligned",
)
VECTOR_COLUMNS = 5
"""The first columns are the addresses that blocks are loaded from, and count for `aligned`."""

# The same for kernels, which may read constexpr globals only (and are recompiled when one changes).
HEADER = constexpr(16)
ROW = constexpr(len(COLUMNS))
PARAM = constexpr(COLUMNS.index("param"))
GRAD = constexpr(COLUMNS.index("grad"))
EXP_AVG = constexpr(COLUMNS.index("exp_avg"))
EXP_AVG_SQ = constexpr(COLUMNS.index("exp_avg_sq"))
MAX_EXP_AVG_SQ = constexpr(COLUMNS.index("max_exp_avg_sq"))
STEP = constexpr(COLUMNS.index("step"))
NUMEL = constexpr(COLUMNS.index("numel"))
LAYER = constexpr(COLUMNS.index("layer"))
FIRST_PARTIAL = constexpr(COLUMNS.index("first_partial"))
ALIGNED = constexpr(COLUMNS.index("aligned"))

_HEADER_WORDS = 16
_CPU = torch.device("cpu")  # named everywhere: the user may have set another default device

Dtypes = tuple[torch.dtype, ...]


class ChunkRun(NamedTuple):
    """The chunks of the tensors that share a kernel: one launch."""

    dtypes: Dtypes  # what these tensors have in common
    start: int  # word of the table
    num_chunks: int


class Table(NamedTuple):
    """A table on the device, and what the host must know of it to launch."""

    data: Tensor  # int64
    num_tensors: int
    num_partials: int  # one a chunk
    layers_start: int  # word of the table
    runs: list[ChunkRun]


def build_table(
    *,
    grads: Sequence[Tensor],
    keys: Sequence[Dtypes],
    layers: Sequence[int],
    num_layers: int,
    device: torch.device,
    params: Sequence[Tensor] = (),
    exp_avgs: Sequence[Tensor] = (),
    exp_avg_sqs: Sequence[Tensor] = (),
    max_exp_avg_sqs: Sequence[Tensor] = (),
    steps: Sequence[Tensor] = (),
    header: Sequence[float] = (),
) -> Table:
    """Describe lists of equally laid out, dense tensors, and upload the description.

    Args:
        grads: The gradients; all other lists are empty or as long.
        keys: The dtypes of each tensor. Those with equal keys go into one launch.
        layers: The layer of each tensor, in ``[0, num_layers)``.
        num_layers: Number of layers.
        device: Where the tensors are and the table goes.
        params: Addresses of the columns of that name, as the following lists.
        exp_avgs: See `params`.
        exp_avg_sqs: See `params`.
        max_exp_avg_sqs: See `params`.
        steps: See `params`.
        header: At most `HEADER` numbers, stored as doubles.

    Returns:
        The table. The upload is queued on the device's current stream; nothing waits for it.
    """
    count = len(grads)
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
    addresses = [[t.data_ptr() for t in tensors] if tensors else [0] * count for tensors in lists]
    columns = torch.tensor(
        [*addresses, [g.numel() for g in grads], list(layers)], dtype=torch.int64, device=_CPU
    )
    numel, layer = columns[COLUMNS.index("numel")], columns[COLUMNS.index("layer")]
    chunks = (numel + (CHUNK - 1)) // CHUNK
    num_chunks = int(chunks.sum())

    layers_start = _HEADER_WORDS + count * len(COLUMNS)
    chunks_start = layers_start + num_layers + 1
    # Pinned, so that the upload does not block; torch's pinned allocator keeps the memory from reuse
    # until the copy, which it sees on its stream, has finished.
    pinned = device.type == "cuda"
    words = torch.empty(chunks_start + num_chunks, dtype=torch.int64, device=_CPU, pin_memory=pinned)

    values = torch.zeros(_HEADER_WORDS, dtype=torch.float64, device=_CPU)
    values[: len(header)] = torch.tensor(header, dtype=torch.float64, device=_CPU)
    words[:_HEADER_WORDS] = values.view(torch.int64)

    first_of_layer = words[layers_start:chunks_start]
    first_of_layer.zero_()
    first_of_layer[1:].index_add_(0, layer, chunks).cumsum_(0)
    # Number the partial sums by layer, then in the order of the lists.
    by_layer = torch.argsort(layer, stable=True)
    sorted_chunks = chunks[by_layer]
    first_partial = torch.empty_like(chunks)
    first_partial[by_layer] = sorted_chunks.cumsum(0) - sorted_chunks

    rows = words[_HEADER_WORDS:layers_start].view(count, len(COLUMNS))
    rows[:, : len(columns)] = columns.T
    rows[:, COLUMNS.index("first_partial")] = first_partial
    misaligned = (columns[:VECTOR_COLUMNS] % VECTOR_BYTES != 0).any(0)
    rows[:, COLUMNS.index("aligned")] = ~misaligned

    runs = _write_chunks(words[chunks_start:], chunks, keys, chunks_start)
    data = words.to(device, non_blocking=True)
    return Table(data, count, num_chunks, layers_start, runs)


def _write_chunks(out: Tensor, chunks: Tensor, keys: Sequence[Dtypes], start: int) -> list[ChunkRun]:
    """Fill `out` with the chunk words, key by key, and say which run of it is whose."""
    tensors_of: dict[Dtypes, list[int]] = {}
    for index, key in enumerate(keys):
        tensors_of.setdefault(key, []).append(index)
    runs, filled = [], 0
    for key, indices in tensors_of.items():
        tensors = torch.tensor(indices, device=_CPU)
        counts = chunks[tensors]
        total = int(counts.sum())
        if total:
            first = counts.cumsum(0) - counts
            within = torch.arange(total, device=_CPU) - first.repeat_interleave(counts)
            out[filled : filled + total] = (tensors.repeat_interleave(counts) << 32) | within
            runs.append(ChunkRun(key, start + filled, total))
            filled += total
    return runs
