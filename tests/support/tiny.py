"""Tiny models, their batches, a training loop of three lines, and exact comparison of what came of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import grass

VOCAB, WIDTH = 32, 16


def llama(seed: int = 0, layers: int = 5, tied: bool = False, **options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
    }
    config = LlamaConfig(
        **{**sizes, **options},
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def t5(seed: int = 0) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


class Block(nn.Module):
    """A residual block without transformers: fast, and of any dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Stack(nn.Module):
    """Embedding, residual blocks, head: the smallest thing with layers and an outside."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def stack(seed: int = 0, layers: int = 5, width: int = 8) -> Stack:
    torch.manual_seed(seed)
    return Stack(layers, width)


def batch(index: int, size: int = 2, length: int = 6) -> Tensor:
    """Token ids of training step ``index``, the same at every call."""
    return torch.randint(1, VOCAB, (size, length), generator=torch.Generator().manual_seed(1000 + index))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Next-token loss, for models with a loss of their own and for those without."""
    if hasattr(model, "config"):
        return model(input_ids=ids, labels=ids).loss
    logits = model(ids)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def train(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    start: int,
    stop: int,
    micro_batches: int = 1,
    before_step: Callable[[int], None] | None = None,
) -> None:
    """Steps ``start`` to ``stop``, each of its own batches."""
    for index in range(start, stop):
        for micro in range(micro_batches):
            (loss_of(model, batch(index * micro_batches + micro)) / micro_batches).backward()
        if before_step is not None:
            before_step(index)
        opt.step()
        opt.zero_grad()


def config(**options: Any) -> grass.GrassConfig:
    """Probe, periods and windows short enough to see several of each in 20 steps."""
    defaults = {
        "active_layers": 2,
        "probe_steps": 3,
        "sample_interval": 3,
        "update_interval": 6,
        "offload": "none",
    }
    return grass.GrassConfig(**{**defaults, **options})


def checkpoint_activations(model: nn.Module, reentrant: bool) -> None:
    """Activation checkpointing of a transformers model, under the name its version gives it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    # Transformers, too, makes the embedding's output require grad, in both modes and for good: it would hide
    # what the method does, and send backward through all frozen layers.
    model.disable_input_require_grads()
    model.train()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def layer_names(model: nn.Module, opt: grass.GrassAdamW) -> dict[str, int]:
    """Each parameter's layer; -1 outside."""
    owners = {name: -1 for name, _ in model.named_parameters()}
    for index, names in enumerate(opt.layers.parameter_names):
        owners.update(dict.fromkeys(names, index))
    return owners


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """A nested state as one flat dict, for comparison leaf by leaf."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    else:
        return {path: value}
    leaves: dict[str, Any] = {f"{path}#": len(items)}
    for key, inner in items:
        leaves.update(flat(inner, f"{path}.{key}"))
    return leaves


def assert_identical(left: Any, right: Any) -> None:
    """Equal in every bit, dtype and place."""
    left, right = flat(left), flat(right)
    assert left.keys() == right.keys()
    for key, value in left.items():
        other = right[key]
        if isinstance(value, Tensor):
            assert value.dtype == other.dtype, key
            assert torch.equal(value, other), key
        else:
            assert value == other, key


def assert_same_run(
    model: nn.Module, opt: grass.GrassAdamW, other_model: nn.Module, other_opt: grass.GrassAdamW
) -> None:
    """Two trainings stand at exactly the same place."""
    assert_identical(dict(model.named_parameters()), dict(other_model.named_parameters()))
    assert_identical(
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: p.requires_grad for name, p in other_model.named_parameters()},
    )
    assert_identical(opt.state_dict(), other_opt.state_dict())
