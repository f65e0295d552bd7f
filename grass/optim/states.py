"""The state of a parameter: its tensors, their dtypes and devices; creating, moving and restoring them."""

from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused

import grass_kernels
from grass.errors import StateMismatchError
from grass_kernels.conversions import DTYPES as KERNEL_DTYPES

LOW_PRECISION = tuple(dtype for dtype in KERNEL_DTYPES if dtype.itemsize < 4)
KINDS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""Keys of the moments in a state."""
STATE_KEYS = ("step", *KINDS, "remainder")
"""Keys of a state that may belong to the optimizer (see `own_keys`); all other keys are the user's."""
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")
"""Keys that every group of an AdamW has."""


class Options(NamedTuple):
    """Arguments of `AdamW` beyond torch's."""

    state_dtype: torch.dtype | None = None
    master_weights: bool = False
    stochastic_rounding: bool = False
    max_grad_norm: float | None = None

    def check(self) -> None:
        """Check the options.

        Raises:
            ValueError: a value is invalid, or options exclude each other.
        """
        if self.state_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                f"state_dtype must be None, torch.float32 or torch.bfloat16, not {self.state_dtype}: the kernels "
                "support these dtypes of moments"
            )
        if self.master_weights and self.stochastic_rounding:
            raise ValueError(
                "master_weights and stochastic_rounding exclude each other: updates of master weights are not rounded "
                "to bfloat16; pass one of them"
            )
        limit = self.max_grad_norm
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, Real) or not limit > 0):
            raise ValueError(
                f"max_grad_norm must be a positive number, or None for no clipping, not {limit!r}"
            )

    def check_group(self, group: dict[str, Any]) -> None:
        """Check that a group that only torch's functional AdamW can update is compatible with the options.

        Raises:
            ValueError: it is not; the message has the name of the setting.
        """
        if not uses_torch(group):
            return
        setting = "differentiable=True" if group["differentiable"] else "decoupled_weight_decay=False"
        if (self.state_dtype, *self[1:3]) != (None, False, False):
            raise ValueError(
                f"a group with {setting} is updated by torch, which does not support state_dtype, master_weights or "
                "stochastic_rounding: remove these options, or the setting"
            )
        if not group["differentiable"] and any(p.dtype in LOW_PRECISION for p in group["params"]):
            raise ValueError(
                f"a group with {setting} is updated by torch, which does not support float32 moments of its bfloat16 "
                "or float16 parameters: use torch.optim.Adam, or decoupled weight decay"
            )

    def check_param(self, p: Tensor, name: str) -> None:
        """Check that a parameter is compatible with the options.

        Raises:
            ValueError: a float16 parameter with options for bfloat16.
        """
        if p.dtype == torch.float16 and (self.master_weights or self.stochastic_rounding):
            option = "master_weights" if self.master_weights else "stochastic_rounding"
            raise ValueError(
                f"{option} is for bfloat16 parameters (float32 ones do not need it), and {name}, of shape "
                f"{tuple(p.shape)}, is float16: convert the model to bfloat16, or remove {option}"
            )


def uses_torch(group: dict[str, Any]) -> bool:
    """Return if a group has settings that only torch's functional AdamW supports."""
    return bool(group["differentiable"]) or not group.get("decoupled_weight_decay", True)


def takes_kernel(group: dict[str, Any], p: Tensor, options: Options) -> bool:
    """Return if a parameter is updated by a plan of `grass_kernels`, else by torch's functional AdamW."""
    if uses_torch(group) or p.dtype not in KERNEL_DTYPES:
        return False
    if p.dtype in LOW_PRECISION or options.state_dtype == torch.bfloat16:
        return True  # torch does not support moments of another dtype
    if group["capturable"] and not (p.device.type == "cuda" and grass_kernels.runs_triton(p.device)):
        return False
    # reading betas on a device would be a device sync
    return not any(isinstance(beta, Tensor) and beta.device.type != "cpu" for beta in group["betas"])


def moment_keys(group: dict[str, Any]) -> tuple[str, ...]:
    """Return the keys of the moments in a state of a group."""
    return KINDS if group["amsgrad"] else KINDS[:2]


def own_keys(state: Mapping[str, Any], group: dict[str, Any], p: Tensor, options: Options) -> list[str]:
    """Return the keys of a parameter's moments and remainder; a user may have other values under keys not in use."""
    keys = [key for key in KINDS[:2] if key in state]
    in_use = {"max_exp_avg_sq": group["amsgrad"], "remainder": options.master_weights}
    for key, is_used in in_use.items():
        value = state.get(key)
        is_ours = isinstance(value, Tensor) and value.shape == p.shape
        is_ours = is_ours and (value.dtype == torch.int16 or key != "remainder")  # type: ignore[union-attr]
        if key in state and (is_used or is_ours):
            keys.append(key)
    return keys


def moment_dtype(group: dict[str, Any], p: Tensor, options: Options) -> torch.dtype:
    """Return the dtype of moments: ``state_dtype`` or float32; for torch's functional AdamW, the parameter's."""
    if uses_torch(group) or p.dtype not in KERNEL_DTYPES:
        return p.dtype
    return options.state_dtype or torch.float32


def has_remainder(group: dict[str, Any], p: Tensor, options: Options) -> bool:
    """Return if a parameter has master weights: a bfloat16 parameter and a remainder."""
    return options.master_weights and p.dtype == torch.bfloat16 and not uses_torch(group)


def step_device(group: dict[str, Any], p: Tensor, options: Options) -> torch.device:
    """Return the device of the step counter: the parameter's for kernels, otherwise as in torch."""
    on_device = takes_kernel(group, p, options) or group["capturable"] or group["fused"]
    return p.device if on_device else torch.device("cpu")


class StateStorage(Protocol):
    """Memory of states that are not on the device of their parameters."""

    def __contains__(self, p: Tensor) -> bool:
        """Return if it holds the states of a parameter."""

    def view(self, p: Tensor, kind: str) -> Tensor:
        """Return the tensor of one state, in the parameter's shape and strides."""

    def zeros(self, p: Tensor, kind: str) -> Tensor:
        """Set one state to zero, and return its tensor."""

    def write(self, p: Tensor, kind: str, value: Tensor) -> Tensor:
        """Copy values to one state, and return its tensor."""


class StateMaker:
    """Creates, moves and restores states.

    Args:
        options: options of the optimizer.
        storage: memory of states that are not on the device of their parameters.
    """

    def __init__(self, options: Options, storage: StateStorage | None = None) -> None:
        self.options, self.storage = options, storage

    @torch.inference_mode(False)  # states outlive the mode
    def allocate(self, state: dict[str, Any], group: dict[str, Any], p: Tensor) -> None:
        """Create the missing tensors of a state, in torch's layout."""
        options = self.options
        if "step" not in state:
            if group["fused"]:
                _device_dtype_check_for_fused(p)
            state["step"] = torch.zeros((), dtype=torch.float32, device=step_device(group, p, options))
        for key in moment_keys(group):
            if key not in state:
                state[key] = self._zeros(p, key, moment_dtype(group, p, options))
        if not has_remainder(group, p, options):
            if options.master_weights:
                state.pop("remainder", None)  # the parameter is no longer bfloat16
        elif "remainder" not in state:
            # zero: the initial float32 value is that of the parameter
            state["remainder"] = self._zeros(p, "remainder", torch.int16)

    def _zeros(self, p: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
        if self.storage is not None and p in self.storage:
            return self.storage.zeros(p, kind)
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)

    def reset(self, state: dict[str, Any]) -> None:
        """Drop moments and step counter, which start from zero when the parameter is drawn again."""
        for key in ("step", *KINDS):
            state.pop(key, None)

    @torch.inference_mode(False)
    def move_to_param(self, state: dict[str, Any], group: dict[str, Any], p: Tensor) -> None:
        """Move a state to its parameter's device or to the storage: a model may be moved between steps.

        The step counter may also be a number, or of another dtype, as in earlier versions of torch.
        """
        device = step_device(group, p, self.options)
        step = state["step"]
        if not isinstance(step, Tensor) or (step.dtype, step.device) != (torch.float32, device):
            state["step"] = _counter(step, device)
        for key in own_keys(state, group, p, self.options):
            value = state[key]
            if not isinstance(value, Tensor):  # refused by name at the next step
                continue
            if self.storage is not None and p in self.storage:
                view = self.storage.view(p, key)
                if (value.data_ptr(), value.shape, value.stride()) != (view.data_ptr(), p.shape, p.stride()):
                    state[key] = self.storage.write(p, key, value)
            elif value.device != p.device:
                state[key] = value.to(p.device)

    @torch.inference_mode(False)
    def restore(self, state: dict[str, Any], group: dict[str, Any], p: Tensor, saved: dict[str, Any]) -> None:
        """Copy moments, remainder and step counter from a saved state, in their own precision.

        Raises:
            StateMismatchError: a moment that is missing or no tensor, or a step counter that is no number.
        """
        options = self.options
        moments = [key for key in own_keys(saved, group, p, options) if key in KINDS]
        missing = [key for key in STATE_KEYS[:3] if key not in saved]
        if 0 < len(missing) < 3:
            raise StateMismatchError(
                f"the state dict has no {missing[0]} of a parameter of shape {tuple(p.shape)}: the file is damaged"
            )
        for name in moments if missing else ("step", *moments):
            if not _is_state(name, saved[name]):
                raise StateMismatchError(
                    f"{name} of a parameter of shape {tuple(p.shape)} in the state dict is {saved[name]!r}, and must "
                    f"be {'a number' if name == 'step' else 'a tensor'}: load the state dict of an AdamW"
                )
        for name in moments:
            state[name] = self._copy(p, name, saved[name].detach(), moment_dtype(group, p, options))
        remainder = saved.get("remainder")
        # torch casts states of unknown keys: a remainder of another dtype is invalid
        is_bits = isinstance(remainder, Tensor) and remainder.dtype == torch.int16
        if remainder is not None and is_bits and has_remainder(group, p, options):
            state["remainder"] = self._copy(p, "remainder", remainder, torch.int16)
        if "step" in saved:
            state["step"] = _counter(saved["step"], step_device(group, p, options))

    def _copy(self, p: Tensor, kind: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        if self.storage is not None and p in self.storage:
            return self.storage.write(p, kind, value)
        return value.to(device=p.device, dtype=dtype, copy=True)


def _is_state(name: str, value: Any) -> bool:
    """Return if a saved value can be a moment, or a step counter."""
    if name == "step":
        return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)
    return isinstance(value, Tensor)


def _counter(step: Any, device: torch.device) -> Tensor:
    """Return a new step counter, from a number or a tensor of one element."""
    value = step.detach() if isinstance(step, Tensor) else torch.tensor(step, device="cpu")
    return value.to(device, torch.float32, copy=True).reshape(())
