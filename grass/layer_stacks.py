"""Modules under the paths that users know, and the stacks of repeated blocks among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

COMPILED = "_orig_mod"  # where torch.compile keeps the module that it wraps


def clean_name(name: str) -> str:
    """A module's or parameter's name as it is without torch.compile's wrappers."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper, or the module itself."""
    while isinstance(inner := module._modules.get(COMPILED), nn.Module):
        module = inner
    return module


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module under its clean path, wrappers in place of what they wrap, parents first."""
    yield path, module
    for name, child in children_of(module):
        yield from walk(child, join(path, name))


def join(path: str, name: str) -> str:
    """`path.name`, where the model itself has the empty path."""
    return f"{path}.{name}" if path else name


def parent_of(path: str) -> str:
    """The path one level up."""
    return path.rpartition(".")[0]


def is_under(path: str, ancestor: str) -> bool:
    """Whether `path` is `ancestor` or lies inside it."""
    return not ancestor or path == ancestor or path.startswith(ancestor + ".")


def children_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children of a module, or of the one inside torch.compile's wrapper."""
    return [(name, child) for name, child in unwrap(module)._modules.items() if child is not None]


def is_plain_container(module: nn.Module) -> bool:
    """Whether a module only holds others and has no forward of its own: never a block."""
    return type(unwrap(module)) in (nn.ModuleList, nn.ModuleDict)


def _holds_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_bare(module: nn.Module) -> bool:
    """Whether all parameters are the module's own: an embedding, a linear map, a norm, no block."""
    return not any(_holds_parameters(child) for _, child in children_of(module))


def _signature(module: nn.Module) -> frozenset[str]:
    return frozenset(clean_name(name) for name, _ in module.named_parameters())


def config_of(module: nn.Module) -> Any:
    """The Hugging Face configuration that a module carries, known by what it can do."""
    config = unwrap(module).__dict__.get("config")
    return config if callable(getattr(config, "get_text_config", None)) else None


@dataclass(frozen=True)
class Stack:
    """A container whose numbered children look like the blocks of a network."""

    path: str
    blocks: tuple[str, ...]  # module paths; a block registered twice is there once
    length: int  # numbered children, whether they hold parameters or not
    num_params: int
    classes: str  # of the blocks, for messages
    bare: bool  # the blocks are single modules without submodules
    config: Any  # of the nearest module around it that carries a Hugging Face configuration

    @property
    def pattern(self) -> str:
        """What to pass to choose this stack."""
        return join(self.path, "*")


def find_stacks(model: nn.Module, counts: Collection[int] = ()) -> list[Stack]:
    """All stacks of a model that lie in no other stack's block, in the order of registration.

    Args:
        model: any module.
        counts: numbers of blocks that the model's configuration announces; a container of as many children
            is a stack even if it repeats nothing (one block, or two of different kinds).
    """
    stacks: list[Stack] = []
    seen: set[int] = set()

    def visit(path: str, module: nn.Module, config: Any) -> None:
        if id(unwrap(module)) in seen:
            return
        seen.add(id(unwrap(module)))
        config = config_of(module) or config
        stack = _as_stack(path, module, config, counts)
        if stack is not None:
            stacks.append(stack)
            return
        for name, child in children_of(module):
            visit(join(path, name), child, config)

    visit("", model, None)
    return stacks


def _as_stack(path: str, module: nn.Module, config: Any, counts: Collection[int]) -> Stack | None:
    children = children_of(module)
    if not children or not all(name.isdigit() for name, _ in children):
        return None
    distinct = {id(unwrap(child)): (name, child) for name, child in reversed(children)}
    holding = [(name, child) for name, child in reversed(distinct.values()) if _holds_parameters(child)]
    if any(is_plain_container(child) for _, child in holding):
        return None

    blocks = [(name, child) for name, child in holding if not _is_bare(child)]
    bare = not blocks
    if bare:
        if len(holding) != len(distinct) or len({_signature(child) for _, child in holding}) != 1:
            return None
        blocks = holding
    elif isinstance(unwrap(module), nn.Sequential):
        blocks = _without_stem_and_head(blocks)

    classes = Counter(type(unwrap(child)).__name__ for _, child in blocks)
    repeats = max(classes.values(), default=0) >= 2
    # A single block, or two of different kinds, repeat nothing: the configuration must vouch for them.
    if not repeats and (bare or len(children) not in counts):
        return None
    parameters = {id(p): p.numel() for _, child in blocks for p in child.parameters()}
    return Stack(
        path=path,
        blocks=tuple(join(path, name) for name, _ in blocks),
        length=len(children),
        num_params=sum(parameters.values()),
        classes="/".join(classes),
        bare=bare,
        config=config,
    )


def _without_stem_and_head(blocks: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Drops the one-of-a-kind modules of an `nn.Sequential` that share no parameter name with the rest."""
    classes = Counter(type(unwrap(child)) for _, child in blocks)
    signatures = [_signature(child) for _, child in blocks]
    names = Counter(name for signature in signatures for name in signature)
    return [
        (name, child)
        for (name, child), signature in zip(blocks, signatures, strict=True)
        if classes[type(unwrap(child))] > 1 or any(names[parameter] > 1 for parameter in signature)
    ]
