"""Failures these tests catch: copies that drift apart without a word, after any way to make them; ranks with different
settings; wrappers and shards that the method does not know; a scaler whose scale would differ between ranks.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import grass
from grass.errors import ConfigError, GrassError
from tests.support import tiny
from tests.support.sharded import Training, whole

pytestmark = pytest.mark.plain_only(
    reason="processes with the interpreter are slow, and shards are ordinary tensors"
)

TRAINING = Training(mesh=(2,), dtype=torch.float32)


def message_of(error, function):
    """Return the message of an error."""
    with pytest.raises(error) as raised:
        function()
    return str(raised.value)


def weights(model):
    return {name: whole(p) for name, p in model.named_parameters()}


def refused_step(model, opt, loss_model=None):
    """The message of the first step, and whether it has changed a weight."""
    before = weights(model)

    def step():
        tiny.loss_of(loss_model or model, tiny.batch(0)).backward()
        opt.step()

    message = message_of(GrassError, step)
    return message, all(torch.equal(before[name], p) for name, p in weights(model).items()), opt.step_count


def data_parallel_before(_):
    model = DistributedDataParallel(tiny.stack())
    return message_of(ConfigError, lambda: grass.GrassAdamW(model))


def fsdp1(_):
    model = FullyShardedDataParallel(tiny.stack(), device_id=torch.device("cpu"))
    return message_of(ConfigError, lambda: grass.GrassAdamW(model))


def deepspeed(_):
    model = tiny.stack()
    model.head.weight.ds_id = 0  # as ZeRO-3 marks parameters
    return message_of(ConfigError, lambda: grass.GrassAdamW(model))


def tensor_parallel(_):
    model = tiny.stack()
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel()})
    return message_of(ConfigError, lambda: grass.GrassAdamW(model))


def tensor_parallel_and_sharded(_):
    model = tiny.stack()
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("parallel", "shard"))
    for block in model.blocks:
        parallelize_module(block, mesh["parallel"], {"up": ColwiseParallel()})
        fully_shard(block, mesh=mesh["shard"])
    return message_of(ConfigError, lambda: grass.GrassAdamW(model, config=tiny.config(always_active="none")))


def partly_sharded(_):
    """Point 6: parameters that no engine synchronizes, whose norms would be counted once a rank."""
    model = tiny.stack()
    for block in model.blocks:
        fully_shard(block)
    return message_of(ConfigError, lambda: grass.GrassAdamW(model))


def two_meshes(_):
    model = tiny.stack()
    for index, block in enumerate(model.blocks):
        shape, names = ((2,), ("shard",)) if index else ((2, 1), ("replicate", "shard"))
        fully_shard(block, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    return message_of(ConfigError, lambda: grass.GrassAdamW(model, config=tiny.config(always_active="none")))


AT_CONSTRUCTION = {
    data_parallel_before: "DistributedDataParallel",
    fsdp1: "FullyShardedDataParallel",
    deepspeed: "DeepSpeed",
    tensor_parallel: "tensor parallelism",
    tensor_parallel_and_sharded: "tensor parallelism",
    partly_sharded: "are not sharded",
    two_meshes: "different meshes",
}


@pytest.mark.parametrize("case", list(AT_CONSTRUCTION), ids=lambda case: case.__name__)
def test_what_is_not_supported_is_refused_at_construction(two, case):
    for message in two.run(case, None):
        assert AT_CONSTRUCTION[case] in message


def copies(_):
    model = tiny.stack()
    return refused_step(model, grass.GrassAdamW(model, config=tiny.config(probe_steps=0)))


def data_parallel_afterwards(_):
    """Point 9: ranks drifted apart by 4e-2 without a word."""
    model = tiny.stack()
    opt = grass.GrassAdamW(model, config=tiny.config())
    return refused_step(model, opt, DistributedDataParallel(model))


def inner_module_of_data_parallel(_):
    model = tiny.stack()
    parallel = DistributedDataParallel(model)
    return refused_step(model, grass.GrassAdamW(model, config=tiny.config()), parallel)


def fsdp1_afterwards(_):
    """It takes the parameters out of the model, so that no gradient ever arrives."""
    model = tiny.stack()
    opt = grass.GrassAdamW(model, config=tiny.config())
    parallel = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    before = [p.detach().clone() for p in parallel.parameters()]
    tiny.loss_of(parallel, tiny.batch(0)).backward()
    message = message_of(ConfigError, opt.step)
    return message, all(map(torch.equal, before, parallel.parameters())), opt.step_count


def made_before_the_process_group(folder, name):
    """A model and its optimizer, which could not know at construction that there would be ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    model = tiny.stack()
    opt = grass.GrassAdamW(model, config=tiny.config())
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=size)
    return model, opt


def data_parallel_before_the_process_group(folder):
    model, opt = made_before_the_process_group(folder, "parallel")
    return refused_step(model, opt, DistributedDataParallel(model))


def sharded_afterwards(_):
    """Not by accelerate, so the optimizer has parameters that are no longer in the model."""
    model = tiny.stack()
    opt = grass.GrassAdamW(model, config=tiny.config())
    TRAINING.shard(model)
    return refused_step(model, opt)


def sharded_before_the_process_group(folder):
    model, opt = made_before_the_process_group(folder, "sharded")
    TRAINING.shard(model)
    return refused_step(model, opt)


AT_THE_FIRST_STEP = {
    data_parallel_before_the_process_group: "fully_shard",
    sharded_afterwards: "after fully_shard",
    sharded_before_the_process_group: "after fully_shard",
    copies: "fully_shard",
    data_parallel_afterwards: "fully_shard",
    inner_module_of_data_parallel: "fully_shard",
    fsdp1_afterwards: "fully_shard",
}


@pytest.mark.parametrize("case", list(AT_THE_FIRST_STEP), ids=lambda case: case.__name__)
def test_copies_and_mixtures_are_refused_at_the_first_step_and_nothing_changes(two, case, tmp_path):
    for message, is_unchanged, step_count in two.run(case, str(tmp_path)):
        assert AT_THE_FIRST_STEP[case] in message
        assert is_unchanged
        assert step_count == 0


def zero_redundancy(_):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = tiny.stack()
    opt = ZeroRedundancyOptimizer(model.parameters(), grass.GrassAdamW, model=model, config=tiny.config())
    tiny.loss_of(model, tiny.batch(0)).backward()
    return message_of(ConfigError, opt.step)


def test_a_partitioned_optimizer_is_refused(two):
    assert all("fully_shard" in message for message in two.run(zero_redundancy, None))


def half_of_the_ranks(_):
    meshes = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    del meshes
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("model", "shard"))["shard"]
    model = tiny.stack()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return message_of(ConfigError, lambda: grass.GrassAdamW(model))


def test_a_mesh_of_some_ranks_is_refused(four):
    assert all("2 of 4 ranks" in message for message in four.run(half_of_the_ranks, None))


def different(training, name, value):
    """Rank 1 has another setting."""
    if dist.get_rank() == 1:
        changed = {name: value}
        if name in ("lr", "max_grad_norm"):
            training = replace(training, options={**training.options, **changed})
        else:
            training = replace(training, config={**training.config, **changed})
    model, opt = training.make()
    before = weights(model)
    message = message_of(GrassError, lambda: training.step(model, opt, 0))
    return message, all(torch.equal(before[n], p) for n, p in weights(model).items())


SETTINGS = {
    "seed": (5, "GrassConfig"),
    "active_layers": (3, "GrassConfig"),
    "lr": (2e-3, "lr, betas"),
}


@pytest.mark.parametrize("probe_steps", [0, 3])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_ranks_with_different_settings_stop_before_anything_changes(two, name, probe_steps):
    value, part = SETTINGS[name]
    training = replace(TRAINING, config={"probe_steps": probe_steps})
    for message, is_unchanged in two.run(different, training, name, value):
        assert message.startswith("rank 1 differs from rank 0 in")
        assert part in message
        assert is_unchanged


def drift(training):
    """Rank 1 draws from another state of the generator."""
    model, opt = training.make()
    training.run(model, opt, 0, 4)
    if dist.get_rank() == 1:
        opt._scheduler.sampler.draw()
    return message_of(GrassError, lambda: training.run(model, opt, 4, 20)), opt.step_count


def drift_of_lr(training):
    """Rank 1 has another learning rate from some step on."""
    model, opt = training.make()
    training.run(model, opt, 0, 4)
    opt.param_groups[0]["lr"] *= 1 + dist.get_rank()
    return message_of(GrassError, lambda: training.run(model, opt, 4, 20)), opt.step_count


@pytest.mark.parametrize(("function", "what"), [(drift, "its state"), (drift_of_lr, "lr, betas")])
def test_ranks_that_drift_apart_stop_at_the_next_draw(two, function, what):
    for message, step_count in two.run(function, TRAINING):
        assert message.startswith(f"rank 1 differs from rank 0 in {what}")
        assert step_count < 20


def scaled(training):
    model, opt = training.make()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(training.loss(model, 0)).backward()
    return message_of(GrassError, lambda: scaler.step(opt))


@pytest.mark.parametrize("probe_steps", [0, 3])
def test_a_grad_scaler_is_refused(two, probe_steps):
    training = replace(TRAINING, config={"probe_steps": probe_steps})
    assert all("bfloat16" in message for message in two.run(scaled, training))


def unread_norms(training):
    model, opt = training.make()
    training.run(model, opt, 0, 2)
    found = [
        message_of(GrassError, lambda: opt.layer_grad_norms),
        message_of(GrassError, lambda: opt.grad_norm),
    ]
    clipping_model, clipping = replace(training, options={"max_grad_norm": 1e9}).make()
    replace(training, options={"max_grad_norm": 1e9}).run(clipping_model, clipping, 0, 2)
    return found, clipping.grad_norm


def test_norms_that_nothing_sums_are_not_read_from_one_shard(two):
    answers = two.run(unread_norms, replace(TRAINING, config={"sampler": "uniform"}))
    for messages, _ in answers:
        assert all("max_grad_norm" in message for message in messages)
    assert torch.equal(answers[0][1], answers[1][1])


def alone(training):
    model, opt = training.make()
    training.run(model, opt, 0, 20)
    return weights(model), opt.layer_grad_norms.isfinite().all()


def test_one_process_with_shards_trains_as_without(one):
    """As in a trial of a script under ``torchrun --nproc-per-node 1``."""
    expected, _ = alone(replace(TRAINING, mesh=None))
    found, has_norms = one.run(alone, replace(TRAINING, mesh=(1,)))[0]
    assert has_norms
    assert all(torch.equal(expected[name], p) for name, p in found.items())


def evaluated_on_one_rank(training):
    """A copy on each rank, and a forward pass of rank 0 alone before the first step."""
    model, opt = training.make()
    if dist.get_rank() == 0:
        with torch.no_grad():
            tiny.loss_of(model, tiny.batch(0))
    training.run(model, opt, 0, 6)
    return weights(model)


def test_one_rank_may_evaluate_a_copy_alone(two):
    training = replace(TRAINING, mesh=(2, 1))
    first, second = two.run(evaluated_on_one_rank, training, seconds=60)
    assert all(torch.equal(p, second[name]) for name, p in first.items())


def unfrozen_later(training):
    """All parameters are frozen at the first forward; then a whole one is unfrozen beside sharded ones."""
    model = tiny.stack()
    for block in model.blocks:
        fully_shard(block)
    model.head.requires_grad_(False)
    model.embed.requires_grad_(False)
    opt = grass.GrassAdamW(model, lr=1e-3, config=tiny.config(probe_steps=0))
    training.run(model, opt, 0, 3)
    opt.set_trainable(model.head.parameters(), True)
    return message_of(ConfigError, lambda: training.run(model, opt, 3, 5))


def test_a_whole_parameter_that_is_unfrozen_later_is_refused(two):
    assert all("are not sharded" in message for message in two.run(unfrozen_later, TRAINING))
