"""Probe: measures the gradients of a bucket as soon as they are complete, and frees them.

A hook on each parameter waits for the gradients of its bucket. The last one measures them in one launch, by a plan that
is built once, and sets ``grad = None``, so that the gradients of several layers are never allocated together (12.5 GiB
for a 7B model in bfloat16, 0.4 GiB per layer). A bucket that lacks gradients (experts that saw no token) is measured
when the next one begins, or at the end of the backward.

One small gradient per device is kept for GradScaler, which raises an error if it finds no gradient. All of its elements
are zero but the first, the mark: the factor by which `unscale_` has changed it is applied to the measured norms, and an
overflow in any gradient is added to it, so that the scaler detects it.
"""

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

import grass_kernels
from grass.optim.param_entry import ParamEntry
from grass.optim.sharding import local, wait_for_copy
from grass_kernels import NormPlan

# Too small to affect a logged norm or clipping; a power of two, so that dividing by a loss scale is exact.
_MARK = 2.0**-20

Measured = tuple[Tensor, list[bool]]
"""Squared norms, float32 [L + 1], and whether each layer had gradients."""


class Probe:
    """Measures the gradients of one step, over any number of micro-batches.

    Args:
        entries: records of the parameters to hook; each parameter must require grad.
        num_layers: L + 1.
        trains: True for a step that trains the active parameters, whose gradients are then kept. As these add up over
            micro-batches, all layers are measured in the first one only.

    Attributes:
        handles: handles of the hooks.
        accumulated: some gradient has been measured more than once since the last `finish_step` or `discard`.
    """

    def __init__(self, entries: Sequence[ParamEntry], num_layers: int, *, trains: bool = False) -> None:
        self.accumulated = False
        self._trains = trains
        self._training = {entry.bucket for entry in entries if trains and entry.is_active}
        self.handles: list[RemovableHandle] = []
        self._members: dict[int, list[Tensor]] = {}  # parameters of each bucket
        self._layers: dict[int, int] = {}  # layer of each bucket
        self._plans: dict[int, NormPlan] = {}  # by bucket
        # The bucket whose gradients arrive, and the parameters that have theirs: one per device, since autograd runs
        # the hooks of each device in a thread of its own.
        self._open: dict[torch.device, tuple[int, set[Tensor]]] = {}
        self._sums: Tensor | None = None  # float32 [L + 1], on the first gradient's device
        self._fired: dict[Tensor, int] = {}  # number of measured gradients since the last step
        self._observed = [False] * num_layers
        self._kept: dict[torch.device, Tensor] = {}  # the parameter whose gradient is kept
        self._overflow: dict[torch.device, Tensor] = {}
        for entry in entries:
            if not entry.param.numel():
                continue
            self._members.setdefault(entry.bucket, []).append(entry.param)
            self._layers[entry.bucket] = entry.layer
            self.handles.append(entry.param.register_post_accumulate_grad_hook(self._hook(entry.bucket)))

    def _hook(self, bucket: int) -> Callable[[Tensor], None]:
        # Weak: parameters hold their hooks, and must not keep the optimizer alive.
        probe_ref = weakref.ref(self)

        def measure_when_complete(param: Tensor) -> None:
            probe = probe_ref()
            if probe is not None:
                probe._on_grad(param, bucket)

        return measure_when_complete

    @property
    def fired(self) -> bool:
        """True if any gradient has arrived since the last `finish_step` or `discard`."""
        return bool(self._fired or self._open)

    def discard_if_cleared(self) -> None:
        """Discard the measurements if gradients were cleared from outside, as by ``model.zero_grad()``."""
        waiting = [param for _, arrived in self._open.values() for param in arrived]
        if any(param.grad is None for param in (*self._kept.values(), *waiting)):
            self.discard()

    @torch.no_grad()
    def _on_grad(self, param: Tensor, bucket: int) -> None:
        self.discard_if_cleared()
        grad = param.grad
        if grad is None or grad.is_sparse:  # `step` refuses sparse gradients
            return
        device = grad.device
        if device in self._open and self._open[device][0] != bucket:
            self._measure_open(device)
        if device not in self._open:
            self._open[device] = bucket, set()
            torch.autograd.Variable._execution_engine.queue_callback(self._measure_all_open)
        arrived = self._open[device][1]
        arrived.add(param)
        if len(arrived) == len(self._members[bucket]):
            self._measure_open(device)

    @torch.no_grad()
    def _measure_all_open(self) -> None:
        """Measure the buckets that lack gradients; those measured in this backward are not open any more."""
        for device in list(self._open):
            self._measure_open(device)

    def _measure_open(self, device: torch.device) -> None:
        bucket, arrived = self._open.pop(device)
        self._measure(bucket, [param for param in self._members[bucket] if param in arrived])

    def _measure(self, bucket: int, params: Sequence[Tensor]) -> None:
        """Measure and free the gradients of parameters of a bucket, all on one device."""
        grads = [local(param.grad) for param in params if param.grad is not None]
        wait_for_copy(params[-1].grad)  # type: ignore[arg-type]
        device = grads[0].device
        kept = self._kept.get(device)
        again = any(param is kept for param in params)
        if kept is not None and again:
            _first(kept).sub_(_MARK)  # this backward has added to it
        if self._trains and any(param in self._fired for param in params):
            self._count(params)
        else:
            norm = self._observe(bucket, params, grads)
            if not self._trains:  # a step that trains need not be skipped for a frozen layer
                # 0 * inf and 0 * nan are nan: adds nothing unless a gradient overflowed.
                self._overflow[device] = self._overflow.get(device, 0.0) + norm * 0
        if bucket in self._training:
            return
        smallest = min(params, key=Tensor.numel)
        if kept is None or again or smallest.numel() < kept.numel():
            if kept is not None and kept is not smallest:
                kept.grad = None
            kept = self._kept[device] = smallest
            assert kept.grad is not None
            local(kept.grad).zero_()
            _first(kept).fill_(_MARK)
        for param in params:
            if param is not kept:
                param.grad = None
        if device in self._overflow:
            _first(kept).add_(self._overflow[device])

    def _observe(self, bucket: int, params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
        """Add gradients of a bucket, all on one device, to the sums; return their squared norm."""
        norm = self._sq_norm(bucket, grads)
        if self._sums is None:
            self._sums = torch.zeros(len(self._observed), dtype=torch.float32, device=norm.device)
        layer = self._layers[bucket]
        self._sums[layer] += norm.to(self._sums.device, non_blocking=True)
        self._observed[layer] = True
        self._count(params)
        return norm

    def _count(self, params: Sequence[Tensor]) -> None:
        for param in params:
            self._fired[param] = self._fired.get(param, 0) + 1
            self.accumulated |= self._fired[param] > 1

    @torch.no_grad()
    def measure_assigned(self) -> None:
        """Measure gradients that were assigned, as from `torch.autograd.grad`, which calls no hook, and drop them.

        They belong to the user, who may still need them: none is kept, and none is changed.
        """
        for bucket, members in self._members.items():
            found: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
            for param in members:
                grad = param.grad
                if grad is not None and grad.numel():
                    found.setdefault(grad.device, []).append((param, local(grad)))
            for pairs in found.values():
                self._observe(bucket, [param for param, _ in pairs], [grad for _, grad in pairs])
                for param, _ in pairs if bucket not in self._training else ():
                    param.grad = None

    def _sq_norm(self, bucket: int, grads: Sequence[Tensor]) -> Tensor:
        """Return the sum of squares of gradients: float32, shape (), by the kernels as far as they support them."""
        supported = [grass_kernels.is_supported(g.dtype, g.dtype, torch.float32) for g in grads]
        norms = [
            torch.linalg.vector_norm(g).square().float()
            for g, known in zip(grads, supported, strict=True)
            if not known
        ]
        grads = [g for g, known in zip(grads, supported, strict=True) if known]
        if grads:
            plan = self._plans.get(bucket)
            if plan is None or not plan.is_valid(grads):
                plan = self._plans[bucket] = grass_kernels.NormPlan(grads, [0] * len(grads), 1)
            norms.append(plan.run(grads)[0])
        return sum(norms[1:], norms[0])

    @torch.no_grad()
    def finish_step(self, grad_scale: Tensor | None) -> Measured:
        """Return the squared norms of the step, unscaled, and the layers that had gradients; then start a new step.

        Args:
            grad_scale: scale of the GradScaler, if gradients are still scaled.

        Returns:
            Squared norms summed over micro-batches, float32 [L + 1]; and whether each layer had gradients.
        """
        self._measure_all_open()  # left by a backward that failed
        assert self._sums is not None, "nothing has been measured"
        sums, ratios = self._sums, []
        if self._trains:
            sums = sums * max(self._fired.values())  # one micro-batch stands for all
        for param in self._kept.values():
            if param.grad is not None:
                first = _first(param)
                if first.numel():  # not an empty shard; no GradScaler changes the gradients of shards
                    ratio = (first.float() / _MARK).square()
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
        self._open.clear()
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


def _first(param: Tensor) -> Tensor:
    """Return a view of the first element of a parameter's gradient; of an empty shard an empty view."""
    assert param.grad is not None
    grad = local(param.grad)
    return grad[(0,) * grad.dim()] if grad.numel() else grad
