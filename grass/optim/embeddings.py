"""Frozen embeddings under reentrant activation checkpointing.

Reentrant checkpointing computes gradients only if an input of the block requires grad. With a frozen embedding
none does, and all gradients of the blocks would silently be missing. A hook therefore makes the embedding's output
require grad, only with reentrant checkpointing: otherwise backward ends at the lowest active layer.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def keep_graph_through_frozen_embeddings(model: nn.Module) -> list[RemovableHandle]:
    """Register a forward hook on the input embeddings of the model and of its parts, such as a decoder."""
    embeddings: dict[nn.Module, None] = {}  # an ordered set
    for part in model.modules():
        get_input_embeddings = getattr(part, "get_input_embeddings", None)
        if get_input_embeddings is None:
            continue
        try:
            embedding = get_input_embeddings()
        except (NotImplementedError, AttributeError):
            continue
        if isinstance(embedding, nn.Module):
            embeddings[embedding] = None
    return [embedding.register_forward_hook(_RequireGrad(model)) for embedding in embeddings]


class _RequireGrad:
    """Forward hook; holds its model by a weak reference, which follows it through copies and pickles."""

    def __init__(self, model: nn.Module | None) -> None:
        self._model_ref = None if model is None else weakref.ref(model)

    def __call__(self, module: nn.Module, _: Any, output: Any) -> None:
        model = None if self._model_ref is None else self._model_ref()
        if model is None or not (model.training and torch.is_grad_enabled()):
            return
        if isinstance(output, Tensor) and not output.requires_grad and uses_reentrant_checkpointing(model):
            output.requires_grad_(True)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": None if self._model_ref is None else self._model_ref()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state["model"]
        self._model_ref = None if model is None else weakref.ref(model)


def uses_reentrant_checkpointing(model: nn.Module) -> bool:
    """Return if a transformers model uses reentrant activation checkpointing."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and getattr(module, "gradient_checkpointing", False):
            return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
    return False
