"""State dict of `GrassAdamW`: torch's layout, with an entry for each parameter, also for those never stepped.

A parameter that was never stepped has an empty entry: torch's optimizers initialize its state at its first step.
`torch.distributed.checkpoint` needs the state of every parameter that requires grad, and gets zeros.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grass.errors import StateMismatchError
from grass.offload.store import zeros_on_demand
from grass.optim.sharding import is_sharded, local, ranks_of
from grass.optim.states import KINDS, Options, has_remainder, moment_dtype, moment_keys, own_keys


def is_for_distributed_checkpoint() -> bool:
    """Return if `torch.distributed.checkpoint` is among the callers; there may be wrappers in between."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("torch.distributed.checkpoint."):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def zero_state(group: dict[str, Any], p: Tensor, options: Options) -> dict[str, Tensor]:
    """Return the state of a parameter that was never stepped, in torch's layout: zeros on the CPU.

    They take no memory until they are written.
    """
    dtypes = dict.fromkeys(moment_keys(group), moment_dtype(group, p, options))
    if has_remainder(group, p, options):
        dtypes["remainder"] = torch.int16
    state = {key: zeros_on_demand(p.shape, dtype) for key, dtype in dtypes.items()}
    return {"step": torch.zeros((), dtype=torch.float32, device="cpu"), **state}


def split_method(state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Split the state of the method from a state dict, and drop the states of parameters that were never stepped.

    Returns:
        A shallow copy in plain torch layout, and the state of the method or None.

    Raises:
        StateMismatchError: not the state dict of an optimizer.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise StateMismatchError('not an optimizer\'s state dict: it lacks "state" or "param_groups"')
    groups = [dict(group) for group in state_dict["param_groups"]]
    method = groups[0].pop("grass", None) if groups else None
    params = {key for group in groups for key in group["params"]}
    entries = {
        key: drop_zero_state(entry) if key in params and isinstance(entry, dict) else entry
        for key, entry in state_dict["state"].items()
    }
    kept = {key: entry for key, entry in entries.items() if key not in params or entry}
    return {**state_dict, "state": kept, "param_groups": groups}, method


def drop_zero_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state without the parts of `zero_state`, which are recognized by a step counter of 0."""
    if float(state.get("step", 1)) != 0:
        return state
    kept = {key: value for key, value in state.items() if key not in ("step", *KINDS)}
    if isinstance(kept.get("remainder"), Tensor) and not bool(local(kept["remainder"]).any()):
        del kept["remainder"]
    return kept


def check_complete(state_dict: dict[str, Any], groups: list[dict[str, Any]], expected: set[Tensor]) -> None:
    """Check that a state dict has the state of all trainable parameters.

    `torch.distributed.checkpoint` loads only the state of parameters that require grad at that moment: all of them
    in a new optimizer, but not those of frozen layers in one that has trained.

    Args:
        state_dict: argument of `load_state_dict`.
        groups: parameter groups of the optimizer.
        expected: parameters whose state a complete state dict has.

    Raises:
        StateMismatchError: states are missing; the message has their number.
    """
    missing = 0
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        for p, key in zip(group["params"], saved["params"], strict=True):
            missing += p in expected and key not in state_dict["state"]
    if missing:
        raise StateMismatchError(
            f"the state dict lacks the state of {missing} parameters, which would lose their moments: "
            "torch.distributed.checkpoint drops frozen layers when it loads into an optimizer that has trained; "
            "construct the optimizer anew and load into that"
        )


def check_structure(state_dict: dict[str, Any], groups: list[dict[str, Any]], options: Options) -> None:
    """Check that the groups and states of a state dict fit the parameters.

    Raises:
        StateMismatchError: they do not fit; the message has the first difference.
    """
    saved = [list(group["params"]) for group in state_dict["param_groups"]]
    own = [group["params"] for group in groups]
    if [len(group) for group in saved] != [len(group) for group in own]:
        raise StateMismatchError(
            f"the state dict has parameter groups of {[len(group) for group in saved]} parameters, this optimizer "
            f"of {[len(group) for group in own]}: the state dict is of another model, or of other groups"
        )
    for group, keys in zip(groups, saved, strict=True):
        for p, key in zip(group["params"], keys, strict=True):
            entry = state_dict["state"].get(key, {})
            if not isinstance(entry, dict):
                raise StateMismatchError(
                    f"the state of parameter {key} in the state dict is not a dict: the file is damaged"
                )
            missing = [kind for kind in KINDS[:2] if "step" in entry and kind not in entry]
            if missing:
                raise StateMismatchError(
                    f"the state dict has no {missing[0]} of parameter {key}: the file is damaged"
                )
            for kind in own_keys(entry, group, p, options):
                found = entry[kind]
                if not _is_readable(found, kind, p):
                    raise StateMismatchError(
                        f"{kind} of parameter {key} in the state dict is {_describe(found)}, the parameter is "
                        f"{p.dtype}: states must be dense tensors, real or complex as their parameter"
                    )
                if found.shape != p.shape:
                    raise StateMismatchError(
                        f"{kind} of parameter {key} has shape {tuple(found.shape)} in the state dict, the parameter "
                        f"{tuple(p.shape)}: the state dict is of another model"
                    )


def _is_readable(found: Any, kind: str, p: Tensor) -> bool:
    """Return if a state can be loaded from a value."""
    if not isinstance(found, Tensor) or found.layout != torch.strided or found.is_meta:
        return False
    return kind == "remainder" or (found.is_complex() if p.is_complex() else found.is_floating_point())


def _describe(found: Any) -> str:
    if not isinstance(found, Tensor):
        return f"of type {type(found).__name__}"
    return f"{found.dtype}, {found.layout}, on {found.device}"


def has_zero_gradients(groups: Sequence[dict[str, Any]]) -> bool:
    """Return True if all learning rates are 0, and all gradients zeros: a step that initializes states.

    `torch.distributed.checkpoint` takes one before it saves or loads. A device sync if the learning rates are 0.
    """
    if any(float(group["lr"]) != 0 for group in groups):
        return False
    params = [p for group in groups for p in group["params"]]
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return False
    has_values = torch.tensor([float(any(bool(local(grad).any()) for grad in grads))], device="cpu")
    ranks = ranks_of([p for p in params if is_sharded(p)])
    return not bool(has_values if ranks is None else ranks.sum(has_values))
