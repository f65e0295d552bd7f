"""Loss of a predicted step: that of `grass finetune`, with the allocations of a GPU."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from grass.plan.models import MisfitError, PlanError, configuration

Loss = Literal["chunked", "full"]


def loss_of(model: Any, ids: Tensor, kind: Loss) -> Tensor:
    """Compute the mean next-token cross-entropy.

    Args:
        model: a causal language model of transformers, possibly wrapped by peft.
        ids: int64 [batch, seq]; also the labels.
        kind: ``"full"`` for the loss of the model, with logits [batch, seq, vocabulary] in the dtype of the model and
            in float32; ``"chunked"`` for `grass.finetune.loss.chunked_loss`, which never materializes them.

    Raises:
        PlanError: the version of torch does not have the chunked loss.
        MisfitError: the chunked loss does not support the model.
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
            "the logits of the model are not the output of a linear layer, so the loss cannot be chunked: pass "
            "--loss full"
        )
    with _AsOnGpu():
        return chunked_loss(causal, {"input_ids": ids, "labels": ids})


def loss_of_run(name: str) -> tuple[Loss, str]:
    """Return the loss that `grass finetune --loss auto` uses on a GPU, and the reason if it may be unexpected.

    It is chunked, unless the vocabulary is small, or the model or torch does not allow it.

    Args:
        name: a preset, a folder or a name on the hub.

    Raises:
        PlanError: there is no such model.
    """
    from grass.finetune.loss import LEAST_VOCABULARY

    config = configuration(name)
    if _caps_logits(config):
        return "full", "the model caps its logits, which cannot be chunked"
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        return "full", f"torch {torch.__version__} has no chunked loss (2.13 or later has)"
    vocabulary = getattr(config.get_text_config(), "vocab_size", 0)
    return "full" if vocabulary < LEAST_VOCABULARY else "chunked", ""


def _caps_logits(config: Any) -> bool:
    return getattr(config.get_text_config(), "final_logit_softcapping", None) is not None


class _AsOnGpu(TorchFunctionMode):
    """Make ``F.linear_cross_entropy`` allocate as on a GPU; on a CPU it makes float32 copies of the head."""

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
    """Allocations and matrix products of torch's chunked loss with policy ``"compact"``, which is used on GPUs.

    A loss per token computes gradients in backward, with the logits computed again; a scalar loss in forward.
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
        grads_of_inputs, ctx.grads = ctx.grads, None
        return (*grads_of_inputs, None, None, None)


def _logits(hidden: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Return the buffer for the logits of a chunk, [rows, vocabulary], at least in float32."""
    dtype = torch.float32 if hidden.dtype.itemsize < 4 else hidden.dtype
    return hidden.new_empty(rows, len(weight), dtype=dtype)


def _product_into(logits: Tensor, chunk: Tensor, weight: Tensor) -> None:
    """Multiply without allocating a result: a GPU converts the product to the dtype of the buffer."""
    out = logits.view(chunk.dtype)[: len(chunk), : len(weight)]
    torch.mm(chunk, weight.T, out=out)


def _gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of hidden states and weight, None for those not needed."""
    logits = _logits(hidden, weight, rows)
    low = hidden.dtype != logits.dtype
    grad_hidden = torch.empty_like(hidden) if needed[0] else None
    grad_weight = torch.zeros_like(weight) if needed[1] else None
    # the hidden states of a chunk in float32, which are kept until the end
    wide = hidden.new_empty(rows, hidden.shape[1], dtype=logits.dtype) if low and needed[1] else None
    for start in range(0, len(hidden), rows):
        chunk, target = hidden[start : start + rows], targets[start : start + rows]
        _product_into(logits, chunk, weight)
        multiplied = logits[: len(chunk)].to(hidden.dtype)  # the buffer itself if it has this dtype
        if grad_hidden is not None:
            out = grad_hidden[start : start + rows]
            torch.mul(torch.index_select(weight, 0, target), 1.0, out=out)
            torch.addmm(out, multiplied, weight, alpha=-1, out=out)
        if grad_weight is not None:
            torch.addmm(grad_weight, multiplied.T, chunk, alpha=-1, out=grad_weight)
        del multiplied
    del wide, logits
    return grad_hidden, grad_weight
