"""Failures these tests catch: ranks that draw other layers than one process on the whole batch, or than each other;
weights that drift apart; frozen weights that move; clipping by a norm of the local shard; shards that are empty, uneven
or never updated; norms that are counted once a rank.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.support.sharded import Training, distance, train

pytestmark = pytest.mark.plain_only(
    reason="processes with the interpreter are slow, and shards are ordinary tensors"
)

FLOAT32 = torch.float32
CASES = {
    "probe": Training(),
    "no probe": Training(config={"probe_steps": 0}),
    "nothing outside": Training(config={"always_active": "none"}),
    "clipping": Training(options={"max_grad_norm": 0.5}),
    "fused backward": Training(config={"fused_backward": True}),
    "uneven and empty shards": Training(block="ragged", width=7),
    "uneven, fused": Training(block="ragged", width=7, config={"fused_backward": True}),
    "tied weights": Training(tied=True),
    "accumulation": Training(micro_batches=2),
    "accumulation, fused": Training(micro_batches=2, config={"fused_backward": True}),
    "activation checkpointing": Training(block="checkpointed"),
    "uniform": Training(config={"sampler": "uniform"}),
    "remeasured": Training(config={"sampler": "remeasured"}),
    "remeasured, fused": Training(config={"sampler": "remeasured", "fused_backward": True}),
    "remeasured, accumulation": Training(micro_batches=2, config={"sampler": "remeasured"}),
    "weight norms": Training(config={"sampler": "weight_norm"}),
    "float32, eps of 1e-8": Training(options={"eps": 1e-8}, dtype=FLOAT32),
    "resident": Training(config={"offload": "resident"}, dtype=FLOAT32),
    "streamed": Training(
        config={"offload": "streamed", "buffer_mb": 0.2}, dtype=FLOAT32, block="ragged", width=7
    ),
    "reset": Training(config={"moments": "reset"}, dtype=FLOAT32),
    "cpu offload policy": Training(offload_policy=True, dtype=FLOAT32),
}


def check(one, ranks, limit):
    first = ranks[0]
    assert all(result.draws == first.draws == one.draws for result in ranks)
    assert len(set(one.draws)) > 3
    assert all(torch.equal(result.importance, first.importance) for result in ranks)
    assert torch.allclose(first.importance, one.importance, rtol=1e-5)
    assert not any(result.moved for result in ranks)
    assert all(distance(result, first) == 0 for result in ranks)
    assert distance(first, one) < limit


def limit_of(training):
    """Rounding of the norms in float32 reaches the weights by clipping."""
    return 1e-9 if training.dtype == torch.float64 else 1e-6


@pytest.mark.parametrize("case", list(CASES))
def test_two_ranks_follow_one_process(two, case):
    training = CASES[case]
    one = train(replace(training, offload_policy=False))
    check(one, two.run(train, replace(training, mesh=(2,))), limit_of(training))


@pytest.mark.parametrize("mesh", [(2, 1), (4,), (2, 2)], ids=str)
@pytest.mark.parametrize("case", ["uneven and empty shards", "clipping"])
def test_replicas_and_more_shards_follow_one_process(two, four, mesh, case):
    training = CASES[case]
    ranks = two if mesh == (2, 1) else four
    check(train(training), ranks.run(train, replace(training, mesh=mesh)), 1e-9)


def test_accumulation_without_reductions_measures_the_sum(two):
    """Point 7: the probe sees one gradient of all micro-batches, so the run follows that of a larger batch."""
    training = Training(micro_batches=2)
    one = train(replace(training, joined=True))
    check(one, two.run(train, replace(training, mesh=(2,), no_sync=True)), 1e-9)


@pytest.mark.parametrize("probe_steps", [0, 3])
def test_a_mixed_precision_policy_trains_float32_shards(two, probe_steps):
    """Gradients are of bfloat16 computations, and near those of float32, also in layers that are frozen at first."""
    training = Training(dtype=FLOAT32, config={"probe_steps": probe_steps})
    one = train(training, 12)
    first, second = two.run(train, replace(training, mesh=(2,), mixed_precision=True), 12)
    assert first.draws == second.draws
    assert torch.equal(first.importance, second.importance)
    assert not first.moved
    assert all(p.dtype == FLOAT32 for p in first.weights.values())
    assert 0 < distance(first, one) < 2e-3


def placed(training):
    """Bytes of the store, and floating-point operations of a step that trains two of five layers."""
    model, opt = training.make()
    training.run(model, opt, 0, 5)
    with FlopCounterMode(display=False) as flops:
        training.step(model, opt, 5)
    return opt.transfer_stats.store_bytes, flops.get_total_flops(), opt.active_layers


def test_states_and_arithmetic_are_those_of_a_shard_and_of_active_layers(two):
    """The store has the local shard; gradients of frozen layers are not computed."""
    training = Training(config={"offload": "resident", "always_active": "none"}, dtype=FLOAT32, width=128)
    store, flops, active = placed(training)
    all_flops = placed(replace(training, config={**training.config, "active_layers": 5}))[1]
    for found_store, found_flops, found_active in two.run(placed, replace(training, mesh=(2,))):
        assert found_active == active
        assert found_store == pytest.approx(store / 2, rel=0.1)
        assert found_flops == flops / 2 < all_flops / 2  # half of the batch
