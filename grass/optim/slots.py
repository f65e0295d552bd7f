"""Slots: where each parameter belongs, as a number.

With L layers, slots 0 to L - 1 are the layers, L is what always trains, L + 1 what never does.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from grass.config import GrassConfig
from grass.errors import ConfigError, ParameterError
from grass.layers import LayerMap


def assign_slots(
    params: Sequence[Tensor], model: nn.Module, layers: LayerMap, config: GrassConfig
) -> list[int]:
    """The slot of each parameter.

    Raises:
        ParameterError: a parameter is not the model's.
        ConfigError: a name pattern of ``always_active`` that matches nothing.
    """
    patterns = config.always_active_patterns
    named: dict[Tensor, tuple[str, int | None]] = {
        p: (name, layer) for name, p, layer in layers.assign(model)
    }
    foreign = [tuple(p.shape) for p in params if p not in named]
    if foreign:
        raise ParameterError(
            f"{len(foreign)} of the parameters do not belong to the model, the first of shape {foreign[0]}: "
            "pass the model's own parameters, and the model that is trained"
        )
    if patterns is not None:
        _check_patterns(patterns, [name for name, _ in named.values()])
    outside = len(layers) if config.always_active == "outside" else len(layers) + 1
    slots = []
    for p in params:
        name, layer = named[p]
        if patterns is not None and any(_matches(name, pattern) for pattern in patterns):
            slots.append(len(layers))
        else:
            slots.append(outside if layer is None else layer)
    return slots


def count_elements(members: Sequence[Sequence[Tensor]]) -> list[int]:
    """Elements of each layer's parameters."""
    return [sum(p.numel() for p in params) for params in members]


@torch.no_grad()
def weight_norms(members: Sequence[Sequence[Tensor]]) -> Tensor:
    """Root-mean-square weight of each layer, float32 [L]; 0 for a layer without parameters."""
    norms = []
    for params in members:
        total = sum(float(torch.linalg.vector_norm(p)) ** 2 for p in params)
        norms.append((total / max(1, sum(p.numel() for p in params))) ** 0.5)
    return torch.tensor(norms)


def refuse_distributed(model: nn.Module) -> None:
    """Refuse what has not been built: every rank would draw layers of its own.

    Raises:
        ConfigError: a data-parallel wrapper, or several processes.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
    if wrapped or (distributed and torch.distributed.get_world_size() > 1):
        raise ConfigError(
            "GrassAdamW runs in one process on one copy of the model: ranks would draw different layers; "
            "run without DataParallel, DistributedDataParallel or FSDP"
        )


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or name.startswith(pattern + ".")


def _check_patterns(patterns: tuple[str, ...], names: list[str]) -> None:
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise ConfigError(
                f"always_active pattern {pattern!r} matches no parameter; names look like {names[0]!r} and "
                f"{names[-1]!r}"
            )
