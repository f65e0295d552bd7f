"""Module paths without `torch.compile` wrappers, and the stacks of repeated blocks of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

_STAGES_DIFFER = 3  # the largest stage has this many times the parameters of the smallest

COMPILED = "_orig_mod"  # attribute in which torch.compile's wrapper keeps the wrapped module


def clean_name(name: str) -> str:
    """Return the name of a module or parameter without `torch.compile` wrappers."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside a `torch.compile` wrapper, or the module itself."""
    while isinstance(inner := module._modules.get(COMPILED), nn.Module):
        module = inner
    return module


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every module with its clean path, parents first; a wrapper stands for the module it wraps."""
    yield path, module
    for name, child in children_of(module):
        yield from walk(child, join(path, name))


def join(path: str, name: str) -> str:
    """Return ``path.name``; the path of the model itself is empty."""
    return f"{path}.{name}" if path else name


def parent_of(path: str) -> str:
    """Return the path of the parent module."""
    return path.rpartition(".")[0]


def is_under(path: str, ancestor: str) -> bool:
    """Return True if `path` is `ancestor` or a submodule of it."""
    return not ancestor or path == ancestor or path.startswith(ancestor + ".")


def children_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the named children of a module, or of the module inside a `torch.compile` wrapper."""
    return [(name, child) for name, child in unwrap(module)._modules.items() if child is not None]


def is_plain_container(module: nn.Module) -> bool:
    """Return True for a list or dict of modules, which has no forward and is therefore no block."""
    return type(unwrap(module)) in (nn.ModuleList, nn.ModuleDict)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_bare(module: nn.Module) -> bool:
    """Return True if no submodule has parameters, as in an embedding, a linear layer or a norm."""
    return not any(_has_parameters(child) for _, child in children_of(module))


def _signature(module: nn.Module) -> frozenset[str]:
    return frozenset(clean_name(name) for name, _ in module.named_parameters())


def config_of(module: nn.Module) -> Any:
    """Return the Hugging Face configuration of a module (an object with ``get_text_config``), or None."""
    config = unwrap(module).__dict__.get("config")
    return config if callable(getattr(config, "get_text_config", None)) else None


@dataclass(frozen=True)
class Stack:
    """Container whose numbered children repeat one structure, such as the blocks of a transformer."""

    path: str
    blocks: tuple[str, ...]  # module paths; a block that is registered twice is listed once
    length: int  # number of children, including those without parameters
    num_params: int
    classes: str  # class names of the blocks, for messages
    bare: bool  # True if no block has submodules
    config: Any  # Hugging Face configuration of the closest enclosing module that has one

    @property
    def pattern(self) -> str:
        """Pattern of the block paths, as `LayerMap.from_model` takes it."""
        below = self.blocks[0][len(join(self.path, "")) if self.path else 0 :]
        return join(self.path, ".".join("*" if part.isdigit() else part for part in below.split(".")))


def find_stacks(model: nn.Module, counts: Collection[int] = ()) -> list[Stack]:
    """Return all stacks that are not inside a block of another stack, in the order of registration.

    Args:
        model: any module.
        counts: numbers of blocks given by the model's configuration. A container of as many children is a stack
            even if no class occurs twice (a single block, or two of different classes).
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
    with_parameters = [(name, child) for name, child in reversed(distinct.values()) if _has_parameters(child)]
    if any(is_plain_container(child) for _, child in with_parameters):
        return None

    blocks = [(name, child) for name, child in with_parameters if not _is_bare(child)]
    bare = not blocks
    if bare:
        signatures = {_signature(child) for _, child in with_parameters}
        if len(with_parameters) != len(distinct) or len(signatures) != 1:
            return None
        blocks = with_parameters
    elif isinstance(unwrap(module), nn.Sequential):
        blocks = _without_stem_and_head(blocks)

    classes = Counter(type(unwrap(child)).__name__ for _, child in blocks)
    repeats = max(classes.values(), default=0) >= 2
    # A single block, or two of different classes, count as a stack only if the configuration gives their number.
    if not repeats and (bare or len(children) not in counts):
        return None
    inner = [] if bare else _blocks_of_stages(path, blocks)
    if inner:
        blocks, length = inner, len(inner)
        classes = Counter(type(unwrap(child)).__name__ for _, child in blocks)
    else:
        length = len(children)
    parameters = {id(p): p.numel() for _, child in blocks for p in child.parameters()}
    return Stack(
        path=path,
        blocks=tuple(join(path, name) for name, _ in blocks),
        length=length,
        num_params=sum(parameters.values()),
        classes="/".join(classes),
        bare=bare,
        config=config,
    )


def _blocks_of_stages(path: str, stages: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Return the blocks of all stages, with their paths below `path`; an empty list if these are blocks themselves.

    The stages of a vision backbone differ in width, and each has a stack of blocks. The experts of a mixture are a
    stack inside blocks of equal size, or not inside all of them.
    """
    sizes = [sum(p.numel() for p in stage.parameters()) for _, stage in stages]
    if max(sizes) < _STAGES_DIFFER * min(sizes):
        return []
    found = []
    for name, stage in stages:
        stacks = [stack for stack in _stacks_below(join(path, name), stage) if not stack.bare]
        if len(stacks) != 1:
            return []
        modules = dict(walk(stage, name))
        start = len(join(path, "")) if path else 0
        found += [(block[start:], modules[block[start:]]) for block in stacks[0].blocks]
    return found


def _stacks_below(path: str, module: nn.Module) -> list[Stack]:
    """Return the stacks inside a module; a container of one block, or of equal ones, counts."""
    stacks = []
    for name, child in children_of(module):
        below = join(path, name)
        length = len(children_of(child))
        stack = _as_stack(below, child, None, {length})
        stacks += [stack] if stack is not None else _stacks_below(below, child)
    return stacks


def _without_stem_and_head(blocks: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Drop modules of an `nn.Sequential` whose class occurs once and that share no parameter name with the rest."""
    classes = Counter(type(unwrap(child)) for _, child in blocks)
    signatures = [_signature(child) for _, child in blocks]
    names = Counter(name for signature in signatures for name in signature)
    return [
        (name, child)
        for (name, child), signature in zip(blocks, signatures, strict=True)
        if classes[type(unwrap(child))] > 1 or any(names[parameter] > 1 for parameter in signature)
    ]
