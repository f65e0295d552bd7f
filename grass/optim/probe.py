"""Probe: measures gradients as soon as they are complete, and frees them.

A hook on each parameter computes the squared norm of the gradient on the device and sets ``grad = None``, so
that all gradients are never allocated together (12.5 GiB for a 7B model in bfloat16).

One small gradient per device is kept for GradScaler, which raises an error if it finds no gradient. All of its elements
are zero but the first, the mark: the factor by which `unscale_` has changed it is applied to the measured norms, and an
overflow in any gradient is added to it, so that the scaler detects it.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

import grass_kernels

# Too small to affect a logged norm or clipping; a power of two, so that dividing by a loss scale is exact.
_MARK = 2.0**-20


class Probe:
    """Measures the gradients of one step, over any number of micro-batches.

    Args:
        params: parameters to hook; each must require grad.
        layers: layer of each parameter, L for parameters outside.
        num_layers: L + 1.

    Attributes:
        handles: handles of the hooks.
        accumulated: some gradient has been measured more than once since the last `finish_step` or `discard`.
    """

    def __init__(self, params: list[Tensor], layers: list[int], num_layers: int) -> None:
        self.accumulated = False
        self.handles: list[RemovableHandle] = []
        self._sums: Tensor | None = None  # float32 [L + 1], on the first gradient's device
        self._fired: dict[Tensor, int] = {}  # number of gradients since the last step
        self._observed = [False] * num_layers
        self._kept: dict[torch.device, Tensor] = {}  # the parameter whose gradient is kept
        self._overflow: dict[torch.device, Tensor] = {}
        for p, layer in zip(params, layers, strict=True):
            self.handles.append(p.register_post_accumulate_grad_hook(self._hook(layer)))

    def _hook(self, layer: int) -> Callable[[Tensor], None]:
        # Weak: parameters hold their hooks, and must not keep the optimizer alive.
        probe_ref = weakref.ref(self)

        def measure_and_free(param: Tensor) -> None:
            probe = probe_ref()
            if probe is not None:
                probe._measure(param, layer)

        return measure_and_free

    @property
    def fired(self) -> bool:
        """True if any gradient has been measured since the last `finish_step` or `discard`."""
        return bool(self._fired)

    def discard_if_cleared(self) -> None:
        """Discard the measurements if gradients were cleared from outside, as by ``model.zero_grad()``."""
        if any(param.grad is None for param in self._kept.values()):
            self.discard()

    @torch.no_grad()
    def _measure(self, param: Tensor, layer: int) -> None:
        self.discard_if_cleared()
        grad = param.grad
        if grad is None or grad.numel() == 0 or grad.is_sparse:  # `step` refuses sparse gradients
            return
        first = (0,) * grad.dim()
        kept = self._kept.get(grad.device)
        if kept is param:
            grad[first] -= _MARK  # this backward has added to it
        norm = sq_norm(grad)
        if self._sums is None:
            self._sums = torch.zeros(len(self._observed), dtype=torch.float32, device=grad.device)
        self._sums[layer] += norm.to(self._sums.device, non_blocking=True)
        self._observed[layer] = True
        self._fired[param] = self._fired.get(param, 0) + 1
        self.accumulated |= self._fired[param] > 1
        # 0 * inf and 0 * nan are nan: adds nothing unless a gradient overflowed.
        overflow = self._overflow.get(grad.device)
        overflow = norm * 0 if overflow is None else overflow + norm * 0
        self._overflow[grad.device] = overflow
        if kept is None or kept is param or grad.numel() < kept.numel():
            if kept is not None and kept is not param:
                kept.grad = None
            kept = self._kept[grad.device] = param
            grad.zero_()
            grad[first] = _MARK
        else:
            param.grad = None
        assert kept.grad is not None
        kept.grad[(0,) * kept.dim()] += overflow.to(kept.grad.dtype)

    @torch.no_grad()
    def finish_step(self, grad_scale: Tensor | None) -> tuple[Tensor, list[bool]]:
        """Return the squared norms of the step, unscaled, and the layers that had gradients; then start a new step.

        Args:
            grad_scale: scale of the GradScaler, if gradients are still scaled.

        Returns:
            Squared norms summed over micro-batches, float32 [L + 1]; and whether each layer had gradients.
        """
        assert self._sums is not None, "nothing has been measured"
        sums, ratios = self._sums, []
        for param in self._kept.values():
            if param.grad is not None:
                ratio = (param.grad[(0,) * param.dim()].float() / _MARK).square()
                ratios.append(torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0))
        if ratios:
            sums = sums * ratios[0].to(sums.device, non_blocking=True)
        if grad_scale is not None:
            sums = sums / grad_scale.to(sums.device, non_blocking=True).square()
        result = sums, self._observed
        self.discard()
        return result

    def discard(self) -> None:
        """Discard the measurements since the last `finish_step`, and the kept gradients."""
        for param in self._kept.values():
            param.grad = None
        self.accumulated = False
        self._sums = None
        self._observed = [False] * len(self._observed)
        self._fired.clear()
        self._kept.clear()
        self._overflow.clear()

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.discard()


def sq_norm(grad: Tensor) -> Tensor:
    """Return the squared norm of a gradient: float32, shape (), on its device; by the kernels if they support it."""
    if grass_kernels.is_supported(grad.dtype, grad.dtype, torch.float32):
        return grass_kernels.layer_sq_norms([grad], [0], 1)[0]
    return torch.linalg.vector_norm(grad).square().float()
