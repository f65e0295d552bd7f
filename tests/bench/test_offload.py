"""Would catch: a pipeline that asks for its copies in an order, or behind waits, that keep the link idle; a simulated
step that moves other bytes than the moments have; a floor or a bound that is none; a claim that holds for some layers
only and does not say so; a benchmark that pretends to have measured, loses rows, or draws nothing.
"""

import contextlib
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.offload import measure, rows
from bench.offload.bound import bound_seconds
from bench.offload.picture import draw
from bench.offload.shapes import SHAPES, Compute, numel, shape_of
from bench.offload.steps import Task, log_of, parts, simulated, spread
from bench.offload.table import lines_of
from grass.cli import main
from grass.errors import ConfigError
from grass.offload.order import conflicts
from grass.offload.streams import COMPUTE, D2H, H2D, UPDATE
from grass.offload.timeline import Link

SEVEN = SHAPES["llama2-7b"]
LINK, TAKING_TURNS, HBM = Link(50e9, 50e9), Link(50e9, 50e9, 0.5), 3e12
NO_COMPUTE, SOME_COMPUTE = Compute(4096, 1e21), Compute(4096, 200e12)
SMALL = "4x256x512x1000"


LINKS = ("full duplex", "taking turns")


def seven(compute=SOME_COMPUTE, active=(8, 24), **options):
    return Task(SEVEN, compute, active, **options)


def test_shapes():
    assert numel(SEVEN.layer()) == 202_383_360
    assert numel(SEVEN.embedding()) == 131_072_000
    total = 32 * numel(SEVEN.layer()) + numel(SEVEN.embedding()) + numel(SEVEN.head())
    assert total == 6_738_415_616
    assert shape_of("32x4096x11008x32000")[1:] == SEVEN[1:]
    assert spread(32, 2) == (8, 24)
    assert spread(3, 3) == (0, 1, 2)
    for text in ("gpt", "1x2x3", "0x1x1x1", "1xax1x1"):
        with pytest.raises(ConfigError, match="llama2-7b"):
            shape_of(text)


def test_a_step_moves_the_moments_once_each_way():
    step = simulated(seven(), LINK, HBM)
    trained = 2 * numel(SEVEN.layer()) + numel(SEVEN.embedding()) + numel(SEVEN.head())
    assert step.num_bytes == {H2D: 8 * trained, D2H: 8 * trained}


@pytest.mark.parametrize("link", [LINK, TAKING_TURNS], ids=["full duplex", "taking turns"])
@pytest.mark.parametrize(("buffer_count", "most"), [(2, 1.06), (3, 1.01)])
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


ROW = re.compile(
    r"\| (8 and 24|0 and 1), ([\d,]+) \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \|"
)


def test_the_log_says_what_is_simulated_for_other_layers_and_fewer_tokens():
    found = ROW.findall((Path(__file__).parents[2] / "docs" / "kernel-log.md").read_text())
    assert len(found) == 4
    for layers, tokens, *told in found:
        compute = Compute(int(tokens.replace(",", "")), 200e12)
        task = seven(compute, active=tuple(map(int, layers.split(" and "))))
        steps = [
            (simulated(task, link, 2e12), bound_seconds(task, link, 2e12)) for link in (LINK, TAKING_TURNS)
        ]
        above = [step.seconds / step.floor for step, _ in steps] + [
            step.seconds / bound for step, bound in steps
        ]
        assert told == [f"{100 * (ratio - 1):.1f}" for ratio in above]


@pytest.mark.parametrize("link", [LINK, TAKING_TURNS], ids=LINKS)
def test_no_layers_take_longer_than_the_lowest(link):
    longest = simulated(seven(active=(0, 1)), link, HBM).seconds
    for active in ((30, 31), (15, 16), (0, 31), (1, 2), (0, 2), (8, 24)):
        assert simulated(seven(active=active), link, HBM).seconds < longest


@pytest.mark.parametrize("link", [LINK, Link(50e9, 50e9, 0.7), TAKING_TURNS], ids=str)
@pytest.mark.parametrize("active", [(0, 1), (8, 24), (15, 16), (30, 31)], ids=str)
@pytest.mark.parametrize(("buffer_mb", "buffer_count", "most"), [(64, 2, 1.03), (64, 3, 1.02), (32, 4, 1.01)])
def test_the_ring_is_used_as_well_as_it_can_be(link, active, buffer_mb, buffer_count, most):
    """With any share of computing, from copies alone to hardly any."""
    for tokens in (0, 512, 1024, 2048, 4096):
        compute = Compute(tokens, 200e12) if tokens else NO_COMPUTE
        task = seven(compute, active=active, buffer_bytes=buffer_mb * 2**20, buffer_count=buffer_count)
        step, bound = simulated(task, link, HBM), bound_seconds(task, link, HBM)
        assert step.floor <= bound * (1 + 1e-9)
        assert bound <= step.seconds * (1 + 1e-9)
        assert step.seconds < most * bound


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


def small():
    return Task(shape_of(SMALL), Compute(64, 1e12), (1, 2), buffer_bytes=2**20)


@pytest.fixture
def no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_device")
def test_without_a_device_it_says_that_it_has_not_measured():
    reported = []
    outcome = rows.run(small(), report=reported.append)
    assert outcome.rows == reported
    assert all(tuple(row) == rows.KEYS for row in reported)
    assert [(row["variant"], row["source"], row["measured"]) for row in reported] == [
        (variant, source, False) for variant in rows.VARIANTS for source in ("device", "simulation")
    ]
    assert {row["reason"] for row in reported if row["source"] == "device"} == {rows.NEEDS_CUDA}
    lines = "\n".join(lines_of(outcome.rows))
    assert "not measured: needs a CUDA device" in lines
    assert "50.0 GB/s in, 50.0 GB/s out" in lines
    assert "(given)" in lines


class FakeEvent:
    """Time passes by a microsecond an event, and by what the device sleeps."""

    now = 0.0

    def __init__(self, enable_timing=False):
        self.at = None

    def record(self, stream=None):
        FakeEvent.now += 1e-6
        self.at = FakeEvent.now

    def synchronize(self):
        assert self.at is not None

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


class FakeStream:
    def __init__(self, device=None):
        pass

    def wait_event(self, event):
        assert event.at is not None


def sleep(cycles):
    FakeEvent.now += cycles / 1e9


@pytest.fixture
def a_device(monkeypatch):
    """A CUDA device that is none: it shows that measuring runs, not what it finds."""
    cuda = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "Event": FakeEvent,
        "Stream": FakeStream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": FakeStream,
        "synchronize": lambda device=None: None,
        "_sleep": sleep,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(measure, "_LINK_BYTES", 1024)
    monkeypatch.setattr(measure, "_HBM_BYTES", 1024)
    environment = rows.describe_environment(torch.device("cpu"))
    monkeypatch.setattr(rows, "describe_environment", lambda device: environment)
    monkeypatch.setattr(torch, "device", lambda *args: _CPU)


_CPU = torch.device("cpu")


@pytest.mark.usefixtures("a_device")
def test_measuring_runs_and_stands_beside_the_simulation(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures are optional")
    outcome = rows.run(small())
    assert [row["measured"] for row in outcome.rows] == [True, False, True, False]
    assert outcome.rows[0]["link_measured"]
    for (_, source), step in outcome.steps.items():
        assert step.num_bytes == outcome.steps["vanilla", "simulation"].num_bytes
        assert step.seconds > 0
        if source == "device":  # what the device slept, at a thousand million cycles a second
            expected = sum(part.seconds for part in parts(small()))
            assert sum(s.end - s.start for s in step.spans if s.queue == COMPUTE) >= expected
    lines = lines_of(outcome.rows)
    assert not any("not measured" in line for line in lines)
    draw(outcome, tmp_path / "picture")
    assert (tmp_path / "picture").read_bytes().startswith(b"\x89PNG")


def bench(*arguments):
    return main(["bench", "offload", *map(str, arguments)])


@pytest.mark.usefixtures("no_device")
def test_the_command(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures are optional")
    out, plot = tmp_path / "rows.jsonl", tmp_path / "step.png"
    options = ["--model", SMALL, "--pcie-gbs", 25, "--duplex-factor", 0.5]
    assert bench(*options, "--out", out, "--plot", plot) == 0
    printed = capsys.readouterr().out
    assert "25.0 GB/s in, 25.0 GB/s out, 50 % of it each" in printed
    assert "overlapped" in printed
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(written) == 4
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert bench(*options, "--json") == 0
    drop = {"timestamp": None}
    assert [{**row, **drop} for row in json.loads(capsys.readouterr().out)] == [
        {**row, **drop} for row in written
    ]


@pytest.mark.usefixtures("no_device")
def test_layers_can_be_named(capsys):
    assert bench("--model", SMALL, "--layers", "1,0", "--json") == 0
    named = json.loads(capsys.readouterr().out)
    assert {tuple(row["active_layers"]) for row in named} == {(0, 1)}
    simulation = next(row for row in named if row["variant"] == "overlapped" and row["seconds"])
    assert simulation["floor_seconds"] < simulation["bound_seconds"] <= simulation["seconds"]
    assert simulation["above_bound"] == simulation["seconds"] / simulation["bound_seconds"] - 1
    assert bench("--model", SMALL, "--layers", "0,1") == 0
    printed = capsys.readouterr().out
    assert "layers 0, 1 and what is in no layer" in printed
    assert "bound ms" in printed
    assert bench("--model", "1x256x512x1000", "--layers", "0") == 0
    assert "layers 0 and what is in no layer" in capsys.readouterr().out
    assert bench("--model", SMALL, "--active-layers", 2) == 0
    assert "layers 1, 3 and what is in no layer" in capsys.readouterr().out


@pytest.mark.usefixtures("no_device")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "gpt"], 1, "pass one of"),
        (["--model", SMALL, "--active-layers", 5], 1, "has 4 layers"),
        (["--model", SMALL, "--buffer-mb", 0.01], 1, "buffer_mb"),
        (["--model", SMALL, "--layers", "1,4"], 1, "has 4 layers"),
        (["--layers", "0,1", "--active-layers", 2], 2, "not allowed with"),
        (["--layers", "1,1"], 2, "twice"),
        (["--layers", "0,-1"], 2, "not a layer's number"),
        (["--layers", "one"], 2, "not a layer's number"),
        (["--layers", ","], 2, "not a layer's number"),
        (["--active-layers", 0], 2, "at least 1"),
        (["--active-layers", "two"], 2, "not a whole number"),
        (["--duplex-factor", 1.5], 2, "at most 1"),
        (["--pcie-gbs", 0], 2, "more than 0"),
        (["--plot", "missing/step.png"], 1, "cannot be written"),
    ],
)
def test_what_cannot_be_is_refused(capsys, arguments, code, message):
    assert bench(*arguments) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
