"""Failures these tests catch: a table or a chart of docs/scale.md that is not that of the stored rows."""

import pytest

from bench import scale
from bench.output import replace_between
from grass.finetune.run_folder import read_rows


def row(gpus, shard, method, collectives):
    return {
        "gpus": gpus,
        "shard": shard,
        "method": method,
        "peak_gib": 20.25,
        "states_host_gib": 64.2,
        "gathered_gib_per_step": 255.5,
        "reduced_gib_per_step": 4.2,
        "collectives_ms": collectives,
        "compute_ms": 2000.0,
        "step_floor_ms": 2000.0,
        "torch": "2.13.0",
    }


ROWS = [
    row(layout.gpus, layout.shard, method, 500.0 + layout.gpus)
    for layout in scale.LAYOUTS
    for method in scale.METHODS
]


def test_the_table_has_the_rows(tmp_path):
    text = scale.table(ROWS)
    assert "| 512 | 64 | GRASS, 2 of 80 layers | 20.2 | 64.2 | 255.5 | 4.2 | 1,012 | 2,000 |" in text
    assert "| 8 | 1 | full fine-tuning |" in text
    assert "Compute takes longer" in text
    assert "Compute takes longer" not in scale.table([{**r, "compute_ms": 100.0} for r in ROWS])


def test_the_chart_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="it draws the chart")
    scale.draw(ROWS, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000


def test_the_page_of_this_checkout_is_that_of_its_rows():
    rows = read_rows(scale.ROWS)
    if rows:
        text = scale.PAGE.read_text(encoding="utf-8")
        assert replace_between(scale.PAGE, scale.BEGIN, scale.END, scale.table(rows)) == text
