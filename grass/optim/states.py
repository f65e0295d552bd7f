"""The state of a parameter: which tensors it has, of what dtype and where; making, moving and restoring it."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused

import grass_kernels

LOW_PRECISION = (torch.bfloat16, torch.float16)
KERNEL_DTYPES = (torch.float32, *LOW_PRECISION)
KINDS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""Moments, by their names in a state."""
STATE_KEYS = ("step", *KINDS, "remainder")
"""What the optimizer keeps in a state; all else there is the user's."""


class Options(NamedTuple):
    """What `AdamW` takes beyond torch's arguments."""

    state_dtype: torch.dtype | None = None
    master_weights: bool = False
    stochastic_rounding: bool = False
    max_grad_norm: float | None = None

    def check(self) -> None:
        """Refuse what cannot be had.

        Raises:
            ValueError: with the remedy.
        """
        if self.state_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                f"state_dtype must be None, torch.float32 or torch.bfloat16, not {self.state_dtype}: the kernels "
                "keep moments in these"
            )
        if self.master_weights and self.stochastic_rounding:
            raise ValueError(
                "master_weights and stochastic_rounding exclude each other: exact weights lose nothing that chance "
                "would have to make up for; pass one of them"
            )
        limit = self.max_grad_norm
        if limit is not None and not (isinstance(limit, int | float) and limit > 0 and limit is not True):
            raise ValueError(
                f"max_grad_norm must be a positive number, or None for no clipping, not {limit!r}"
            )

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse a group that only torch's functional AdamW can update, if it cannot have the options.

        Raises:
            ValueError: with the setting's name.
        """
        if not uses_torch(group):
            return
        setting = "differentiable=True" if group["differentiable"] else "decoupled_weight_decay=False"
        if (self.state_dtype, *self[1:3]) != (None, False, False):
            raise ValueError(
                f"a group with {setting} is updated by torch, which knows no state_dtype, master_weights or "
                "stochastic_rounding: leave them out, or the setting"
            )
        if not group["differentiable"] and any(p.dtype in LOW_PRECISION for p in group["params"]):
            raise ValueError(
                f"a group with {setting} has bfloat16 or float16 parameters, whose moments are float32 here and would "
                "not be in torch, which updates it: use torch.optim.Adam, or decoupled weight decay"
            )

    def check_param(self, p: Tensor, name: str) -> None:
        """Refuse a parameter that the options cannot serve.

        Raises:
            ValueError: a float16 parameter, whose lost bits neither option keeps.
        """
        if p.dtype == torch.float16 and (self.master_weights or self.stochastic_rounding):
            option = "master_weights" if self.master_weights else "stochastic_rounding"
            raise ValueError(
                f"{option} is for bfloat16 parameters (float32 ones need it not), and {name}, of shape "
                f"{tuple(p.shape)}, is float16: convert the model to bfloat16, or leave {option} out"
            )


def uses_torch(group: dict[str, Any]) -> bool:
    """Return if a group has settings that only torch's functional AdamW knows."""
    return bool(group["differentiable"]) or not group.get("decoupled_weight_decay", True)


def takes_kernel(group: dict[str, Any], p: Tensor, options: Options) -> bool:
    """Return if a parameter is updated by a plan of `grass_kernels`, else by torch's functional AdamW."""
    if uses_torch(group) or p.dtype not in KERNEL_DTYPES:
        return False
    if p.dtype in LOW_PRECISION or options.state_dtype == torch.bfloat16:
        return True  # torch has no path for moments of another dtype
    if group["capturable"] and not (p.device.type == "cuda" and grass_kernels.runs_triton(p.device)):
        return False
    # to read them would be a device sync
    return not any(isinstance(beta, Tensor) and beta.device.type != "cpu" for beta in group["betas"])


def moment_keys(group: dict[str, Any]) -> tuple[str, ...]:
    """Names of a parameter's moments in its state."""
    return KINDS if group["amsgrad"] else KINDS[:2]


def moment_dtype(group: dict[str, Any], p: Tensor, options: Options) -> torch.dtype:
    """float32 or what the user asked for; the parameter's own where torch's functional AdamW needs it."""
    if uses_torch(group) or p.dtype not in KERNEL_DTYPES:
        return p.dtype
    return options.state_dtype or torch.float32


def has_remainder(group: dict[str, Any], p: Tensor, options: Options) -> bool:
    """Return if a parameter is stored as an fp32 value in two parts."""
    return options.master_weights and p.dtype == torch.bfloat16 and not uses_torch(group)


def step_device(group: dict[str, Any], p: Tensor, options: Options) -> torch.device:
    """Device of the step counter: the parameter's for kernels, else torch's choice."""
    on_device = takes_kernel(group, p, options) or group["capturable"] or group["fused"]
    return p.device if on_device else torch.device("cpu")


class Home(Protocol):
    """Memory for states elsewhere than beside their parameters."""

    def __contains__(self, p: Tensor) -> bool:
        """Return if it has a place for a parameter's states."""

    def place(self, p: Tensor, kind: str) -> Tensor:
        """Return the place of one state, in the parameter's shape and strides."""

    def zeros(self, p: Tensor, kind: str) -> Tensor:
        """Return the place of one state, zeroed."""

    def write(self, p: Tensor, kind: str, value: Tensor) -> Tensor:
        """Return the place of one state, with these values."""


class StateMaker:
    """Makes and restores states.

    Args:
        options: of the optimizer.
        home: memory of states that do not live beside their parameters; holds none by itself.
    """

    def __init__(self, options: Options, home: Home | None = None) -> None:
        self.options, self.home = options, home

    @torch.inference_mode(False)  # states outlive the mode
    def allocate(self, state: dict[str, Any], group: dict[str, Any], p: Tensor) -> None:
        """Add to a state what it lacks, in torch's layout."""
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
            # zero: the fp32 value to begin with is the parameter's own
            state["remainder"] = self._zeros(p, "remainder", torch.int16)

    def _zeros(self, p: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
        if self.home is not None and p in self.home:
            return self.home.zeros(p, kind)
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)

    def reset(self, state: dict[str, Any]) -> None:
        """Drop moments and counter, which start from zero when the parameter returns; all else stays."""
        for key in ("step", *KINDS):
            state.pop(key, None)

    @torch.inference_mode(False)
    def follow(self, state: dict[str, Any], group: dict[str, Any], p: Tensor) -> None:
        """Move a state to where its parameter is: a model may be moved after its optimizer has stepped.

        The counter may also be a number, or of another dtype, as earlier versions of torch kept it.
        """
        device = step_device(group, p, self.options)
        step = state["step"]
        if not isinstance(step, Tensor) or (step.dtype, step.device) != (torch.float32, device):
            state["step"] = torch.as_tensor(step, dtype=torch.float32).to(device).reshape(())
        for key in STATE_KEYS[1:]:
            value = state.get(key)
            if not isinstance(value, Tensor):
                continue
            if self.home is not None and p in self.home:
                place = self.home.place(p, key)
                if (value.data_ptr(), value.shape, value.stride()) != (place.data_ptr(), p.shape, p.stride()):
                    state[key] = self.home.write(p, key, value)
            elif value.device != p.device:
                state[key] = value.to(p.device)

    @torch.inference_mode(False)
    def restore(self, state: dict[str, Any], group: dict[str, Any], p: Tensor, saved: dict[str, Any]) -> None:
        """Copy moments, remainder and counter from a saved state, in their own precision."""
        options = self.options
        for name in moment_keys(group):
            if name in saved:
                state[name] = self._copy(p, name, saved[name].detach(), moment_dtype(group, p, options))
        remainder = saved.get("remainder")
        # torch casts what it does not know: other dtypes are no remainders any more
        is_bits = isinstance(remainder, Tensor) and remainder.dtype == torch.int16
        if remainder is not None and is_bits and has_remainder(group, p, options):
            state["remainder"] = self._copy(p, "remainder", remainder, torch.int16)
        if "step" in saved:
            step = torch.as_tensor(saved["step"], dtype=torch.float32)
            state["step"] = step.detach().to(step_device(group, p, options), copy=True).reshape(())

    def _copy(self, p: Tensor, kind: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        if self.home is not None and p in self.home:
            return self.home.write(p, kind, value)
        return value.to(device=p.device, dtype=dtype, copy=True)
