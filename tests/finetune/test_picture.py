"""Picture and table.

Would catch: a period drawn one step off, or drawn for frozen layers; probe steps counted as training; a
picture that fails with a sampler that measures nothing; a share of trained parameters not weighted by time; a
table too wide for many layers; layers without a label, and labels that overlap; a loss curve without its held-out
losses.
"""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from grass import GrassConfig, LayerMap
from grass.finetune.options import FinetuneOptions
from grass.finetune.picture import draw_losses, draw_picture, importance_over_time, selection_over_time
from grass.finetune.summary import format_table, make_results, trained_share


def row(step, events, active, phase="adapt", importance=(1.0, 3.0, 2.0), trained=0):
    return {
        "step": step,
        "events": events,
        "phase": phase,
        "importance": list(importance),
        "active": active,
        "trained_params": trained,
    }


ROWS = [
    row(0, ["start"], [], "probe", (0.0, 0.0, 0.0)),
    row(4, ["refresh", "draw", "switch"], [1], trained=10),
    row(7, ["refresh", "draw"], [1], trained=10, importance=(1.0, 1.0, 4.0)),
    row(8, ["switch"], [0, 2], trained=20),
    row(10, ["draw"], [0, 2], trained=20),
]


def test_selection_follows_the_rows():
    edges, values = selection_over_time(ROWS, steps=10)
    per_step = np.repeat(values, np.diff(edges), axis=1)
    expected = np.zeros((3, 10))
    expected[1, 4:8] = 1
    expected[[0, 2], 8:] = 1
    np.testing.assert_array_equal(per_step, expected)


def test_importance_is_relative_to_the_mean_of_its_refresh():
    edges, values = importance_over_time(ROWS, steps=10)
    assert edges.tolist() == [4, 7, 10]
    np.testing.assert_allclose(values, [[0.5, 0.5], [1.5, 0.5], [1.0, 2.0]])
    assert importance_over_time(ROWS[:1], steps=3) is None


def test_trained_share_is_weighted_by_steps_and_leaves_the_probe_out():
    # 4 steps of 10 and 2 steps of 20 out of 40 parameters
    assert trained_share(ROWS, steps=10, num_params=40) == pytest.approx((4 * 10 + 2 * 20) / 6 / 40)
    assert trained_share(ROWS[:1], steps=4, num_params=40) == 0.0


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], [row(0, ["start", "draw", "switch"], [0])]])
def test_every_kind_of_run_gives_a_png(tmp_path, rows):
    path = tmp_path / "p.png"
    draw_picture(rows, 10, "a title", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_table_without_heldout_records_has_no_empty_columns():
    training = {
        "steps": 1200,
        "tokens_per_second": 5000.4,
        "seconds": 3725.0,
        "peak_device_bytes": 7_000_000_000,
        "peak_host_bytes": 2_000_000,
        "best_step": 600,
        "optimizer_state_bytes": 5_500_000,
        "optimizer_state_bytes_active": 999,
        "draw_counts": None,
        "nonfinite_norms": 2,
    }
    options = FinetuneOptions(method="full")
    results = make_results(options, GrassConfig(), None, 40, training, [], {}, {}, "runs/x")
    table = format_table(results)
    assert "held-out" not in table
    assert "before" not in table
    for part in (
        "full fine-tuning, 1,200 steps",
        "100.0%",
        "5.5 MB",
        "5,000",
        "left out: 2",
        "1:02:05",
        "7.0 GB",
        "600",
    ):
        assert part in table


def test_draws_of_many_layers_are_wrapped():
    training = {
        "steps": 1200,
        "tokens_per_second": 5000.4,
        "seconds": 3725.0,
        "peak_device_bytes": 7_000_000_000,
        "peak_host_bytes": 2_000_000,
        "best_step": 600,
        "optimizer_state_bytes": 5_500_000_000,
        "optimizer_state_bytes_active": 999,
        "draw_counts": list(range(100, 180)),
        "nonfinite_norms": 0,
    }
    evaluation = {"heldout_loss": 1.5, "accuracy": 0.125, "answers": 8, "scoring": {"number": 8}}
    layers = LayerMap(tuple(map(str, range(80))), (1,) * 80, ((),) * 80, (), 0)
    results = make_results(
        FinetuneOptions(), GrassConfig(), layers, 80, training, ROWS, evaluation, evaluation, "runs/x"
    )
    lines = format_table(results).splitlines()
    assert max(map(len, lines)) <= 100
    assert "79:179" in lines[-1]
    assert "12.5%" in lines[2]
    assert lines[2].endswith("8 answers by number")
    assert any("5.5 GB" in line and "999 B active" in line for line in lines)


def saved(monkeypatch):
    """The figures that are saved from now on."""
    figures = []
    original = Figure.savefig

    def savefig(self, *args, **options):
        original(self, *args, **options)
        figures.append(self)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


@pytest.mark.parametrize(
    ("num_layers", "labelled"), [(6, 6), (16, 16), (30, 30), (32, 32), (40, 40), (80, 40)]
)
def test_the_share_of_every_layer_can_be_read(tmp_path, monkeypatch, num_layers, labelled):
    figures = saved(monkeypatch)
    importance = [1.0] * num_layers
    rows = [
        row(0, ["start", "draw", "switch"], [0], importance=importance),
        row(5, ["switch"], [1], importance=importance),
    ]
    draw_picture(rows, 10, "a title", tmp_path / "p.png")
    (figure,) = figures
    lower = figure.axes[1]
    (right,) = lower.child_axes
    assert [label.get_text() for label in right.get_yticklabels()][:3] == (
        ["50%", "50%", "0%"] if labelled == num_layers else ["50%", "0%", "0%"]
    )
    renderer = figure.canvas.get_renderer()
    for axes in (*figure.axes[:2], right):
        boxes = [label.get_window_extent(renderer) for label in axes.get_yticklabels()]
        assert len(boxes) == labelled
        boxes.sort(key=lambda box: box.y0)
        assert all(a.y1 <= b.y0 for a, b in itertools.pairwise(boxes)), "labels overlap"


LOSSES = [
    {"step": 0, "heldout_loss": 4.5, "when": "before"},
    {"step": 4, "epoch": 0.5, "loss": 4.25, "lr": 1e-3},
    {"step": 8, "epoch": 1.0, "loss": 3.75, "lr": 1e-3},
    {"step": 8, "heldout_loss": 3.99951},
    {"step": 12, "epoch": 1.5, "loss": float("nan"), "lr": 1e-3},
    {"step": 16, "epoch": 2.0, "loss": 3.5, "lr": 1e-3},
    {"step": 16, "heldout_loss": 3.625, "when": "after"},
]


def test_losses_are_a_line_and_points_with_values(tmp_path, monkeypatch):
    figures = saved(monkeypatch)
    path, again = tmp_path / "loss.png", tmp_path / "again.png"
    draw_losses(LOSSES, path, "a title")
    draw_losses(LOSSES, again, "a title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.read_bytes() == again.read_bytes()
    (axes,) = figures[0].axes
    training, heldout = axes.lines
    assert training.get_xydata().tolist() == [[4, 4.25], [8, 3.75], [16, 3.5]]
    assert heldout.get_xydata().tolist() == [[0, 4.5], [8, 3.99951], [16, 3.625]]
    assert [text.get_text() for text in axes.texts] == ["4.500", "4.000", "3.625"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "held-out records"]


def test_of_many_points_the_first_the_lowest_and_the_last_have_values(tmp_path, monkeypatch):
    figures = saved(monkeypatch)
    losses = [abs(step - 30) / 10 + 1 for step in range(50)]
    rows = [{"step": step, "heldout_loss": loss} for step, loss in enumerate(losses)]
    draw_losses(rows, tmp_path / "loss.png", "a title")
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["4.000", "1.000", "2.900"]


@pytest.mark.parametrize("rows", [[], LOSSES[1:3], LOSSES[:1], [{"step": 1, "loss": None}]])
def test_losses_of_every_kind_of_run_give_a_png(tmp_path, rows):
    draw_losses(rows, tmp_path / "loss.png", "a title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
