"""Layer map: the assignment of a model's parameters to layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from torch import nn

from grass.errors import LayerDiscoveryError, ParameterError
from grass.layer_discovery import candidates, describe, discover, how_to_pass, title
from grass.layer_stacks import children_of, clean_name, is_plain_container, is_under, unwrap, walk

Pattern = str | Sequence[str] | Sequence[nn.Module] | nn.Module


@dataclass(frozen=True)
class LayerMap:
    """Names and sizes of the layers of a model, and of the parameters outside of them.

    Every parameter belongs to one layer or to the outside (embedding, head, final norm). A parameter that is shared
    by two layers, or by a layer and a module outside, belongs to the outside, since freezing one layer must not
    freeze another. Names are those of the uncompiled model, so a map is valid before and after `torch.compile`.

    Example:
        >>> layers = LayerMap.from_model(model)
        >>> layers.names[0], layers.layer_of("model.layers.0.mlp.up_proj.weight")
        ('model.layers.0', 0)

    Args:
        names: module path of each layer, in order.
        num_params: number of elements of each layer; tied parameters count once.
        parameter_names: for each layer, the names of its parameters as in ``model.named_parameters()``.
        outside: names of the parameters that belong to no layer.
        outside_num_params: number of elements outside the layers.
        tied: for each additional name of a tied parameter, this name and the name under which it is listed.
    """

    names: tuple[str, ...]
    num_params: tuple[int, ...]
    parameter_names: tuple[tuple[str, ...], ...]
    outside: tuple[str, ...]
    outside_num_params: int
    tied: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        names = self.names if len(self.names) <= 3 else (self.names[0], "...", self.names[-1])
        return (
            f"LayerMap({len(self.names)} layers: {', '.join(names)}; {sum(self.num_params):,} elements in layers, "
            f"{self.outside_num_params:,} outside)"
        )

    @classmethod
    def from_model(cls, model: nn.Module, pattern: Pattern | None = None) -> LayerMap:
        """Find the layers of a model, or take those that `pattern` names.

        Args:
            model: any module. In Hugging Face models (also wrapped by peft or `torch.compile`) the configuration and
                the input embedding tell the layers of the language model from others.
            pattern: None to find the layers; a pattern of module paths such as ``"model.layers.*"``, in which ``*``
                matches one component of a path; several patterns, in order; or the block modules.

        Raises:
            LayerDiscoveryError: there are no layers, or they are ambiguous; the message lists the candidates.
        """
        return cls._from_paths(model, discover(model) if pattern is None else _paths_of(model, pattern))

    @classmethod
    def _from_paths(cls, model: nn.Module, paths: Sequence[str]) -> LayerMap:
        aliases: dict[int, list[str]] = {}
        parameters: dict[int, nn.Parameter] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(clean_name(name))
            parameters[id(parameter)] = parameter

        holders = _holders(model, paths)
        members: list[list[str]] = [[] for _ in paths]
        sizes = [0] * len(paths)
        outside: list[str] = []
        outside_num_params = 0
        for key, parameter in parameters.items():
            owner = holders[key].pop() if len(holders[key]) == 1 else None
            if owner is None:
                outside.append(aliases[key][0])
                outside_num_params += parameter.numel()
            else:
                members[owner].append(aliases[key][0])
                sizes[owner] += parameter.numel()
        for path, names in zip(paths, members, strict=True):
            if not names:
                raise LayerDiscoveryError(
                    f"layer {path!r} owns no parameter: it has none, or shares all of them with other "
                    "modules. Pass a pattern that matches only blocks with parameters of their own."
                )
        return cls(
            names=tuple(paths),
            num_params=tuple(sizes),
            parameter_names=tuple(tuple(names) for names in members),
            outside=tuple(outside),
            outside_num_params=outside_num_params,
            tied=tuple((other, names[0]) for names in aliases.values() for other in names[1:]),
        )

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.names)

    def layer_of(self, parameter_name: str) -> int | None:
        """Return the layer of a parameter, None if it is outside the layers.

        Raises:
            ParameterError: the model has no parameter with this name.
        """
        name = clean_name(parameter_name)
        name = dict(self.tied).get(name, name)
        owner = self._owners.get(name, -1)
        if owner == -1:
            raise ParameterError(
                f"{parameter_name!r} is not a parameter of the model of this layer map; pass a name of "
                "model.named_parameters()"
            )
        return owner

    def assign(self, model: nn.Module) -> list[tuple[str, nn.Parameter, int | None]]:
        """Return every parameter of a model once, with its clean name and its layer (None if it is outside).

        Args:
            model: the model that the map was made from, or a copy; compiled or not.

        Raises:
            ParameterError: the parameters of the model differ from those of the map.
        """
        owners = self._owners
        parameters = {clean_name(name): parameter for name, parameter in model.named_parameters()}
        if parameters.keys() != owners.keys():
            missing = sorted(owners.keys() - parameters.keys())
            unknown = sorted(parameters.keys() - owners.keys())
            raise ParameterError(
                f"the parameters of the model differ from those of the layer map: {len(missing)} missing "
                f"{missing[:3]}, {len(unknown)} unknown {unknown[:3]}. Adapters and wrappers change names: "
                "make the map from the model that is trained, with LayerMap.from_model(model)"
            )
        return [(name, parameter, owners[name]) for name, parameter in parameters.items()]

    def modules(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """Return the modules of the layers; for a compiled block, its wrapper.

        Raises:
            ParameterError: the model lacks a layer of the map.
        """
        names = set(self.names)
        by_path = {path: module for path, module in walk(model) if path in names}
        missing = [name for name in self.names if name not in by_path]
        if missing:
            raise ParameterError(
                f"the model has no modules {missing[:3]}: the layer map was made from a different model; make it "
                "from this one with LayerMap.from_model(model)"
            )
        return tuple(by_path[name] for name in self.names)

    @cached_property
    def _owners(self) -> dict[str, int | None]:
        owners: dict[str, int | None] = dict.fromkeys(self.outside)
        for index, names in enumerate(self.parameter_names):
            owners.update(dict.fromkeys(names, index))
        return owners


def _holders(model: nn.Module, paths: Sequence[str]) -> dict[int, set[int | None]]:
    """Return for each parameter, by id, the layers that hold it (None for the outside).

    Modules are compared by identity: a block that is registered under two names does not share its parameters.
    """
    modules = dict(walk(model))
    layer_of_block = {id(unwrap(modules[path])): index for index, path in enumerate(paths)}
    holders: dict[int, set[int | None]] = {}

    def visit(module: nn.Module, layer: int | None) -> None:
        module = unwrap(module)
        layer = layer_of_block.get(id(module), layer)
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), set()).add(layer)
        for _, child in children_of(module):
            visit(child, layer)

    visit(model, None)
    return holders


def _paths_of(model: nn.Module, pattern: Pattern) -> list[str]:
    items = [pattern] if isinstance(pattern, str) else list(pattern) if isinstance(pattern, Iterable) else []
    if items and all(isinstance(item, str) for item in items):
        paths = _paths_matching(model, items)  # type: ignore[arg-type]
    elif items and all(isinstance(item, nn.Module) for item in items):
        paths = _paths_of_modules(model, items)  # type: ignore[arg-type]
    else:
        raise LayerDiscoveryError(
            f"pattern must be a string, a non-empty list of strings, or a non-empty list of modules, not {pattern!r}"
        )
    for path in paths:
        outer = next((other for other in paths if other != path and is_under(path, other)), None)
        if outer is not None:
            raise LayerDiscoveryError(f"{path!r} is inside {outer!r}: layers must not be nested")
    return paths


def _paths_matching(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    modules = {path: module for path, module in walk(model) if path}
    path_of_block: dict[int, str] = {}  # by id: a block that is registered twice is one layer
    for pattern in patterns:
        parts = clean_name(pattern).split(".")
        matches = [path for path in modules if _matches(path.split("."), parts)]
        if not matches:
            raise _pattern_error(model, f"pattern {pattern!r} matches no module")
        for path in matches:
            if is_plain_container(modules[path]):
                raise _pattern_error(
                    model, f"pattern {pattern!r} matches {path!r}, a list of modules, not a block"
                )
            path_of_block.setdefault(id(unwrap(modules[path])), path)
    return list(path_of_block.values())


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(path) == len(pattern) and all(map(fnmatchcase, path, pattern))


def _paths_of_modules(model: nn.Module, blocks: Sequence[nn.Module]) -> list[str]:
    path_of: dict[int, str] = {}
    for path, module in walk(model):
        path_of.setdefault(id(unwrap(module)), path)
    foreign = [block for block in blocks if id(unwrap(block)) not in path_of]
    if foreign:
        raise _pattern_error(model, f"the {title(foreign[0])} passed as a layer is not a module of the model")
    return list(dict.fromkeys(path_of[id(unwrap(block))] for block in blocks))


def _pattern_error(model: nn.Module, reason: str) -> LayerDiscoveryError:
    stacks = candidates(model)
    listed = f"\nstacks of repeated blocks in {title(model)}:\n{describe(stacks)}" if stacks else ""
    return LayerDiscoveryError(f"{reason}{listed}\n{how_to_pass(stacks)}")
