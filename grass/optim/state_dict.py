"""State dict of `GrassAdamW`: torch's layout, with entries for parameters that were never stepped.

Checkpoint libraries want the state of every parameter that requires grad, and a layer that was never drawn has none.
It appears as zeros that share one element of memory, which are dropped again when loaded.
"""

from typing import Any

import torch
from torch import Tensor

from grass.errors import StateMismatchError
from grass.optim.states import KINDS, Options, has_remainder, moment_dtype, moment_keys


def placeholder_state(group: dict[str, Any], p: Tensor, options: Options) -> dict[str, Tensor]:
    """Return the state of a parameter that was never stepped, in torch's layout, without its memory."""
    state = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
    for key in moment_keys(group):
        state[key] = torch.zeros((), dtype=moment_dtype(group, p, options), device=p.device).expand(p.shape)
    if has_remainder(group, p, options):
        state["remainder"] = torch.zeros((), dtype=torch.int16, device=p.device).expand(p.shape)
    return state


def split_method(state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Take the method's state out of a state dict, and the entries that were never stepped.

    Returns:
        A shallow copy that torch's layout describes whole, and the method's state or None.

    Raises:
        StateMismatchError: not a state dict of an optimizer.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise StateMismatchError('not an optimizer\'s state dict: it lacks "state" or "param_groups"')
    groups = [dict(group) for group in state_dict["param_groups"]]
    method = groups[0].pop("grass", None) if groups else None
    params = {key for group in groups for key in group["params"]}
    entries = {
        key: _without_zeros(entry) if key in params and isinstance(entry, dict) else entry
        for key, entry in state_dict["state"].items()
    }
    kept = {key: entry for key, entry in entries.items() if key not in params or entry}
    return {**state_dict, "state": kept, "param_groups": groups}, method


def _without_zeros(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it was before `state_dict` completed it: a counter of 0 stands beside moments that were not there."""
    if float(state.get("step", 1)) != 0:
        return state
    kept = {key: value for key, value in state.items() if key not in ("step", *KINDS)}
    if isinstance(kept.get("remainder"), Tensor) and not bool(kept["remainder"].any()):
        del kept["remainder"]
    return kept


def check_complete(state_dict: dict[str, Any], groups: list[dict[str, Any]], expected: set[Tensor]) -> None:
    """Refuse a state dict from which somebody has dropped parameters.

    `torch.distributed.checkpoint` keeps from what it loads only what requires grad at that moment: all
    for an optimizer that has not trained yet, but no frozen layer for one that has.

    Args:
        state_dict: as given to `load_state_dict`.
        groups: the optimizer's.
        expected: parameters that a complete state dict has.

    Raises:
        StateMismatchError: with how many are missing.
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


def check_shapes(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Refuse a state dict whose groups or moments do not fit the parameters.

    Raises:
        StateMismatchError: with the first difference.
    """
    saved = [list(group["params"]) for group in state_dict["param_groups"]]
    own = [group["params"] for group in groups]
    if [len(group) for group in saved] != [len(group) for group in own]:
        raise StateMismatchError(
            f"the state dict has parameter groups of {[len(group) for group in saved]} parameters, this optimizer "
            f"of {[len(group) for group in own]}: it is of another model, or of other groups"
        )
    for group, keys in zip(own, saved, strict=True):
        for p, key in zip(group, keys, strict=True):
            entry = state_dict["state"].get(key, {})
            if not isinstance(entry, dict):
                raise StateMismatchError(
                    f"the state of parameter {key} in the state dict is no dict: it is damaged"
                )
            missing = [kind for kind in KINDS[:2] if "step" in entry and kind not in entry]
            if missing:
                raise StateMismatchError(
                    f"the state dict has no {missing[0]} of parameter {key}: it is damaged"
                )
            for kind in (*KINDS, "remainder"):
                found = entry.get(kind)
                if kind in entry and not _is_readable(found, kind, p):
                    raise StateMismatchError(
                        f"{kind} of parameter {key} in the state dict is {_describe(found)}, the parameter is "
                        f"{p.dtype}: its states are dense tensors of such numbers"
                    )
                if found is not None and found.shape != p.shape:
                    raise StateMismatchError(
                        f"{kind} of parameter {key} has shape {tuple(found.shape)} in the state dict, the parameter "
                        f"{tuple(p.shape)}: it is of another model"
                    )


def _is_readable(found: Any, kind: str, p: Tensor) -> bool:
    """Whether these are values that a state can take."""
    if not isinstance(found, Tensor) or found.layout != torch.strided or found.is_meta:
        return False
    return kind == "remainder" or (found.is_complex() if p.is_complex() else found.is_floating_point())


def _describe(found: Any) -> str:
    if not isinstance(found, Tensor):
        return f"of type {type(found).__name__}"
    return f"{found.dtype}, {found.layout}, on {found.device}"
