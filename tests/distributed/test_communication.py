"""Failures these tests catch: gradients of frozen layers that are reduced all the same, or computed; an all-reduce of
norms that nobody reads, or more than one a step; accumulation that reduces every micro-batch.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from grass.optim.sharding import Ranks
from tests.support.sharded import Training

pytestmark = pytest.mark.plain_only(
    reason="processes with the interpreter are slow, and shards are ordinary tensors"
)

TRAINING = Training(mesh=(2,), dtype=torch.float32, config={"probe_steps": 1, "always_active": "none"})


class Traffic:
    """Counts collectives of FSDP2 and of the method inside a context, and the bytes of reduced gradients."""

    def __init__(self, monkeypatch):
        self.count = Counter()
        self.bytes = Counter()
        for name in ("reduce_scatter_tensor", "reduce_scatter_single", "all_reduce", "all_gather"):
            if hasattr(dist, name):
                monkeypatch.setattr(dist, name, self.counted(name, getattr(dist, name)))

    def counted(self, name, function):
        def count(*args, **kwargs):
            self.count[name] += 1
            tensor = kwargs.get("input_tensor", kwargs.get("input"))
            tensor = args[0] if tensor is None else tensor
            if isinstance(tensor, torch.Tensor):
                self.bytes[name] += tensor.numel() * tensor.element_size()
            return function(*args, **kwargs)

        return count


def traffic(training, start, stop):
    """Collectives of some steps, a list of (count, bytes) by name."""
    model, opt = training.make()
    training.run(model, opt, 0, start)
    found = []
    for index in range(start, stop):
        with pytest.MonkeyPatch.context() as patch:
            seen = Traffic(patch)
            training.step(model, opt, index)
        found.append((dict(seen.count), dict(seen.bytes)))
    block = sum(p.numel() for p in model.blocks[0].parameters())
    return found, 4 * block, len(model.blocks)


def reduced(bytes_by_name):
    return sum(count for name, count in bytes_by_name.items() if name.startswith("reduce_scatter"))


@pytest.mark.parametrize("mesh", [(2,), (1, 2), (2, 1)], ids=str)
def test_gradients_of_frozen_layers_are_not_reduced(two, mesh):
    """gamma of L layers: the share of the bytes that full fine-tuning reduces. Replicas use all-reduce."""
    steps, block, layers = two.run(traffic, replace(TRAINING, mesh=mesh), 0, 6)[0]
    norms = 4 * (layers + 1)
    for index, (_, sizes) in enumerate(steps):
        found = sizes["all_reduce"] - norms if mesh == (2, 1) else reduced(sizes)
        assert found == (2 if index else layers) * block  # the probe reduces all


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1),
        ({"options": {"max_grad_norm": 1.0}}, 1),
        ({"config": {"sampler": "uniform"}}, 0),
        ({"config": {"sampler": "static", "probe_steps": 1}}, 0),
        ({"config": {"fused_backward": True, "probe_steps": 1}}, 1),
        ({"micro_batches": 2}, 1),
    ],
    ids=["adaptive", "clipping", "uniform", "static", "fused", "accumulation"],
)
def test_norms_are_summed_once_a_step_and_only_if_something_reads_them(two, changes, expected):
    steps, _, _ = two.run(traffic, replace(TRAINING, **changes), 2, 8)[0]
    assert [counts.get("all_reduce", 0) for counts, _ in steps] == [expected] * 6
    assert sum(counts.get("all_gather", 0) for counts, _ in steps) == 2  # of fingerprints, one for each draw


def test_remeasured_norms_are_summed_in_the_step_that_measures(two):
    training = replace(TRAINING, config={"probe_steps": 1, "sampler": "remeasured"})
    steps, _, _ = two.run(traffic, training, 2, 14)[0]
    # One step before every second period of three steps begins.
    assert [counts.get("all_reduce", 0) for counts, _ in steps] == [0, 0, 0, 1, 0, 0] * 2


def test_accumulation_reduces_in_the_last_backward_only(two):
    training = replace(TRAINING, micro_batches=3, no_sync=True)
    steps, block, _ = two.run(traffic, training, 2, 5)[0]
    assert all(reduced(sizes) == 2 * block for _, sizes in steps)


def test_sums_over_replicas_count_each_shard_once():
    """Four ranks, two replicas: a sum over all ranks has every shard twice."""

    class Mesh:
        shape = (2, 2)
        device_type = "cpu"

        @staticmethod
        def size():
            return 4

    from torch.distributed.tensor import Replicate, Shard

    ranks = Ranks(Mesh(), (Replicate(), Shard(0)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda t: t.mul_(4))
        assert ranks.sum(torch.ones(3)).tolist() == [2.0] * 3
