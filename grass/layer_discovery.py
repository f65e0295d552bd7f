"""Finds a model's blocks by what it is made of, without a table of class names.

A *stack* is a container of numbered children that repeat one structure and lie in no other stack's
block. A plain model with one stack is clear. In a Hugging Face model with several (a vision tower, an
audio encoder), the language model's is the one that lies beside the input embedding, belongs to a
module of the text configuration and has as many blocks as that configuration says. What remains in doubt is
not guessed: the error lists every stack and the pattern to pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from grass.errors import LayerDiscoveryError

COMPILED = "_orig_mod"  # where torch.compile keeps the module that it wraps

# Where configurations say how many blocks there are; `num_hidden_layers` alone covers nearly all.
_COUNT_FIELDS = (
    "num_hidden_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
)


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
    for name, child in _children(module):
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


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in unwrap(module)._modules.items() if child is not None]


def _holds_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_bare(module: nn.Module) -> bool:
    """Whether all parameters are the module's own: an embedding, a linear map, a norm, no block."""
    return not any(_holds_parameters(child) for _, child in _children(module))


def _signature(module: nn.Module) -> frozenset[str]:
    return frozenset(clean_name(name) for name, _ in module.named_parameters())


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


def find_stacks(model: nn.Module) -> list[Stack]:
    """All stacks of a model that lie in no other stack's block, in the order of registration."""
    language_models = [module for _, module in _language_models(model)]
    counts = {count for module in language_models for count in _expected_counts(module.config)}
    stacks: list[Stack] = []
    seen: set[int] = set()

    def visit(path: str, module: nn.Module, config: Any) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        config = _config_of(module) or config
        stack = _as_stack(path, module, config, counts)
        if stack is not None:
            stacks.append(stack)
            return
        for name, child in _children(module):
            visit(join(path, name), child, config)

    visit("", model, None)
    return stacks


def _as_stack(path: str, module: nn.Module, config: Any, counts: set[int]) -> Stack | None:
    children = _children(module)
    if not children or not all(name.isdigit() for name, _ in children):
        return None
    distinct = {id(unwrap(child)): (name, child) for name, child in reversed(children)}
    holding = [(name, child) for name, child in reversed(distinct.values()) if _holds_parameters(child)]
    # A list has no forward: a list of lists is a way of keeping house, not a stack of blocks.
    if any(type(unwrap(child)) in (nn.ModuleList, nn.ModuleDict) for _, child in holding):
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
    # A single block, or two of different kinds, repeat nothing: then the configuration must vouch for them.
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


def _config_of(module: nn.Module) -> Any:
    """The Hugging Face configuration that a module carries, known by what it can do."""
    config = unwrap(module).__dict__.get("config")
    return config if callable(getattr(config, "get_text_config", None)) else None


def _text_configs(config: Any) -> list[Any]:
    """The configurations of everything that reads or writes text, the configuration itself last."""
    found = []
    for end in ({}, {"decoder": True}, {"encoder": True}):
        try:
            found.append(config.get_text_config(**end))
        except ValueError:  # transformers' word for "several fit"
            continue
    found += [part for part in (getattr(config, "encoder", None), getattr(config, "decoder", None)) if part]
    parts = [
        part for part in found if part is not config and callable(getattr(part, "get_text_config", None))
    ]
    return [*parts, config]


def _expected_counts(config: Any) -> set[int]:
    counts = {getattr(part, field, None) for part in _text_configs(config) for field in _COUNT_FIELDS}
    return {count for count in counts if isinstance(count, int) and count > 0}


def _language_models(model: nn.Module) -> list[tuple[str, Any]]:
    """The outermost Hugging Face models that embed tokens, with their paths."""
    found: list[tuple[str, Any]] = []

    def visit(path: str, module: nn.Module) -> None:
        inner = unwrap(module)
        if _config_of(inner) is not None and hasattr(type(inner), "get_input_embeddings"):
            if _token_embedding(inner) is not None:
                found.append((path, inner))
            return
        for name, child in _children(inner):
            visit(join(path, name), child)

    visit("", model)
    return found


def _token_embedding(module: Any) -> nn.Module | None:
    try:
        embedding = module.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    if not isinstance(embedding, nn.Module):
        return None
    # An adapter may wrap the embedding; a vision tower's "input embedding" is a convolution.
    return embedding if any(isinstance(part, nn.Embedding) for part in embedding.modules()) else None


def choose_stacks(model: nn.Module, stacks: Sequence[Stack]) -> list[Stack]:
    """The stacks whose blocks are the model's layers: one, or encoder and decoder in that order.

    Args:
        model: the model, wrapped or not.
        stacks: all of its stacks, from `find_stacks`.

    Raises:
        LayerDiscoveryError: no stack, or several without a reason to prefer one.
    """
    if not stacks:
        raise LayerDiscoveryError(
            f"{_title(model)} has no repeated blocks: no module holds numbered children of the same kind. "
            + how_to_pass(stacks)
        )
    language_models = _language_models(model)
    if len(language_models) > 1:
        places = ", ".join(repr(path) for path, _ in language_models)
        raise doubt(model, stacks, f"it holds {len(language_models)} language models ({places})")
    stacks = [stack for stack in stacks if not stack.bare] or list(stacks)
    if not language_models:
        if len(stacks) == 1:
            return list(stacks)
        raise doubt(model, stacks, f"{len(stacks)} stacks of repeated blocks fit")

    root_path, root = language_models[0]
    paths = {id(unwrap(module)): path for path, module in walk(model)}
    inside = [stack for stack in stacks if is_under(stack.path, root_path)]
    chosen = None
    if getattr(root.config, "is_encoder_decoder", False):
        chosen = _choose_encoder_decoder(root, inside, paths)
    if chosen is None:
        embedding = paths.get(id(unwrap(_token_embedding(root) or root)), root_path)
        chosen = [_choose_one(inside, _text_configs(root.config), near=embedding, root=root_path)]
    if None in chosen:
        raise doubt(
            model,
            stacks,
            f"{len(stacks)} stack{'s' * (len(stacks) > 1)} of repeated blocks found, "
            "none is clearly the language model's",
        )
    return [stack for stack in chosen if stack is not None]


def _choose_encoder_decoder(
    root: Any, stacks: list[Stack], paths: dict[int, str]
) -> list[Stack | None] | None:
    ends = []
    for end in ("get_encoder", "get_decoder"):
        module = getattr(root, end)() if hasattr(root, end) else None
        if not isinstance(module, nn.Module) or module is root or id(unwrap(module)) not in paths:
            return None
        ends.append(unwrap(module))
    encoder, decoder = ends
    if encoder is decoder:
        return None
    chosen = []
    for module in ends:
        path = paths[id(module)]
        config = _config_of(module) or root.config
        scope = [stack for stack in stacks if is_under(stack.path, path)]
        chosen.append(_choose_one(scope, _text_configs(config), near=path, root=path))
    # An image or speech encoder of another make in front of a text decoder is a tower, not a second stack.
    kin = type(_config_of(encoder)) is type(_config_of(decoder)) or _token_embedding(encoder) is not None
    return chosen if kin else chosen[1:]


def _choose_one(stacks: list[Stack], configs: Sequence[Any], near: str, root: str) -> Stack | None:
    """Narrows the stacks by place, owner and length; None if that leaves doubt.

    Args:
        stacks: the candidates.
        configs: the text configurations, most specific first.
        near: path of the input embedding, or of the module to search.
        root: path of the language model, where climbing from `near` ends.
    """
    home = near
    while home != root and not any(is_under(stack.path, home) for stack in stacks):
        home = parent_of(home)
    remaining = [stack for stack in stacks if is_under(stack.path, home)]
    for config in configs:
        owned = [stack for stack in remaining if type(stack.config) is type(config)]
        if owned:
            remaining = owned
            break
    else:
        return None
    counts = {count for config in configs for count in _expected_counts(config)}
    fitting = [stack for stack in remaining if stack.length in counts]
    beside = [stack for stack in fitting or remaining if parent_of(stack.path) == home]
    if fitting:
        for choice in (fitting, beside):
            if len(choice) == 1:
                return choice[0]
        return None
    # Pruned or grown without a word to the configuration: the place alone must tell.
    return beside[0] if len(beside) == 1 else remaining[0] if len(remaining) == len(stacks) == 1 else None


def doubt(model: nn.Module, stacks: Sequence[Stack], why: str) -> LayerDiscoveryError:
    """The error that says what was found and what to pass."""
    return LayerDiscoveryError(
        f"cannot tell which blocks of {_title(model)} are its layers: {why}\n"
        f"{describe(stacks)}\n{how_to_pass(stacks)}"
    )


def describe(stacks: Sequence[Stack]) -> str:
    """One aligned line a stack: pattern, blocks, parameters, classes."""
    width = max((len(stack.pattern) for stack in stacks), default=0)
    return "\n".join(
        f"  {stack.pattern:<{width}}  {len(stack.blocks):>4} blocks  {stack.num_params:>14,} parameters"
        f"  {stack.classes}"
        for stack in stacks
    )


def how_to_pass(stacks: Sequence[Stack]) -> str:
    """The remedy, with a pattern of this model where there is one."""
    largest = max(stacks, key=lambda stack: stack.num_params, default=None)
    pattern = largest.pattern if largest is not None else "model.layers.*"
    return (
        f'Pass pattern="{pattern}" (`*` stands for one part of a module path), a list of such patterns, '
        "or a list of the block modules themselves."
    )


def _title(model: nn.Module) -> str:
    return type(unwrap(model)).__name__
