"""Saving: what of `GrassAdamW` goes into state dicts, copies and pickles, and how it comes back."""

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grass.layer_scheduler import LayerScheduler
from grass.optim.checkpoint import check_complete, check_shapes, placeholder_state, split_method
from grass.optim.freezing import Lease
from grass.optim.fused_backward import FusedBackward
from grass.optim.probe import Probe
from grass.optim.stored_adamw import StoredAdamW


class Saving(StoredAdamW):
    """The part of `GrassAdamW` that saves and restores the method beside torch's state."""

    _model_ref: weakref.ref[nn.Module] | None
    _scheduler: LayerScheduler
    _late: set[Tensor]
    _lease: Lease
    _probe: Probe | None
    _fused: FusedBackward | None

    if TYPE_CHECKING:  # of `GrassAdamW`
        step_count: property
        torn_layers: property

        def _can_train(self, p: Tensor) -> bool: ...
        def _build(self, trainable: list[bool]) -> None: ...
        def _switch_parameters(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """State in torch's AdamW layout, with the whole method in ``param_groups[0]["grass"]``.

        Layers that were never drawn appear with zero moments that take no memory: checkpoint libraries want
        every parameter's state.
        """
        if self._offloading is not None:
            self._offloading.drain()
        state_dict = super().state_dict()
        state_dict["param_groups"][0]["grass"] = self._method_state()
        for index, (group, p) in enumerate(self._members()):
            if self._can_train(p) and "step" not in self.state.get(p, ()):
                empty = placeholder_state(group, p, self._options)
                state_dict["state"][index] = {**empty, **self.state.get(p, {})}
        return state_dict

    def _method_state(self) -> dict[str, Any]:
        method = self._scheduler.state_dict()
        if self._fused is not None:
            # of one shape at all times, as all of the method's state
            torn = [*self.torn_layers, *[-1] * (self._config.active_layers + 1)]
            method["torn"] = torch.tensor(torn[: self._config.active_layers + 1], device="cpu")
        return method

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken, in whatever phase.

        A state dict of `torch.optim.AdamW` gives the moments; the method then starts at its beginning, with
        one warning.

        Raises:
            StateMismatchError: of another model, another layer map or another `GrassConfig`; nothing has
                been changed then.
        """
        given = state_dict
        state_dict, method = split_method(given)
        check_shapes(state_dict, self.param_groups)
        if method is not None:
            self._scheduler.check(method)
            check_complete(given, self.param_groups, {p for _, p in self._members() if self._can_train(p)})
        super().load_state_dict(state_dict)
        if method is None:
            warnings.warn(
                "the state dict is plain AdamW's: moments are loaded, the method starts at its beginning",
                stacklevel=2,
            )
            self._scheduler.load_state_dict(self._scheduler.beginning)
        else:
            self._scheduler.load_state_dict(method)
            _warn_if_torn(method)
        self._switch_parameters()

    def __getstate__(self) -> dict[str, Any]:
        if self._offloading is not None:
            self._offloading.drain()
        members = [p for _, p in self._members()]
        return {
            **super().__getstate__(),
            "grass_copy": {
                "config": self._config,
                "layers": self._layers,
                "slots": [self._slots[p] for p in members],
                "trainable": [self._lease.found(p) for p in members],
                "late": [p in self._late for p in members],
                "method": self._method_state(),
            },
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        copied = state.get("grass_copy")
        super().__setstate__({key: value for key, value in state.items() if key != "grass_copy"})
        if copied is None:  # torch's load_state_dict comes by here too
            return
        self._config, self._layers, self._model_ref = copied["config"], copied["layers"], None
        members = [p for _, p in self._members()]
        self._slots = dict(zip(members, copied["slots"], strict=True))
        self._late = {p for p, late in zip(members, copied["late"], strict=True) if late}
        self._offloading = None  # of the original
        self._build(copied["trainable"])
        self._scheduler.load_state_dict(copied["method"])
        _warn_if_torn(copied["method"])
        self._switch_parameters()

    def _wants_only_state(self) -> bool:
        """Whether this step is a checkpoint library's, which makes a fresh optimizer show its state.

        `torch.distributed.checkpoint` sets zero gradients by hand and the learning rate to 0, steps once, and
        then loads the state of whatever requires grad.
        """
        if self.step_count or any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        grads = [p.grad for _, p in self._members() if p.grad is not None]
        if self._probe is not None:
            return bool(grads) and not self._probe.fired
        return bool(grads) and not any(bool(grad.any()) for grad in grads)

    def _show_state(self) -> None:
        """Make the state of all that can ever train, and let it require grad until the next switch."""
        for group, p in self._members():
            if self._can_train(p):
                self._states.allocate(self.state[p], group, p)
        self._lease.switch(lambda p: self._slots[p] <= len(self._layers))


def _warn_if_torn(method: dict[str, Any]) -> None:
    torn = [slot for slot in method.get("torn", torch.empty(0)).tolist() if slot >= 0]
    if torn:
        warnings.warn(
            f"the state was saved inside a step that did not end: layers {torn} are one update ahead of the others; "
            "weights, moments and counters of each agree",
            stacklevel=4,
        )
