"""Tensors between sentinels, and their bits."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from grass_kernels import _triton

interpreter_only = pytest.mark.skipif(
    not _triton.INTERPRETING, reason="looks into the kernels: run with TRITON_INTERPRET=1"
)

# NaN in the type they guard: read by mistake they spread, written by mistake they change.
_SENTINELS = {
    torch.float32: (torch.int32, 0x7FC5A5A5),
    torch.bfloat16: (torch.int16, 0x7FC5),
    torch.float16: (torch.int16, 0x7E5A),
    torch.int16: (torch.int16, 0x5A5A),
}
_GUARD = 64  # elements on each side; keeps the alignment of the allocation


def bits(t: Tensor) -> Tensor:
    """The bit patterns of a floating-point tensor, in storage order if it is dense."""
    return t.detach().contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, except that one NaN is as good as another."""
    return bool(((bits(a) == bits(b)) | (a.isnan() & b.isnan())).all())


class Buffers:
    """Tensors with sentinels before, behind and between their elements."""

    def __init__(self) -> None:
        self._placed: list[tuple[Tensor, Tensor, int]] = []

    def place(
        self, values: Tensor, dtype: torch.dtype, *, shift: int = 0, strides: Sequence[int] | None = None
    ) -> Tensor:
        """`values` in a buffer of their own, `shift` elements off a 64-byte boundary."""
        integer, sentinel = _SENTINELS[dtype]
        strides = tuple(strides) if strides is not None else values.contiguous().stride()
        span = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
        buffer = torch.full((2 * _GUARD + shift + max(span, 0),), sentinel, dtype=integer)
        assert buffer.data_ptr() % 64 == 0
        tensor = buffer.view(dtype).as_strided(values.shape, strides, _GUARD + shift)
        tensor.copy_(values)
        own = torch.zeros(len(buffer), dtype=torch.bool).as_strided(values.shape, strides, _GUARD + shift)
        own.fill_(True)
        self._placed.append((buffer, own.as_strided((len(buffer),), (1,), 0), sentinel))
        return tensor

    def check(self) -> None:
        for buffer, own, sentinel in self._placed:
            assert bool((buffer[~own] == sentinel).all()), "an element outside a tensor was written"
