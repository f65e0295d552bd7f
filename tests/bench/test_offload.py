"""Would catch: a pipeline that asks for its copies in an order, or behind waits, that keep the link idle; a simulated
step that moves other bytes than the moments have; a floor that is none; a benchmark that pretends to have measured,
loses rows, or draws nothing.
"""

import contextlib
import json

import pytest
import torch

from bench.offload import measure, rows
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


def seven(compute=SOME_COMPUTE, **options):
    return Task(SEVEN, compute, spread(32, 2), **options)


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
def test_a_step_that_computes_longer_than_it_copies_reaches_its_floor(link):
    step = simulated(seven(), link, HBM)
    assert step.seconds < 1.05 * step.floor


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
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "gpt"], 1, "pass one of"),
        (["--model", SMALL, "--active-layers", 5], 1, "has 4 layers"),
        (["--model", SMALL, "--buffer-mb", 0.01], 1, "buffer_mb"),
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
