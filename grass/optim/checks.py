"""Checks of a step's parameters, gradients, states and settings, before anything is changed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import grass_kernels
from grass.optim.hyperparameters import hyperparameters_of
from grass.optim.param_entry import ParamEntry
from grass.optim.states import STATE_KEYS, Options, moment_dtype, moment_keys, takes_kernel
from grass_kernels import KernelArgumentError, layout
from grass_kernels.arguments import check_addressable, check_has_memory


def refuse_in_capture() -> None:
    """Refuse to build a plan while a graph is captured: states and tables would belong to the graph's memory."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "this step cannot be captured: something other than gradients' addresses has changed since the last one; "
            "take one step like it before the capture begins"
        )


def refuse_sparse(groups: list[dict[str, Any]]) -> None:
    """Refuse sparse gradients as torch does, before anything is changed."""
    for group in groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(
                    "Adam does not support sparse gradients, please consider SparseAdam instead"
                )


def check_groups(groups: Sequence[dict[str, Any]], options: Options) -> None:
    """Refuse hyperparameters of any group that trains, before the first bucket of a fused backward is updated.

    Raises:
        KernelArgumentError: with the hyperparameter's name.
    """
    for group in groups:
        for p in group["params"]:
            if p.requires_grad and takes_kernel(group, p, options):
                hyperparameters_of(group, p.device)
                break


def check_entries(entries: Sequence[ParamEntry], groups: Sequence[dict[str, Any]], options: Options) -> None:
    """Refuse parameters and gradients that cannot be updated, before states are made.

    Raises:
        KernelArgumentError: with the parameter's place.
        RuntimeError: for settings that torch refuses in the same way.
    """
    for entry in entries:
        p, g, group = entry.param, entry.param.grad, groups[entry.group]
        if group["differentiable"] and p.requires_grad and p.is_leaf:
            raise RuntimeError(
                f"parameter {entry.index} is a leaf Variable that requires grad, and differentiable=True updates it in "
                "place, which autograd refuses: make it the result of an operation, such as clone()"
            )
        if (
            group["capturable"]
            and p.device.type == "cpu"
            and not takes_kernel(group, p, options)
            and not group["fused"]
        ):
            raise RuntimeError(
                f"capturable=True needs parameters on a device with graphs, and parameter {entry.index} is on the CPU: "
                "leave it out"
            )
        assert g is not None
        known = grass_kernels.is_supported(p.dtype, p.dtype, torch.float32)
        if not known and p.dtype != torch.float64 and not p.is_complex():
            raise KernelArgumentError(
                f"parameter {entry.index}, of shape {tuple(p.shape)}, is {p.dtype}, which AdamW does not update: it "
                "updates bfloat16, float16, float32, float64 and complex; convert it"
            )
        fits = grass_kernels.is_supported(p.dtype, g.dtype, torch.float32) if known else g.dtype == p.dtype
        if not fits:
            which = "its parameter's dtype or float32" if known else "its parameter's dtype"
            raise KernelArgumentError(
                f"the gradient of parameter {entry.index}, of shape {tuple(p.shape)}, is {g.dtype} and the parameter "
                f"{p.dtype}: a gradient has {which}; convert it"
            )
        if g.shape != p.shape or g.device != p.device:
            raise KernelArgumentError(
                f"the gradient of parameter {entry.index} has shape {tuple(g.shape)} on {g.device}, the parameter "
                f"{tuple(p.shape)} on {p.device}: they must be equal; clear gradients after parameters are replaced"
            )
        check_addressable(f"parameter {entry.index}", p)
        check_addressable(f"the gradient of parameter {entry.index}", g)
        check_has_memory(f"parameter {entry.index}", p)
        check_has_memory(f"the gradient of parameter {entry.index}", g)
        if layout.may_overlap(p):
            raise KernelArgumentError(
                f"parameter {entry.index}, of shape {tuple(p.shape)} and strides {p.stride()}, has elements that share "
                "memory, as expanded tensors do: make it a tensor of its own with clone()"
            )


def check_shapes(state: dict[str, Any], p: Tensor, index: int) -> None:
    """Refuse states of another shape than their parameter's.

    Raises:
        KernelArgumentError: with the parameter's place.
    """
    for key in STATE_KEYS[1:]:
        value = state.get(key)
        if isinstance(value, Tensor) and value.shape != p.shape:
            raise KernelArgumentError(
                f"{key} of parameter {index} is {value.dtype} of shape {tuple(value.shape)}, the parameter {p.dtype} "
                f"of shape {tuple(p.shape)}: states have its shape; drop the parameter's state to start it anew"
            )


def check_states(
    entries: Sequence[ParamEntry],
    groups: Sequence[dict[str, Any]],
    state: Mapping[Tensor, dict[str, Any]],
    options: Options,
) -> None:
    """Refuse states that do not fit their parameters, before anything is changed: they may have been put in by hand.

    Raises:
        KernelArgumentError: with the parameter's place.
    """
    for entry in entries:
        p, group = entry.param, groups[entry.group]
        found = state.get(p, {})
        mine = {key: found[key] for key in STATE_KEYS[1:] if key in found}
        for key, value in mine.items():
            name = f"{key} of parameter {entry.index}"
            check_addressable(name, value)
            if value.layout != torch.strided:
                raise KernelArgumentError(
                    f"{name} is {value.layout}: states are dense; put in its to_dense()"
                )
            check_has_memory(name, value)
            if layout.may_overlap(value):
                raise KernelArgumentError(
                    f"{name} has elements that share memory, as expanded tensors do: put in its clone()"
                )
        check_shapes(mine, p, entry.index)
        _check_step(found.get("step", 0), entry.index)
        kept = (torch.float32, torch.bfloat16) if takes_kernel(group, p, options) else (p.dtype,)
        missing = moment_dtype(group, p, options)
        dtypes = [mine[key].dtype if key in mine else missing for key in moment_keys(group)]
        for key, dtype in zip(moment_keys(group), dtypes, strict=True):
            if dtype != dtypes[0] or dtype not in kept:
                raise KernelArgumentError(
                    f"{key} of parameter {entry.index} is {dtype}, the parameter {p.dtype}"
                    f"{' with differentiable=True' if group['differentiable'] else ''}: moments have one dtype that it "
                    "can have; put in one that fits, or drop the parameter's state to start it anew"
                )
        remainder = mine.get("remainder")
        if options.master_weights and remainder is not None and remainder.dtype != torch.int16:
            raise KernelArgumentError(
                f"remainder of parameter {entry.index} is {remainder.dtype}: it is int16; drop it to start from the "
                "parameter as it is"
            )


def _check_step(step: Any, index: int) -> None:
    """Refuse counters that are no number, nor a tensor of one."""
    if isinstance(step, Tensor):
        fits = step.numel() == 1 and step.layout == torch.strided and not (step.is_complex() or step.is_neg())
        if fits:
            check_has_memory(f"step of parameter {index}", step)
            return
    elif isinstance(step, int | float):
        return
    raise KernelArgumentError(
        f"step of parameter {index} is {step!r}: put in the number of its updates, as a float32 tensor of shape ()"
    )
