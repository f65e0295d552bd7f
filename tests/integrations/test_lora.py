"""Failures these tests catch: a layer without adapters that is drawn, trained, or left out without a word, or told of
more than once; adapters on fewer layers than ``active_layers`` that are noticed late; a quantized base that stops
adapters from training, changes itself, or is accepted as a parameter to train.
"""

import copy
import logging
import re

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grass
from tests.support import tiny

# peft asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOLD = re.compile(r"2 of 5 layers have no trainable parameter and are not drawn: \[1, 4\]")


class Int8Linear(nn.Linear):
    """A linear layer as bitsandbytes makes it: integer weights that cannot require grad, and a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        weight = linear.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale)


def quantize(model: nn.Module) -> nn.Module:
    """Freeze a model and quantize the linear layers of its blocks, as before QLoRA."""
    model.requires_grad_(False)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, Int8Linear(child))
    return model


def with_adapters(model: nn.Module, layers: list[int] | None = None) -> nn.Module:
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", layers_to_transform=layers
    )
    return peft.get_peft_model(model, settings)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        r.getMessage() for r in caplog.records if TOLD.search(r.getMessage()) and r.levelno == logging.WARNING
    ]


def test_layers_without_adapters_are_told_once_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = with_adapters(tiny.llama(), [0, 2, 3])
    adapters, before = trainable(model), tiny.weights(model)
    opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config())
    torch.testing.assert_close(opt.probabilities, torch.tensor([1, 0, 1, 1, 0]) / 3)
    trained = set()
    for step in range(40):
        tiny.train(model, opt, step, step + 1)
        assert not set(opt.active_layers) & {1, 4}
        trained |= set(opt.active_layers)
    assert trained == {0, 2, 3}
    assert opt.draw_counts[1] == opt.draw_counts[4] == 0
    assert opt.probabilities[[1, 4]].tolist() == [0, 0]
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == adapters
    opt.release()
    assert trainable(model) == adapters
    copy.deepcopy(opt)
    assert len(told(caplog)) == 1


def test_adapters_on_every_layer_are_nothing_to_tell(caplog: pytest.LogCaptureFixture) -> None:
    grass.GrassAdamW(with_adapters(tiny.llama()), config=tiny.config())
    assert not [r for r in caplog.records if "no trainable parameter" in r.getMessage()]


def test_adapters_on_too_few_layers_are_refused_at_construction() -> None:
    model = with_adapters(tiny.llama(), [3])
    adapters = trainable(model)
    message = "active_layers is 2, but only 1 layers can be trained; pass active_layers between 1 and 1"
    with pytest.raises(grass.ConfigError, match=message):
        grass.GrassAdamW(model, config=tiny.config())
    assert trainable(model) == adapters


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "checkpointed"])
@pytest.mark.parametrize("fused", [False, True], ids=["step", "fused backward"])
def test_adapters_on_a_quantized_base(reentrant: bool | None, fused: bool) -> None:
    model = with_adapters(quantize(tiny.llama()), [0, 2, 3])
    if reentrant is not None:
        tiny.checkpoint_activations(model.base_model.model, reentrant)
    adapters, before = trainable(model), tiny.weights(model)
    assert any(p.dtype == torch.int8 for p in model.parameters())
    ids = tiny.batch(0)
    opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(fused_backward=fused))
    losses = []
    for _ in range(40):
        loss = tiny.loss_of(model, ids)
        loss.backward()
        losses.append(loss.item())
        opt.step()
        opt.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == adapters
    assert [n > 0 for n in opt.draw_counts] == [True, False, True, True, False]


def test_a_quantized_base_trains_what_requires_grad() -> None:
    """Integer weights cannot, so without adapters only norms are left to train."""
    model = quantize(tiny.llama())
    with pytest.raises(RuntimeError, match="floating point"):
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    for block in model.model.layers:
        block.input_layernorm.requires_grad_(True)
    norms, before = trainable(model), tiny.weights(model)
    opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config())
    tiny.train(model, opt, 0, 40)
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == norms


def test_a_base_in_which_nothing_requires_grad_is_told(caplog: pytest.LogCaptureFixture) -> None:
    grass.GrassAdamW(quantize(tiny.llama()), config=tiny.config())
    assert "5 of 5 layers have no trainable parameter" in caplog.text
