"""Strides: which tensors can be walked in storage order together, and what is done with the others.

An element-wise kernel needs no shapes. Tensors that fill their memory without gaps or overlaps (dense:
contiguous, channels_last, transposed, ...) and have equal strides are walked as flat arrays, in storage
order. A tensor whose strides differ from its parameter's goes through a copy in the parameter's layout.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each place once, and are what stands there."""
    if t.is_neg():
        return False  # a negative view keeps its sign beside its elements
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
    """Whether elements may share memory: not if each stride steps over all that smaller strides reach.

    Of the others some interleave without sharing; nothing that torch makes is laid out so, and telling them apart
    takes a walk over all elements.
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
    """Whether two dense tensors of one shape keep equal indices at equal places."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    return all(p == q for p, q, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size != 1)


def flat(t: Tensor) -> Tensor:
    """A dense tensor as a 1-D view in storage order."""
    return t if t.dim() == 1 and t.is_contiguous() else t.as_strided((t.numel(),), (1,))


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors of equal sizes, of any dtypes, in one call."""
    if targets:
        torch._foreach_copy_(targets, sources)


class Layout:
    """Lists of tensors brought to one layout: that of each parameter, or contiguous if it has gaps.

    Tensors that already have it are passed through. `write_back` returns what was changed in copies to
    where it belongs; storages never change hands.
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
        """`tensors`, one a parameter, to be read only."""
        return self._match(tensors, lambda original, copy: copy)

    def update(self, tensors: Sequence[Tensor | None]) -> list:
        """`tensors`, one a parameter (or None where there is none), to be changed in place."""
        return self._match(tensors, self._copy)

    @torch.no_grad()
    def write_back(self) -> None:
        """Return the contents of changed copies to the tensors they stand for."""
        for original, copy in self._copies:
            original.copy_(copy)
