"""Layer discovery: find the transformer blocks of a model from its structure, without a table of class names.

A *stack* is a container of numbered children that repeat one structure and are not inside a block of another
stack. If a model has one stack, its blocks are the layers. In a Hugging Face model with several (a vision tower,
an audio encoder), the stack of the language model is next to the input embedding, belongs to a module with the text
configuration, and has as many blocks as that configuration gives. There is no guess if this leaves several: the error
lists every stack and the pattern to pass.
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

# Fields of configurations that give the number of blocks; nearly all have `num_hidden_layers`.
_COUNT_FIELDS = (
    "num_hidden_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
)


def discover(model: nn.Module) -> list[str]:
    """Return the paths of the model's layers, in order; layers of an encoder come before those of the decoder.

    Args:
        model: the model, compiled or not.

    Raises:
        LayerDiscoveryError: there is no stack, or it is ambiguous which one holds the layers.
    """
    stacks = candidates(model)
    if not stacks:
        raise LayerDiscoveryError(
            f"{title(model)} has no repeated blocks: no module has numbered children of the same class. "
            + how_to_pass(stacks)
        )
    language_models = _language_models(model)
    if len(language_models) > 1:
        names = ", ".join(repr(path) for path, _ in language_models)
        raise _ambiguous(model, stacks, f"it contains {len(language_models)} language models ({names})")
    if not language_models:
        if len(stacks) > 1:
            raise _ambiguous(
                model,
                stacks,
                f"it has {len(stacks)} stacks, and no Hugging Face language model among its modules",
            )
        return list(stacks[0].blocks)

    root_path, root = language_models[0]
    paths: dict[int, str] = {}
    for path, module in walk(model):
        paths.setdefault(id(unwrap(module)), path)
    inside = [stack for stack in stacks if is_under(stack.path, root_path)]
    halves = _encoder_and_decoder(root, paths)
    if halves:
        chosen = [_choose_one(inside, _text_configs(config), near=path, root=path) for path, config in halves]
    else:
        embedding = paths.get(id(unwrap(_token_embedding(root) or root)), root_path)
        chosen = [_choose_one(inside, _text_configs(root.config), near=embedding, root=root_path)]
    certain = [stack for stack in chosen if stack is not None]
    if len(certain) < len(chosen):
        raise _ambiguous(model, stacks, "none of these stacks clearly belongs to the language model")
    return [path for stack in certain for path in stack.blocks]


def candidates(model: nn.Module) -> list[Stack]:
    """Return the stacks that may be the layers; stacks of bare modules (linear layers) only if there are no others."""
    counts = {
        count for _, root in _language_models(model) for count in _expected_counts(_text_configs(root.config))
    }
    stacks = find_stacks(model, counts)
    return [stack for stack in stacks if not stack.bare] or stacks


def _encoder_and_decoder(root: Any, paths: dict[int, str]) -> list[tuple[str, Any]]:
    """Return path and configuration of encoder and decoder; of the decoder alone after an image or speech encoder.

    The list is empty if the model is no encoder-decoder.
    """
    if not getattr(root.config, "is_encoder_decoder", False):
        return []
    encoder, decoder = root.get_encoder(), root.get_decoder()
    # A multimodal wrapper returns its whole text model as the decoder: take the decoder of that model.
    while decoder is not encoder and any(module is encoder for module in decoder.modules()):
        inner = decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder
        if inner is decoder:
            return []
        decoder = inner
    if encoder is decoder or not {id(unwrap(encoder)), id(unwrap(decoder))} <= paths.keys():
        return []
    encoder, decoder = unwrap(encoder), unwrap(decoder)
    halves = [(paths[id(half)], config_of(half) or root.config) for half in (encoder, decoder)]
    # An encoder of another family that embeds no tokens reads images or speech: its blocks are not text layers.
    is_text = type(config_of(encoder)) is type(config_of(decoder)) or _token_embedding(encoder) is not None
    return halves if is_text else halves[1:]


def _choose_one(stacks: list[Stack], configs: Sequence[Any], near: str, root: str) -> Stack | None:
    """Choose a stack by position, configuration and length; return None if the choice is ambiguous.

    Args:
        stacks: the candidates.
        configs: the text configurations, most specific first.
        near: path of the input embedding, or of the module to search.
        root: path of the language model, at which the search for an ancestor of `near` ends.
    """
    ancestor = near
    while ancestor != root and not any(is_under(stack.path, ancestor) for stack in stacks):
        ancestor = parent_of(ancestor)
    remaining = [stack for stack in stacks if is_under(stack.path, ancestor)]
    for config in configs:
        of_config = [stack for stack in remaining if type(stack.config) is type(config)]
        if of_config:
            remaining = of_config
            break
    else:
        return None
    counts = _expected_counts(configs)
    adjacent = [stack for stack in remaining if parent_of(stack.path) == ancestor]
    of_length = [stack for stack in remaining if stack.length in counts]
    both = [stack for stack in adjacent if stack in of_length]
    # Either criterion is enough if no stack meets the other: a pruned model has fewer blocks than its configuration
    # gives, and some models keep their blocks deeper. If they select different stacks, the choice is ambiguous.
    if both:
        chosen = both
    elif adjacent and of_length:
        chosen = []
    else:
        chosen = adjacent or of_length or (stacks if len(stacks) == 1 else [])
    return chosen[0] if len(chosen) == 1 else None


def _text_configs(config: Any) -> list[Any]:
    """Return the configurations of all parts that read or write text, the given configuration last."""
    parts = []
    for half in ({}, {"decoder": True}, {"encoder": True}):
        try:
            parts.append(config.get_text_config(**half))
        except ValueError:  # transformers raises it if several configurations match
            continue
    parts += [part for part in (getattr(config, "encoder", None), getattr(config, "decoder", None)) if part]
    text_parts = [
        part for part in parts if part is not config and callable(getattr(part, "get_text_config", None))
    ]
    return [*text_parts, config]


def _expected_counts(configs: Sequence[Any]) -> set[int]:
    counts = {getattr(config, field, None) for config in configs for field in _COUNT_FIELDS}
    return {count for count in counts if isinstance(count, int) and count > 0}


def _language_models(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the outermost Hugging Face models that embed tokens, each once, with their paths."""
    outermost: dict[int, tuple[str, Any]] = {}

    def visit(path: str, module: nn.Module) -> None:
        inner = unwrap(module)
        if config_of(inner) is not None and hasattr(type(inner), "get_input_embeddings"):
            if _token_embedding(inner) is not None:
                outermost.setdefault(id(inner), (path, inner))
            return
        for name, child in children_of(inner):
            visit(join(path, name), child)

    visit("", model)
    # A wrapper may also register a submodule of the model that it wraps.
    inner_ids = {id(part) for _, root in outermost.values() for part in root.modules() if part is not root}
    return [entry for key, entry in outermost.items() if key not in inner_ids]


def _token_embedding(module: Any) -> nn.Module | None:
    try:
        embedding = module.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    if not isinstance(embedding, nn.Module):
        return None
    # An adapter may wrap the embedding; the "input embedding" of a vision tower is a convolution.
    return embedding if any(isinstance(part, nn.Embedding) for part in embedding.modules()) else None


def _ambiguous(model: nn.Module, stacks: Sequence[Stack], reason: str) -> LayerDiscoveryError:
    return LayerDiscoveryError(
        f"cannot determine which blocks of {title(model)} are its layers: {reason}\n"
        f"{describe(stacks)}\n{how_to_pass(stacks)}"
    )


def describe(stacks: Sequence[Stack]) -> str:
    """Return an aligned line for each stack: pattern, blocks, parameters, classes."""
    width = max((len(stack.pattern) for stack in stacks), default=0)
    return "\n".join(
        f"  {stack.pattern:<{width}}  {len(stack.blocks):>4} blocks  {stack.num_params:>14,} parameters"
        f"  {stack.classes}"
        for stack in stacks
    )


def how_to_pass(stacks: Sequence[Stack]) -> str:
    """Return the remedy for a message, with a pattern of this model if there is one."""
    if not stacks:
        remedy = 'Pass pattern="model.layers.*" with the path of the blocks'
    elif len(stacks) == 1:
        remedy = f'Pass pattern="{stacks[0].pattern}" if these are the layers'
    else:
        largest = max(stacks, key=lambda stack: stack.num_params)
        remedy = f'Pass the pattern of the layers, for example pattern="{largest.pattern}"'
    return (
        f"{remedy} (`*` matches one component of a path), a list of patterns, or a list of the block modules."
    )


def title(model: nn.Module) -> str:
    """Return the class name of the model, without wrapper, for messages."""
    return type(unwrap(model)).__name__
