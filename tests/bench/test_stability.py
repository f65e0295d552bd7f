"""Measures of the stability of norms, on known norms.

Would catch: noise taken for signal; another window or stage; a measure that is off on a known case.
"""

import numpy as np
import pytest

from bench.quality import stability
from bench.quality.methods import CONFIG
from grass import GrassConfig


def test_a_run_is_measured_at_its_stages_and_at_every_step(measured):
    assert {r["step"] for r in measured if r["kind"] == "norms"} == {0, 65, 129}
    (trace,) = [r for r in measured if r["kind"] == "trace"]
    assert np.array(trace["norms"]).shape == (130, 8)
    assert all(layers == [] for layers in trace["active"][: CONFIG.probe_steps])
    assert all(len(layers) == 2 for layers in trace["active"][CONFIG.probe_steps :])
    assert stability.variation(measured, 64, 0) < stability.variation(measured, 4, 0)
    assert all(np.isfinite(value) for value in stability.bias(measured))


def known(norms, step=0, size=16, signal=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)):
    base = {"base": 0, "step": step}
    return [
        {"kind": "norms", "size": size, "norms": norms, **base},
        {"kind": "signal", "size": 1024, "norms": [list(signal)], **base},
    ]


def test_measures_of_noise_on_known_norms():
    order = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    same = known([order] * 4)
    assert stability.variation(same, 16, 0) == 0
    assert stability.noise_share(same, 16, 0) == pytest.approx(0)
    assert stability.repeatability(same, 16, 0, 1) == stability.agreement(same, 16, 0, 2) == pytest.approx(1)
    doubled = known([[2 * m for m in order]] * 4)
    # 4 = |G|^2 + s^2 / 16 and 1 = |G|^2 + s^2 / 1024 would need |G|^2 < 1
    assert stability.noise_share(doubled, 16, 0) == pytest.approx(1 - (1024 - 64) / (1024 - 16) / 4)
    turned = known([order, order[::-1]] * 2)
    assert stability.repeatability(turned, 16, 0, 1) == pytest.approx(-1)
    later = known([order[::-1]] * 4, step=9)
    assert stability.drift([*same, *later], 16, 0, 9) == pytest.approx(-1)


def test_noise_of_probabilities_on_known_norms():
    """With the log scale and tau 1, p is proportional to m: (1, ..., 1, 9) gives the last layer 9 / 16."""
    a, b = [1.0] * 7 + [9.0], [9.0] + [1.0] * 7
    noise, contrast = stability.probability_noise(known([a, b]), 16, 0, 1, GrassConfig())
    assert noise == pytest.approx(8 / 16)
    assert contrast == pytest.approx(2 * (5 / 16 - 1 / 8))
    noise, contrast = stability.probability_noise(
        known([a, b]), 16, 0, 1, GrassConfig(importance_scale="none", temperature=1e9)
    )
    assert noise == pytest.approx(0, abs=1e-6)
    assert contrast == pytest.approx(0, abs=1e-6)


def test_a_moving_average_smooths_probabilities_and_selection_is_known():
    rng = np.random.default_rng(1)
    rows = known((5 + rng.random((40, 8))).tolist())
    noise = [
        stability.probability_noise(rows, 16, 0, 5, GrassConfig(ema=alpha), averaged=4)[0]
        for alpha in (0.5, 1.0)
    ]
    a, b = (
        np.array(rows[0]["norms"])[i : i + 5].mean(axis=0) for i in (15, 35)
    )  # the newest window of each chain
    assert noise[1] == pytest.approx(np.abs(a / a.sum() - b / b.sum()).sum() / 2)
    assert noise[0] < noise[1]
    trace = {"kind": "trace", "norms": [[1.0] * 6 + [5.0] * 2] * 3, "active": [[], [6, 7], [0, 6]]}
    assert stability.selection([trace]) == pytest.approx((5 / 2 + 3 / 2) / 2)


def test_autocorrelation_and_bias_of_known_traces():
    rng = np.random.default_rng(0)
    steps = 2000
    white = np.exp(0.1 * rng.standard_normal((steps, 8)))
    trace = {
        "kind": "trace",
        "norms": white.tolist(),
        "importance": np.full((steps, 8), 2.0).tolist(),
        "active": [[0, 1]] * steps,
    }
    assert stability.autocorrelation([trace], 1) == pytest.approx(0, abs=0.05)
    active, frozen = stability.bias([trace])
    assert active == pytest.approx(np.log(2), abs=0.05)
    assert frozen == pytest.approx(np.log(2), abs=0.05)
    slow = np.repeat(white[:200], 10, axis=0)
    assert stability.autocorrelation([trace | {"norms": slow.tolist()}], 1) > 0.7
