"""FusedBackward: a bucket is updated inside backward, when the last of its gradients is complete.

One backward is one step, unless accumulation is declared: a hook cannot know which micro-batch is the last. Buckets
that the hooks do not update are left to `step`.
"""

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grass.errors import BackwardError


class FusedBackward:
    """Hooks on the parameters of one active set.

    Args:
        members: parameters of each bucket, all that train.
        tied: parameters whose gradients may come in several parts; their buckets wait for `step`.
        update: updates a bucket, whose parameters have gradients; returns float32 squared norms by layer.

    Attributes:
        handles: of the hooks.
        done: buckets updated since the last step. If backward has failed, the step is torn: these are ahead.
    """

    def __init__(
        self,
        members: Mapping[int, Sequence[Tensor]],
        tied: set[Tensor],
        update: Callable[[int], Tensor | None],
    ) -> None:
        self._members = {bucket: list(params) for bucket, params in members.items()}
        self._update = weakref.WeakMethod(
            update
        )  # parameters hold their hooks, and must not hold the optimizer
        self._arrived: dict[int, set[Tensor]] = {bucket: set() for bucket in members}
        self._sq_norms: list[Tensor] = []
        self._accumulating = 0
        self.done: list[int] = []
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
                fused._notice(bucket, param)

        return update_when_complete

    def _accumulates(self) -> bool:
        """Return if further micro-batches follow, as the user or accelerate says."""
        return self._accumulating > 0 or not _accelerate_syncs()

    def _notice(self, bucket: int, param: Tensor) -> None:
        if bucket in self.done:
            param.grad = None
            raise BackwardError(
                f"a second gradient came for a parameter of shape {tuple(param.shape)} whose layer has been updated "
                "already, inside an earlier backward of this step; that update stays. With fused_backward one backward "
                "is one step: put all micro-batches but the last in `with optimizer.accumulate():`. After a backward "
                "that failed call step(), which counts what was updated, or zero_grad(), which goes on without"
            )
        arrived = self._arrived[bucket]
        arrived.add(param)
        if len(arrived) == len(self._members[bucket]):
            self._run(bucket)

    @torch.no_grad()
    def _run(self, bucket: int) -> None:
        update = self._update()
        assert update is not None, "the optimizer is gone, and its hooks are not"
        sq_norms = update(bucket)
        self.done.append(bucket)
        self._arrived[bucket].clear()
        for p in self._members[bucket]:
            p.grad = None
        if sq_norms is not None:
            self._sq_norms.append(sq_norms)

    def finish_step(self, order: Sequence[int]) -> tuple[list[Tensor], list[int]]:
        """Update the buckets that backward has not, and end the step.

        Args:
            order: of the buckets.

        Returns:
            float32 squared norms by layer, one tensor a bucket, to be added up; and the buckets that had gradients.
        """
        for bucket in order:
            params = self._members.get(bucket, [])
            if bucket not in self.done and any(p.grad is not None for p in params):
                self._run(bucket)
        taken = list(self._sq_norms), list(self.done)
        self.discard()
        return taken

    def discard(self) -> None:
        """Start a new step; updates that were made stay."""
        self._sq_norms.clear()
        self.done.clear()
        for arrived in self._arrived.values():
            arrived.clear()

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Accumulate gradients inside this context."""
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
    """Parameters that a model has under several names; they may get gradients several times in a backward."""
    seen: set[Tensor] = set()
    tied: set[Tensor] = set()
    if model is not None:
        for _, p in model.named_parameters(remove_duplicate=False):
            (tied if p in seen else seen).add(p)
    return tied


def _accelerate_syncs() -> bool:
    """Return if this backward is a step's last, as accelerate knows it; True where it is not in use."""
    accelerate: Any = sys.modules.get("accelerate.state")
    if accelerate is None or not accelerate.GradientState._shared_state:
        return True
    return bool(accelerate.GradientState().sync_gradients)
