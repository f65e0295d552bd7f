"""Picture and table.

Would catch: a period drawn one step off, or drawn for frozen layers; probe steps counted as training; a
picture that fails with a sampler that measures nothing; a share of trained parameters not weighted by time; a
table too wide for many layers.
"""

import numpy as np
import pytest

from grass import GrassConfig, LayerMap
from grass.finetune.options import FinetuneOptions
from grass.finetune.picture import draw_picture, importance_over_time, selection_over_time
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
