"""Would catch: a pipeline that asks for its copies in an order, or behind waits, that keep the link idle; a simulated
step that moves other bytes than the moments have; a floor or a bound that is none; a claim that holds for some layers
only and does not say so; a benchmark that pretends to have measured; a share or an excess that is another's.
"""

import argparse
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.__main__ import main
from bench.offload import command, measure, rows
from bench.offload.bound import bound_seconds
from bench.offload.measure import Updates
from bench.offload.order import conflicts
from bench.offload.picture import names_outside
from bench.offload.shapes import SHAPES, Compute, numel, shape_of
from bench.offload.steps import UPDATE_TRAFFIC, Task, log_of, parts, simulated, spread
from bench.offload.table import lines_of
from bench.offload.timeline import Link
from grass.cli.values import UsageError
from grass.errors import ConfigError
from grass.offload import pipeline
from grass.offload.streams import COMPUTE, D2H, H2D, UPDATE
from grass_kernels import masked_adamw_

SEVEN = SHAPES["llama2-7b"]
LINK, TAKING_TURNS, HBM = Link(50e9, 50e9), Link(50e9, 50e9, 0.5), 3e12
NO_COMPUTE, SOME_COMPUTE = Compute(4096, 1e21), Compute(4096, 200e12)
OUTSIDE = numel(SEVEN.embedding()) + numel(SEVEN.norm()) + numel(SEVEN.head())
LINKS = ("full duplex", "taking turns")


def seven(compute=SOME_COMPUTE, active=(8, 24), **options):
    return Task(SEVEN, compute, active, **options)


def test_shapes():
    assert numel(SEVEN.layer()) == 202_383_360
    assert numel(SEVEN.embedding()) == 131_072_000
    total = 32 * numel(SEVEN.layer()) + OUTSIDE
    assert total == 6_738_415_616
    assert shape_of("32x4096x11008x32000")[1:] == SEVEN[1:]
    assert spread(32, 2) == (8, 24)
    assert spread(3, 3) == (0, 1, 2)
    for text in ("gpt", "1x2x3", "0x1x1x1", "1xax1x1"):
        with pytest.raises(ConfigError, match="llama2-7b"):
            shape_of(text)


def test_a_step_moves_the_moments_once_each_way():
    step = simulated(seven(), LINK, HBM)
    trained = 2 * numel(SEVEN.layer()) + OUTSIDE
    assert step.num_bytes == {H2D: 8 * trained, D2H: 8 * trained}


@pytest.mark.parametrize("link", [LINK, TAKING_TURNS], ids=["full duplex", "taking turns"])
@pytest.mark.parametrize(("buffer_count", "most"), [(2, 1.07), (3, 1.01)])
def test_copies_alone_reach_their_floor(link, buffer_count, most):
    # Two buffers wait for half an update a unit, and a short unit for the long one beside it.
    step = simulated(seven(NO_COMPUTE, buffer_count=buffer_count), link, HBM)
    assert step.floor <= step.seconds * (1 + 1e-9)
    assert step.seconds < most * step.floor


@pytest.mark.parametrize("link", [LINK, TAKING_TURNS], ids=["full duplex", "taking turns"])
def test_4096_tokens_with_layers_spread_evenly_reach_the_floor(link):
    step = simulated(seven(), link, HBM)
    assert step.seconds < 1.05 * step.floor


@pytest.mark.parametrize(
    ("link", "least", "most"), [(LINK, 1.05, 1.08), (TAKING_TURNS, 1.15, 1.18)], ids=LINKS
)
def test_with_the_lowest_layers_the_floor_is_out_of_reach_and_the_bound_is_not(link, least, most):
    """Backward has ended but for one layer when the states of layers 1 and 0, and of the embedding, begin to move."""
    task = seven(active=(0, 1))
    step, bound = simulated(task, link, HBM), bound_seconds(task, link, HBM)
    assert least * step.floor < bound <= step.seconds < most * step.floor
    assert step.seconds < 1.005 * bound


CELL = r" ([\d.]+) % \(([\d.]+) %\) \|"
ROW = re.compile(r"\| (\d+) and (\d+), ([\d,]+) \|" + 4 * CELL)


def test_the_log_says_what_is_simulated_at_both_rates():
    found = ROW.findall((Path(__file__).parents[2] / "docs" / "kernel-log.md").read_text())
    assert len(found) == 10
    for first, second, tokens, *told in found:
        cells = []
        for flops in (200e12, 400e12):
            for link in (LINK, TAKING_TURNS):
                task = seven(Compute(int(tokens.replace(",", "")), flops), active=(int(first), int(second)))
                step = simulated(task, link, rows.DEFAULT_HBM, hop=rows.DEFAULT_HOP)
                cells += [
                    step.seconds / step.floor,
                    step.seconds / bound_seconds(task, link, rows.DEFAULT_HBM),
                ]
        assert told == [f"{100 * (ratio - 1):.1f}" for ratio in cells]


@pytest.mark.parametrize("link", [LINK, TAKING_TURNS], ids=LINKS)
def test_no_layers_take_longer_than_the_lowest(link):
    longest = simulated(seven(active=(0, 1)), link, HBM).seconds
    for active in ((30, 31), (15, 16), (0, 31), (1, 2), (0, 2), (8, 24)):
        assert simulated(seven(active=active), link, HBM).seconds < longest


@pytest.mark.parametrize("link", [LINK, Link(50e9, 50e9, 0.7), TAKING_TURNS], ids=str)
@pytest.mark.parametrize("active", [(0, 1), (8, 24), (15, 16), (30, 31)], ids=str)
@pytest.mark.parametrize(("buffer_mb", "buffer_count", "most"), [(64, 2, 1.04), (64, 3, 1.03), (32, 4, 1.02)])
def test_the_ring_is_used_as_well_as_it_can_be(monkeypatch, link, active, buffer_mb, buffer_count, most):
    """With any share of computing, from copies alone to hardly any; waits that free gradients are apart."""
    monkeypatch.setattr(pipeline, "MAX_HELD", math.inf)
    for tokens in (0, 512, 1024, 2048, 4096):
        compute = Compute(tokens, 200e12) if tokens else NO_COMPUTE
        task = seven(compute, active=active, buffer_bytes=buffer_mb * 2**20, buffer_count=buffer_count)
        step, bound = simulated(task, link, HBM), bound_seconds(task, link, HBM)
        assert step.floor <= bound * (1 + 1e-9)
        assert bound <= step.seconds * (1 + 1e-9)
        assert step.seconds < most * bound


@pytest.mark.parametrize("flops", [200e12, 400e12])
def test_freeing_gradients_costs_neighbours_only(monkeypatch, flops):
    """Would catch a wait for a bucket whose update cannot be over: of layers apart, or behind a norm of the head."""
    free = {
        active: simulated(seven(Compute(4096, flops), active=active), LINK, HBM)
        for active in ((8, 24), (15, 16))
    }
    monkeypatch.setattr(pipeline, "MAX_HELD", math.inf)
    for active, step in free.items():
        costs = step.seconds / simulated(seven(Compute(4096, flops), active=active), LINK, HBM).seconds - 1
        if active == (8, 24):
            assert costs == pytest.approx(0, abs=1e-9)
        else:
            assert 0.005 < costs < 0.05


def test_a_longer_update_and_a_longer_hop_are_hidden_by_a_third_buffer():
    """0.3 ms for an update of a full buffer, and 10 us from a stream to the next: what three buffers are for."""
    slow = UPDATE_TRAFFIC * 64 * 2**20 / 0.3e-3
    above = {}
    for count in (2, 3):
        step = simulated(seven(active=(0, 1), buffer_count=count), LINK, slow, hop=10e-6)
        above[count] = step.seconds / step.floor - 1
    assert above[2] > 0.085
    assert above[3] < 0.073


@settings(max_examples=60, deadline=None)
@given(
    st.sets(st.integers(0, 4), min_size=1),
    st.sampled_from([1.0, 3e8, 3e9, 3e10]),
    st.sampled_from([(1e9, 1e9), (1e9, 3e9), (2e9, 1e9)]),
    st.sampled_from([0.3, 0.5, 0.8, 1.0]),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.integers(1, 4),
    st.booleans(),
)
def test_no_step_beats_the_bound(active, flops, rates, factor, buffer_mb, buffer_count, vanilla):
    task = Task(
        shape_of("5x128x256x3000"),
        Compute(1, flops),
        tuple(sorted(active)),
        int(buffer_mb * 2**20),
        buffer_count,
    )
    link, hbm = Link(*rates, factor), 2e10
    step = simulated(task, link, hbm, vanilla=vanilla)
    assert bound_seconds(task, link, hbm) <= step.seconds * (1 + 1e-9)


@pytest.mark.parametrize("link", [LINK, TAKING_TURNS], ids=["full duplex", "taking turns"])
def test_overlapping_is_faster_than_not(link):
    task = seven()
    overlapped, vanilla = simulated(task, link, HBM), simulated(task, link, HBM, vanilla=True)
    copies = sum(vanilla.num_bytes.values()) / link.h2d  # one after the other: there is nothing to share
    assert vanilla.seconds == pytest.approx(vanilla.busy[COMPUTE] + vanilla.busy[UPDATE] + copies)
    assert vanilla.exposed == pytest.approx(vanilla.busy[UPDATE] + copies)
    assert overlapped.floor <= overlapped.seconds < vanilla.seconds
    assert overlapped.num_bytes == vanilla.num_bytes


def test_more_buffers_and_faster_links_are_never_slower():
    seconds = [simulated(seven(buffer_count=count), LINK, HBM).seconds for count in (2, 3, 4)]
    seconds += [simulated(seven(buffer_count=4), Link(rate, rate), HBM).seconds for rate in (60e9, 100e9)]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize("vanilla", [False, True])
def test_what_is_simulated_has_no_conflict(vanilla):
    assert conflicts(log_of(seven(), vanilla=vanilla)) == []


def test_compute_is_counted_by_products():
    task = seven()
    layer = 2 * numel(SEVEN.layer()) * 4096 / 200e12
    seconds = {part.operation[:2]: part.seconds for part in parts(task)}
    assert seconds["forward", "layer 3"] == pytest.approx(layer)
    assert seconds["backward", "layer 3"] == pytest.approx(2 * layer)  # recomputed, and gradients of inputs
    assert seconds["backward", "layer 8"] == pytest.approx(3 * layer)  # of weights, too


def test_without_a_device_it_says_that_it_has_not_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reported = []
    task = Task(shape_of("4x256x512x1000"), Compute(64, 1e12), (1, 2), buffer_bytes=2**20)
    outcome = rows.run(task, report=reported.append)
    assert outcome.rows == reported
    assert all(tuple(row) == rows.KEYS for row in reported)
    assert [(row["variant"], row["source"], row["measured"]) for row in reported] == [
        (variant, source, False) for variant in rows.VARIANTS for source in ("device", "simulation")
    ]
    assert {row["reason"] for row in reported if row["source"] == "device"} == {rows.NEEDS_CUDA}
    assert "not measured: needs a CUDA device" in "\n".join(lines_of(outcome.rows))


def test_numbers_of_a_row(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for row in rows.run(seven(active=(0, 1)), Link(50e9, 25e9, 0.5), HBM, hop=1e-5).rows[1::2]:
        vanilla = row["variant"] == "vanilla"
        step = simulated(seven(active=(0, 1)), Link(50e9, 25e9, 0.5), HBM, hop=1e-5, vanilla=vanilla)
        assert (row["seconds"], row["floor_seconds"]) == (step.seconds, step.floor)
        assert row["above_floor"] == pytest.approx(row["seconds"] / row["floor_seconds"] - 1)
        assert row["above_bound"] == pytest.approx(row["seconds"] / row["bound_seconds"] - 1)
        assert row["floor_seconds"] < row["bound_seconds"] <= row["seconds"]
        assert row["exposed_seconds"] == pytest.approx(row["seconds"] - row["compute_seconds"])
        copies = row["h2d_bytes"] / 50e9 + row["d2h_bytes"] / 25e9  # which take turns
        assert row["hidden_share"] == pytest.approx(max(0.0, 1 - row["exposed_seconds"] / copies))
        assert (row["h2d_bytes"], row["d2h_bytes"]) == (step.num_bytes[H2D], step.num_bytes[D2H])


def test_measured_updates_are_whole_and_each_place_has_one_plan():
    """A view of 5 elements and one of 8 at the same place, then the first again; and another place."""
    ring = torch.rand(2, 2, 8)
    expected = ring.clone()
    update = Updates(8, torch.device("cpu"))
    step, param = torch.zeros(()), update.param.clone()
    for buffer, n in ((0, 5), (0, 8), (0, 5), (1, 5)):
        update(None, {"exp_avg": ring[buffer, 0, :n], "exp_avg_sq": ring[buffer, 1, :n]})
        lists = ([param[:n]], [update.grad[:n]], [expected[buffer, 0, :n]], [expected[buffer, 1, :n]], [step])
        masked_adamw_(*lists, lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    assert torch.equal(ring, expected)
    assert torch.equal(update.param, param)
    assert len(update.plans) == 3


def test_a_measurement_that_fails_says_why_and_leaves_the_simulation(monkeypatch):
    def failing(task, device, vanilla):
        raise RuntimeError("CUDA error: launch failed\nmore")

    products = SimpleNamespace(flops_per_second=700e12)
    for name, value in {
        "measure_link": LINK,
        "measure_hbm": HBM,
        "measure_hop": 1e-5,
        "Products": products,
    }.items():
        monkeypatch.setattr(rows.measure, name, lambda *arguments, value=value: value)
    monkeypatch.setattr(rows.measure, "measure_steps", failing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(rows, "describe_environment", lambda device: {})
    made = rows.run(seven(), measures_flops=True).rows
    assert [(row["variant"], row["source"], row["reason"]) for row in made] == [
        ("overlapped", "device", "RuntimeError: CUDA error: launch failed"),
        ("overlapped", "simulation", None),
        ("vanilla", "device", "RuntimeError: CUDA error: launch failed"),
        ("vanilla", "simulation", None),
    ]
    assert {(row["flops"], row["flops_measured"]) for row in made} == {(700e12, True)}


def asked(*options):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["offload", *options])
    return command.read(arguments), arguments


def test_options_reach_the_task_and_the_rates():
    """Catches an option that is read and forgotten, or in another unit."""
    (task, link, hbm), arguments = asked()
    assert task == Task(SEVEN, Compute(4096, 200e12), (8, 24), 64 * 2**20, 3, -1)
    assert (link, hbm, arguments.hop_us) == (None, None, None)
    assert asked("--buffer-count", "2", "--buffer-mb", "32", "--normal-priority")[0][0][3:] == (
        32 * 2**20,
        2,
        0,
    )
    assert asked("--tflops", "400", "--tokens", "7")[0][0].compute == Compute(7, 400e12)
    assert asked("--hbm-gbs", "1500")[0][2] == 1.5e12
    (_, _, hbm), _ = asked("--update-ms", "0.3", "--buffer-mb", "32")
    assert UPDATE_TRAFFIC * 32 * 2**20 / hbm == pytest.approx(0.3e-3)
    with pytest.raises(UsageError, match="the same"):
        asked("--update-ms", "0.3", "--hbm-gbs", "100")
    for text, value in (("0", 0), ("0.00", 0), ("7.5", 7.5)):
        assert asked("--hop-us", text)[1].hop_us == value
    with pytest.raises(SystemExit):
        asked("--hop-us", "-1")


def test_a_run_uses_the_hop_and_the_updates_it_was_asked_for(capsys):
    """And says so in its rows."""
    for option, key, value in (
        ("--hop-us=500", "hop_seconds", 500e-6),
        ("--update-ms=3", "hbm_bytes_per_second", UPDATE_TRAFFIC * 64 * 2**20 / 3e-3),
    ):
        seconds = []
        for options in ([], [option]):
            assert main(["offload", "--layer-indices", "0,1", "--json", *options]) == 0
            row = next(r for r in json.loads(capsys.readouterr().out) if r["source"] == "simulation")
            seconds.append(row["seconds"])
        assert row[key] == pytest.approx(value)
        assert seconds[1] > 1.005 * seconds[0]


def test_the_priority_of_updates_reaches_the_device(monkeypatch):
    priorities = []

    class StoppedError(Exception):
        pass

    def engine(device, *, serial, update_priority):
        priorities.append(update_priority)
        raise StoppedError

    monkeypatch.setattr(measure, "TracingEngine", engine)
    for priority in (-1, 0):
        with pytest.raises(StoppedError):
            measure.measure_steps(seven(update_priority=priority), torch.device("cpu"), vanilla=False)
    assert priorities == [-1, 0]


def test_the_picture_names_the_buckets_outside_of_layers():
    found = parts(seven())
    outside = {
        part.bucket: part.operation.label
        for part in found
        if part.bucket is not None and not part.operation.label.startswith("layer")
    }
    assert names_outside({"layers": SEVEN.layers}) == outside
