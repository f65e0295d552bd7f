"""The page of evidence and its figures.

Would catch: a verdict that the rows do not give; pairs that are not pairs; a number of the page changed by hand, or
left behind by new rows; an arm without reason and prediction; a figure that fails on what the study writes.
"""

import json
import random
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy import stats

from bench.quality import __main__ as command
from bench.quality import figures, real, stability
from bench.quality.comparison import (
    ACROSS,
    FAMILIES,
    FEWEST,
    Found,
    across,
    compare,
    has_all,
    results,
    summarize,
)
from bench.quality.evidence import BEGIN, CLAIMS, END, findings, in_short, page, written_pages
from bench.quality.log import NOTES
from bench.quality.methods import BLIND, CONFIG, RULES, SETTINGS
from bench.quality.stability import measure
from bench.quality.study import (
    BUDGETS,
    CONTROLS,
    FURTHER,
    KEY,
    MODULES,
    OTHERS,
    REMOVED,
    SEARCH,
    SMALL,
    STUDY,
    UNITS,
    rate_of,
)
from bench.quality.tables import TITLES, log_page, real_report, tables_page
from bench.quality.training import Budget, make_model
from grass import GrassConfig
from grass.errors import GrassError
from grass.finetune.run_folder import read_rows, write_rows
from grass.reproduce.job import digest_of, settings_of
from grass.reproduce.options import SEARCH_SEED
from grass.reproduce.study import Job

PART = STUDY.parts["key"]
BEST = SEARCH.rates[1]


def row(job, log_loss, **changes):
    values = {
        "base_digest": f"digest {job.base}",
        "log_loss": log_loss,
        "exact": 0.5,
        "curve": [2.0, 1.5, 1.2, 1.0, 0.9, 0.8, 0.7, 0.65, 0.6, 0.55],
        "trained_share": 0.25,
        "longest_wait": 30,
        "layers": [0.25] * 8,
        "processor_seconds": 20.0,
    }
    return asdict(job) | asdict(BUDGETS[job.task]) | values | changes


def rows_of(method, shift, noise=0.0, part=PART):
    """Rows of a method whose log-loss is 0.5, a term of the pair, and a shift."""
    rng = random.Random(method)
    found = [
        row(Job(part.task, method, lr, base, order), 1.0 + (lr != BEST), exact=0.5 - 0.1 * (lr != BEST))
        for lr in SEARCH.rates
        for base in part.bases
        for order in SEARCH.orders
    ]
    for base, order in part.pairs:
        of_pair = random.Random(100 * base + order).gauss(0, 0.05)
        loss = 0.5 + of_pair + shift + rng.gauss(0, noise)
        found.append(row(Job(part.task, method, BEST, base, order), loss, exact=0.6 - shift))
    return found


@pytest.fixture
def rows():
    """GRASS better than uniform by 0.03, as good as static with noise, worse than full."""
    values = {"full": (-0.1, 0.005), "uniform": (0.03, 0.005), "static": (0.0, 0.02), "grass": (0.0, 0.005)}
    return [r for method, (shift, noise) in values.items() for r in rows_of(method, shift, noise)]


def one(rows, method, other):
    return compare(rows, PART, [(method, other)]).get((method, other))


def found_in(rows, folder):
    write_rows(folder / "study.jsonl", rows)
    return Found.of(folder)


def test_a_difference_is_that_of_the_rows(rows):
    found = one(rows, "grass", "uniform")
    a, b = (results(rows, PART, method) for method in ("grass", "uniform"))
    expected = np.mean([a[pair]["log_loss"] - b[pair]["log_loss"] for pair in PART.pairs])
    assert found.log_loss.mean == pytest.approx(expected)
    assert found.log_loss.low < -0.03 < found.log_loss.high
    assert found.exact.mean == pytest.approx(3.0)
    assert found.verdict == "better"
    assert (set(found.bases), found.agreement) == (set(PART.bases), "4 of 4")
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


def line_of(text, names):
    """The cells of a comparison in the table of claims."""
    (line,) = [
        line for line in text.splitlines() if line.startswith(f"| {names} |") and line.count("|") == 11
    ]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_claims_are_better_worse_undecided_or_not_run(rows, tmp_path):
    found = found_in(rows, tmp_path)
    claims = page(found).partition("## The paper's claims")[2]
    pairs, loss, bases, p_value, _, verdict, exact, _, exact_verdict = line_of(claims, "`grass` - `uniform`")
    assert (pairs, bases, p_value, verdict) == ("32", "4 of 4", "< 0.001", "better")
    assert loss.startswith("-0.03")
    assert exact.startswith("+3.0 [")
    assert exact_verdict == "better"
    assert line_of(claims, "`grass` - `shuffled`") == ["not run", *[""] * 8]
    assert line_of(claims, "`grass` - `static`")[5] == "undecided"
    full = line_of(claims, "`grass` - `full`")
    assert (full[5], full[8]) == ("worse", "worse")
    assert full[6].startswith("-10.0 [")
    of = findings(found)
    rules = of["Doubt: is there any rule that beats random layers?"]
    assert rules.startswith("Rules that see the gradients of all layers: not run yet.")
    starving = of["Doubt: some layers starve."]
    assert starving.endswith("in the key contrast, of 500 steps: `uniform` 30, `grass` 30, `static` 30.")
    assert "`lora-r32`" not in in_short(found)
    lora = rows_of("lora-r32", 0.1, 0.005, STUDY.parts["methods"])
    for r in lora:
        r["exact"] = 0.9  # sure of what is wrong, and right more often
    more = rows_of("grass", 0.0, 0.005, STUDY.parts["methods"])
    text = in_short(found_in([*rows, *lora, *more], tmp_path))
    assert re.search(r"`lora-r32` \| 4 \| -0\.1\d+ \[.*\] better\* \| -\d+\.\d \[.*\] worse\* \|", text)
    memory = next(text for claim, text in of.items() if "1,792 tokens" in claim)
    assert memory == "not predicted yet."
    write_rows(tmp_path / "memory.jsonl", [{"method": "lora-r128", "peak_gib": 20.26}])
    memory = next(text for claim, text in findings(Found.of(tmp_path)).items() if "1,792 tokens" in claim)
    assert "LoRA of rank 128 20.3 (" in memory


def test_every_comparison_of_a_claim_is_made():
    for _, comparisons in CLAIMS.values():
        for family, names, _ in comparisons:
            assert names in FAMILIES[family][1]


def test_what_fixed_layers_gain_is_told_at_both_rates(rows, tmp_path):
    """The layers that they trained, and the search at the rate of uniform sampling, not at their own."""
    top = rows_of("static-top", -0.3, 0.005)
    for r in top:
        r["layers"] = [0.9, 0.0, 0.9, *[0.0] * 5] if r["base"] == 3 else [0.9, 0.9, *[0.0] * 6]
        if r["order"] in SEARCH.orders and r["lr"] == BEST:
            r |= {"log_loss": 0.96, "exact": 0.7}
    text = in_short(found_in([*rows, *top], tmp_path))
    assert "in 24 of 32 runs." in text
    assert "`static-top` -0.040 nats, +20.0 points (4 runs of the search)." in text


def test_rates_that_exact_match_would_have_chosen_are_told(rows, tmp_path):
    for r in rows:
        if r["method"] == "grass" and r["order"] in SEARCH.orders and r["lr"] == SEARCH.rates[0]:
            r["exact"] = 0.9
    text = page(found_in(rows, tmp_path))
    assert "A search by it would have chosen another rate for `grass` in 1 of 1 parts." in " ".join(
        text.split()
    )


def test_in_short_says_what_the_verdicts_are(rows, tmp_path):
    """A verdict on the wrong comparison, or the same sentence whatever was found."""
    assert in_short(found_in([], tmp_path)) == "Not run yet.\n"
    text = in_short(found_in(rows, tmp_path))
    assert text.startswith("**GRASS is better than uniform sampling.**")
    assert "| `grass` - `uniform` | 4 | -0.03" in text
    assert "`static-top` -" not in text
    more = rows_of("static-top", -0.3, 0.005)
    for r in more:
        r["exact"] = 0.1
    text = in_short(found_in([*rows, *more], tmp_path))
    assert re.search(
        r"`static-top` - `uniform` \| 4 \| -0\.3\d+ \[.*\] better \| -\d+\.\d \[.*\] worse \|", text
    )
    worse = [r for r in rows if r["method"] != "grass"] + rows_of("grass", 0.1, 0.005)
    text = in_short(found_in(worse, tmp_path))
    assert text.startswith("**GRASS is worse than uniform sampling.**")
    noisy = [r for r in rows if r["method"] != "grass"] + rows_of("grass", 0.0, 0.1)
    assert in_short(found_in(noisy, tmp_path)).startswith(
        "**It is not decided whether GRASS is better or worse than"
    )


def test_a_claim_is_for_or_against_by_its_first_comparison(rows, tmp_path):
    """`static-top` that is better is against the claim that sampling is needed."""
    top = [r | {"exact": 0.9} for r in rows_of("static-top", -0.3, 0.005)]
    text = page(found_in([*rows, *top], tmp_path))

    def answers(claim):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| **{claim}")]
        cells = [cell.strip() for cell in line.split("|")]
        return cells[7], cells[10]

    assert answers("Sampling by gradient norms") == ("**for**", "**for**")
    assert answers("GRASS is close to full") == ("**against**", "**against**")
    assert answers("Sampling is needed") == ("**against**", "**against**")
    assert answers("Adapting during training")[0] == ""
    assert answers("GRASS is better than LISA") == ("", "")  # not run


def test_rules_are_counted_by_verdict(rows, tmp_path):
    """With all rules and eight pairs, a clear one is found."""
    part = STUDY.parts["rules"]
    rules = [name for name in part.methods if name in RULES]
    shifts = {"signal": -0.08, "signal-inverse": 0.1}
    more = [r for name in rules for r in rows_of(name, shifts.get(name, 0.0), 0.005, part)]
    uniform = rows_of("uniform", 0.0, 0.002, part)
    of = findings(found_in([*rows, *more, *uniform], tmp_path))
    line = of["Doubt: is there any rule that beats random layers?"]
    assert line.startswith(
        f"Of {len(rules) - len(set(BLIND) & set(rules))} rules that see the gradients of all layers, against uniform "
        "sampling: by log-loss 1 better (`signal`), "
    )
    assert re.search(r"[12] worse, \d+ undecided; by exact match \d+ better", line)


def test_every_arm_has_a_title_or_a_reason_and_a_prediction():
    assert set(TITLES) >= {*KEY, *OTHERS, *FURTHER, *UNITS, *MODULES, *CONTROLS}
    assert set(NOTES) == {*RULES, *SETTINGS, *REMOVED, "grass-floor", *FURTHER, *CONTROLS}
    assert all(note.reason.endswith((".", "?")) and note.prediction for note in NOTES.values())
    for part, family in FAMILIES.values():
        assert {name for names in family for name in names} <= {*STUDY.parts[part].methods, *REMOVED}


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


@pytest.fixture
def project(tmp_path, rows, monkeypatch):
    """A folder with rows, their pages, and a README."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    write_rows(tmp_path / "results" / "study.jsonl", rows)
    (tmp_path / "README.md").write_text(f"Before\n{BEGIN}\nold\n{END}\nAfter\n")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(command, "FIGURES", tmp_path / "figures")
    for name in ("_timeline", "_memory"):
        monkeypatch.setattr(figures, name, lambda path, *_: path.write_bytes(b"drawn by another command"))
    figures.draw_all(tmp_path / "results", tmp_path / "figures")
    assert command.main(["verify", "--write"]) == 0
    return tmp_path


def test_pages_that_were_written_are_as_the_rows_say(project, capsys):
    assert command.main(["verify"]) == 0
    assert capsys.readouterr().out.count("as the rows say") == 4
    readme = (project / "README.md").read_text()
    assert readme.startswith("Before\n")
    assert readme.endswith("After\n")
    assert "**GRASS is better than uniform sampling" in readme
    assert "old" not in readme


@pytest.mark.parametrize(
    "name", ["docs/evidence.md", "docs/evidence-tables.md", "docs/evidence-log.md", "README.md"]
)
def test_a_change_by_hand_is_found(project, name, capsys):
    path = project / name
    text = path.read_text()
    by_hand = {"is better": "is worse", "| better |": "| worse |", "equal": "better"}
    changed = text
    for old, new in by_hand.items():
        changed = changed.replace(old, new)
    assert changed != text
    path.write_text(changed)
    assert command.main(["verify"]) == 1
    assert f"{path.name} is not what the rows say" in capsys.readouterr().err


def test_a_changed_row_is_found(project, rows, capsys):
    changed = next(r for r in rows if r["method"] == "grass" and r["order"] == 0)
    changed["log_loss"] += 0.05
    write_rows(project / "results" / "study.jsonl", rows)
    assert command.main(["verify"]) == 1
    assert "is not what the rows say" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["losses.png", "memory.png"])
def test_a_changed_figure_is_found(project, name, capsys):
    path = project / "figures" / name
    path.write_bytes(path.read_bytes() + b"by hand")
    assert command.main(["verify"]) == 1
    assert f"{name} is not as it was drawn" in capsys.readouterr().err


def test_a_figure_of_other_rows_is_found(project, rows, capsys):
    """Of a part that no page mentions, such as the curve of a run."""
    rows[-1]["curve"] = [9.0] * 10
    write_rows(project / "results" / "study.jsonl", rows)
    assert command.main(["verify"]) == 1
    assert "its rows have changed" in capsys.readouterr().err


def test_a_figure_that_the_manifest_does_not_list_is_found(project, capsys):
    """Its entry was deleted, so that nothing is compared."""
    path = project / "figures" / figures.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["losses.png"]
    path.write_text(json.dumps(manifest))
    assert command.main(["verify"]) == 1
    assert "does not list losses.png" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["docs/evidence.md", "docs/evidence-tables.md", "README.md"])
def test_a_number_changed_by_hand_is_found(project, name, capsys):
    """The first, one in the middle, and the last, by the last digit."""
    path = project / name
    text = path.read_text()
    numbers = [found.start() for found in re.finditer(r"\d(?= nats|\])", text)]
    assert numbers
    for place in (numbers[0], numbers[len(numbers) // 2], numbers[-1]):
        path.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
        assert command.main(["verify"]) == 1
        assert f"{path.name} is not what the rows say" in capsys.readouterr().err


def test_figures_that_were_never_drawn_are_missed(project, capsys):
    (project / "figures" / figures.MANIFEST).unlink()
    assert command.main(["verify"]) == 1
    assert "run python -m bench.quality figures" in capsys.readouterr().err


def test_a_readme_without_its_part_is_refused(project):
    (project / "README.md").write_text("nothing")
    with pytest.raises(GrassError, match=r"README\.md has no part between"):
        written_pages(project / "results", project)


# -- stability -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    torch.save(make_model(0).state_dict(), folder / "base-0.pt")
    budget = Budget(steps=130, batch=2, train=40, heldout=2)
    before = stability.BATCHES, stability.SIZES, stability.REFERENCE
    stability.BATCHES, stability.SIZES, stability.REFERENCE = 4, (4, 16, 64), 8
    try:
        return measure(0, 1e-3, budget, folder)
    finally:
        stability.BATCHES, stability.SIZES, stability.REFERENCE = before


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


# -- figures ---------------------------------------------------------------------------------------------


def test_every_figure_is_drawn_from_its_rows(tmp_path, rows, measured, monkeypatch):
    pytest.importorskip("matplotlib", reason="figures are drawn by it")
    for name in ("_timeline", "_memory"):
        monkeypatch.setattr(figures, name, lambda path, *_: path.write_bytes(b"drawn by another command"))
    folder = tmp_path / "rows"
    folder.mkdir()
    assert {path.name for path in figures.draw_all(folder, tmp_path / "none")} == {
        "timeline.png",
        "memory.png",
    }
    write_rows(folder / "study.jsonl", rows)
    write_rows(folder / "stability.jsonl", measured)
    norms = [{"panel": "arithmetic", "name": name, "norms": [1.0, 2.0, 4.0]} for name in ("AddSub", "gsm8k")]
    write_rows(folder / "norms.jsonl", norms)
    paths = figures.draw_all(folder, tmp_path / "all")
    names = {"timeline", "memory", "losses", "differences", "norms-small", "norms"}
    assert {path.name for path in paths} == {f"{name}.png" for name in names}
    assert all(path.stat().st_size > 0 for path in paths)


def test_figures_show_what_the_rows_say(rows, monkeypatch, tmp_path):
    """Another method's values, or another sign."""
    pytest.importorskip("matplotlib", reason="figures are drawn by it")
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path, title: drawn.append(figure))
    figures.draw_differences(rows, tmp_path / "differences.png")
    left, right = drawn[0].axes
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert labels[0] == "full, key (32 pairs)"  # the best
    assert len(labels) == 3
    for place, label in enumerate(labels):
        expected = one(rows, label.split(",")[0], "uniform")
        for axes, of in ((left, expected.log_loss), (right, expected.exact)):
            span, mean = axes.lines[2 * place : 2 * place + 2]
            assert list(span.get_xdata()) == [of.low, of.high]
            assert list(mean.get_xdata()) == [of.mean]
    for r in rows:
        r["curve"] = [
            {"full": 1.0, "uniform": 3.0, "static": 2.0, "grass": 2.5}[r["method"]] + r["order"] / 100
        ] * 10
    figures.draw_losses(rows, tmp_path / "losses.png")
    means = {line.get_label(): line.get_ydata()[0] for line in drawn[1].axes[0].lines}
    assert means == pytest.approx({"full": 1.035, "uniform": 3.035, "static": 2.035, "grass": 2.535})


def test_the_page_of_this_checkout_is_that_of_its_rows():
    pages = written_pages(command.RESULTS, command.ROOT)
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, (
            f"run python -m bench.quality verify --write ({path})"
        )
    assert "evidence.md" in {path.name for path in pages}
    figures.check_figures(command.RESULTS, command.FIGURES)


def write_real(folder, table, losses):
    """Rows of study B and their settings: a search, and a result for each log-loss of a method."""
    options = real.options_for(table, "SmolLM2", "data", "", 1, 1.0)
    settings = settings_of(options, real.CONFIG, "weights", {"train": "records"})
    rows = []
    for method, of in losses.items():
        job = {"task": table, "method": method, "base": "SmolLM2", "settings": digest_of(settings)}
        job |= {"lr": 2e-4, "num_examples": 677}
        for lr in (1e-4, 2e-4, 4e-4):
            rows.append(job | {"lr": lr, "order": SEARCH_SEED, "log_loss": 1.0 + (lr != 2e-4)})
        for order, loss in enumerate(of):
            accuracies = dict.fromkeys(real.TASKS[table], 0.75 - loss)
            rows.append(job | {"order": order, "log_loss": loss, "accuracies": accuracies})
    write_rows(folder / f"{table}.jsonl", rows)
    (folder / f"{table}.settings.json").write_text(json.dumps(settings))


def test_rows_of_the_real_model_are_compared_by_order(tmp_path, rows):
    """Another order's loss; an arm with fewer orders; a method that has none."""
    losses = {"grass": [0.5, 0.6, 0.7], "uniform": [0.6, 0.6, 0.6], "full": [0.4, 0.5], "static": []}
    write_real(tmp_path, "arithmetic", losses)
    report = real_report(tmp_path, "arithmetic")
    assert report.differences["uniform"] == [
        pytest.approx(of) for of in ((-0.1, 10.0), (0.0, 0.0), (0.1, -10.0))
    ]
    assert report.differences["full"] == [pytest.approx((0.1, -10.0))] * 2
    assert not report.differences["static"]
    assert report.methods["grass"]["lr"] == 2e-4
    found = Found.of(tmp_path)
    text = in_short(found_in(rows, tmp_path))
    assert (
        "GRASS - `uniform` +0.000 (-0.100 to +0.100) nats, +0.0 (-10.0 to +10.0) points; `full` +0.100 (+0.100 to "
        "+0.100) nats, -10.0 (-10.0 to -10.0) points (mean and range of 2 orders" in text
    )
    assert "commonsense: not run yet." in text
    table = tables_page(found)
    assert "**arithmetic**, 677 training records" in table
    assert "confirmation, arithmetic, commonsense." in page(found)  # not run completely
    assert "| grass | 0.0002 | 3 | 0.600 ± 0.100 | 15.0 | 15.0 | 15.0 | 15.0 | 15.0 ± 10.0 |  |  |" in table
    assert "| static | 0.0002 | 0 |" in table


def test_rows_of_the_real_model_with_other_settings_are_refused(tmp_path, monkeypatch):
    """A run of another length, or rows to which the settings do not belong."""
    write_real(tmp_path, "arithmetic", {"grass": [0.5]})
    with monkeypatch.context() as patch:
        patch.setattr(real, "STEPS", 2 * real.STEPS)
        with pytest.raises(GrassError, match="rows of arithmetic were made with other settings"):
            real_report(tmp_path, "arithmetic")
    rows = read_rows(tmp_path / "arithmetic.jsonl")
    write_rows(tmp_path / "arithmetic.jsonl", [*rows, rows[-1] | {"settings": "other", "order": 1}])
    with pytest.raises(GrassError, match="rows of arithmetic were made with other settings"):
        real_report(tmp_path, "arithmetic")


def test_norms_of_the_real_model_are_compared_by_task(tmp_path, measured):
    """Four layers in one order, in the opposite one, and with a swap of two: correlation 1, -1 and 0.8."""
    write_rows(tmp_path / "stability.jsonl", measured)
    order, swapped = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]
    panels = {"arithmetic": [order, swapped], "commonsense": [order[::-1], order[::-1]]}
    rows = [
        {"panel": panel, "name": str(i), "norms": norms}
        for panel, of in panels.items()
        for i, norms in enumerate(of)
    ]
    write_rows(tmp_path / "norms.jsonl", rows)
    text = next(
        text
        for claim, text in findings(Found.of(tmp_path)).items()
        if claim.startswith("Paper: which layers")
    )
    assert "+0.80 to +0.80 between two of 2 arithmetic tasks" in text
    assert "+1.00 to +1.00 between two of 2 commonsense tasks" in text
    assert "-1.00 to -0.80 between one of arithmetic and one of commonsense" in text


def test_the_page_is_written_with_all_rows(tmp_path, rows, measured):
    """With every part and both tables nothing is left to run."""
    for part in STUDY.parts.values():
        methods = {*part.methods, *map(rate_of, part.methods)}
        rows = rows + [r for name in sorted(methods) for r in rows_of(name, 0.0, 0.02, part)]
    rows = list({(r["task"], r["method"], r["lr"], r["base"], r["order"]): r for r in rows}.values())
    removed = [r for name in REMOVED for r in rows_of(name, 0.0, 0.02, STUDY.parts["confirmation"])]
    write_rows(tmp_path / "study.jsonl", [*rows, *removed])
    enough = [r | {"norms": r["norms"] * 10} if r["kind"] == "norms" else r for r in measured]
    write_rows(tmp_path / "stability.jsonl", enough)
    write_rows(tmp_path / "memory.jsonl", [{"method": "grass", "peak_gib": 20.0}])
    for table in real.TASKS:
        losses = {method: [0.5, 0.6, 0.7] for method in real.METHODS[table]}
        write_real(tmp_path, table, losses)
    found = Found.of(tmp_path)
    text = page(found) + tables_page(found) + log_page(found)
    assert "not run" not in text.lower()
    assert "not predicted yet" not in text
    assert "nan" not in text


def test_a_study_is_run_and_summarized(tmp_path, capsys, monkeypatch):
    """The command; its runs are made up."""

    def run_missing(jobs, run_job, path, workers, seconds):
        while found := jobs(read_rows(path)):
            new = row(found[0], 1.0 + (found[0].lr != BEST)) | asdict(SMALL.budgets[found[0].task])
            write_rows(path, [*read_rows(path), new])
            yield new, len(found) - 1

    monkeypatch.setattr(command, "run_missing", run_missing)
    monkeypatch.setattr(command, "ROWS", tmp_path / "study.jsonl")
    arguments = ["run", "--bases", str(tmp_path / "bases"), "--small"]
    assert command.main([*arguments, "--part", "relations"]) == 2
    assert "--small has no part relations: choose of key, rules" in capsys.readouterr().err
    assert command.main([*arguments, "--part", "rules"]) == 0
    assert "shuffled" not in capsys.readouterr().out
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    assert "arithmetic, 2 bases x 2 orders: held-out log-loss, exact match" in out
    assert re.search(r"\nshuffled +1\.0000  50\.0%  4 runs at 0\.004\n", out)
    assert {r["order"] for r in read_rows(tmp_path / "small.jsonl")} == {0, 1, *SEARCH.orders}
