"""ParamEntry: the record of one parameter: group, layer, bucket, and whether it trains."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from grass.config import GrassConfig
from grass.errors import ConfigError, ParameterError
from grass.layers import LayerMap
from grass.optim.sharding import Ranks, local


@dataclass(eq=False, slots=True)
class ParamEntry:
    """One parameter of an optimizer.

    With L layers, `layer` is 0 to L - 1 inside the layers, and L outside. A bucket is updated and moved together: a
    layer, or a single parameter outside: gradients of head and embedding are complete at opposite ends of backward.
    """

    param: Tensor
    group: int
    """Index of the parameter group."""
    index: int
    """Index among all parameters; the seed of stochastic rounding, and the number in messages."""
    layer: int
    bucket: int = 0
    can_train: bool = True
    """False if it is never trained: frozen by the user, or by ``always_active``."""
    is_active: bool = True
    """True if the next step trains it."""

    @property
    def shard(self) -> Tensor:
        """The local shard of the parameter, as kernels, states and the store use it; a whole parameter itself."""
        return local(self.param)


def make_entries(
    groups: Sequence[dict], layer_of: dict[Tensor, int], trainable: dict[Tensor, bool], num_layers: int
) -> list[ParamEntry]:
    """Return the records of all parameters, in the order of the groups.

    Args:
        groups: the optimizer's parameter groups.
        layer_of: from `assign_layers`.
        trainable: ``requires_grad`` of each parameter as the user set it.
        num_layers: L.
    """
    entries: list[ParamEntry] = []
    outside = num_layers  # bucket of the next parameter outside
    for index, group in enumerate(groups):
        for p in group["params"]:
            layer = layer_of[p]
            bucket = layer
            if layer == num_layers:
                bucket, outside = outside, outside + 1
            can_train = trainable[p] and layer <= num_layers
            entries.append(ParamEntry(p, index, len(entries), layer, bucket, can_train))
    return entries


def assign_layers(
    params: Sequence[Tensor], model: nn.Module, layers: LayerMap, config: GrassConfig
) -> list[int]:
    """Return the layer of each parameter: L outside if it always trains, L + 1 if it never does.

    Raises:
        ParameterError: a parameter does not belong to the model.
        ConfigError: a name pattern of ``always_active`` matches nothing.
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
    assigned = []
    for p in params:
        name, layer = named[p]
        if patterns is not None and any(_matches(name, pattern) for pattern in patterns):
            assigned.append(len(layers))
        else:
            assigned.append(outside if layer is None else layer)
    return assigned


def params_by_layer(entries: Sequence[ParamEntry], num_layers: int) -> list[list[Tensor]]:
    """Return the trainable parameters of each layer."""
    params: list[list[Tensor]] = [[] for _ in range(num_layers)]
    for entry in entries:
        if entry.can_train and entry.layer < num_layers:
            params[entry.layer].append(entry.param)
    return params


def count_elements(params: Sequence[Sequence[Tensor]]) -> list[int]:
    """Return the number of elements in each layer."""
    return [sum(p.numel() for p in layer) for layer in params]


@torch.no_grad()
def weight_norms(params: Sequence[Sequence[Tensor]], ranks: Ranks | None) -> Tensor:
    """Return the root mean square of the weights of each layer: float32 [L], 0 for a layer without parameters.

    Args:
        params: parameters of each layer.
        ranks: the processes that have the shards of sharded parameters.
    """
    sq_norms = torch.tensor(
        [sum(float(torch.linalg.vector_norm(local(p))) ** 2 for p in layer) for layer in params],
        dtype=torch.float64,
        device="cpu",
    )
    if ranks is not None:
        sq_norms = ranks.sum(sq_norms)
    counts = torch.tensor([max(1, count) for count in count_elements(params)], device="cpu")
    return (sq_norms / counts).sqrt().float()


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or name.startswith(pattern + ".")


def _check_patterns(patterns: tuple[str, ...], names: list[str]) -> None:
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise ConfigError(
                f"always_active pattern {pattern!r} matches no parameter; names look like {names[0]!r} and "
                f"{names[-1]!r}"
            )
