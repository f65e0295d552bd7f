"""Finds a model's blocks by what it is made of, without a table of class names.

A *stack* is a container of numbered children that repeat one structure and lie in no other stack's
block. A plain model with one stack is clear. In a Hugging Face model with several (a vision tower, an
audio encoder), the language model's is the one that lies beside the input embedding, belongs to a
module of the text configuration and has as many blocks as that configuration says. What remains in doubt is
not guessed: the error lists every stack and the pattern to pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from grass.errors import LayerDiscoveryError
from grass.layer_stacks import (
    Stack,
    children_of,
    config_of,
    find_stacks,
    is_under,
    join,
    parent_of,
    unwrap,
    walk,
)

# Where configurations say how many blocks there are; `num_hidden_layers` alone covers nearly all.
_COUNT_FIELDS = (
    "num_hidden_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
)


def discover(model: nn.Module) -> list[str]:
    """The paths of the blocks that are the model's layers, in order; an encoder's before the decoder's.

    Args:
        model: the model, wrapped or not.

    Raises:
        LayerDiscoveryError: no stack, or several without a reason to prefer one.
    """
    stacks = candidates(model)
    if not stacks:
        raise LayerDiscoveryError(
            f"{title(model)} has no repeated blocks: no module holds numbered children of the same kind. "
            + how_to_pass(stacks)
        )
    language_models = _language_models(model)
    if len(language_models) > 1:
        places = ", ".join(repr(path) for path, _ in language_models)
        raise _doubt(model, stacks, f"it holds {len(language_models)} language models ({places})")
    if not language_models:
        if len(stacks) > 1:
            raise _doubt(model, stacks, f"{len(stacks)} stacks fit, and it has no language model to go by")
        return list(stacks[0].blocks)

    root_path, root = language_models[0]
    paths: dict[int, str] = {}
    for path, module in walk(model):
        paths.setdefault(id(unwrap(module)), path)
    inside = [stack for stack in stacks if is_under(stack.path, root_path)]
    ends = _encoder_and_decoder(root, paths)
    if ends:
        chosen = [_choose_one(inside, _text_configs(config), near=path, root=path) for path, config in ends]
    else:
        embedding = paths.get(id(unwrap(_token_embedding(root) or root)), root_path)
        chosen = [_choose_one(inside, _text_configs(root.config), near=embedding, root=root_path)]
    found = [stack for stack in chosen if stack is not None]
    if len(found) < len(chosen):
        raise _doubt(model, stacks, "none of these stacks is clearly the language model's")
    return [path for stack in found for path in stack.blocks]


def candidates(model: nn.Module) -> list[Stack]:
    """The stacks that could be the layers: of single modules (a list of linear maps) only if there is no other."""
    counts = {
        count for _, root in _language_models(model) for count in _expected_counts(_text_configs(root.config))
    }
    stacks = find_stacks(model, counts)
    return [stack for stack in stacks if not stack.bare] or stacks


def _encoder_and_decoder(root: Any, paths: dict[int, str]) -> list[tuple[str, Any]]:
    """Path and configuration of both halves of an encoder-decoder; of the decoder behind a foreign tower."""
    if not getattr(root.config, "is_encoder_decoder", False):
        return []
    encoder, decoder = root.get_encoder(), root.get_decoder()
    # A multimodal wrapper gives its whole text model as the decoder: its own decoder is meant.
    while decoder is not encoder and any(module is encoder for module in decoder.modules()):
        inner = decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder
        if inner is decoder:
            return []
        decoder = inner
    if encoder is decoder or not {id(unwrap(encoder)), id(unwrap(decoder))} <= paths.keys():
        return []
    encoder, decoder = unwrap(encoder), unwrap(decoder)
    ends = [(paths[id(end)], config_of(end) or root.config) for end in (encoder, decoder)]
    # An image or speech encoder of another make in front of a text decoder is a tower, not a second stack.
    kin = type(config_of(encoder)) is type(config_of(decoder)) or _token_embedding(encoder) is not None
    return ends if kin else ends[1:]


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
    counts = _expected_counts(configs)
    beside = [stack for stack in remaining if parent_of(stack.path) == home]
    fitting = [stack for stack in remaining if stack.length in counts]
    both = [stack for stack in beside if stack in fitting]
    # One witness is enough only if the other is silent: a pruned model's blocks no longer fit, and some
    # models keep theirs deeper. If place and length point at different stacks, that is doubt.
    if both:
        chosen = both
    elif beside and fitting:
        chosen = []
    else:
        chosen = beside or fitting or (stacks if len(stacks) == 1 else [])
    return chosen[0] if len(chosen) == 1 else None


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


def _expected_counts(configs: Sequence[Any]) -> set[int]:
    counts = {getattr(config, field, None) for config in configs for field in _COUNT_FIELDS}
    return {count for count in counts if isinstance(count, int) and count > 0}


def _language_models(model: nn.Module) -> list[tuple[str, Any]]:
    """The outermost Hugging Face models that embed tokens, each once, with their paths."""
    found: dict[int, tuple[str, Any]] = {}

    def visit(path: str, module: nn.Module) -> None:
        inner = unwrap(module)
        if config_of(inner) is not None and hasattr(type(inner), "get_input_embeddings"):
            if _token_embedding(inner) is not None:
                found.setdefault(id(inner), (path, inner))
            return
        for name, child in children_of(inner):
            visit(join(path, name), child)

    visit("", model)
    # A wrapper may also register a part of the model that it wraps.
    inner_ids = {id(part) for _, root in found.values() for part in root.modules() if part is not root}
    return [entry for key, entry in found.items() if key not in inner_ids]


def _token_embedding(module: Any) -> nn.Module | None:
    try:
        embedding = module.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    if not isinstance(embedding, nn.Module):
        return None
    # An adapter may wrap the embedding; a vision tower's "input embedding" is a convolution.
    return embedding if any(isinstance(part, nn.Embedding) for part in embedding.modules()) else None


def _doubt(model: nn.Module, stacks: Sequence[Stack], why: str) -> LayerDiscoveryError:
    return LayerDiscoveryError(
        f"cannot tell which blocks of {title(model)} are its layers: {why}\n"
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
    if not stacks:
        passing = 'Pass pattern="model.layers.*" with the path of the blocks'
    elif len(stacks) == 1:
        passing = f'Pass pattern="{stacks[0].pattern}" if these are the ones'
    else:
        largest = max(stacks, key=lambda stack: stack.num_params)
        passing = f'Pass the pattern of the right one, for example pattern="{largest.pattern}"'
    return (
        f"{passing} (`*` stands for one part of a path), a list of patterns, or a list of the block modules."
    )


def title(model: nn.Module) -> str:
    """The model's class, by which a message calls it."""
    return type(unwrap(model)).__name__
