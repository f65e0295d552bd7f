"""Failures these tests catch: whole weights or states counted on every GPU; gathered weights that are never freed;
gradients of frozen layers that count as reduced; bounds that take one link for another; a process group left behind.
"""

import dataclasses
import json

import pytest
import torch.distributed as dist

from grass.cli import main
from grass.errors import ConfigError
from grass.plan.cluster import GATHER, REDUCE, SCATTER, Cluster
from grass.plan.prediction import GIBIBYTE, Case, predict
from tests.support.plan_model import SIZES

pytest.importorskip("transformers", reason="plans are of transformers models")

WIDTH, INNER, VOCAB, LAYERS = (
    SIZES[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers")
)
LAYER = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH
OUTSIDE = 2 * VOCAB * WIDTH + WIDTH
ACTIVE = 2
BYTES = 2  # of a weight or gradient


@pytest.fixture(scope="module")
def case(folder):
    return Case(str(folder), batch=1, seq=16, loss="full", sample_interval=10, master_weights=False)


@pytest.fixture(scope="module")
def rows(case):
    """Rows by (GPUs, shard, method); None for one GPU."""
    found = {}
    for cluster in (None, Cluster(4, 4), Cluster(8, 4)):
        key = None if cluster is None else (cluster.world_size, cluster.shard)
        for row in predict(dataclasses.replace(case, cluster=cluster), ["grass-resident", "grass-adamw"]):
            found[key, row.method] = row
    return found


def size(gib):
    return gib * GIBIBYTE


@pytest.mark.parametrize("method", ["grass-resident", "grass-adamw"])
def test_each_gpu_has_its_share_of_weights_and_states(rows, method):
    alone, shared = rows[None, method], rows[(4, 4), method]
    for name in ("weights_gib", "states_host_gib"):
        assert getattr(shared, name) == pytest.approx(getattr(alone, name) / 4, rel=0.01)
    if method == "grass-adamw":
        assert shared.states_device_gib == pytest.approx(
            alone.states_device_gib / 4, rel=0.02
        )  # and counters
    assert dataclasses.replace(
        rows[(8, 4), method], reduced_gib_per_step=0, step_floor_ms=0, peak_gib=0, activations_gib=0
    ) == dataclasses.replace(shared, reduced_gib_per_step=0, step_floor_ms=0, peak_gib=0, activations_gib=0)


def test_whole_weights_of_few_layers_exist_at_a_time(rows):
    """The outside stays gathered from forward to backward; of the layers two, and one on its way."""
    alone, shared = rows[None, "grass-adamw"], rows[(4, 4), "grass-adamw"]
    gathered = size(shared.peak_gib - alone.peak_gib / 4)
    assert gathered < BYTES * (2 * OUTSIDE + 6 * LAYER)
    assert shared.peak_gib < alone.peak_gib


def test_weights_are_sent_twice_and_gradients_of_trained_layers_once(rows):
    share = 3 / 4
    for method, trained in (("grass-adamw", LAYERS), ("grass-resident", ACTIVE)):
        row = rows[(4, 4), method]
        # forward and backward gather the layers; the outside is gathered once
        assert size(row.gathered_gib_per_step) == pytest.approx(
            share * BYTES * (2 * LAYERS * LAYER + OUTSIDE)
        )
        gradients = BYTES * (trained * LAYER + OUTSIDE)
        assert size(row.reduced_gib_per_step) == pytest.approx(share * gradients)
        copies = rows[(8, 4), method]
        over_copies = 2 * (2 - 1) / 2 * gradients / 4
        assert size(copies.reduced_gib_per_step) == pytest.approx(share * gradients + over_copies)


def test_a_bound_is_that_of_the_slowest_link():
    cluster = Cluster(16, 8, node_size=8, link_gbs=400.0, network_gbs=50.0)
    assert cluster.replicas == 2
    assert cluster.sent(GATHER, 800) == cluster.sent(SCATTER, 800) == 700
    assert cluster.sent(REDUCE, 800) == 800
    assert cluster.seconds(400e9, 0) == pytest.approx(1.0)  # inside a machine
    assert cluster.seconds(0, 50e9) == pytest.approx(1.0)  # between machines
    over_machines = dataclasses.replace(cluster, shard=16, network_gbs=25.0)
    assert over_machines.seconds(200e9, 0) == pytest.approx(1.0)  # eight GPUs share what crosses a border
    pairs = Cluster(16, 2, node_size=8, link_gbs=400.0, network_gbs=50.0)
    assert pairs.seconds(0, 200e9) == pytest.approx(1.0)  # two rings share eight networks
    assert pairs.seconds(800e9, 200e9) == pytest.approx(2.0)  # the kinds overlap
    one_machine = Cluster(8, 4, node_size=8, link_gbs=400.0, network_gbs=50.0)
    assert one_machine.seconds(0, 400e9) == pytest.approx(1.0)


@pytest.mark.parametrize(("world_size", "shard"), [(8, 3), (4, 8), (0, 1)])
def test_copies_that_do_not_divide_the_gpus_are_refused(world_size, shard):
    with pytest.raises(ConfigError, match="divides"):
        Cluster(world_size, shard)


def test_the_command_has_rows_of_one_of_several_gpus(folder, capsys):
    arguments = ["plan", "--model", str(folder), "--batch-size", "1", "--context", "16", "--world-size", "4"]
    assert main([*arguments, "--json"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert "full" in rows
    assert not any(name.startswith("lora") for name in rows)
    assert 0 < rows["grass"]["reduced_gib_per_step"] < rows["full"]["reduced_gib_per_step"]
    assert not dist.is_initialized()
    assert main([*arguments, "--shard", "3"]) == 2
    assert "divides" in capsys.readouterr().err
    assert main([*arguments, "--loss", "chunked"]) == 2
    assert "--loss full" in capsys.readouterr().err
