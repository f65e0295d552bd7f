"""Failures these tests catch: ranks that wait for ever for one that has died; a NaN on one rank that the others do not
hear of, so that their draws part; a checkpoint that a death makes useless.
"""

import os
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from grass.optim.sharding import local
from tests.distributed.test_checkpoints import largest_difference, resume, state_of, weights
from tests.support.ranks import RankError
from tests.support.sharded import Training, whole

pytestmark = [
    pytest.mark.plain_only(reason="processes with the interpreter are slow, and shards are ordinary tensors"),
    pytest.mark.filterwarnings("ignore:.*torch.distributed is (disabled, )?unavailable:UserWarning"),
]

TRAINING = Training(mesh=(2,), dtype=torch.float32)


def die_after_a_checkpoint(training, folder):
    model, opt = training.make()
    training.run(model, opt, 0, 8)
    dcp.save(state_of(model, opt), checkpoint_id=folder)
    training.run(model, opt, 8, 10)
    if dist.get_rank() == 1:
        os._exit(1)
    start = time.monotonic()
    try:
        training.run(model, opt, 10, 20)
    except RuntimeError as error:  # of the engine
        return type(error).__name__, time.monotonic() - start
    return "no error", 0.0


def test_the_others_end_with_an_error_and_the_last_checkpoint_resumes(two, tmp_path):
    answers = two.run_all(die_after_a_checkpoint, TRAINING, str(tmp_path), seconds=60)
    assert isinstance(answers[1], RankError)
    error, seconds = answers[0]
    assert error != "no error"
    assert seconds < 30
    model, opt = replace(TRAINING, mesh=None).make()
    replace(TRAINING, mesh=None).run(model, opt, 0, 20)
    for found, _, _ in two.run(resume, TRAINING, 8, str(tmp_path)):
        assert largest_difference(weights(model), found) < 1e-6


def overflow_on_one_rank(training, step):
    """A NaN in the gradients of rank 1's shards in one step; how each rank goes on."""
    model, opt = training.make()
    training.run(model, opt, 0, step)
    before = {name: whole(p) for name, p in model.named_parameters()}
    weights_of_blocks = [block.up.weight for block in model.blocks if block.up.weight.requires_grad]
    handles = [
        p.register_post_accumulate_grad_hook(lambda p: local(p.grad).fill_(torch.nan))
        for p in weights_of_blocks
        if dist.get_rank() == 1
    ]
    training.loss(model, step).backward()
    for handle in handles:
        handle.remove()
    opt.step()
    opt.zero_grad()
    is_unchanged = all(torch.equal(before[name], whole(p)) for name, p in model.named_parameters())
    draws = []
    for index in range(step + 1, 24):
        training.step(model, opt, index)
        draws.append(opt.active_layers)
    return is_unchanged, opt.nonfinite_norms, opt.importance, draws, weights(model)


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("step", [1, 8], ids=["probing", "training"])
def test_a_nan_in_one_shard_is_known_to_all(two, step, clip):
    """The importance ignores it on every rank; clipping skips the step. Without, the NaN trains, as in torch."""
    training = replace(TRAINING, options={"max_grad_norm": clip})
    first, second = two.run(overflow_on_one_rank, training, step)
    is_skipped = clip is not None or step == 1
    assert first[0] == second[0] == is_skipped
    assert first[1] == second[1] > 0
    assert torch.equal(first[2], second[2])
    assert first[2].isfinite().all()
    assert first[3] == second[3]
    assert all(p.isfinite().all() for p in first[4].values()) == is_skipped
