"""RequiresGradLease: sets ``requires_grad`` of an optimizer's parameters, and restores it at the end.

One optimizer at a time controls ``requires_grad`` of a parameter. A newer one ends the lease of the older one: hooks
are removed and ``requires_grad`` is restored. The same happens on `release`, and when the optimizer is collected.

What the user sets meanwhile is kept: a parameter that is found with another value than the lease has set becomes
trainable, or stops being so.
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
        self._trainable = dict(zip(params, trainable, strict=True))
        self._current = {p: p.requires_grad for p in params}  # as last set
        self.handles: list[RemovableHandle] = []
        self.ended = False
        self._finalizer: weakref.finalize[..., object] | None = None
        ref = weakref.ref(self)
        for p in params:
            _LEASES[p] = ref

    def bind(self, owner: object) -> None:
        """End the lease when the owner is garbage-collected; the lease must not refer to the owner."""
        self._finalizer = weakref.finalize(owner, self.end)
        self._finalizer.atexit = False

    def switch(self, is_on: Callable[[Tensor], bool]) -> None:
        """Set ``requires_grad`` of trainable parameters, and drop the gradients of those that are switched off.

        ``grad = None`` rather than zeros: a zero gradient would still decay weights and moments.
        """
        if self.ended:
            return
        for p, trainable in self._trainable.items():
            if trainable:
                on = self._current[p] = is_on(p)
                _set_requires_grad(p, on)
                if not on:
                    p.grad = None

    def adopt_changes(self) -> dict[Tensor, bool]:
        """Adopt what the user has set since the last switch; return the parameters that change, and if they train now.

        A parameter that is switched off and set to False by the user looks the same as before: see `set_trainable`.
        """
        changed: dict[Tensor, bool] = {}
        if [p.requires_grad for p in self._current] == [
            *self._current.values()
        ]:  # in every step, so in one pass
            return changed
        if not self.ended:
            for p, trainable in self._trainable.items():
                if self.is_trainable(p) != trainable:
                    changed[p] = not trainable
                self._current[p] = p.requires_grad
        self._trainable.update(changed)
        return changed

    def set_trainable(self, params: Iterable[Tensor], trainable: bool) -> None:
        """Set whether parameters are switched on by `switch`, as if they had been so before the lease."""
        for p in params:
            self._trainable[p] = trainable
            if not trainable:
                self._current[p] = False
                _set_requires_grad(p, False)
                p.grad = None

    def is_trainable(self, p: Tensor) -> bool:
        """Return ``requires_grad`` of a parameter as the user set it, before the lease or since."""
        on = p.requires_grad
        return on if on != self._current[p] else self._trainable[p]

    def drop(self, params: Iterable[Tensor]) -> None:
        """Restore ``requires_grad`` of some parameters, and remove them from the lease."""
        for p in params:
            trainable = self._trainable.pop(p)
            del self._current[p]
            if not self.ended:
                _set_requires_grad(p, trainable)
                _LEASES.pop(p, None)

    def end(self) -> None:
        """Restore ``requires_grad`` and remove the hooks. Further calls do nothing."""
        if self.ended:
            return
        for handle in self.handles:
            handle.remove()
        self.adopt_changes()
        self.ended = True
        if self._finalizer is not None:
            # It would keep this lease and its parameters alive as long as the owner.
            self._finalizer.detach()
        for p, trainable in self._trainable.items():
            _set_requires_grad(p, trainable)
            _LEASES.pop(p, None)


def trainable_flags(params: Sequence[Tensor]) -> list[bool]:
    """Return ``requires_grad`` of each parameter, as it was before a lease if there is one."""
    flags = []
    for p in params:
        ref = _LEASES.get(p)
        lease = None if ref is None else ref()
        flags.append(p.requires_grad if lease is None else lease.is_trainable(p))
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
