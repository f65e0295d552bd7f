"""Variants of other libraries, each where it is installed. Their moments are their own, in their own layout."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.kernels.cases import DTYPE_NAMES, Case
from bench.kernels.problem import BETAS, EPS, LR, WEIGHT_DECAY, Problem
from bench.kernels.variants import (
    HYPERPARAMETERS,
    Built,
    CannotDoError,
    Variant,
    parameters,
    with_norms_and_clipping,
)


@dataclass(frozen=True)
class Peer:
    """An optimizer of another library.

    Args:
        name: in rows.
        module: to import.
        make: from the module, parameters and case to the optimizer.
        state: from a case to a description of its moments, and to the bytes a parameter that they and what
            else it keeps take to read and write.
        roundings: which of a mixture's it has; for others it takes no part.
    """

    name: str
    module: str
    make: Callable[[Any, list[torch.nn.Parameter], Case], torch.optim.Optimizer]
    state: Callable[[Case], tuple[str, float]]
    roundings: tuple[str, ...] = ("nearest",)

    @property
    def is_installed(self) -> bool:
        """True if its library can be found."""
        return importlib.util.find_spec(self.module.split(".")[0]) is not None

    def build(self, problem: Problem) -> Built:
        """Make it ready for a problem."""
        case = problem.case
        mixture = case.mixture
        if mixture.grad != mixture.param:
            raise CannotDoError("wants gradients of their parameter's dtype")
        if mixture.rounding not in self.roundings:
            raise CannotDoError(f"has nothing like {mixture.rounding} rounding")
        params = parameters(problem, mixture.grad)
        try:
            optimizer = self.make(importlib.import_module(self.module), params, case)
        except (ImportError, AttributeError, TypeError) as error:
            raise CannotDoError(f"this version of {self.module} is another one: {error}") from error
        description, state_bytes = self.state(case)
        update = 2 * mixture.param.itemsize + mixture.grad.itemsize + state_bytes
        return Built(
            step=with_norms_and_clipping(problem, params, optimizer.step),
            num_bytes=round(case.active_numel * (update + case.extra_bytes(mixture.grad))),
            grad_dtype=mixture.grad,
            state=description,
            rounding=mixture.rounding,
            state_is_shared=False,
        )


def _make_optimi(module: Any, params: list[torch.nn.Parameter], case: Case) -> torch.optim.Optimizer:
    kahan = case.mixture.rounding == "master"
    return module.AdamW(params, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, kahan_sum=kahan)


def _optimi_state(case: Case) -> tuple[str, float]:
    size, name = case.mixture.param.itemsize, DTYPE_NAMES[case.mixture.param]
    return (f"{name} + Kahan", 6 * size) if case.mixture.rounding == "master" else (name, 4 * size)


def _make_torchao(module: Any, params: list[torch.nn.Parameter], case: Case) -> torch.optim.Optimizer:
    stochastic = case.mixture.rounding == "stochastic"
    return module.AdamW8bit(params, **HYPERPARAMETERS, bf16_stochastic_round=stochastic)


def _make_flashoptim(module: Any, params: list[torch.nn.Parameter], case: Case) -> torch.optim.Optimizer:
    bits = 24 if case.mixture.rounding == "master" else None
    return module.FlashAdamW(params, **HYPERPARAMETERS, master_weight_bits=bits)


def _blocks_of_256(
    small: Callable[[Case], int], *, whole_blocks: bool
) -> Callable[[Case], tuple[str, float]]:
    """Two 8-bit moments with an fp32 scale for each 256, read and written, in tensors that are large enough.

    Args:
        small: bytes an element of one moment in tensors of less than 4096 elements.
        whole_blocks: whether tensors that are no multiple of 256 count as small.
    """

    def state(case: Case) -> tuple[str, float]:
        large = [n for n in case.active_sizes if n >= 4096 and not (whole_blocks and n % 256)]
        share = sum(large) / case.active_numel
        return "uint8", share * (4 + 16 / 256) + (1 - share) * 4 * small(case)

    return state


PEERS = (
    Peer("optimi", "optimi", _make_optimi, _optimi_state, ("nearest", "master")),
    Peer(
        "bitsandbytes_32bit",
        "bitsandbytes",
        lambda module, params, case: module.optim.AdamW32bit(params, **HYPERPARAMETERS),
        lambda case: ("fp32", 16),
    ),
    Peer(
        "bitsandbytes_8bit",
        "bitsandbytes",
        lambda module, params, case: module.optim.AdamW8bit(params, **HYPERPARAMETERS),
        _blocks_of_256(lambda case: 4, whole_blocks=False),
    ),
    Peer(
        "torchao_8bit",
        "torchao.optim",
        _make_torchao,
        _blocks_of_256(lambda case: case.mixture.param.itemsize, whole_blocks=True),
        ("nearest", "stochastic"),
    ),
    Peer(
        "flashoptim",
        "flashoptim",
        _make_flashoptim,
        # an fp16 scale for each 32, and one byte of a parameter's lost bits
        lambda case: ("int8", 4 + 8 / 32 + (2 if case.mixture.rounding == "master" else 0)),
        ("nearest", "master"),
    ),
)


def peer_variants(device: torch.device) -> tuple[list[Variant], list[str]]:
    """The installed libraries' variants, and a line for each that cannot be measured here."""
    variants, missing = [], []
    for peer in PEERS:
        if not peer.is_installed:
            missing.append(f"{peer.name}: {peer.module.split('.')[0]} is not installed")
        elif device.type != "cuda":
            missing.append(f"{peer.name}: needs a CUDA device")
        else:
            variants.append(Variant(peer.name, peer.build))
    return variants, missing
