"""Strides: tensors that can be processed in storage order together, and copies of the others.

An element-wise kernel needs no shapes. Dense tensors, which fill their memory without gaps or overlaps (contiguous,
channels_last, transposed, ...), are processed as flat arrays in storage order if their strides are equal. A tensor
whose strides differ from its parameter's is copied to the parameter's layout.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def is_dense(t: Tensor) -> bool:
    """Return if the elements fill one range of memory, without gaps or overlaps; False for negative views."""
    if t.is_neg():
        return False  # the values differ from the memory
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def may_overlap(t: Tensor) -> bool:
    """Return if elements may share memory: False if each stride exceeds the range of all smaller strides.

    True also for some tensors that interleave without sharing: torch does not create such layouts, and an exact check
    would have to visit all elements.
    """
    if t.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def same_order(a: Tensor, b: Tensor) -> bool:
    """Return if two dense tensors of one shape have the same order of elements in storage."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    return all(p == q for p, q, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size != 1)


def flat(t: Tensor) -> Tensor:
    """Return a dense tensor as a 1-D view in storage order."""
    return t if t.dim() == 1 and t.is_contiguous() else t.as_strided((t.numel(),), (1,))


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors of equal sizes, of any dtypes, in one call."""
    if targets:
        torch._foreach_copy_(targets, sources)


class Layout:
    """Copies of tensors in the layout of their parameter, or contiguous ones if the parameter has gaps.

    Tensors that already have the layout are passed through. `write_back` copies updated copies back to the original
    tensors, whose storages stay the same.
    """

    @torch.no_grad()
    def __init__(self, params: Sequence[Tensor]):
        self._copies: list[tuple[Tensor, Tensor]] = []  # (original, copy)
        self.params = [p if is_dense(p) else self._copy(p, p.resolve_neg().contiguous()) for p in params]

    def _copy(self, original: Tensor, copy: Tensor) -> Tensor:
        self._copies.append((original, copy))
        return copy

    @torch.no_grad()
    def _match(
        self, tensors: Sequence[Tensor | None], on_copy: Callable[[Tensor, Tensor], Tensor]
    ) -> list[Tensor | None]:
        matched: list[Tensor | None] = []
        for param, t in zip(self.params, tensors, strict=True):
            if t is None or (is_dense(t) and same_order(t, param)):
                matched.append(t)
            else:
                like = torch.empty_like(param, dtype=t.dtype, memory_format=torch.preserve_format)
                matched.append(on_copy(t, like.copy_(t)))
        return matched

    def read(self, tensors: Sequence[Tensor]) -> list:
        """Return `tensors`, one per parameter, in the layout, for reading only."""
        return self._match(tensors, lambda original, copy: copy)

    def update(self, tensors: Sequence[Tensor | None]) -> list:
        """Return `tensors`, one or None per parameter, in the layout, for updates in place."""
        return self._match(tensors, self._copy)

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy updated copies back to the original tensors."""
        for original, copy in self._copies:
            original.copy_(copy)
