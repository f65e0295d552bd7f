"""Hyperparameters of a parameter group: checked, and converted for the kernels."""

import math
from typing import Any

import torch
from torch import Tensor

import grass_kernels
from grass_kernels import Hyperparameters
from grass_kernels.arguments import check_flag, check_hyperparameters, to_number
from grass_kernels.conversions import LR_DTYPES
from grass_kernels.inputs import split_lr


def settings_of(group: dict[str, Any]) -> tuple[Any, ...]:
    """Return the hyperparameters of a group for comparison; betas by value, as a list may change in place."""
    try:
        beta1, beta2 = group["betas"]
    except (TypeError, ValueError):
        raise grass_kernels.KernelArgumentError(f"betas are {group['betas']!r}: give two numbers") from None
    return group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["maximize"]


def hyperparameters_of(
    group: dict[str, Any], device: torch.device, max_grad_norm: float = math.inf
) -> Hyperparameters:
    """Return the hyperparameters of a group as arguments of the kernels.

    Raises:
        KernelArgumentError: a hyperparameter is invalid; the message has its name.
    """
    lr, *rest, maximize = settings_of(group)
    if not isinstance(lr, Tensor) or lr.device != device or device.type == "cpu" or lr.dtype not in LR_DTYPES:
        lr = to_number("lr", lr)  # otherwise kernels read it on the device
    names = ("betas[0]", "betas[1]", "eps", "weight_decay")
    beta1, beta2, eps, weight_decay = map(to_number, names, rest)
    check_hyperparameters(lr, (beta1, beta2), eps, weight_decay, device)
    return Hyperparameters(
        *split_lr(lr, device),
        (beta1, beta2),
        eps,
        weight_decay,
        check_flag("maximize", maximize),
        max_grad_norm,
    )


def check_settings(group: dict[str, Any], device: torch.device) -> None:
    """Check the hyperparameters of a group for torch. Tensors on a device are not read: no device sync.

    Raises:
        KernelArgumentError: a hyperparameter is invalid; the message has its name.
    """
    settings = settings_of(group)
    if are_plain(settings):
        hyperparameters_of(group, device)
        return
    for name, value in zip(("lr", "betas[0]", "betas[1]", "eps", "weight_decay"), settings, strict=False):
        if (
            isinstance(value, Tensor)
            and value.device.type != "cpu"
            and value.numel() == 1
            and not value.is_complex()
        ):
            continue
        to_number(name, value)


def are_plain(settings: tuple[Any, ...]) -> bool:
    """Return if all settings are Python numbers, which can be compared without a device sync."""
    return all(type(value) in (float, int, bool) for value in settings)
