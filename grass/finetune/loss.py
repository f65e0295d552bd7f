"""Next-token loss in chunks of tokens: the whole-vocabulary logits of a batch are never there at once.

The logits of 4 x 1024 tokens over a vocabulary of 128,000 are 1 GiB in bfloat16; a full loss holds them in float32
as well, and their gradient. Computed `CHUNK_TOKENS` tokens at a time they cost what one chunk costs, whatever
the batch. The arithmetic is a library's: Liger's kernel on a GPU where it is installed, else torch's
``linear_cross_entropy`` (2.13 and newer). Both rely on logits being the head's plain product with the decoder's
hidden states; `why_not_chunked` finds out whether a model's are.
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
from grass.finetune.encoding import IGNORED

# Torch's own choice is 16 to 64 tokens for models of width 576 to 1024, which on a CPU takes up to four times as
# long as the full loss: each chunk reads the head's weight and reads and writes its gradient.
CHUNK_TOKENS = 512
# Below it, a batch's logits are no burden, and the full loss is the simpler one.
LEAST_VOCABULARY = 8192
_LOW_PRECISION = (torch.bfloat16, torch.float16)


def chunked_loss(
    model: PreTrainedModel, batch: Mapping[str, Tensor], num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Mean next-token cross-entropy, as ``model(**batch).loss`` gives it, without a batch's logits.

    It knows no softcapping, no scaling and no auxiliary loss: ask `why_not_chunked` first.

    Args:
        model: a transformers causal language model; under ``torch.no_grad`` only the loss is computed.
        batch: int64 [batch, length] ``input_ids`` and ``labels`` (`IGNORED` where nothing is learnt, not shifted),
            and whatever else the decoder takes, such as ``attention_mask``.
        num_items_in_batch: divide the sum by this many tokens instead of by the learnt ones of this batch;
            Trainer passes those of all micro-batches of a step.

    Returns:
        A float32 scalar (float64 of a float64 model); NaN with zero gradients where no token is learnt, as
        transformers has it.
    """
    hidden = _hidden_states(model, batch)
    return _loss(hidden, model.get_output_embeddings(), batch["labels"], num_items_in_batch)


def use_chunked_loss(model: PreTrainedModel, wanted: str, say: Callable[[str], None]) -> bool:
    """Decide between the chunked and the full loss.

    Args:
        model: to be trained, on the device it will be trained on.
        wanted: ``"full"``; ``"chunked"``; or ``"auto"``: chunked where it works, but not for a vocabulary below
            `LEAST_VOCABULARY`, and not in bfloat16 or float16 on a CPU, where torch computes it in float32 and
            takes several times as long.
        say: told in a line why ``"auto"`` keeps the full loss of a model that would profit.

    Raises:
        ConfigError: ``"chunked"`` is wanted and cannot be had.
    """
    if wanted == "full":
        return False
    head = model.get_output_embeddings()
    if wanted == "auto" and isinstance(head, nn.Linear):
        slow = head.weight.device.type == "cpu" and head.weight.dtype in _LOW_PRECISION
        if slow or head.weight.shape[0] < LEAST_VOCABULARY:
            return False
    reason = why_not_chunked(model)
    if reason is None:
        return True
    if wanted == "chunked":
        raise ConfigError(f"loss cannot be 'chunked': {reason}; pass --loss full")
    say(f"the loss takes the logits of the whole vocabulary at once: {reason}")
    return False


def why_not_chunked(model: PreTrainedModel) -> str | None:
    """Compare the chunked loss with the model's own on 16 tokens; None, or in a few words why it may not be used.

    A loss alone would tell little: softcapping hardly changes the small logits of an untrained model. So each
    step between hidden states and loss is looked at: the head is a linear layer, its input is what the decoder
    gives, the model's logits are its output to the bit, the model's loss is their cross-entropy, and the
    chunked loss, with gradients, is the same within rounding. Weights, random states and mode stay as they are.
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
    """[2, 8] tokens with ignored labels and padding, always the same."""
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
    """Whether the difference is at most `tolerance` of the expected length; never where either is NaN."""
    if value.shape != expected.shape:
        return False
    value, expected = value.detach().double(), expected.detach().double()
    return bool((value - expected).norm() <= tolerance * expected.norm())


def _hidden_states(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The decoder's last hidden states, [batch, length, width]."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    decoder: Any = model.get_decoder()
    hidden: Tensor = decoder(**inputs, use_cache=False, return_dict=True).last_hidden_state
    return hidden


def _next_tokens(labels: Tensor) -> Tensor:
    """Each position's target, [batch * length]: the next label, and `IGNORED` at the end of a row."""
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:].flatten()


def _loss(hidden: Tensor, head: Any, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
    targets = _next_tokens(labels).to(hidden.device)
    total = _summed_cross_entropy(hidden.flatten(0, -2), head.weight, head.bias, targets)
    learnt = (targets != IGNORED).sum() if num_items is None else torch.as_tensor(num_items)
    learnt = learnt.to(total.device)
    # A division by zero would send infinity times zero through backward.
    return torch.where(learnt == 0, torch.nan, total / learnt.clamp(min=1))


def _summed_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Sum over tokens of the cross-entropy of ``hidden @ weight.T + bias``.

    Args:
        hidden: [tokens, width].
        weight: [vocabulary, width].
        bias: [vocabulary], or None.
        targets: int64 [tokens], `IGNORED` where a token does not count.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # the libraries' functions are not on autocast's list
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    liger = _liger(device)
    if liger is not None:
        total: Tensor = liger(hidden, weight, targets, bias=bias, ignore_index=IGNORED, reduction="sum")
        return total
    # Torch adds up a scalar loss in the type of `hidden`: in bfloat16, over 32 chunks, it was 2.6 % off. A loss for
    # each token can be added up in float32; its backward makes the logits once more.
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
    """Liger's function for a type of device, if it can be used there."""
    if device != "cuda":
        return None
    try:
        functional = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError:
        return None
    function: Callable[..., Any] | None = getattr(functional, "liger_fused_linear_cross_entropy", None)
    return function
