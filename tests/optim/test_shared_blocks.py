"""Failures these tests catch: for blocks that run several times in a forward pass, as in ALBERT, importance or updates
that come from a part of their gradient; a probe that measures the parts one by one without a word.
"""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import grass
from grass.errors import BackwardError
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


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_probe_of_parts_is_refused(micro_batches: int) -> None:
    """Each reentrant checkpoint is a backward of its own: the gradient of a call is complete before the next call's."""
    model = shared(True)
    opt = grass.GrassAdamW(model, config=tiny.config())
    with pytest.raises(BackwardError, match=r"more than once.* use_reentrant=False"):
        tiny.train(model, opt, 0, 1, micro_batches)
    opt.zero_grad()
    model.reentrant = False
    tiny.train(model, opt, 0, 3)
    expected = torch.stack([root_mean_squares(shared(None), index) for index in range(3)]).mean(0)
    torch.testing.assert_close(opt.importance, expected)


@pytest.mark.parametrize("always_active", ["outside", "none"])
def test_micro_batches_under_reentrant_checkpointing_are_no_shared_blocks(always_active: str) -> None:
    model = tiny.llama()
    tiny.checkpoint_activations(model, reentrant=True)
    opt = grass.GrassAdamW(model, config=tiny.config(always_active=always_active))
    tiny.train(model, opt, 0, 8, micro_batches=3)
    assert opt.phase == "adapt"


class TwoLosses(Shared):
    """Each block once, and two losses."""

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x).square().mean(), self.head(x).mean()


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_backwards_of_one_forward_are_no_shared_blocks(reentrant: bool) -> None:
    model = TwoLosses(reentrant)
    opt = grass.GrassAdamW(model, config=tiny.config())
    first, second = model(tiny.batch(0))
    first.backward(retain_graph=True)
    second.backward()
    opt.step()
    assert opt.step_count == 1


class InParts(tiny.Stack):
    """Each half of a block in a checkpoint of its own."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            inner = checkpoint(
                lambda x, block=block: torch.tanh(block.up(block.norm(x))), x, use_reentrant=True
            )
            x = x + checkpoint(block.down, inner, use_reentrant=True)
        return self.head(x)


def test_checkpoints_of_parts_of_a_block_are_no_shared_blocks() -> None:
    model, plain = InParts(5, 8), shared(None)
    model.load_state_dict(plain.state_dict())
    opt = grass.GrassAdamW(model, config=tiny.config(probe_steps=1))
    tiny.train(model, opt, 0, 1)
    reference = tiny.stack()
    reference.load_state_dict(plain.state_dict())
    torch.testing.assert_close(opt.importance, root_mean_squares(reference, 0))


def test_a_copy_and_a_pickle_of_a_model_in_the_probe() -> None:
    model = tiny.stack()
    opt = grass.GrassAdamW(model, config=tiny.config())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        tiny.loss_of(other, tiny.batch(0)).backward()
    tiny.train(model, opt, 0, 4)
    opt.release()
    assert not model._forward_pre_hooks
