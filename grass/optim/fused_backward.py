"""Fused backward: a slot of parameters is updated inside backward, when the last of its gradients is complete.

One backward is one step, unless accumulation is declared: a hook cannot know which micro-batch is the last. What
the hooks do not update, `step` does.
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
        members: the parameters of each slot, all that train.
        late: parameters whose gradients may come in several parts; their slots wait for `step`.
        update: updates a slot, whose parameters have gradients; returns float32 squared norms by layer.

    Attributes:
        handles: of the hooks.
        done: slots updated since the last step. If backward has failed, the step is torn: these are ahead.
    """

    def __init__(
        self,
        members: Mapping[int, Sequence[Tensor]],
        late: set[Tensor],
        update: Callable[[int], Tensor | None],
    ) -> None:
        self._members = {slot: list(params) for slot, params in members.items()}
        self._update = weakref.WeakMethod(
            update
        )  # parameters hold their hooks, and must not hold the optimizer
        self._arrived: dict[int, set[Tensor]] = {slot: set() for slot in members}
        self._sq_norms: list[Tensor] = []
        self._accumulating = 0
        self.done: list[int] = []
        self.handles: list[RemovableHandle] = []
        for slot, params in self._members.items():
            if not any(p in late for p in params):
                for p in params:
                    self.handles.append(p.register_post_accumulate_grad_hook(self._hook(slot)))

    def _hook(self, slot: int) -> Callable[[Tensor], None]:
        self_ref = weakref.ref(self)

        def update_when_complete(param: Tensor) -> None:
            fused = self_ref()
            if fused is not None and not fused._accumulates():
                fused._notice(slot, param)

        return update_when_complete

    def _accumulates(self) -> bool:
        """Whether further micro-batches follow: the user says so, or accelerate does."""
        return self._accumulating > 0 or not _accelerate_syncs()

    def _notice(self, slot: int, param: Tensor) -> None:
        if slot in self.done:
            param.grad = None
            raise BackwardError(
                f"a second gradient came for a parameter of shape {tuple(param.shape)} whose layer has been updated "
                "already, inside an earlier backward of this step; that update stays. With fused_backward one backward "
                "is one step: put all micro-batches but the last in `with optimizer.accumulate():`. After a backward "
                "that failed call step(), which counts what was updated, or zero_grad(), which goes on without"
            )
        arrived = self._arrived[slot]
        arrived.add(param)
        if len(arrived) == len(self._members[slot]):
            self._run(slot)

    @torch.no_grad()
    def _run(self, slot: int) -> None:
        update = self._update()
        assert update is not None, "the optimizer is gone, and its hooks are not"
        sq_norms = update(slot)
        self.done.append(slot)
        self._arrived[slot].clear()
        for p in self._members[slot]:
            p.grad = None
        if sq_norms is not None:
            self._sq_norms.append(sq_norms)

    def take(self, order: Sequence[int]) -> tuple[list[Tensor], list[int]]:
        """Update what backward has not, and end the step.

        Args:
            order: of the slots.

        Returns:
            float32 squared norms by layer, whose sum is the step's, on their way; and the slots that had gradients.
        """
        for slot in order:
            params = self._members.get(slot, [])
            if slot not in self.done and any(p.grad is not None for p in params):
                self._run(slot)
        taken = list(self._sq_norms), list(self.done)
        self.discard()
        return taken

    def discard(self) -> None:
        """Begin a new step; updates that were made stay."""
        self._sq_norms.clear()
        self.done.clear()
        for arrived in self._arrived.values():
            arrived.clear()

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Let gradients add up meanwhile."""
        self._accumulating += 1
        try:
            yield
        finally:
            self._accumulating -= 1

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


def tied_parameters(model: nn.Module | None) -> set[Tensor]:
    """Parameters that a model has under several names: they may be used, and get gradients, several times."""
    seen: set[Tensor] = set()
    tied: set[Tensor] = set()
    if model is not None:
        for _, p in model.named_parameters(remove_duplicate=False):
            (tied if p in seen else seen).add(p)
    return tied


def _accelerate_syncs() -> bool:
    """Whether this backward is a step's last, by accelerate, if that is in use; Trainer tells it before each."""
    accelerate: Any = sys.modules.get("accelerate.state")
    if accelerate is None or not accelerate.GradientState._shared_state:
        return True
    return bool(accelerate.GradientState().sync_gradients)
