"""Squared norms of many tensors by layer: kernels and launcher.

One pass reads every gradient once and writes one partial sum per chunk; a second, small pass adds the partial sums of a
layer in order. There are no atomics, and the order of additions is fixed (:func:`tree_sum`), so the result is bitwise
the same on every run, with any layout of a block, in this kernel, in AdamW's, and in the plain-torch reference.
"""

# ruff: noqa: N803 - constexpr arguments are in capitals, as everywhere in Triton

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grass_kernels import _triton, arguments, layout, operators
from grass_kernels._triton import jit, runs_triton, tl, tl_dtype
from grass_kernels.conversions import (
    ALIGNMENT,
    access_width,
    block_mask,
    block_pointers,
    load_fp32,
    pointer,
)
from grass_kernels.inputs import Inputs
from grass_kernels.table import (
    BLOCK,
    CHUNK,
    FIRST_PARTIAL,
    LAYER_BLOCK,
    NUMEL,
    ROW,
    Table,
    build_table,
)

_PIECE = 4 * CHUNK
"""Elements of a piece of a gradient: torch's norm copies it to fp32, 256 KiB. One of up to two pieces is not split."""


@jit()
def tree_sum(x, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """Sum `SIZE` (a power of two) values: first neighbours, then neighbouring pairs, and so on.

    `tl.sum` over a whole block would add in an order that depends on the layout of the block, and hence on the other
    loads of the kernel. A sum of two values has no order.
    """
    for level in tl.static_range(1, 31):
        if SIZE >> level > 0:
            x = tl.sum(tl.reshape(x, [SIZE >> level, 2]), axis=1)
    return tl.sum(x, axis=0)  # of one value


@jit()
def find_chunk(chunk_ptr, table_ptr):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """Return the chunk of a program: index of its tensor, index in the tensor, and pointer to the tensor's row."""
    word = tl.load(chunk_ptr)
    tensor = word >> 32
    return tensor, word & 0xFFFFFFFF, table_ptr + tensor * ROW


@jit()
def chunk_range(row, chunk, addresses, CHUNK: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the first element of a chunk, its length, and the length of its part with 128-bit accesses.

    Those need full blocks, and addresses that are multiples of 16 bytes (`addresses`: bitwise or of all). The first
    element is an int64; lengths are int32, which take half the registers.
    """
    start = chunk * CHUNK
    length = tl.minimum(tl.load(row + NUMEL) - start, CHUNK).to(tl.int32)
    return start, length, tl.where(addresses % ALIGNMENT == 0, length - length % BLOCK, 0)


@jit(do_not_specialize=("chunks_start",))
def _layer_sq_norms_kernel(  # type: ignore[no-untyped-def]  # Triton types its own arguments
    table_ptr,  # int64, see table.py
    inputs_ptr,  # int64, see inputs.py
    partials_ptr,  # output: float32 [chunks]
    chunks_start,  # first word of this launch's chunks
    GRAD_DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,  # elements of an access, see access_width
):
    """Write the partial sum of one chunk per program."""
    tensor, chunk, row = find_chunk(table_ptr + chunks_start + tl.program_id(0), table_ptr)
    grad_address = tl.load(inputs_ptr + tensor)
    start, length, full = chunk_range(row, chunk, grad_address, CHUNK, BLOCK)
    grad_ptr = pointer(grad_address, GRAD_DTYPE) + start
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in range(0, full, BLOCK):
        grad = load_fp32(block_pointers(grad_ptr, block, BLOCK, WIDTH), None)
        sums += grad * grad
    for block in range(full, length, BLOCK):
        mask = block_mask(block, length, BLOCK)
        grad = load_fp32(block_pointers(grad_ptr, block, BLOCK, 1), mask)
        sums += grad * grad
    tl.store(partials_ptr + tl.load(row + FIRST_PARTIAL) + chunk, tree_sum(sums, BLOCK))


@jit(do_not_specialize=("layers_start",))
def _sum_layers_kernel(  # type: ignore[no-untyped-def]  # Triton types its own arguments
    table_ptr,  # int64, see table.py
    partials_ptr,  # float32 [chunks]
    grad_scale_ptr,  # float32 [1] or None
    sq_norms_ptr,  # output: float32 [num_layers]
    layers_start,  # first word of the layers in the table
    BLOCK: tl.constexpr,
):
    """Sum the partial sums of one layer per program."""
    layer = tl.program_id(0)
    begin = tl.load(table_ptr + layers_start + layer)
    end = tl.load(table_ptr + layers_start + layer + 1)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        sums += tl.load(partials_ptr + index, mask=index < end, other=0.0)
    sq_norm = tree_sum(sums, BLOCK)
    if grad_scale_ptr is not None:
        inverse = tl.div_rn(1.0, tl.load(grad_scale_ptr))
        sq_norm = sq_norm * inverse * inverse
    tl.store(sq_norms_ptr + layer, sq_norm)


def launch_norms(table: Table, inputs: Tensor, partials: Tensor) -> None:
    """Launch the first pass, for a table whose keys begin with the dtype of the gradient."""
    for key, start, count in table.runs:
        _triton.launch(
            _layer_sq_norms_kernel,
            count,
            table.data.device,
            table_ptr=table.data,
            inputs_ptr=inputs,
            partials_ptr=partials,
            chunks_start=start,
            GRAD_DTYPE=tl_dtype(key[0]),  # type: ignore[index]
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            WIDTH=access_width([key[0]]),  # type: ignore[index]
        )


def launch_sum_layers(table: Table, partials: Tensor, grad_scale: Tensor | None, sq_norms: Tensor) -> None:
    """Launch the second pass, which writes the sum of each layer to `sq_norms`, 0 for a layer without chunks."""
    _triton.launch(
        _sum_layers_kernel,
        table.num_layers,
        table.data.device,
        table_ptr=table.data,
        partials_ptr=partials,
        grad_scale_ptr=grad_scale,
        sq_norms_ptr=sq_norms,
        layers_start=table.layers_start,
        BLOCK=LAYER_BLOCK,
    )


class NormPlan:
    """Squared norms by layer of gradients that have the same dtypes and sizes in every step, and may move.

    With Triton the chunk table is built and uploaded once; a run uploads the addresses that have changed, and launches
    the two passes. The plan holds no gradients.

    Args:
        grads, layer_index, num_layers: As in :func:`layer_sq_norms`.

    Raises:
        KernelArgumentError: As :func:`layer_sq_norms`.
    """

    def __init__(self, grads: Sequence[Tensor], layer_index: Sequence[int] | Tensor, num_layers: int) -> None:
        self._num_layers = arguments.check_num_layers(num_layers)
        arguments.check_grads(grads)
        self._device = arguments.common_device({"grads": grads})
        self._layers = arguments.layer_list(layer_index, len(grads), self._num_layers)
        self._key = _key_of(grads, self._device)
        self._table: Table | None = None
        if runs_triton(self._device) and not operators.is_needed(grads):
            self._table = build_table(
                numels=[g.numel() for g in grads],
                keys=[(g.dtype,) for g in grads],
                layers=self._layers,
                num_layers=self._num_layers,
                device=self._device,
            )
            self._inputs = Inputs(len(grads), 0, self._device)
            self._partials = torch.empty(self._table.num_partials, dtype=torch.float32, device=self._device)

    def is_valid(self, grads: Sequence[Tensor]) -> bool:
        """Return if dtypes and sizes are those of the construction, and the device's current stream too.

        The stream, since a run on another one could overwrite addresses and sums that kernels of the last run read.
        """
        return all(g.device == self._device for g in grads) and _key_of(grads, self._device) == self._key

    @torch.no_grad()
    def run(self, grads: Sequence[Tensor], *, grad_scale: Tensor | None = None) -> Tensor:
        """Compute the squared norms of gradients for which the plan is valid, as :func:`layer_sq_norms`."""
        if operators.is_needed(grads):
            return torch.ops.grass_kernels.layer_sq_norms(
                grads, self._layers, self._num_layers, grad_scale=grad_scale
            )
        arguments.check_memory({"grads": grads})
        grad_scale = arguments.device_scalar("grad_scale", grad_scale, self._device)
        grads = [g if layout.is_dense(g) else g.contiguous() for g in grads]
        if self._table is None:
            return torch_sq_norms(grads, self._layers, self._num_layers, grad_scale)
        self._inputs.upload([g.data_ptr() for g in grads])
        sq_norms = torch.empty(self._num_layers, dtype=torch.float32, device=self._device)
        launch_norms(self._table, self._inputs.data, self._partials)
        launch_sum_layers(self._table, self._partials, grad_scale, sq_norms)
        return sq_norms


def _key_of(grads: Sequence[Tensor], device: torch.device) -> tuple[Any, ...]:
    on_stream = device.type == "cuda" and not operators.is_needed(grads)
    stream = torch.cuda.current_stream(device) if on_stream else None
    return stream, [g.dtype for g in grads], [g.numel() for g in grads]


def torch_sq_norms(
    grads: Sequence[Tensor], layers: Sequence[int], num_layers: int, grad_scale: Tensor | None
) -> Tensor:
    """Compute squared norms by layer without Triton, by torch's norms of dense tensors on one device.

    Low-precision gradients are processed in pieces that fit a cache: torch copies each to fp32.
    """
    device = grads[0].device if grads else torch.device("cpu")
    pieces: list[Tensor] = []
    index: list[int] = []
    for grad, layer in zip(grads, layers, strict=True):
        whole = grad.dtype == torch.float32 or grad.numel() <= 2 * _PIECE
        split = (grad,) if whole else layout.flat(grad).split(_PIECE)
        pieces += split
        index += [layer] * len(split)
    sq_norms = torch.zeros(num_layers, dtype=torch.float32, device=device)
    if pieces:
        norms = torch.stack(torch._foreach_norm(pieces, 2, dtype=torch.float32))
        places = torch.tensor(index, dtype=torch.int64, device="cpu").to(device)
        sq_norms.index_add_(0, places, norms.square())
    if grad_scale is not None:
        inverse = 1 / grad_scale
        sq_norms = sq_norms * inverse * inverse
    return sq_norms


@torch.no_grad()
def layer_sq_norms(
    grads: Sequence[Tensor],
    layer_index: Sequence[int] | Tensor,
    num_layers: int,
    *,
    grad_scale: Tensor | None = None,
) -> Tensor:
    """Compute the squared Euclidean norm of the gradients of each layer.

    ``out[l] = sum over i with layer_index[i] = l of ||grads[i]||^2 / grad_scale^2``

    Reads each gradient once, and writes only the result, without a device sync. Deterministic: results are bitwise
    the same on every run, and equal to those of :func:`masked_adamw_`; with and without Triton the last bits may
    differ. Infinities and NaN propagate to the result.

    Args:
        grads: Gradients, fp32, bf16 or fp16 in any mixture, on one device. Dense tensors of any strides are read
            in storage order; others are copied to contiguous ones.
        layer_index: The layer of each gradient, integers in ``[0, num_layers)``.
        num_layers: Number of layers. A layer without gradients has norm 0.
        grad_scale: Divisor of the gradients, one float32 on their device, as the scale of `torch.amp.GradScaler`.
            None is 1.

    Returns:
        float32 ``[num_layers]``, on the gradients' device; on the CPU for an empty list.

    Raises:
        KernelArgumentError: A list of the wrong length, an index out of range, gradients on several
            devices, of another dtype, sparse, complex or without memory of their own (DTensor).

    Source: the per-layer norms of GRASS's importance, before the square root.
    """
    arguments.check_list("grads", grads)
    if operators.is_needed(grads):
        layers = layer_index.tolist() if isinstance(layer_index, Tensor) else layer_index
        return torch.ops.grass_kernels.layer_sq_norms(grads, layers, num_layers, grad_scale=grad_scale)
    return NormPlan(grads, layer_index, num_layers).run(grads, grad_scale=grad_scale)


def layer_sq_norms_bytes(numel: int, grad_dtype: torch.dtype) -> int:
    """Return the bytes that :func:`layer_sq_norms` must move for `numel` gradient elements: each is read once."""
    return numel * grad_dtype.itemsize
