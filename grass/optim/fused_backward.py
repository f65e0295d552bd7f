"""FusedBackward: updates a bucket inside backward, as soon as all of its gradients are complete.

One backward is one step, unless accumulation is declared: a hook cannot know which micro-batch is the last. Buckets
that were not updated inside backward are updated by `step`.
"""

import contextlib
import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grass.errors import BackwardError
from grass.optim.sharding import wait_for_copy


class FusedBackward:
    """Hooks on the active parameters, which update each bucket when its gradients are complete.

    Args:
        members: active parameters of each bucket.
        tied: parameters that may get gradients several times in a backward; their buckets are updated by `step`.
        update: function that updates a bucket, whose parameters have gradients, and returns the squared gradient
            norms by layer, float32 [layers].
        model_ref: weak reference to the model; None if it is not known.

    Attributes:
        handles: handles of the hooks.
        done: buckets updated since the last step. After a backward that failed, they have one update more than others.
        at_end: function that is called when a backward that has updated something ends; not if all of its gradients
            arrive inside reentrant checkpoints, whose callbacks would be called once a layer.
    """

    def __init__(
        self,
        members: Mapping[int, Sequence[Tensor]],
        tied: set[Tensor],
        update: Callable[[int], Tensor | None],
        model_ref: "weakref.ref[nn.Module] | None" = None,
    ) -> None:
        self._model_ref = model_ref
        self._members = {bucket: list(params) for bucket, params in members.items()}
        self._update = weakref.WeakMethod(
            update
        )  # parameters hold their hooks, and must not hold the optimizer
        # Parameters of each bucket whose gradients have arrived, and these.
        self._arrived: dict[int, dict[Tensor, weakref.ref[Tensor]]] = {bucket: {} for bucket in members}
        self._sq_norms: list[Tensor] = []
        self._accumulating = 0
        self._backward: int | None = None  # id of the backward that runs, or has failed
        self._updated: list[int] = []  # buckets updated in it
        self.done: list[int] = []
        self.at_end: Callable[[], None] = lambda: None
        self.handles: list[RemovableHandle] = []
        for bucket, params in self._members.items():
            if not any(p in tied for p in params):
                for p in params:
                    self.handles.append(p.register_post_accumulate_grad_hook(self._hook(bucket)))

    def _hook(self, bucket: int) -> Callable[[Tensor], None]:
        self_ref = weakref.ref(self)

        def update_when_complete(param: Tensor) -> None:
            fused = self_ref()
            if fused is not None and not fused._accumulates():
                fused._on_grad(bucket, param)

        return update_when_complete

    def _accumulates(self) -> bool:
        """Return if further micro-batches follow, as declared by the user or accelerate."""
        return self._accumulating > 0 or (not _accelerate_syncs() and self._is_prepared)

    @functools.cached_property
    def _is_prepared(self) -> bool:
        """Return if accelerate has prepared the optimizer's model, or a part of it; True if the model is not known.

        The state that `_accelerate_syncs` reads is one for the process. An Accelerator that was left inside an
        accumulation, as by an exception, must not affect other trainings.
        """
        model = None if self._model_ref is None else self._model_ref()
        if model is None:
            return True
        return any("_is_accelerate_prepared" in module.__dict__ for module in model.modules())

    def _on_grad(self, bucket: int, param: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        if self._backward != backward and not _is_in_reentrant_checkpoint():
            if self._backward is not None:
                self._forget_failed_backward()
            self._backward = backward
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        if bucket in self.done:
            self._refuse_second_gradient(bucket, param)
        arrived = self._arrived[bucket]
        assert param.grad is not None
        arrived[param] = weakref.ref(param.grad)
        if len(arrived) == len(self._members[bucket]):
            self._updated.append(bucket)
            self._run(bucket)

    def _end_backward(self) -> None:
        updated = bool(self._updated)
        self._backward = None
        self._updated.clear()
        if updated:
            self.at_end()

    def _forget_failed_backward(self) -> None:
        """Lead on after a backward that failed, if its gradients have been cleared, as by ``model.zero_grad()``."""
        arrived = [(p, grad) for params in self._arrived.values() for p, grad in params.items()]
        if any(grad() is not None and p.grad is grad() for p, grad in arrived):
            raise BackwardError(
                "an earlier backward has failed, and some of its gradients are still there: call zero_grad() before "
                "the next backward"
            )
        if self.done:
            warnings.warn(
                f"an earlier backward has failed after {len(self.done)} buckets of parameters had been updated by "
                "fused_backward: they keep this update, which belongs to no step",
                stacklevel=2,
            )
        self.discard()

    def _refuse_second_gradient(self, bucket: int, param: Tensor) -> None:
        param.grad = None
        shape = tuple(param.shape)
        what = (
            f"a second gradient arrived for a parameter of shape {shape} whose layer has already been updated"
        )
        if bucket in self._updated:
            raise BackwardError(
                f"{what} inside this backward: the model uses a module more than once, so no hook knows which "
                "gradient is the last; train it without fused_backward. The update stays"
            )
        self._backward = None  # the same for the next backward
        raise BackwardError(
            f"{what} inside an earlier backward of this step; that update stays. With fused_backward one backward "
            "is one step: run all micro-batches but the last in `with optimizer.accumulate():`. To go on call step(), "
            "which counts the updates as a step, or zero_grad(), which does not"
        )

    @torch.no_grad()
    def _run(self, bucket: int) -> None:
        update = self._update()
        assert update is not None, "hooks have outlived their optimizer"
        for p in self._members[bucket]:
            if p.grad is not None:
                wait_for_copy(p.grad)
        sq_norms = update(bucket)
        self.done.append(bucket)
        self._arrived[bucket].clear()
        for p in self._members[bucket]:
            p.grad = None
        if sq_norms is not None:
            self._sq_norms.append(sq_norms)

    def finish_step(self, order: Sequence[int]) -> tuple[list[Tensor], list[int]]:
        """Update the buckets that were not updated inside backward, and end the step.

        Args:
            order: all buckets, in the order of updates.

        Returns:
            Squared gradient norms by layer, one float32 [layers] tensor per bucket, to be summed; and the buckets
            that had gradients.
        """
        for bucket in order:
            params = self._members.get(bucket, [])
            if bucket not in self.done and any(p.grad is not None for p in params):
                self._run(bucket)
        taken = list(self._sq_norms), list(self.done)
        self.discard()
        return taken

    def discard(self) -> None:
        """Start a new step; parameters that were updated are not restored."""
        self._backward = None  # a backward that failed has not ended
        self._updated.clear()
        self._sq_norms.clear()
        self.done.clear()
        for arrived in self._arrived.values():
            arrived.clear()

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Accumulate gradients, without updates, inside this context."""
        self._accumulating += 1
        try:
            yield
        finally:
            self._accumulating -= 1

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


def tied_parameters(model: nn.Module | None) -> set[Tensor]:
    """Return the parameters that a model has under several names: a backward may add to their gradients twice."""
    seen: set[Tensor] = set()
    tied: set[Tensor] = set()
    if model is not None:
        for _, p in model.named_parameters(remove_duplicate=False):
            (tied if p in seen else seen).add(p)
    return tied


def _is_in_reentrant_checkpoint() -> bool:
    """Return if this runs inside the backward of a reentrant checkpoint, which is a backward of its own."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _accelerate_syncs() -> bool:
    """Return if accelerate synchronizes gradients in this backward, the last of a step; True without accelerate."""
    accelerate: Any = sys.modules.get("accelerate.state")
    if accelerate is None or not accelerate.GradientState._shared_state:
        return True
    return bool(accelerate.GradientState().sync_gradients)
