"""Failures these tests catch: `grass.AdamW` that is no drop-in for torch's on sharded parameters: other updates, states
of another form, clipping by the norm of a shard.
"""

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import grass
from tests.distributed.test_checkpoints import largest_difference, weights
from tests.support.sharded import Training

pytestmark = [
    pytest.mark.plain_only(reason="processes with the interpreter are slow, and shards are ordinary tensors"),
    pytest.mark.filterwarnings("ignore:.*torch.distributed is (disabled, )?unavailable:UserWarning"),
]

TRAINING = Training(mesh=(2,), dtype=torch.float32, block="ragged", width=7)


def model_of(training):
    model, opt = training.make()
    opt.release()
    return model


def beside_torch(training, max_grad_norm):
    """Ten steps by torch with `clip_grad_norm_`, and ten by ours; the norms of the last step."""
    norms, found = [], []
    for is_ours in (False, True):
        model = model_of(training)
        opt = (
            grass.AdamW(model.parameters(), lr=1e-3, eps=1e-3, max_grad_norm=max_grad_norm)
            if is_ours
            else torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
        )
        for index in range(10):
            training.loss(model, index).backward()
            if max_grad_norm and not is_ours:
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
                norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
            opt.step()
            opt.zero_grad()
        if max_grad_norm and is_ours:
            norms = [norms[-1], float(opt.grad_norm)]
        found.append(weights(model))
    return largest_difference(*found), norms


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("mesh", [(2,), (2, 1)], ids=str)
def test_steps_are_those_of_torch(two, mesh, max_grad_norm):
    for difference, norms in two.run(beside_torch, replace(TRAINING, mesh=mesh), max_grad_norm):
        assert difference < 1e-6
        assert norms == [] or norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_one_process_has_norms_of_its_shards(one):
    difference, norms = one.run(beside_torch, replace(TRAINING, mesh=(1,)), 0.5)[0]
    assert difference < 1e-6
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def into_ours(training):
    """A state dict of torch's optimizer, loaded by ours, and the other way round."""
    model = model_of(training)
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    training.run(model, theirs, 0, 5)
    saved = copy.deepcopy(get_optimizer_state_dict(model, theirs))
    ours = grass.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    set_optimizer_state_dict(model, ours, saved)
    again = get_optimizer_state_dict(model, ours)
    same = all(
        torch.equal(value.full_tensor(), again["state"][name][key].full_tensor())
        for name, state in saved["state"].items()
        for key, value in state.items()
        if key != "step"
    )
    training.run(model, ours, 5, 8)
    third = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    third.load_state_dict(ours.state_dict())
    training.run(model, third, 8, 10)
    return same, {int(state["step"]) for state in third.state.values()}, dist.get_rank()


def test_state_dicts_are_those_of_torch(two):
    for same, counters, _ in two.run(into_ours, TRAINING):
        assert same
        assert counters == {10}
