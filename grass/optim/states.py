"""The state of a parameter: which tensors it has, of what dtype and where; making, moving and restoring it."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused

import grass_kernels

LOW_PRECISION = (torch.bfloat16, torch.float16)
KERNEL_DTYPES = (torch.float32, *LOW_PRECISION)
KINDS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""Of moments, by their names in a state."""


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


def takes_kernel(group: dict[str, Any], p: Tensor, options: Options) -> bool:
    """Whether a parameter is updated by our kernels or by torch's own functional AdamW."""
    if group["differentiable"] or p.dtype not in KERNEL_DTYPES:
        return False
    if p.dtype in LOW_PRECISION or options.state_dtype == torch.bfloat16:
        return True  # torch has no path for moments of another dtype
    if group["capturable"] and not (p.device.type == "cuda" and grass_kernels.runs_triton(p.device)):
        return False
    return not isinstance(group["betas"][0], Tensor)


def moment_keys(group: dict[str, Any]) -> tuple[str, ...]:
    """Names of a parameter's moments in its state."""
    return KINDS if group["amsgrad"] else KINDS[:2]


def moment_dtype(p: Tensor, options: Options, differentiable: bool = False) -> torch.dtype:
    """float32 or what the user asked for; the parameter's own where torch's path needs it."""
    if differentiable or p.dtype not in KERNEL_DTYPES:
        return p.dtype
    return options.state_dtype or torch.float32


def has_remainder(p: Tensor, options: Options, differentiable: bool = False) -> bool:
    """Whether a parameter is stored as an exact fp32 value in two parts."""
    return options.master_weights and p.dtype == torch.bfloat16 and not differentiable


def step_device(group: dict[str, Any], p: Tensor, options: Options) -> torch.device:
    """Where the step counter lives: beside the parameter for kernels, else where torch wants it."""
    on_device = takes_kernel(group, p, options) or group["capturable"] or group["fused"]
    return p.device if on_device else torch.device("cpu")


class Home(Protocol):
    """Memory for states, elsewhere than beside their parameters."""

    def __contains__(self, p: Tensor) -> bool:
        """Whether it has a place for a parameter's states."""

    def place(self, p: Tensor, kind: str) -> Tensor:
        """The place of one state, in the parameter's shape and strides."""

    def zeros(self, p: Tensor, kind: str) -> Tensor:
        """The place of one state, zero."""

    def write(self, p: Tensor, kind: str, value: Tensor) -> Tensor:
        """The place of one state, with these values."""


class StateMaker:
    """Makes and restores states. All that it makes share one version counter.

    Autograd notices that a tensor was written by its version counter. To advance those of a thousand moments
    takes longer than to launch their update; so moments and counters of an optimizer count as written together.

    Args:
        options: of the optimizer.
        home: where states live that do not live beside their parameters.
    """

    def __init__(self, options: Options, home: "Home | None" = None) -> None:
        self.options, self.home = options, home
        self.counter = torch.empty(0, device="cpu")

    def _counted(self, t: Tensor) -> Tensor:
        """`t` as a tensor that shares the version counter."""
        counted = self.counter.detach()
        counted.data = t
        return counted

    def allocate(self, state: dict[str, Any], group: dict[str, Any], p: Tensor) -> None:
        """Give a parameter what its state lacks, in torch's layout."""
        options, differentiable = self.options, group["differentiable"]
        if "step" not in state:
            if group["fused"]:
                _device_dtype_check_for_fused(p)
            device = step_device(group, p, options)
            state["step"] = self._counted(torch.zeros((), dtype=torch.float32, device=device))
        for key in moment_keys(group):
            if key not in state:
                zeros = self._zeros(p, key, moment_dtype(p, options, differentiable))
                state[key] = zeros if differentiable else self._counted(zeros)
        if not has_remainder(p, options, differentiable):
            state.pop("remainder", None)  # the parameter is no longer bfloat16
        elif "remainder" not in state:
            # the exact value to begin with is the parameter's own
            state["remainder"] = self._counted(self._zeros(p, "remainder", torch.int16))

    def _zeros(self, p: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
        if self.home is not None and p in self.home:
            return self.home.zeros(p, kind)
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)

    def zero_remainder(self, state: dict[str, Any], p: Tensor) -> None:
        """Let a parameter's exact value be what it is itself, in its home too."""
        if self.home is not None and p in self.home:
            state["remainder"] = self._counted(self.home.zeros(p, "remainder"))
        else:
            state["remainder"].zero_()

    def reset(self, state: dict[Tensor, dict[str, Any]], p: Tensor) -> None:
        """Drop what starts from zero when the parameter returns; what it lacks of its exact value stays."""
        dropped = state.pop(p, {})
        if "remainder" in dropped:
            state[p] = {"remainder": dropped["remainder"]}

    def follow(self, state: dict[str, Any], group: dict[str, Any], p: Tensor) -> None:
        """Bring a state to where its parameter is: a model may be moved after its optimizer has stepped.

        The counter may also be a number, or of another type, as earlier versions of torch kept it.
        """
        device = step_device(group, p, self.options)
        step = state["step"]
        if not isinstance(step, Tensor) or (step.dtype, step.device) != (torch.float32, device):
            step = torch.as_tensor(step, dtype=torch.float32).to(device).reshape(())
            state["step"] = self._counted(step)
        for key, value in state.items():
            if key == "step" or not isinstance(value, Tensor):
                continue
            if self.home is not None and p in self.home:
                place = self.home.place(p, key)
                if (value.data_ptr(), value.shape, value.stride()) != (place.data_ptr(), p.shape, p.stride()):
                    state[key] = self._counted(self.home.write(p, key, value))
            elif value.device != p.device:
                state[key] = self._counted(value.to(p.device))

    def restore(self, state: dict[str, Any], group: dict[str, Any], p: Tensor, saved: dict[str, Any]) -> None:
        """Put moments, remainder and counter as they were saved in place of what torch made of them."""
        options = self.options
        for name in moment_keys(group):
            if name in saved:
                dtype = moment_dtype(p, options, group["differentiable"])
                state[name] = self._counted(self._values(p, name, saved[name].detach(), dtype))
        state.pop("remainder", None)
        remainder = saved.get("remainder")
        is_bits = (
            isinstance(remainder, Tensor) and remainder.dtype == torch.int16
        )  # torch casts what it does not know
        if remainder is not None and is_bits and has_remainder(p, options, group["differentiable"]):
            state["remainder"] = self._counted(self._values(p, "remainder", remainder, torch.int16))
        if "step" in saved:
            step = torch.as_tensor(saved["step"], dtype=torch.float32)
            device = step_device(group, p, options)
            state["step"] = self._counted(step.to(device, copy=True).reshape(()))

    def _values(self, p: Tensor, kind: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        if self.home is not None and p in self.home:
            return self.home.write(p, kind, value)
        return value.to(device=p.device, dtype=dtype)
