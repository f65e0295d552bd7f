"""Which parameters form which layer: the map that every other part of the method reads."""

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
    """The layers of a model, and what is outside of them; names and numbers only.

    Every parameter has exactly one owner, a layer or the outside. One that two layers share, or a layer
    and something outside, belongs to the outside: freezing a layer must not freeze another. Names
    are those of the unwrapped model, so a map holds before and after `torch.compile`.

    Example:
        >>> layers = LayerMap.from_model(model)
        >>> layers.names[0], layers.layer_of("model.layers.0.mlp.up_proj.weight")
        ('model.layers.0', 0)

    Args:
        names: module path of each layer, in order.
        num_params: elements of each layer; a parameter counts once.
        parameter_names: for each layer the names as `model.named_parameters()` gives them.
        outside: names of the parameters in no layer.
        outside_num_params: elements outside.
        tied: further names of parameters that have several, each with the one under which it is listed.
    """

    names: tuple[str, ...]
    num_params: tuple[int, ...]
    parameter_names: tuple[tuple[str, ...], ...]
    outside: tuple[str, ...]
    outside_num_params: int
    tied: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_model(cls, model: nn.Module, pattern: Pattern | None = None) -> LayerMap:
        """Finds the layers of a model, or takes those that the caller names.

        Args:
            model: any module; Hugging Face models (also wrapped by peft or `torch.compile`) are
                understood by their configuration and input embedding.
            pattern: None to discover; a pattern of module paths such as `"model.layers.*"`, in which `*`
                stays within one part of the path; several patterns, in order; or the block modules.

        Raises:
            LayerDiscoveryError: no layers, or doubt about them; the message lists the candidates.
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
                    "modules. Pass as pattern only blocks with parameters of their own."
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
        """The number of layers."""
        return len(self.names)

    def layer_of(self, parameter_name: str) -> int | None:
        """The layer that owns a parameter, None if it is outside.

        Raises:
            ParameterError: the model has no parameter of this name.
        """
        name = clean_name(parameter_name)
        name = dict(self.tied).get(name, name)
        owner = self._owners.get(name, -1)
        if owner == -1:
            raise ParameterError(
                f"{parameter_name!r} is no parameter of the model that this layer map describes. "
                "Names are those of model.named_parameters()."
            )
        return owner

    def assign(self, model: nn.Module) -> list[tuple[str, nn.Parameter, int | None]]:
        """Every parameter of the model once, with its clean name and its layer (None: outside).

        Args:
            model: the model the map was made from, or a copy; compiled or not.

        Raises:
            ParameterError: the model's parameters are not those of the map.
        """
        owners = self._owners
        found = {clean_name(name): parameter for name, parameter in model.named_parameters()}
        if found.keys() != owners.keys():
            missing, unknown = sorted(owners.keys() - found.keys()), sorted(found.keys() - owners.keys())
            raise ParameterError(
                f"the model's parameters are not those of the layer map: {len(missing)} missing "
                f"{missing[:3]}, {len(unknown)} unknown {unknown[:3]}. Adapters and wrappers change names: "
                "make the map of the model as it is trained, LayerMap.from_model(model)."
            )
        return [(name, parameter, owners[name]) for name, parameter in found.items()]

    def modules(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """The blocks themselves, as the model calls them (a compiled block in its wrapper).

        Raises:
            ParameterError: the model lacks one of the blocks.
        """
        found: dict[str, nn.Module] = {}
        wanted = set(self.names)
        for path, module in walk(model):
            if path in wanted:
                found[path] = module
        missing = [name for name in self.names if name not in found]
        if missing:
            raise ParameterError(
                f"the model has no modules {missing[:3]}: the layer map was made from a model of another "
                "structure. Make it anew with LayerMap.from_model(model)."
            )
        return tuple(found[name] for name in self.names)

    @cached_property
    def _owners(self) -> dict[str, int | None]:
        owners: dict[str, int | None] = dict.fromkeys(self.outside)
        for index, names in enumerate(self.parameter_names):
            owners.update(dict.fromkeys(names, index))
        return owners


def _holders(model: nn.Module, paths: Sequence[str]) -> dict[int, set[int | None]]:
    """For each parameter's id the layers (None: outside) that hold it, told by module, not by name.

    A model may register a block, or the whole language model, under a second name; that shares nothing.
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
    wanted = [pattern] if isinstance(pattern, str) else list(pattern) if isinstance(pattern, Iterable) else []
    if wanted and all(isinstance(item, str) for item in wanted):
        paths = _paths_matching(model, wanted)  # type: ignore[arg-type]
    elif wanted and all(isinstance(item, nn.Module) for item in wanted):
        paths = _paths_of_modules(model, wanted)  # type: ignore[arg-type]
    else:
        raise LayerDiscoveryError(
            "pattern must be a string, or a list of only strings or only modules, and not empty; "
            f"got {pattern!r}"
        )
    for path in paths:
        around = next((other for other in paths if other != path and is_under(path, other)), None)
        if around is not None:
            raise LayerDiscoveryError(f"{path!r} lies inside {around!r}: layers must not be nested")
    return paths


def _paths_matching(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    modules = {path: module for path, module in walk(model) if path}
    found: dict[int, str] = {}  # by block: one that stands in two places is one layer
    for pattern in patterns:
        parts = clean_name(pattern).split(".")
        matches = [path for path in modules if _matches(path.split("."), parts)]
        if not matches:
            raise _not_there(model, f"pattern {pattern!r} matches no module")
        for path in matches:
            if is_plain_container(modules[path]):
                raise _not_there(
                    model, f"pattern {pattern!r} matches {path!r}, a list of modules, not a block"
                )
            found.setdefault(id(unwrap(modules[path])), path)
    return list(found.values())


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(path) == len(pattern) and all(map(fnmatchcase, path, pattern))


def _paths_of_modules(model: nn.Module, blocks: Sequence[nn.Module]) -> list[str]:
    known: dict[int, str] = {}
    for path, module in walk(model):
        known.setdefault(id(unwrap(module)), path)
    foreign = [block for block in blocks if id(unwrap(block)) not in known]
    if foreign:
        raise _not_there(model, f"a {title(foreign[0])} passed as layer is no module of the model")
    return list(dict.fromkeys(known[id(unwrap(block))] for block in blocks))


def _not_there(model: nn.Module, why: str) -> LayerDiscoveryError:
    stacks = candidates(model)
    listed = f"\nstacks of repeated blocks in {title(model)}:\n{describe(stacks)}" if stacks else ""
    return LayerDiscoveryError(f"{why}{listed}\n{how_to_pass(stacks)}")
