"""The loss of a planned step: what `grass finetune` trains with, as a GPU computes it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from grass.plan.models import MisfitError, PlanError, configuration

LOSSES = ("chunked", "full")


def loss_of(model: Any, ids: Tensor, kind: str) -> Tensor:
    """The mean cross-entropy of the next tokens.

    Args:
        model: a causal language model of transformers, or one that peft has wrapped.
        ids: int64 [batch, seq]; also the labels.
        kind: ``"full"``: the model's own, with logits [batch, seq, vocabulary] in the model's dtype and in float32.
            ``"chunked"``: `grass.finetune.loss.chunked_loss`, in which those never exist.

    Raises:
        PlanError: the loss cannot be had with this version of torch.
        MisfitError: nor for this model.
    """
    if kind == "full":
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss
    from grass.finetune.loss import chunked_loss

    if not hasattr(nn, "LinearCrossEntropyOptions"):
        raise PlanError(
            f"the chunked loss needs torch 2.13 or later, not {torch.__version__}: pass --loss full"
        )
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if _caps_logits(causal.config) or not isinstance(causal.get_output_embeddings(), nn.Linear):
        raise MisfitError(
            "the model's logits are not a linear layer's, and cannot be chunked: pass --loss full"
        )
    with _AsOnGpu():
        return chunked_loss(causal, {"input_ids": ids, "labels": ids})


def can_be_chunked(name: str) -> bool:
    """Whether a model's configuration says nothing against the chunked loss.

    Raises:
        PlanError: there is no such model.
    """
    return not _caps_logits(configuration(name))


def _caps_logits(config: Any) -> bool:
    return getattr(config.get_text_config(), "final_logit_softcapping", None) is not None


class _AsOnGpu(TorchFunctionMode):
    """Lets ``F.linear_cross_entropy`` allocate what it does on a GPU: on a CPU it makes float32 copies of the head."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear_cross_entropy:
            hidden, weight, targets = args
            per_token = kwargs["reduction"] == "none"
            rows = min(kwargs["options"].batch_chunk_size, len(hidden))
            return _LinearCrossEntropy.apply(hidden, weight, targets, rows, per_token)
        return func(*args, **kwargs)


class _LinearCrossEntropy(torch.autograd.Function):
    """torch's chunked path by its allocations and matrix products, policy ``"compact"``, which GPUs get.

    A loss for each token computes gradients in backward, from logits made once more; a scalar one in forward.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, per_token: bool
    ) -> Tensor:
        ctx.rows, ctx.grads = rows, None
        if per_token:
            ctx.save_for_backward(hidden.detach(), weight.detach(), targets)
            logits = _logits(hidden, weight, rows)
            for start in range(0, len(hidden), rows):
                _product_into(logits, hidden[start : start + rows], weight)
            return hidden.new_empty(len(hidden))
        ctx.grads = _gradients(hidden, weight, targets, rows, ctx.needs_input_grad)
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if ctx.grads is None:
            hidden, weight, targets = ctx.saved_tensors
            ctx.grads = _gradients(hidden, weight, targets, ctx.rows, ctx.needs_input_grad)
        taken, ctx.grads = ctx.grads, None
        return (*taken, None, None, None)


def _logits(hidden: Tensor, weight: Tensor, rows: int) -> Tensor:
    """The buffer of a chunk, [rows, vocabulary], in float32 where the model is in less."""
    dtype = torch.float32 if hidden.dtype.itemsize < 4 else hidden.dtype
    return hidden.new_empty(rows, len(weight), dtype=dtype)


def _product_into(logits: Tensor, chunk: Tensor, weight: Tensor) -> None:
    """The product without memory of its own: a GPU writes it in the buffer's type."""
    place = logits.view(chunk.dtype)[: len(chunk), : len(weight)]
    torch.mm(chunk, weight.T, out=place)


def _gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden states and weight, if needed."""
    logits = _logits(hidden, weight, rows)
    low = hidden.dtype != logits.dtype
    grad_hidden = torch.empty_like(hidden) if needed[0] else None
    grad_weight = torch.zeros_like(weight) if needed[1] else None
    # held to the end: the chunk's hidden states in float32
    wide = hidden.new_empty(rows, hidden.shape[1], dtype=logits.dtype) if low and needed[1] else None
    for start in range(0, len(hidden), rows):
        chunk, target = hidden[start : start + rows], targets[start : start + rows]
        _product_into(logits, chunk, weight)
        multiplied = logits[: len(chunk)].to(hidden.dtype)  # the buffer itself, if of that type
        if grad_hidden is not None:
            place = grad_hidden[start : start + rows]
            torch.mul(torch.index_select(weight, 0, target), 1.0, out=place)
            torch.addmm(place, multiplied, weight, alpha=-1, out=place)
        if grad_weight is not None:
            torch.addmm(grad_weight, multiplied.T, chunk, alpha=-1, out=grad_weight)
        del multiplied
    del wide, logits
    return grad_hidden, grad_weight
