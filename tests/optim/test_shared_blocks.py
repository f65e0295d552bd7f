"""Failures these tests catch: for blocks that run several times in a forward pass, as in ALBERT, importance or updates
that come from a part of their gradient.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import grass
from tests.support import tiny

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")

MODES = {"plain": None, "checkpointed": False, "reentrant": True}


class Shared(tiny.Stack):
    """Blocks that run one after the other, and then again."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__(layers=5, width=8)
        self.reentrant = reentrant

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in [*self.blocks, *self.blocks]:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def shared(reentrant: bool | None) -> Shared:
    torch.manual_seed(0)
    return Shared(reentrant)


def root_mean_squares(model: nn.Module, index: int) -> Tensor:
    """Root mean square of each block's whole gradient."""
    model.zero_grad()
    tiny.loss_of(model, tiny.batch(index)).backward()
    grads = [torch.cat([p.grad.flatten() for p in block.parameters()]) for block in model.blocks]
    return torch.stack([grad.square().mean().sqrt() for grad in grads])


@pytest.mark.parametrize("mode", ["plain", "checkpointed"])
def test_the_probe_measures_the_whole_gradient(mode: str) -> None:
    model = shared(MODES[mode])
    opt = grass.GrassAdamW(model, config=tiny.config(probe_steps=3))
    tiny.train(model, opt, 0, 3)
    expected = torch.stack([root_mean_squares(shared(None), index) for index in range(3)]).mean(0)
    torch.testing.assert_close(opt.importance, expected)
    assert not opt._scheduler.importance.accumulated


@pytest.mark.parametrize("mode", MODES)
def test_updates_are_of_the_whole_gradient(mode: str) -> None:
    """Samplers without probe, with activation checkpointing of each kind and without: bitwise one training."""
    runs = []
    for reentrant in (None, MODES[mode]):
        model = shared(reentrant)
        opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(sampler="uniform"))
        norms = []
        for index in range(8):
            tiny.train(model, opt, index, index + 1)
            norms.append(opt.layer_grad_norms)
        runs.append((torch.stack(norms), tiny.weights(model)))
    torch.testing.assert_close(runs[0][0], runs[1][0])
    torch.testing.assert_close(runs[0][1], runs[1][1])
    assert (runs[0][0] > 0).sum(1).tolist() == [2] * 8


def test_norms_of_updates_are_of_the_whole_gradient() -> None:
    model = shared(None)
    expected = root_mean_squares(shared(None), 0)
    opt = grass.GrassAdamW(model, config=tiny.config(sampler="uniform"))
    active = list(opt.active_layers)
    tiny.train(model, opt, 0, 1)
    sizes = torch.tensor(opt.layers.num_params)
    torch.testing.assert_close((opt.layer_grad_norms / sizes.sqrt())[active], expected[active])


def test_under_reentrant_checkpoints_the_probe_measures_calls_as_micro_batches() -> None:
    """Each reentrant checkpoint is a backward of its own: the gradient of a call is complete before the next call's."""
    model = shared(True)
    opt = grass.GrassAdamW(model, config=tiny.config())
    tiny.train(model, opt, 0, 2)
    assert opt._scheduler.importance.accumulated
    tiny.train(model, opt, 2, 4)
    assert opt.phase == "adapt"
