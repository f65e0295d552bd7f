"""One run of the study: a base model, a method, a learning rate, an order of the data."""

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from bench.quality.tasks import IGNORED, Data, Problem, base_texts, encode, token_ids
from grass import GrassAdamW
from grass.reproduce.training import curve_of, schedule, set_lr

BASE_STEPS, BASE_BATCH, BASE_LR = 3200, 16, 2e-3
ANSWER_TOKENS = 7  # longest answer, with its end
LAYERS = 8


@dataclass(frozen=True)
class Budget:
    """Size of a run, the same for all methods.

    Args:
        steps: number of steps, the probe included.
        batch: number of problems in a step.
        train: number of training problems.
        heldout: number of held-out problems.
    """

    steps: int = 400
    batch: int = 16
    train: int = 4000
    heldout: int = 200


def make_model(seed: int) -> LlamaForCausalLM:
    """Return a Llama of eight layers and 0.77 million parameters, initialized by a seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(token_ids()),
        hidden_size=88,
        intermediate_size=236,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def loss_of(model: nn.Module, ids: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy of the next token, over all targets of a batch. Padding is on the right."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction=reduction
    )


def base_model(seed: int, folder: Path) -> LlamaForCausalLM:
    """Return the base model of a seed, trained the first time and then kept in a folder."""
    model = make_model(seed)
    path = folder / f"base-{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model
    data = Data([Problem(text, "") for text in base_texts(seed)], whole=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_LR, weight_decay=0.0)
    for step, batch in enumerate(data.batches(BASE_BATCH, BASE_STEPS, seed)):
        set_lr(optimizer, BASE_LR * schedule(step, BASE_STEPS))
        loss_of(model, *batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    temporary = path.with_suffix(f".{random.getrandbits(32)}")
    torch.save(model.state_dict(), temporary)
    temporary.rename(path)
    return model


@torch.enable_grad()
def layer_gradients(
    layers: Sequence[Sequence[nn.Parameter]], loss: Callable[[], Tensor]
) -> list[list[Tensor]]:
    """Return the gradients of the parameters of all layers, also of frozen ones, and leave ``requires_grad`` as it was.

    Args:
        layers: parameters of each layer.
        loss: computes the loss.
    """
    params = [p for layer in layers for p in layer]
    flags = [p.requires_grad for p in params]
    for p in params:
        p.requires_grad_(True)
    try:
        grads = iter(torch.autograd.grad(loss(), params))
    finally:
        for p, flag in zip(params, flags, strict=True):
            p.requires_grad_(flag)
    return [[next(grads) for _ in layer] for layer in layers]


def root_mean_squares(layers: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the root mean square of each layer's tensors, [L]."""
    return torch.stack([torch.cat([t.flatten() for t in layer]).square().mean().sqrt() for layer in layers])


def digest(model: nn.Module) -> str:
    """Return twelve digits that tell the weights of one model from those of another."""
    content = hashlib.sha256()
    for tensor in model.state_dict().values():
        content.update(tensor.numpy().tobytes())
    return content.hexdigest()[:12]


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, size: int = 100) -> tuple[float, float]:
    """Return the log-loss of the answers, a mean over their tokens in nats, and the share of exact answers."""
    model.eval()
    total, count, exact = 0.0, 0, 0
    for indices in torch.arange(len(data)).split(size):
        ids, labels = data.batch(indices)
        total += float(loss_of(model, ids, labels, reduction="sum"))
        count += int((labels[:, 1:] != IGNORED).sum())
        exact += sum(_answers(model, [data.problems[i] for i in indices.tolist()]))
    model.train()
    return total / count, exact / len(data)


def _answers(model: nn.Module, problems: Sequence[Problem]) -> list[bool]:
    """Return for each problem whether the most likely continuation is its answer, with the end."""
    right = [False] * len(problems)
    by_length: dict[int, list[int]] = {}
    for i, problem in enumerate(problems):
        by_length.setdefault(len(problem.prompt.split()), []).append(i)
    for indices in by_length.values():
        ids = torch.tensor([encode(f"<s> {problems[i].prompt}") for i in indices])
        length = ids.shape[1]
        for _ in range(ANSWER_TOKENS):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        for i, row in zip(indices, ids[:, length:].tolist(), strict=True):
            expected = encode(f"{problems[i].answer} </s>")
            right[i] = row[: len(expected)] == expected
    return right


@dataclass
class Trained:
    """Result of a run.

    Attributes:
        log_loss: held-out loss of the answers, nats a token.
        exact: share of exact answers.
        curve: training loss, a mean over every tenth of the steps.
        trained_share: share of the parameters that a step trains, a mean over all steps.
        layers: share of the steps in which each layer trained; empty if not known.
        longest_wait: largest number of steps in a row in which a layer did not train.
        probabilities: of the layers at the end.
    """

    log_loss: float
    exact: float
    curve: list[float]
    trained_share: float
    layers: list[float] = field(default_factory=list)
    longest_wait: int = 0
    probabilities: list[float] = field(default_factory=list)


def fine_tune(
    model: nn.Module,
    optimizer: Optimizer,
    train: Data,
    heldout: Data,
    lr: float,
    order: int,
    budget: Budget,
    observe: Callable[[int, tuple[Tensor, Tensor]], None] = lambda step, batch: None,
) -> Trained:
    """Train on a task, and evaluate.

    Args:
        model: trained in place.
        optimizer: of the method.
        train, heldout: problems.
        lr: maximum learning rate. It rises from zero after the probe, if there is one.
        order: seed of the order of the data.
        budget: size of the run.
        observe: called before each step, with its number and batch.
    """
    losses: list[float] = []
    num_params = sum(p.numel() for p in model.parameters())
    sampled = optimizer if isinstance(optimizer, GrassAdamW) else None
    blocks = [[*block.parameters()] for block in sampled.layers.modules(model)] if sampled else []
    num_layers = len(blocks)
    probed, trained, longest_wait, active, waits = 0, 0, 0, [0] * num_layers, [0] * num_layers
    for step, batch in enumerate(train.batches(budget.batch, budget.steps, order)):
        observe(step, batch)
        is_probe = sampled is not None and sampled.phase == "probe"
        probed += is_probe
        set_lr(optimizer, lr * schedule(step - probed, budget.steps - probed))
        loss = loss_of(model, *batch)
        loss.backward()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            return Trained(math.inf, 0.0, curve_of(losses[:-1]), 0.0)
        if not is_probe:  # a frozen parameter may have a gradient: see `grass.optim.probe`
            active_layers = sampled.active_layers if sampled else ()
            frozen = {p for layer in range(num_layers) if layer not in active_layers for p in blocks[layer]}
            trained += sum(p.numel() for p in model.parameters() if p.grad is not None and p not in frozen)
        for layer in range(num_layers):
            is_active = sampled is not None and layer in sampled.active_layers
            active[layer] += is_active
            waits[layer] = 0 if is_active else waits[layer] + 1
            longest_wait = max(longest_wait, waits[layer])
        optimizer.step()
        optimizer.zero_grad()
    if sampled:
        sampled.release()
    log_loss, exact = evaluate(model, heldout)
    curve = curve_of(losses)
    share = trained / (budget.steps * num_params)
    if not sampled:
        return Trained(log_loss, exact, curve, share)
    layers = [round(count / budget.steps, 4) for count in active]
    probabilities = [round(p, 4) for p in sampled.probabilities.tolist()]
    return Trained(log_loss, exact, curve, share, layers, longest_wait, probabilities)
