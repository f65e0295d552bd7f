"""RequiresGradLease: which parameters require grad, restored when the optimizer is done with them.

One optimizer at a time sets ``requires_grad`` of a parameter. A newer one takes over: the older one's hooks are
removed and ``requires_grad`` is first restored. The same happens on `release`, and when the optimizer is collected.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

_LEASES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> weakref to its lease


class RequiresGradLease:
    """Sets ``requires_grad`` of some parameters until it ends.

    Args:
        params: the parameters; leases of others on any of them end first.
        trainable: `trainable_flags` of them. What is not trainable is never switched on.

    Attributes:
        handles: hooks that are removed with the lease.
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
        """End when the owner is collected; the owner must not be reachable from here."""
        weakref.finalize(owner, self.end).atexit = False

    def switch(self, is_on: Callable[[Tensor], bool]) -> None:
        """Switch trainable parameters on or off; what is off loses its gradient.

        ``grad = None``, not zeros: a zero gradient would still decay weights and advance moments.
        """
        if self.ended:
            return
        for p, trainable in self._original.items():
            if trainable:
                on = is_on(p)
                p.requires_grad_(on)
                if not on:
                    p.grad = None

    def original_requires_grad(self, p: Tensor) -> bool:
        """``requires_grad`` of a parameter before the lease."""
        return self._original[p]

    def drop(self, params: Iterable[Tensor]) -> None:
        """End for some of the parameters, and keep them no longer."""
        for p in params:
            trainable = self._original.pop(p)
            if not self.ended:
                p.requires_grad_(trainable)
                _LEASES.pop(p, None)

    def end(self) -> None:
        """Restore ``requires_grad`` and remove the hooks; once."""
        if self.ended:
            return
        self.ended = True
        for handle in self.handles:
            handle.remove()
        for p, trainable in self._original.items():
            p.requires_grad_(trainable)
            _LEASES.pop(p, None)


def trainable_flags(params: Sequence[Tensor]) -> list[bool]:
    """``requires_grad`` of each parameter, as it is or as it was before a lease."""
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
