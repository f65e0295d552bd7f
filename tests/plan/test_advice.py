"""Failures these tests catch: advice to take what does not fit in some phase or on the host, the dear way where a
cheap one fits, others' methods, a chart without a line or with probing in it.
"""

from pathlib import Path

import pytest

from grass.plan.advice import advise
from grass.plan.chart import draw_chart, lengths
from grass.plan.prediction import METHODS, Row


def row(method, peak, floor_ms=100.0, traffic=0.0, host=0.0):
    return Row(method, peak, peak, 0.0, 0.0, host, 0.0, traffic, traffic, floor_ms, True)


ROWS = [
    row("full", 50, 150),
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
        (24, "grass-resident", "full, with 50.0"),
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
    assert advise([row("full", 8, 50), row("grass", 7, 100)], 10).startswith(
        "Use full: 8.0 of 10 GiB, at least 50 ms"
    )


def test_states_must_fit_the_host():
    assert advise(ROWS, 24, host_gib=32) == (
        "Nothing fits 24 GiB: full needs the least, 50.0 GiB; shorter sequences, a smaller batch or fewer active "
        "layers need less."
    )
    assert advise(ROWS, 55, host_gib=32).startswith("Use full")
    assert "48.0 in host memory" in advise(ROWS, 24, host_gib=48)
    assert "Nothing fits 32 GiB of host" in advise(ROWS[4:7], 24, host_gib=32)


@pytest.mark.parametrize(
    ("seq", "most", "expected"),
    [(1024, None, [256, 512, 1024, 1536]), (1024, 1024, [256, 512, 1024]), (1, 8, [1])],
)
def test_lengths_of_the_chart_are_those_the_model_has(seq, most, expected):
    assert lengths(seq, most) == expected


def test_chart(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="the chart needs it")
    by_length = {
        seq: [row(name, seq / 100 + i) for i, name in enumerate(METHODS)] for seq in (256, 512, 1024)
    }
    draw_chart(by_length, 24, "a model", tmp_path / "chart.png")
    content = (tmp_path / "chart.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000
