"""RequiresGradLease: sets ``requires_grad`` of an optimizer's parameters, and restores it at the end.

One optimizer at a time controls ``requires_grad`` of a parameter. A newer one ends the lease of the older one: hooks
are removed and ``requires_grad`` is restored. The same happens on `release`, and when the optimizer is collected.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

_LEASES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> weakref to its lease


class RequiresGradLease:
    """Exclusive control of ``requires_grad`` of some parameters.

    Args:
        params: parameters; other leases on any of them are ended first.
        trainable: their `trainable_flags`; a parameter that is not trainable is never switched on.

    Attributes:
        handles: handles of hooks that are removed at the end of the lease.
    """

    def __init__(self, params: Sequence[Tensor], trainable: Sequence[bool]) -> None:
        end_leases(params)
        self._original = dict(zip(params, trainable, strict=True))
        self.handles: list[RemovableHandle] = []
        self.ended = False
        ref = weakref.ref(self)
        for p in params:
            _LEASES[p] = ref

    def bind(self, owner: object) -> None:
        """End the lease when the owner is garbage-collected; the lease must not refer to the owner."""
        weakref.finalize(owner, self.end).atexit = False

    def switch(self, is_on: Callable[[Tensor], bool]) -> None:
        """Set ``requires_grad`` of trainable parameters, and drop the gradients of those that are switched off.

        ``grad = None`` rather than zeros: a zero gradient would still decay weights and moments.
        """
        if self.ended:
            return
        for p, trainable in self._original.items():
            if trainable:
                on = is_on(p)
                _set_requires_grad(p, on)
                if not on:
                    p.grad = None

    def original_requires_grad(self, p: Tensor) -> bool:
        """Return ``requires_grad`` of a parameter before the lease."""
        return self._original[p]

    def drop(self, params: Iterable[Tensor]) -> None:
        """Restore ``requires_grad`` of some parameters, and remove them from the lease."""
        for p in params:
            trainable = self._original.pop(p)
            if not self.ended:
                _set_requires_grad(p, trainable)
                _LEASES.pop(p, None)

    def end(self) -> None:
        """Restore ``requires_grad`` and remove the hooks. Further calls do nothing."""
        if self.ended:
            return
        self.ended = True
        for handle in self.handles:
            handle.remove()
        for p, trainable in self._original.items():
            _set_requires_grad(p, trainable)
            _LEASES.pop(p, None)


def trainable_flags(params: Sequence[Tensor]) -> list[bool]:
    """Return ``requires_grad`` of each parameter, as it was before a lease if there is one."""
    flags = []
    for p in params:
        ref = _LEASES.get(p)
        lease = None if ref is None else ref()
        flags.append(p.requires_grad if lease is None else lease.original_requires_grad(p))
    return flags


def end_leases(params: Sequence[Tensor]) -> None:
    """End every lease on any of the parameters."""
    for p in params:
        ref = _LEASES.get(p)
        lease = None if ref is None else ref()
        if lease is not None:
            lease.end()


def _set_requires_grad(p: Tensor, value: bool) -> None:
    with torch.inference_mode() if p.is_inference() else contextlib.nullcontext():
        p.requires_grad_(value)
