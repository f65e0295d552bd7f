"""Checks of a step's parameters, gradients, states and settings, before anything is changed."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import grass_kernels
from grass.errors import GrassError, ParameterError
from grass.optim.hyperparameters import hyperparameters_of
from grass.optim.param_entry import ParamEntry
from grass.optim.sharding import local
from grass.optim.states import STATE_KEYS, Options, moment_dtype, moment_keys, own_keys, takes_kernel
from grass_kernels import KernelArgumentError, layout
from grass_kernels.arguments import check_addressable, check_has_memory


def refuse_in_capture() -> None:
    """Raise if a graph is being captured: states and tables of a new plan would be allocated in the graph's memory."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "this step cannot be captured: parameters, states or settings have changed since the last step; take "
            "one step with them before the capture begins"
        )


def refuse_sparse(groups: list[dict[str, Any]]) -> None:
    """Raise for sparse gradients, as torch does, before anything is changed."""
    for group in groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(
                    "Adam does not support sparse gradients, please consider SparseAdam instead"
                )


def refuse_without_memory(params: Sequence[Tensor]) -> None:
    """Raise for trainable parameters that could not be updated, before a probe of many steps.

    Raises:
        ParameterError: a parameter without memory of its own, such as a quantized weight; not on the meta device.
    """
    for p in map(local, params):
        if not p.is_meta:
            try:
                check_has_memory("the parameter", p)
            except KernelArgumentError:
                raise ParameterError(
                    f"a trainable parameter of shape {tuple(p.shape)} has no memory of its own, as quantized weights: "
                    "such weights cannot be updated; freeze them by requires_grad_(False), and train others or adapters"
                ) from None


def check_groups(groups: Sequence[dict[str, Any]], options: Options) -> None:
    """Check the hyperparameters of groups with trainable parameters, before a fused backward updates a bucket.

    Raises:
        KernelArgumentError: a hyperparameter is invalid; the message has its name.
    """
    for group in groups:
        for p in group["params"]:
            if p.requires_grad and takes_kernel(group, p, options):
                hyperparameters_of(group, p.device)
                break


def check_entries(entries: Sequence[ParamEntry], groups: Sequence[dict[str, Any]], options: Options) -> None:
    """Check that parameters and gradients can be updated, before states are created.

    Raises:
        KernelArgumentError: a parameter or gradient cannot be updated; the message has the parameter's index.
        RuntimeError: a setting that torch rejects with the same type of error.
        ValueError: a parameter was converted to a dtype that the options exclude.
    """
    for entry in entries:
        p, g, group = entry.shard, entry.param.grad, groups[entry.group]
        if group["differentiable"] and entry.param.requires_grad and entry.param.is_leaf:
            raise RuntimeError(
                f"parameter {entry.index} is a leaf Variable that requires grad, and differentiable=True updates it in "
                "place, which autograd does not allow: pass the result of an operation, such as clone()"
            )
        if (
            group["capturable"]
            and p.device.type == "cpu"
            and not takes_kernel(group, p, options)
            and not group["fused"]
        ):
            raise RuntimeError(
                f"capturable=True needs parameters on a device with graphs, and parameter {entry.index} is on the CPU: "
                "remove capturable=True"
            )
        assert g is not None
        g = local(g)
        options.check_param(p, f"parameter {entry.index}")
        known = grass_kernels.is_supported(p.dtype, p.dtype, torch.float32)
        if not known and p.dtype != torch.float64 and not p.is_complex():
            raise KernelArgumentError(
                f"parameter {entry.index}, of shape {tuple(p.shape)}, is {p.dtype}, which AdamW does not update: it "
                "updates bfloat16, float16, float32, float64 and complex; convert it"
            )
        fits = grass_kernels.is_supported(p.dtype, g.dtype, torch.float32) if known else g.dtype == p.dtype
        if not fits:
            allowed = "the parameter's dtype or float32" if known else "the parameter's dtype"
            raise KernelArgumentError(
                f"the gradient of parameter {entry.index}, of shape {tuple(p.shape)}, is {g.dtype} and the parameter "
                f"{p.dtype}: gradients must have {allowed}; convert it"
            )
        if g.shape != p.shape or g.device != p.device:
            raise KernelArgumentError(
                f"the gradient of parameter {entry.index} has shape {tuple(g.shape)} on {g.device}, the parameter "
                f"{tuple(p.shape)} on {p.device}: they must be equal; clear gradients after replacing parameters"
            )
        check_addressable(f"parameter {entry.index}", p)
        check_addressable(f"the gradient of parameter {entry.index}", g)
        check_has_memory(f"parameter {entry.index}", p)
        check_has_memory(f"the gradient of parameter {entry.index}", g)
        if takes_kernel(group, p, options) and not (_has_address(p) and _has_address(g)):
            raise KernelArgumentError(
                f"parameter {entry.index}, of shape {tuple(p.shape)}, or its gradient has no address, as in "
                "transformations of torch.func (vmap, grad): use differentiable=True there, or torch.optim.AdamW"
            )
        if layout.may_overlap(p):
            raise KernelArgumentError(
                f"parameter {entry.index}, of shape {tuple(p.shape)} and strides {p.stride()}, has elements that share "
                "memory, as in expanded tensors: pass a clone()"
            )


def _has_address(t: Tensor) -> bool:
    """Return False for a tensor in a transformation of `torch.func`."""
    try:
        t.data_ptr()
    except RuntimeError:
        return False
    return True


def check_state_shapes(state: dict[str, Any], p: Tensor, index: int) -> None:
    """Check that the states of a parameter have its shape.

    Raises:
        KernelArgumentError: another shape; the message has the parameter's index.
    """
    for key in STATE_KEYS[1:]:
        value = state.get(key)
        if isinstance(value, Tensor) and value.shape != p.shape:
            raise KernelArgumentError(
                f"{key} of parameter {index} is {value.dtype} of shape {tuple(value.shape)}, the parameter {p.dtype} "
                f"of shape {tuple(p.shape)}: their shapes must be equal; drop the parameter's state to start it anew"
            )


def check_states(
    entries: Sequence[ParamEntry],
    groups: Sequence[dict[str, Any]],
    state: Mapping[Tensor, dict[str, Any]],
    options: Options,
) -> None:
    """Check that states, which users may have assigned, fit their parameters, before anything is changed.

    Raises:
        KernelArgumentError: a state does not fit; the message has the parameter's index.
    """
    for entry in entries:
        p, group = entry.shard, groups[entry.group]
        found = state.get(entry.param, {})
        own = {key: found[key] for key in own_keys(found, group, p, options)}
        for key, value in own.items():
            name = f"{key} of parameter {entry.index}"
            check_addressable(name, value)
            if value.layout != torch.strided:
                raise KernelArgumentError(
                    f"{name} is {value.layout}: states must be dense; assign its to_dense()"
                )
            check_has_memory(name, value)
            if layout.may_overlap(value):
                raise KernelArgumentError(
                    f"{name} has elements that share memory, as in expanded tensors: assign its clone()"
                )
        check_state_shapes(own, p, entry.index)
        _check_step(found.get("step", 0), entry.index)
        kept = (torch.float32, torch.bfloat16) if takes_kernel(group, p, options) else (p.dtype,)
        missing = moment_dtype(group, p, options)
        dtypes = [own[key].dtype if key in own else missing for key in moment_keys(group)]
        for key, dtype in zip(moment_keys(group), dtypes, strict=True):
            if dtype != dtypes[0] or dtype not in kept:
                raise KernelArgumentError(
                    f"{key} of parameter {entry.index} is {dtype}, the parameter {p.dtype}"
                    f"{' with differentiable=True' if group['differentiable'] else ''}: all moments must have "
                    "one supported dtype; convert them, or drop the parameter's state to start it anew"
                )
        remainder = own.get("remainder")
        if options.master_weights and remainder is not None and remainder.dtype != torch.int16:
            raise KernelArgumentError(
                f"remainder of parameter {entry.index} is {remainder.dtype}: it must be int16; drop it to start from "
                "the parameter's own value"
            )


def _check_step(step: Any, index: int) -> None:
    """Check that a step counter is a number or a tensor of one real element."""
    if isinstance(step, Tensor):
        fits = step.numel() == 1 and step.layout == torch.strided and not (step.is_complex() or step.is_neg())
        if fits:
            check_has_memory(f"step of parameter {index}", step)
            return
    elif isinstance(step, Real):
        return
    raise KernelArgumentError(
        f"step of parameter {index} is {step!r}: assign the number of its updates, as a float32 tensor of shape ()"
    )


def refuse_scaler(optimizer: Optimizer, *, updates_in_backward: bool) -> None:
    """Raise if a GradScaler calls the step, which it does with attributes of the optimizer.

    Args:
        optimizer: the optimizer.
        updates_in_backward: True with ``fused_backward``; False with sharded parameters.

    Raises:
        GrassError: a GradScaler calls the step.
    """
    # GradScaler deletes them only after a step that returns.
    given = [optimizer.__dict__.pop(name, None) for name in ("grad_scale", "found_inf")]
    if given == [None, None]:
        return
    if updates_in_backward:
        raise GrassError(
            "fused_backward and a GradScaler exclude each other: parameters were already updated inside backward, "
            "with gradients still scaled; load an earlier checkpoint, and train in bfloat16 without a scaler, or "
            "without fused_backward"
        )
    raise GrassError(
        "a GradScaler is not supported with sharded parameters, since its scale would differ between ranks: train in "
        "bfloat16 without one"
    )
