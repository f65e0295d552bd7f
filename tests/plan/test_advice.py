"""Failures these tests catch: advice to take what does not fit in some phase or on the host, the dear way where a cheap
one fits, others' methods, a command that trains by another method than the advised one, a chart without a line or
with probing in it, a chart whose lines lie on its bottom.
"""

from pathlib import Path

import pytest

from grass.cli import make_parser
from grass.cli.dataclass_options import given_options
from grass.config import GrassConfig
from grass.finetune.options import FinetuneOptions
from grass.plan.advice import ONLY_COMPARED, advise, choose, finetune_command
from grass.plan.chart import draw_chart, lengths, make_chart
from grass.plan.prediction import METHODS, PROBING, Row


def row(method, peak, floor_ms=100.0, traffic=0.0, host=0.0):
    return Row(method, peak, peak, 0.0, 0.0, host, 0.0, traffic, traffic, floor_ms, True)


ROWS = [
    row("full", 40, 150),
    row("grass-adamw", 50, 150),
    row("lora-r128", 10, 90),
    row("lisa", 11, 80),
    row("grass", 60),
    row("grass-resident", 23, 100.5, 0.1, 48),
    row("grass-streamed", 15, 100, 5, 48),
    row("grass-streamed-fused", 14, 100, 5, 48),
    row("grass-probing", 14.5),
    row("grass-streamed-fused-probing", 14.5),
]


@pytest.mark.parametrize(
    ("gpu_gib", "chosen", "following"),
    [
        (80, "grass:", "All methods"),
        (55, "grass-resident", "grass, with 60.0"),
        (24, "grass-resident", "grass-adamw, with 50.0"),
        (16, "grass-streamed:", "grass-resident, with 23.0"),
        (14.6, "grass-streamed-fused", "grass-streamed, with 15.0"),
    ],
)
def test_the_cheapest_that_fits_and_the_next(gpu_gib, chosen, following):
    line = advise(ROWS, gpu_gib)
    assert line.startswith(f"Use {chosen}")
    assert following in line
    assert "\n" not in line


def test_probing_must_fit_too():
    assert advise(ROWS, 14.2).startswith(
        "Nothing fits 14.2 GiB: grass-streamed-fused needs the least, 14.5 GiB"
    )


def test_full_is_taken_where_it_is_fastest():
    assert advise([row("full", 6, 40), row("grass-adamw", 8, 50), row("grass", 7, 100)], 10).startswith(
        "Use grass-adamw: 8.0 of 10 GiB, at least 50 ms"
    )


def test_states_must_fit_the_host():
    assert advise(ROWS, 24, host_gib=32) == (
        "Nothing fits 24 GiB: grass-adamw needs the least, 50.0 GiB; shorter sequences, a smaller batch or fewer "
        "active layers need less."
    )
    assert advise(ROWS, 55, host_gib=32).startswith("Use grass-adamw")
    assert "48.0 in host memory" in advise(ROWS, 24, host_gib=48)
    assert "Nothing fits 32 GiB of host" in advise(ROWS[5:8], 24, host_gib=32)


def test_nothing_is_chosen_if_nothing_fits():
    assert choose(ROWS, 10) is None


TRAINED = [name for name in METHODS if not name.endswith(PROBING) and not name.startswith(ONLY_COMPARED)]


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_that_is_advised_has_a_command(method, tmp_path, monkeypatch):
    """The parser of `grass finetune` accepts it, and what it reads is the method with the settings of the plan."""
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    options = FinetuneOptions(model="OWNER/NAME", data="FILE", batch_size=4, context=512)
    config = GrassConfig(active_layers=3, buffer_mb=32.5)
    words = finetune_command(method, options, config).split()
    parsed = make_parser().parse_args(words[1:])
    read = FinetuneOptions(**given_options(parsed, FinetuneOptions))
    assert (read.batch_size, read.context) == (4, 512)
    read_config = GrassConfig(**given_options(parsed, GrassConfig))
    if method == "grass-adamw":
        assert read.method == "full"
        assert read_config == GrassConfig()
        return
    assert read.method == "grass"
    assert read_config.active_layers == 3
    assert f"grass-{read_config.offload}".removesuffix("-none") == method.removesuffix("-fused")
    assert read_config.fused_backward is method.endswith("-fused")
    assert not (read_config.fused_backward and read.max_grad_norm)
    assert read_config.buffer_mb == (32.5 if read_config.offload == "streamed" else GrassConfig.buffer_mb)


def test_options_at_their_defaults_are_left_out():
    command = finetune_command("grass-resident", FinetuneOptions(model="M", data="D"), GrassConfig())
    assert command == "grass finetune --model M --data D --offload resident"


@pytest.mark.parametrize(
    ("seq", "most", "points", "expected"),
    [
        (1024, None, 4, [256, 512, 1024, 1536]),
        (1024, 1024, 3, [256, 512, 1024]),
        (1024, None, 2, [256, 1024]),
        (1024, None, 1, [1024]),
        (1, 8, 4, [1]),
    ],
)
def test_lengths_of_the_chart_are_those_the_model_has(seq, most, points, expected):
    assert lengths(seq, most, points) == expected


def test_the_chart_is_scaled_to_what_it_shows():
    """Peaks are at least half as high as the axes, in whatever unit; a limit far above is named, not drawn."""
    pytest.importorskip("matplotlib", reason="the chart needs it")
    for highest, gpu_gib, unit, has_limit in (
        (0.01, 24.0, "MiB", False), (0.9, 1.0, "MiB", True), (2.0, 24.0, "GiB", False), (20.0, 24.0, "GiB", True),
        (60.0, 24.0, "GiB", True),
    ):  # fmt: skip
        rows = {seq: [row(name, highest * seq / 512) for name in METHODS] for seq in (256, 512)}
        (axes,) = make_chart(rows, gpu_gib, "a model").axes
        scale = 1024 if unit == "MiB" else 1
        assert axes.get_ylim()[1] < 2 * highest * scale
        drawn = [line for line in axes.lines if line.get_label() in METHODS]
        assert max(max(line.get_ydata()) for line in drawn) == pytest.approx(highest * scale)
        head = axes.get_title(loc="left")
        assert unit in head.split(" (")[0]
        assert (len(axes.lines) > len(drawn)) is has_limit
        assert (f"{gpu_gib:g} GiB" in head) is not has_limit


def test_chart(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="the chart needs it")
    by_length = {
        seq: [row(name, seq / 100 + i) for i, name in enumerate(METHODS)] for seq in (256, 512, 1024)
    }
    draw_chart(by_length, 24, "a model", tmp_path / "chart.png")
    content = (tmp_path / "chart.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000
