"""Probe: gradients are measured the moment they are complete, and freed at once.

A hook on each parameter takes the gradient's squared norm on the device and sets ``grad = None``, so
that all gradients are never alive together (of a 7B model in bfloat16 they are 12.5 GiB).

One small gradient a device is kept. A GradScaler refuses to update when it has seen no gradient; and
what it, or `unscale_`, did to that gradient tells by how much all the others must be scaled. An overflow
in any gradient is written into the kept one, so that the scaler sees it.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from grass.optim.adamw import sq_norm


@dataclass
class _Kept:
    """The gradient kept on one device: whose it is, and what it was when its hook last saw it."""

    param: Tensor
    grad_before: Tensor  # accumulated gradient, a copy
    sq_norm_before: Tensor  # its squared norm


class Probe:
    """Measures the gradients of one step, over any number of micro-batches.

    Args:
        params: parameters to hook; each must require grad.
        slots: the layer of each, or one past the last layer for what is in none.
        num_slots: layers + 1.

    Attributes:
        handles: of the hooks.
        accumulated: some gradient has been measured more than once since the last `take` or `discard`.
    """

    def __init__(self, params: list[Tensor], slots: list[int], num_slots: int) -> None:
        self.accumulated = False
        self.handles: list[RemovableHandle] = []
        self._sums: Tensor | None = None  # float32 [slots], on the first gradient's device
        self._fired: dict[Tensor, int] = {}  # how often, since the last take
        self._observed = [False] * num_slots
        self._kept: dict[torch.device, _Kept] = {}
        self._overflow: dict[torch.device, Tensor] = {}
        for p, slot in zip(params, slots, strict=True):
            self.handles.append(p.register_post_accumulate_grad_hook(self._hook(slot)))

    def _hook(self, slot: int) -> Callable[[Tensor], None]:
        # Weak: parameters hold their hooks, and must not keep the optimizer alive.
        probe_ref = weakref.ref(self)

        def measure_and_free(param: Tensor) -> None:
            probe = probe_ref()
            if probe is not None:
                probe._measure(param, slot)

        return measure_and_free

    @property
    def fired(self) -> bool:
        """Whether any gradient has been measured since the last `take` or `discard`."""
        return bool(self._fired)

    @torch.no_grad()
    def _measure(self, param: Tensor, slot: int) -> None:
        grad = param.grad
        if grad is None or grad.numel() == 0:
            return
        kept = self._kept.get(grad.device)
        own = kept is not None and kept.param is param
        # The kept gradient goes on accumulating: what this backward added is the difference.
        norm = sq_norm(grad - kept.grad_before) if own and kept is not None else sq_norm(grad)
        if self._sums is None:
            self._sums = torch.zeros(len(self._observed), device=grad.device)
        self._sums[slot] += norm.to(self._sums.device, non_blocking=True)
        self._observed[slot] = True
        self._fired[param] = self._fired.get(param, 0) + 1
        self.accumulated |= self._fired[param] > 1
        # 0 * inf and 0 * nan are nan: adds nothing unless a gradient overflowed.
        overflow = self._overflow.get(grad.device)
        overflow = norm * 0 if overflow is None else overflow + norm * 0
        self._overflow[grad.device] = overflow
        if kept is None or own or grad.numel() < kept.param.numel():
            if kept is not None and not own:
                kept.param.grad = None
            kept = self._kept[grad.device] = _Kept(param, grad.clone(), sq_norm(grad))
        else:
            param.grad = None
        assert kept.param.grad is not None
        kept.param.grad[(0,) * kept.param.grad.dim()] += overflow.to(kept.param.grad.dtype)

    @torch.no_grad()
    def take(self, grad_scale: Tensor | None) -> tuple[Tensor, list[bool]]:
        """The step's squared norms, unscaled, and which slots had gradients; then start anew.

        Args:
            grad_scale: the GradScaler's, if gradients are still scaled.

        Returns:
            float32 [slots], the sum over micro-batches of squared norms; and one bool a slot.
        """
        assert self._sums is not None, "nothing has been measured"
        sums, ratios = self._sums, []
        for kept in self._kept.values():
            if kept.param.grad is not None:
                now, before = sq_norm(kept.param.grad), kept.sq_norm_before
                usable = torch.isfinite(now) & torch.isfinite(before) & (before > 0) & (now > 0)
                ratios.append(torch.where(usable, now / before, 1.0))
        if ratios:
            sums = sums * ratios[0].to(sums.device, non_blocking=True)
        if grad_scale is not None:
            sums = sums / grad_scale.to(sums.device, non_blocking=True).square()
        result = sums, self._observed
        self.discard()
        return result

    def discard(self) -> None:
        """Drop what has been measured since the last `take`, and the kept gradients."""
        for kept in self._kept.values():
            kept.param.grad = None
        self.accumulated = False
        self._sums = None
        self._observed = [False] * len(self._observed)
        self._fired.clear()
        self._kept.clear()
        self._overflow.clear()

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.discard()
