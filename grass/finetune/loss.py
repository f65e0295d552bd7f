"""Next-token loss in chunks of tokens, which never materializes the logits of a whole batch.

The logits of 4 x 1024 tokens with a vocabulary of 128,000 take 1 GiB in bfloat16; a full loss also holds them in
float32, and their gradient. With `CHUNK_TOKENS` tokens at a time, they take the memory of one chunk. The loss is
computed by Liger's kernel on a GPU if it is installed, else by ``torch.nn.functional.linear_cross_entropy`` (torch 2.13
or newer). Both require that the logits are the product of the hidden states and the weight of the head;
`why_not_chunked` checks this for a model.
"""

import importlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from grass.errors import ConfigError
from grass.finetune.options import Loss

IGNORED = -100  # label of tokens that the loss ignores

# Torch's default is 16 to 64 tokens for models of width 576 to 1024, which on a CPU takes up to four times as long as
# the full loss, since each chunk reads the weight of the head, and reads and writes its gradient.
CHUNK_TOKENS = 512
# With a smaller vocabulary the logits take little memory, and the full loss is simpler.
LEAST_VOCABULARY = 8192
_LOW_PRECISION = (torch.bfloat16, torch.float16)


def chunked_loss(
    model: PreTrainedModel, batch: Mapping[str, Tensor], num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Compute the mean next-token cross-entropy, as in ``model(**batch).loss``, without the logits of the batch.

    Softcapping, logit scaling and auxiliary losses are not supported: check a model with `why_not_chunked` first.

    Args:
        model: a causal language model of transformers; under ``torch.no_grad`` only the loss is computed.
        batch: int64 [batch, length] ``input_ids`` and ``labels`` (not shifted, `IGNORED` for tokens that are no
            target), and further arguments of the decoder, such as ``attention_mask``.
        num_items_in_batch: divide the sum by this number of tokens instead of the number of targets in this batch;
            Trainer passes the number of targets in all micro-batches of a step.

    Returns:
        A float32 scalar (float64 for a float64 model); NaN with zero gradients if there is no target, as in
        transformers.
    """
    hidden = _hidden_states(model, batch)
    return _loss(hidden, model.get_output_embeddings(), batch["labels"], num_items_in_batch)


def use_chunked_loss(model: PreTrainedModel, loss: Loss, say: Callable[[str], None]) -> bool:
    """Return True if a model is trained with the chunked loss.

    Args:
        model: the model, on the device on which it is trained.
        loss: ``"full"``, ``"chunked"``, or ``"auto"`` for chunked if the model allows it; but not for a vocabulary
            below `LEAST_VOCABULARY`, and not in bfloat16 or float16 on a CPU, where torch computes it in float32 and
            is several times slower.
        say: called with the reason if ``"auto"`` uses the full loss for a model with a large vocabulary.

    Raises:
        ConfigError: `loss` is ``"chunked"``, which is impossible for the model.
    """
    if loss == "full":
        return False
    head = model.get_output_embeddings()
    if loss == "auto" and isinstance(head, nn.Linear):
        slow = head.weight.device.type == "cpu" and head.weight.dtype in _LOW_PRECISION
        if slow or head.weight.shape[0] < LEAST_VOCABULARY:
            return False
    reason = why_not_chunked(model)
    if reason is None:
        return True
    if loss == "chunked":
        raise ConfigError(f"loss cannot be 'chunked': {reason}; pass --loss full")
    say(f"using the full loss, which materializes all logits of a batch: {reason}")
    return False


def why_not_chunked(model: PreTrainedModel) -> str | None:
    """Compare the chunked loss with the loss of the model on 16 tokens; return the reason if it cannot be used.

    Comparing losses is not enough, since softcapping hardly changes the small logits of an untrained model. So every
    step between hidden states and loss is checked: the head is a linear layer, its input is the output of the
    decoder, the logits are bitwise its output, the loss is their cross-entropy, and the chunked loss is equal within
    rounding. Weights, random states and training mode do not change.

    Returns:
        None if the chunked loss can be used, else the reason in a few words.
    """
    head: Any = model.get_output_embeddings()
    if head is None or type(head).forward is not nn.Linear.forward:
        return "the model's head is not a plain linear layer"
    if _liger(head.weight.device.type) is None and not hasattr(nn, "LinearCrossEntropyOptions"):
        return (
            f"torch {torch.__version__} has no chunked linear_cross_entropy"
            " (install torch 2.13 or newer, or liger-kernel for a GPU)"
        )
    try:
        return _difference(model, head)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        return f"the model cannot be run in two parts, decoder and head: {reason}"


def _difference(model: PreTrainedModel, head: nn.Linear) -> str | None:
    batch = _few_tokens(model, head)
    calls: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda module, args, output: calls.append((args[0], output)))
    was_training = model.training
    model.eval()  # dropout would differ from call to call
    try:
        with torch.no_grad():
            outputs = model(**batch, use_cache=False)
            hidden = _hidden_states(model, batch)
    finally:
        hook.remove()
        model.train(was_training)
    if len(calls) != 1:
        return f"the model calls its head {len(calls)} times in a forward pass"
    head_input, head_output = calls[0]
    tolerance = 2e-2 if hidden.dtype in _LOW_PRECISION else 1e-4
    if not _close(hidden, head_input, tolerance):
        return "the model's head does not see the decoder's last hidden states as they are"
    if not torch.equal(outputs.logits.float(), head_output.float()):
        return "the model's logits are not its head's output as it is (softcapping, or scaling)"
    targets = _next_tokens(batch["labels"])
    expected = F.cross_entropy(outputs.logits.float().flatten(0, -2), targets, ignore_index=IGNORED)
    if not _close(outputs.loss, expected, 1e-5):
        return "the model's loss is not the mean cross-entropy of the next token alone"
    with torch.enable_grad():  # as in training
        loss = _loss(hidden.requires_grad_(), head, batch["labels"], None)
    if not _close(loss, expected, tolerance):
        return f"the chunked loss is {float(loss):.6g} where the model's own is {float(expected):.6g}"
    return None


def _few_tokens(model: PreTrainedModel, head: nn.Linear) -> dict[str, Tensor]:
    """Return a fixed batch of [2, 8] tokens with ignored labels and padding."""
    embeddings: Any = model.get_input_embeddings()
    vocabulary = min(head.weight.shape[0], embeddings.weight.shape[0])
    input_ids = (torch.arange(1, 17) * 7919 % vocabulary).view(2, 8)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 5:] = 0
    labels = torch.where(attention_mask == 0, IGNORED, input_ids)
    labels[:, :2] = IGNORED
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return {name: value.to(model.device) for name, value in batch.items()}


def _close(value: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return True if the relative error in the 2-norm is at most `tolerance`; False for NaN."""
    if value.shape != expected.shape:
        return False
    value, expected = value.detach().double(), expected.detach().double()
    return bool((value - expected).norm() <= tolerance * expected.norm())


def _hidden_states(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the last hidden states of the decoder, [batch, length, width]."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    decoder: Any = model.get_decoder()
    hidden: Tensor = decoder(**inputs, use_cache=False, return_dict=True).last_hidden_state
    return hidden


def _next_tokens(labels: Tensor) -> Tensor:
    """Return the target of each position, [batch * length]: the next label, `IGNORED` at the end of a row."""
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:].flatten()


def _loss(hidden: Tensor, head: Any, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
    targets = _next_tokens(labels).to(hidden.device)
    total = _summed_cross_entropy(hidden.flatten(0, -2), head.weight, head.bias, targets)
    num_targets = (targets != IGNORED).sum() if num_items is None else torch.as_tensor(num_items)
    num_targets = num_targets.to(total.device)
    # After a division by zero, backward would compute infinity times zero.
    return torch.where(num_targets == 0, torch.nan, total / num_targets.clamp(min=1))


def _summed_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Compute the sum over tokens of the cross-entropy of ``hidden @ weight.T + bias``.

    Args:
        hidden: [tokens, width].
        weight: [vocabulary, width].
        bias: [vocabulary], or None.
        targets: int64 [tokens], `IGNORED` for tokens that do not count.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # autocast does not cast the arguments of either function
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    liger = _liger(device)
    if liger is not None:
        total: Tensor = liger(hidden, weight, targets, bias=bias, ignore_index=IGNORED, reduction="sum")
        return total
    # Torch sums a scalar loss in the dtype of `hidden`: in bfloat16, over 32 chunks, the error was 2.6 %. A loss per
    # token can be summed in float32; its backward computes the logits again.
    losses = F.linear_cross_entropy(
        hidden,
        weight,
        targets,
        linear_bias=bias,
        reduction="none" if hidden.dtype in _LOW_PRECISION else "sum",
        ignore_index=IGNORED,
        options=nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_TOKENS),
    )
    return losses.float().sum() if hidden.dtype in _LOW_PRECISION else losses


@cache
def _liger(device: str) -> Callable[..., Any] | None:
    """Return Liger's function, or None if it is not installed or does not support the device type."""
    if device != "cuda":
        return None
    try:
        functional = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError:
        return None
    function: Callable[..., Any] | None = getattr(functional, "liger_fused_linear_cross_entropy", None)
    return function
