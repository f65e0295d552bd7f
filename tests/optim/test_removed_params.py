"""Parameters that are removed from their groups, in the probe or after it, in any mode.

Would catch: a state made for a parameter that no group has, with which no state dict can be made; a removed parameter
that is kept alive, updated, frozen or given a gradient of None; one that cannot be added again.

Runs in both passes.
"""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import grass

MODES: dict[str, dict[str, Any]] = {
    "none": {"offload": "none"},
    "resident": {"offload": "resident"},
    "streamed": {"offload": "streamed", "buffer_mb": 0.25},
    "fused": {"offload": "streamed", "buffer_mb": 0.25, "fused_backward": True},
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def train(model: Model, optimizer: grass.GrassAdamW, steps: int) -> None:
    for _ in range(steps):
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def make(mode: str) -> tuple[Model, grass.GrassAdamW]:
    model = Model()
    config = grass.GrassConfig(
        active_layers=1, probe_steps=2, sample_interval=2, update_interval=4, **MODES[mode]
    )
    return model, grass.GrassAdamW(model, lr=0.1, config=config)


def remove(optimizer: grass.GrassAdamW, params: list[nn.Parameter]) -> None:
    (group,) = optimizer.param_groups
    group["params"] = [p for p in group["params"] if not any(p is q for q in params)]
    for p in params:
        optimizer.state.pop(p, None)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("taken", [1, 5])
def test_they_are_let_alone(mode: str, taken: int) -> None:
    """All biases of layers and the head's weight, in the probe or after draws."""
    model, optimizer = make(mode)
    train(model, optimizer, taken)
    removed = [*(block.bias for block in model.blocks), model.head.weight]
    remove(optimizer, removed)
    before = [p.detach().clone() for p in removed]
    train(model, optimizer, 8)
    for p, value in zip(removed, before, strict=True):
        assert torch.equal(p, value)
        assert p not in optimizer.state
        assert p.requires_grad
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copy.deepcopy((model, optimizer))
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": removed})
    train(model, optimizer, 8)
    assert not any(torch.equal(p, value) for p, value in zip(removed[-1:], before[-1:], strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("taken", [1, 5])
def test_they_are_not_kept_alive(mode: str, taken: int) -> None:
    model, optimizer = make(mode)
    train(model, optimizer, taken)
    bias = model.head.bias
    model.head.bias = None
    remove(optimizer, [bias])
    seen = weakref.ref(bias)
    del bias
    train(model, optimizer, 6)
    gc.collect()
    assert seen() is None
