"""Comparisons of methods in the rows of study A.

Would catch: a verdict that the rows do not give; pairs that are not pairs; an observation that is counted twice.
"""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from bench.quality.comparison import ACROSS, FEWEST, across, compare, has_all, results, summarize
from bench.quality.study import SEARCH, STUDY
from grass.errors import GrassError
from grass.reproduce.study import Job
from tests.support.study import BEST, PART, one, row, rows_of


def test_a_difference_is_that_of_the_rows(rows):
    found = one(rows, "grass", "uniform")
    a, b = (results(rows, PART, method) for method in ("grass", "uniform"))
    expected = np.mean([a[pair]["log_loss"] - b[pair]["log_loss"] for pair in PART.pairs])
    assert found.log_loss.mean == pytest.approx(expected)
    assert found.log_loss.low < -0.03 < found.log_loss.high
    assert found.exact.mean == pytest.approx(3.0)
    assert found.verdict == "better"
    assert set(found.bases) == set(PART.bases)
    assert found.log_loss.deviation < 0.01  # pairs share what is theirs, of deviation 0.05
    assert one(rows, "uniform", "grass").verdict == "worse"


def test_the_rate_is_the_best_in_the_mean_over_bases(rows):
    """On one base another rate is much better: without its mean over bases it would be chosen there."""
    searched = [r for r in rows if r["method"] == "grass" and r["order"] in SEARCH.orders]
    for r in searched:
        if r["base"] == 2:
            r["log_loss"] = 0.5 if r["lr"] == SEARCH.rates[0] else 1.0
    assert one(rows, "grass", "uniform").log_loss.num_pairs == 32
    for r in searched:
        if r["base"] == 2:
            r["log_loss"] = -9.0 if r["lr"] == SEARCH.rates[0] else 1.0
    lower = [
        row(Job("arithmetic", "grass", SEARCH.rates[0] / 2, base, SEARCH.orders[0]), 3.0)
        for base in PART.bases
    ]
    assert one(rows + lower, "grass", "uniform") is None  # no results with that rate


def test_a_difference_of_one_base_decides_nothing(rows):
    for r in rows:
        if r["method"] == "grass" and r["base"] != 1:
            r["log_loss"] += 0.04  # not better than uniform there
        if r["method"] == "grass" and r["base"] == 1:
            r["log_loss"] -= 0.2
    found = one(rows, "grass", "uniform")
    assert found.log_loss.high < 0
    assert found.p_value < 0.05
    assert found.verdict == "undecided"


def test_only_pairs_that_both_have_are_compared(rows):
    fewer = [r for r in rows if r["method"] != "uniform" or r["order"] < 2 or r["order"] in SEARCH.orders]
    assert one(fewer, "grass", "uniform").log_loss.num_pairs == 8
    assert one(rows, "grass", "cyclic") is None
    pairs = PART.pairs[: FEWEST - 1]
    few = [
        r for r in rows_of("shuffled", 0.1) if r["order"] in SEARCH.orders or (r["base"], r["order"]) in pairs
    ]
    family = [("grass", "uniform"), ("grass", "shuffled")]
    assert compare([*rows, *few], PART, family) == compare(rows, PART, family)  # they spoil no other p-value
    other_rate = [r | {"lr": 99.0} for r in rows if r["method"] == "grass"]
    assert one([*rows, *other_rate], "grass", "uniform") == one(rows, "grass", "uniform")


def test_diverged_runs_are_counted_and_not_compared(rows):
    for r in rows:
        if r["method"] == "uniform" and (r["base"], r["order"]) == (0, 0):
            r["log_loss"] = None
    assert one(rows, "grass", "uniform").log_loss.num_pairs == 31
    assert one(rows, "grass", "uniform").diverged == 1
    of = summarize(rows, PART, "uniform")
    assert (of.runs, of.diverged) == (32, 1)
    assert has_all(rows, PART, "uniform")
    assert not has_all(rows, PART, "cyclic")


def test_runs_that_began_with_different_weights_are_no_pair(rows):
    for r in rows:
        if r["method"] == "grass" and (r["base"], r["order"]) == (2, 3):
            r["base_digest"] = "another"
    with pytest.raises(GrassError, match="grass and uniform began with different weights on base 2"):
        one(rows, "grass", "uniform")


def test_a_summary_has_deviations_within_bases(rows):
    for r in rows:
        r["log_loss"] += r["base"]  # between bases
    of = summarize(rows, PART, "full")
    own = [r for r in rows if r["method"] == "full" and r["order"] not in SEARCH.orders]
    assert of.rate == BEST
    assert of.runs == 32
    assert of.log_loss == pytest.approx(np.mean([r["log_loss"] for r in own]))
    within = [np.var([r["log_loss"] for r in own if r["base"] == base], ddof=1) for base in PART.bases]
    assert of.log_loss_deviation == pytest.approx(np.sqrt(np.mean(within)))
    assert of.exact == pytest.approx(70.0)


def test_the_trained_share_is_of_the_base_model(rows):
    """Adapters that count among the parameters: 40 of 100 + 40 are 40 %, not 29 %."""
    lora = [r | {"method": "lora-r8", "trained_share": 40 / 140} for r in rows_of("grass", 0.0)]
    lora_part = replace(PART, methods=("lora-r8",))
    assert summarize(lora, lora_part, "lora-r8").trained_share == pytest.approx(0.4)
    assert summarize(rows, PART, "grass").trained_share == 0.25


def test_a_base_is_one_observation_over_all_parts(rows):
    """A t test of the bases' means, corrected for their number."""
    confirmation = STUDY.parts["confirmation"]
    more = [r for name in ("uniform", "grass") for r in rows_of(name, 0.0, 0.005, confirmation)]
    found = across([*rows, *more])
    of = found["grass", "uniform"].log_loss.difference
    assert of.size == 8
    assert set(found) <= set(ACROSS)
    assert of.mean == pytest.approx(4 * -0.03 / 8, abs=0.005)  # -0.03 on the bases of the key contrast
    only = across(rows)
    values = [one(rows, "grass", "full").bases[base] for base in PART.bases]
    expected = stats.ttest_1samp(values, 0.0)
    of = only["grass", "full"].log_loss
    assert of.difference.p_value == pytest.approx(expected.pvalue)
    assert of.p_value == pytest.approx(expected.pvalue * 3)  # the smallest of three
    assert of.verdict == only["grass", "full"].exact.verdict == "worse"
    assert only["grass", "uniform"].exact.verdict == "better"
    undecided = only["grass", "static"].log_loss
    assert undecided.verdict == "undecided"
    assert undecided.detectable > abs(undecided.difference.mean)


def test_bases_on_which_a_method_was_chosen_do_not_count(rows):
    """Of the best of many on these bases the difference is too large."""
    confirmation, rules = STUDY.parts["confirmation"], STUDY.parts["rules"]
    more = [
        r for name in ("uniform", "static-top", "lowest") for r in rows_of(name, 0.0, 0.005, confirmation)
    ]
    more += [r for name in ("uniform", "lowest") for r in rows_of(name, 0.0, 0.005, rules)]
    found = across([*rows, *more, *rows_of("static-top", 0.0, 0.005)])
    assert found["static-top", "uniform"].log_loss.difference.size == len(PART.bases)
    assert found["lowest", "uniform"].log_loss.difference.size == len(confirmation.bases)
