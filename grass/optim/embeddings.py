"""Frozen embeddings under reentrant activation checkpointing.

Reentrant checkpointing computes gradients only if an input of the block requires grad. With a frozen
embedding none does, and every gradient above would silently be lost. So the embedding's output is made to
require grad there; elsewhere it is left alone, and backward ends at the lowest active layer.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def keep_graph_through_frozen_embeddings(model: nn.Module) -> list[RemovableHandle]:
    """Hook the input embeddings that the model, or a part of it such as a decoder, can be asked for."""
    embeddings: dict[nn.Module, None] = {}  # a set that keeps its order
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
    """The hook; it holds its model weakly, but goes with it through copies and pickles."""

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
    """Whether a transformers model checkpoints its blocks in the reentrant way."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and getattr(module, "gradient_checkpointing", False):
            return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
    return False
