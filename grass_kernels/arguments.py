"""Checks of the arguments of public functions, before anything is launched or changed."""

import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from grass_kernels import layout
from grass_kernels.conversions import DTYPES, LR_DTYPES, STATE_DTYPES
from grass_kernels.errors import KernelArgumentError

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_supported(param_dtype: torch.dtype, grad_dtype: torch.dtype, state_dtype: torch.dtype) -> bool:
    """Return if :func:`masked_adamw_` supports this combination of dtypes.

    Parameters are fp32, bf16 or fp16; gradients of the parameter's dtype or fp32; moments fp32 or bf16 (in
    fp16 the squares of small gradients would underflow).
    """
    grads = (param_dtype, torch.float32)
    return param_dtype in DTYPES and grad_dtype in grads and state_dtype in STATE_DTYPES


def is_fake(t: Any) -> bool:
    """Return if a tensor is fake, as in planners and compilers."""
    return isinstance(t, FakeTensor)


def common_device(lists: Mapping[str, Sequence[Tensor]]) -> torch.device:
    """Return the device of all tensors; the CPU if there are none."""
    devices = {t.device for tensors in lists.values() for t in tensors}
    if len(devices) <= 1:
        return devices.pop() if devices else torch.device("cpu")
    first: torch.device | None = None
    for name, tensors in lists.items():
        for position, t in enumerate(tensors):
            first = first or t.device
            if t.device != first:
                raise KernelArgumentError(
                    f"{name}[{position}] is on {t.device}, tensors before it are on {first}: all tensors "
                    f"of a call must be on one device; call once per device"
                )
    raise AssertionError("unreachable: several devices, and no tensor that differs")


def check_list(name: str, tensors: Any) -> None:
    """Check for a list or a tuple, whose members are checked later."""
    if not isinstance(tensors, list | tuple):
        raise KernelArgumentError(f"{name} is {_short_name(type(tensors).__name__)}: give a list of tensors")


def check_grads(grads: Sequence[Tensor]) -> None:
    """Check that gradients are dense (in torch's sense: not sparse) and of a supported dtype."""
    _check_tensors("grads", grads)
    for position, g in enumerate(grads):
        if g.layout != torch.strided:
            raise KernelArgumentError(
                f"grads[{position}] is {_short_name(g.layout)}: sparse gradients are not supported; use "
                f"sparse=False in the embedding, or torch.optim.SparseAdam for it"
            )
        if g.dtype not in DTYPES:
            raise KernelArgumentError(
                f"grads[{position}] is {_short_name(g.dtype)}: float32, bfloat16 and float16 are supported"
                + ("; pass torch.view_as_real(...) of complex tensors" if g.is_complex() else "")
            )


def check_addressable(name: str, t: Any) -> None:
    """Check for a tensor whose elements are in memory of its own."""
    if type(t) in _PLAIN:
        return
    if not isinstance(t, Tensor):
        raise KernelArgumentError(f"{name} is {t!r}: give a tensor")
    if hasattr(t, "__tensor_flatten__"):
        raise KernelArgumentError(
            f"{name} is a {type(t).__name__}, which stores its elements in other tensors: give those (for a DTensor "
            "its to_local()), or use torch.optim.AdamW"
        )
    check_has_memory(name, t)


def _check_tensors(name: str, tensors: Sequence[Tensor | None], optional: bool = False) -> None:
    """Call `check_addressable` for a list of tensors; None is allowed if `optional`."""
    if not _PLAIN.issuperset(map(type, tensors)):
        for position, t in enumerate(tensors):
            if t is not None or not optional:
                check_addressable(f"{name}[{position}]", t)


def check_memory(lists: Mapping[str, Sequence[Tensor]]) -> None:
    """Check that all tensors have memory: otherwise kernels would read and write at address 0."""
    for name, tensors in lists.items():
        try:
            all_have_memory = 0 not in [t.data_ptr() for t in tensors]  # whole lists first, for speed
        except RuntimeError:  # a tensor without an address
            all_have_memory = False
        for position, t in enumerate(() if all_have_memory else tensors):
            check_has_memory(f"{name}[{position}]", t)


def check_has_memory(name: str, t: Tensor) -> None:
    """Check that a tensor has memory; fake and functional tensors, as in compilers, are not checked."""
    if is_fake(t) or torch._is_functional_tensor(t):
        return
    try:
        is_missing = t.numel() > 0 and t.data_ptr() == 0
    except RuntimeError:  # Python functional tensors and those of vmap have no address
        return
    if is_missing:
        raise KernelArgumentError(
            f"{name}, a {type(t).__name__} on {t.device}, has no memory (on meta, freed, or elsewhere): give a "
            "tensor that holds its elements, or use torch.optim.AdamW"
        )


def layer_list(layer_index: Sequence[int] | Tensor | None, count: int, num_layers: int | None) -> list[int]:
    """Return `layer_index` as a list of `count` ints in ``[0, num_layers)``; all 0 if either is None."""
    layers = _host_list("layer_index", layer_index) if layer_index is not None else [0] * count
    if len(layers) != count:
        raise KernelArgumentError(
            f"layer_index has {len(layers)} entries for {count} tensors: give one per tensor"
        )
    if num_layers is None:
        wrong = next((i for i, layer in enumerate(layers) if layer < 0), None)
        if wrong is not None:
            raise KernelArgumentError(f"layer_index[{wrong}] is {layers[wrong]}: indices begin at 0")
        return [0] * count
    if layers and not (min(layers) >= 0 and max(layers) < num_layers):
        position = next(i for i, layer in enumerate(layers) if not 0 <= layer < num_layers)
        raise KernelArgumentError(
            f"layer_index[{position}] is {layers[position]}, but there are {num_layers} layers (as many as "
            f"active or sq_norms has entries): indices run from 0 to {num_layers - 1}"
        )
    return layers


def _host_list(name: str, values: Sequence[int] | Tensor) -> list[int]:
    if isinstance(values, Tensor):
        fractions = values.is_floating_point() or values.is_complex()
        if values.device.type != "cpu" or fractions or values.dim() != 1:
            raise KernelArgumentError(
                f"{name} is a {values.dim()}-dimensional {_short_name(values.dtype)} tensor on {values.device}: "
                f"give a list or a 1-D integer tensor on the CPU"
            )
        return [int(v) for v in values.tolist()]
    if not isinstance(values, Collection):
        raise KernelArgumentError(f"{name} is {values!r}: give a list of integers")
    wrong = next((i for i, v in enumerate(values) if not isinstance(v, numbers.Integral)), None)
    if wrong is not None:
        raise KernelArgumentError(f"{name}[{wrong}] is {values[wrong]!r}: give integers")
    return [int(v) for v in values]


def device_scalar(
    name: str, value: Tensor | None, device: torch.device, dtype: torch.dtype | None = torch.float32
) -> Tensor | None:
    """Check a tensor of one element that kernels read on the device, of `dtype` (None: any real one)."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.numel() != 1 or value.device != device:
        found = f"{tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else repr(value)
        raise KernelArgumentError(f"{name} is {found}: give a tensor of one element on {device}")
    if value.is_complex() or (dtype is not None and value.dtype != dtype):
        wanted = "a real dtype" if dtype is None else _short_name(dtype)
        raise KernelArgumentError(f"{name} is {_short_name(value.dtype)}: convert it to {wanted}")
    check_addressable(name, value)
    return value.resolve_neg()


def check_adamw_lists(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor] | None,
    steps: Sequence[Tensor],
    remainders: Sequence[Tensor | None] | None = None,
    rounding_seeds: Sequence[int] | None = None,
) -> torch.device:
    """Check lengths, layouts, dtypes, shapes and devices of the lists of an AdamW call, and return the device."""
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if max_exp_avg_sqs is not None:
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    optional = {"remainders": remainders, "rounding_seeds": rounding_seeds}
    given = {name: column for name, column in optional.items() if column is not None}
    for name, tensors in {**lists, "steps": steps, **given}.items():
        if len(tensors) != len(params):
            raise KernelArgumentError(
                f"{name} has {len(tensors)} tensors for {len(params)} parameters: give one per parameter"
            )
    everything = {"params": params, **lists, "steps": steps, "remainders": remainders or ()}
    for name, tensors in everything.items():
        _check_tensors(name, tensors, optional=name == "remainders")
    check_grads(grads)
    given_remainders = [r for r in remainders or () if r is not None]
    tensors_of = {"params": params, **lists, "steps": steps, "remainders": given_remainders}
    device = common_device(tensors_of)
    check_memory(tensors_of)
    # Whole lists are compared first, for speed: there may be thousands of tensors, and rarely an error.
    shapes = [p.shape for p in params]
    for name, tensors in lists.items():
        if [t.shape for t in tensors] != shapes:
            position = next(i for i, t in enumerate(tensors) if t.shape != shapes[i])
            raise KernelArgumentError(
                f"{name}[{position}] has shape {tuple(tensors[position].shape)}, its parameter "
                f"{tuple(shapes[position])}: they must be equal"
            )
    dtypes = list(zip(*([t.dtype for t in tensors] for tensors in (params, *lists.values())), strict=True))
    refused = {found for found in set(dtypes) if not is_supported(*found[:3]) or len(set(found[2:])) > 1}
    if refused:
        position = next(i for i, found in enumerate(dtypes) if found in refused)
        columns = zip(("params", *lists), dtypes[position], strict=True)
        raise KernelArgumentError(
            f"dtypes at position {position} are {', '.join(f'{name} {_short_name(t)}' for name, t in columns)}: "
            f"parameters may be float32, bfloat16 or float16, gradients of the same dtype or float32, moments "
            f"float32 or bfloat16, all moments alike (see is_supported); convert them"
        )
    written = {name: tensors for name, tensors in everything.items() if name not in ("grads", "steps")}
    for name, tensors in written.items():
        for position, t in enumerate(tensors):
            if t is not None and layout.may_overlap(t):
                raise KernelArgumentError(
                    f"{name}[{position}] has strides {t.stride()} for shape {tuple(t.shape)}: its elements may share "
                    "memory, as in expanded tensors; update its base instead"
                )
    _check_rounding(params, remainders, rounding_seeds)
    for position, step in enumerate(steps):
        if step.dtype != torch.float32 or step.dim() != 0:
            raise KernelArgumentError(
                f"steps[{position}] is {_short_name(step.dtype)} of shape {tuple(step.shape)}: "
                f"give a float32 tensor of shape ()"
            )
        if step.is_neg():
            raise KernelArgumentError(f"steps[{position}] is a negative view: give its resolve_neg()")
    return device


def _check_rounding(
    params: Sequence[Tensor], remainders: Sequence[Tensor | None] | None, seeds: Sequence[int] | None
) -> None:
    """Check that remainders are int16 with bf16 parameters, and not combined with stochastic rounding."""
    if remainders is not None and seeds is not None:
        raise KernelArgumentError(
            "remainders and rounding_seeds are both given: master weights are not rounded stochastically; give one "
            "of them"
        )
    for position, (param, remainder) in enumerate(zip(params, remainders or (), strict=False)):
        if remainder is None:
            continue
        if remainder.dtype != torch.int16 or param.dtype != torch.bfloat16:
            raise KernelArgumentError(
                f"remainders[{position}] is {_short_name(remainder.dtype)} for a {_short_name(param.dtype)} parameter: "
                f"give int16 for bfloat16, and None for other dtypes"
            )
        if remainder.shape != param.shape:
            raise KernelArgumentError(
                f"remainders[{position}] has shape {tuple(remainder.shape)}, its parameter "
                f"{tuple(param.shape)}: they must be equal"
            )
    for position, seed in enumerate(seeds if seeds is not None else ()):
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
            raise KernelArgumentError(f"rounding_seeds[{position}] is {seed!r}: give an integer in [0, 2^63)")


def layer_count(active: Sequence[bool] | Tensor | None, sq_norms: Tensor | None) -> int | None:
    """Return the number of layers: the length of `sq_norms` or `active`; None without either."""
    if sq_norms is not None and active is not None and sq_norms.numel() != len(active):
        raise KernelArgumentError(
            f"active has {len(active)} entries, sq_norms {sq_norms.numel()}: both must have one per layer"
        )
    if sq_norms is not None:
        return sq_norms.numel()
    return None if active is None else len(active)


def check_sq_norms(sq_norms: Tensor | None, device: torch.device) -> None:
    """Check the output for norms: contiguous float32 on the tensors' device."""
    if sq_norms is None:
        return
    if not isinstance(sq_norms, Tensor):
        raise KernelArgumentError(f"sq_norms is {sq_norms!r}: give a float32 tensor [num_layers] to write to")
    if sq_norms.dtype != torch.float32 or sq_norms.dim() != 1 or sq_norms.device != device:
        raise KernelArgumentError(
            f"sq_norms is {_short_name(sq_norms.dtype)} of shape {tuple(sq_norms.shape)} on {sq_norms.device}: "
            f"give float32 [num_layers] on {device}"
        )
    if not sq_norms.is_contiguous():
        raise KernelArgumentError("sq_norms has gaps between its elements: give a contiguous tensor")
    if sq_norms.is_neg():
        raise KernelArgumentError("sq_norms is a negative view: give its resolve_neg()")
    check_addressable("sq_norms", sq_norms)
    check_memory({"sq_norms": [sq_norms]})


def split_mask(
    active: Sequence[bool] | Tensor | None, device: torch.device
) -> tuple[list[bool] | None, Tensor | None]:
    """Return `active` as a list for the host or a tensor on the device; at most one is not None."""
    if active is None:
        return None, None
    if not isinstance(active, Tensor):
        if not isinstance(active, Collection):
            raise KernelArgumentError(f"active is {active!r}: give a list of bools, one per layer")
        for position, value in enumerate(active):
            if type(value).__name__ not in ("bool", "bool_"):  # Python and numpy
                raise KernelArgumentError(f"active[{position}] is {value!r}: give bools")
        return [bool(a) for a in active], None
    if active.dtype != torch.bool or active.dim() != 1:
        raise KernelArgumentError(
            f"active is {_short_name(active.dtype)} of shape {tuple(active.shape)}: give bool [num_layers]"
        )
    if active.device.type == "cpu":
        return active.tolist(), None
    if active.device != device:
        raise KernelArgumentError(
            f"active is on {active.device}, the tensors on {device}: move it there, or to the CPU"
        )
    return None, active.contiguous()


def check_num_layers(num_layers: Any) -> int:
    """Return `num_layers` as a Python integer."""
    if not isinstance(num_layers, numbers.Integral) or isinstance(num_layers, bool) or num_layers < 0:
        raise KernelArgumentError(f"num_layers is {num_layers!r}: give an integer of at least 0")
    return int(num_layers)


def check_hyperparameters(
    lr: float | Tensor, betas: Sequence[float], eps: float, weight_decay: float, device: torch.device
) -> None:
    """Check hyperparameters: `lr` a number, or one element on `device` or the CPU; `betas` in ``[0, 1)``; `eps` >= 0.

    Numbers are those of Python and numpy; strings, bools and other tensors are invalid.
    """
    if isinstance(lr, Tensor):
        check_addressable("lr", lr)
    else:
        _check_number("lr", lr)
    _check_number("eps", eps)
    _check_number("weight_decay", weight_decay)
    if eps < 0:
        raise KernelArgumentError(f"eps is {eps}: give a number of at least 0")
    if not isinstance(betas, Sequence) or isinstance(betas, str):
        raise KernelArgumentError(f"betas is {betas!r}: give two numbers")
    if len(betas) != 2:
        raise KernelArgumentError(
            f"betas has {len(betas)} entries: give two, of the first and the second moment"
        )
    for i, beta in enumerate(betas):
        _check_number(f"betas[{i}]", beta)
        if not 0 <= beta < 1:
            raise KernelArgumentError(f"betas[{i}] is {beta}: give a number in [0, 1)")
    if isinstance(lr, Tensor) and (
        lr.numel() != 1 or lr.device not in (device, torch.device("cpu")) or lr.dtype not in LR_DTYPES
    ):
        raise KernelArgumentError(
            f"lr is {_short_name(lr.dtype)} of shape {tuple(lr.shape)} on {lr.device}: give a number, or a "
            f"float32 or float64 tensor of one element on {device} or the CPU"
        )


def check_flag(name: str, value: Any) -> bool:
    """Return `value` as a bool: a bool, 0 or 1; strings are invalid, since "no" would be True."""
    if isinstance(value, bool):
        return value
    try:
        return {0: False, 1: True}[value.item() if hasattr(value, "item") else value]
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise KernelArgumentError(f"{name} is {value!r}: give True or False") from None


def to_number(name: str, value: Any) -> float:
    """Return `value` as a float: a Python or numpy number, or a tensor of one real element."""
    if isinstance(value, Tensor) and not (value.numel() == 1 and not value.is_complex()):
        raise KernelArgumentError(
            f"{name} is a tensor of shape {tuple(value.shape)}, {_short_name(value.dtype)}: give a number"
        )
    if not isinstance(value, (str, bytes)) and hasattr(value, "__float__"):
        try:
            number = float(value.detach() if isinstance(value, Tensor) else value)
        except (TypeError, ValueError, RuntimeError):
            number = math.nan
        if number == number and not isinstance(value, bool):
            return number
    raise KernelArgumentError(f"{name} is {value!r}: give a number")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or value != value:
        raise KernelArgumentError(f"{name} is {value!r}: give a number")


def _short_name(thing: object) -> str:
    """Return `float32` for `torch.float32`."""
    return str(thing).removeprefix("torch.")
