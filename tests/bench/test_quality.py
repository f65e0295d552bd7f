"""The study of samplers.

Would catch: an answer that is wrong, or known from training; a loss on the prompt; an exact match that is not; methods
of different budgets; a study that runs what it has, or chooses rates on what it reports; statistics that find what is
not there, or miss what is.
"""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from bench.quality.methods import (
    ACTIVE,
    CONFIG,
    NAMES,
    PERIOD,
    View,
    by_position,
    diminishing,
    hopeful,
    make,
    nothing,
    update,
)
from bench.quality.statistics import contrast, corrected_p_values, detectable, holm, mean_of, verdict
from bench.quality.study import SEARCH, STUDY, Design, Part, RunJob, problems
from bench.quality.tasks import IGNORED, TASKS, Data, Problem, base_texts, encode
from bench.quality.training import Budget, evaluate, fine_tune, loss_of, make_model
from grass.errors import GrassError
from grass.finetune.arithmetic import NAMES as PEOPLE
from grass.finetune.arithmetic import THINGS
from grass.reproduce.study import Job
from grass.reproduce.training import schedule

BUDGET = Budget(steps=4, batch=4, train=32, heldout=8)


def solve(problem):
    """The answer by another way than the generator's."""
    words = problem.prompt.split()
    if "older" not in words:
        a, sign, b, _, result = problem.answer.split()
        numbers = [word for word in words if word.isdigit()]
        assert [a, b] == numbers
        return str(int(a) + int(b) if sign == "+" else int(a) - int(b)) == result
    above = {words[i - 2]: words[i + 2] for i, word in enumerate(words) if word == "older"}
    people = set(above) | set(above.values())
    (oldest,), (youngest,) = people - set(above.values()), people - set(above)
    asked = oldest if "oldest" in words else youngest
    options = {words[i + 2]: word for i, word in enumerate(words) if word.startswith("option")}
    return problem.answer == f"{asked} : {options[asked]}"


def content(problem):
    """Return the content of a problem: the order of the people, or the words and numbers without names."""
    words = problem.prompt.split()
    if "older" not in words:
        return " ".join("NAME" if w in PEOPLE else "THING" if w in THINGS else w for w in words)
    above = {words[i - 2]: words[i + 2] for i, word in enumerate(words) if word == "older"}
    order = list(set(above) - set(above.values()))
    while order[-1] in above:
        order.append(above[order[-1]])
    return tuple(order)


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right_and_not_known_from_training(task):
    train, heldout = TASKS[task](300, 60, seed=3)
    assert (len(train), len(heldout)) == (300, 60)
    assert all(map(solve, train + heldout))
    contents = [{content(p) for p in part} for part in (train, heldout)]
    assert not contents[0] & contents[1]
    assert TASKS[task](300, 60, seed=3) == (train, heldout)
    assert TASKS[task](300, 60, seed=4)[0] != train
    assert all(encode(text) for text in base_texts(0)[::50])  # no unknown word


def test_no_problem_is_a_text_of_the_base():
    base = set(base_texts(0))
    for problem in [p for part in TASKS["relations"](300, 100, seed=0) for p in part]:
        assert f"{problem.prompt} {problem.answer}" not in base


def test_the_loss_is_that_of_answer_tokens():
    model = make_model(0)
    problems = [Problem("1 + 1 =", "2"), Problem("Ada", "3 + 4 = 7")]
    log_loss, _ = evaluate(model, Data(problems))
    terms = []
    for problem in problems:
        prompt, answer = encode(f"<s> {problem.prompt}"), encode(f"{problem.answer} </s>")
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1).detach()
        terms += [-float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer)]
    assert log_loss == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_an_answer_is_exact_only_as_a_whole():
    problems = [Problem("Ada", "3 + 4 = 7"), Problem("Ben", "3 + 4 = 8"), Problem("Cleo has", "3")]
    says = encode("3 + 4 = 7 </s> </s>")

    class Parrot(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            lengths = [
                1 + (2 if row[1] != encode("Ada")[0] and row[1] != encode("Ben")[0] else 1)
                for row in input_ids
            ]
            logits = torch.zeros(*input_ids.shape, 200)
            for i, length in enumerate(lengths):
                logits[i, -1, says[min(input_ids.shape[1] - length, 6)]] = 9.0
            return type("Out", (), {"logits": logits})

    assert evaluate(Parrot(), Data(problems))[1] == pytest.approx(1 / 3)


def test_batches_are_every_problem_once_an_epoch():
    data = Data([Problem(str(i), "1") for i in range(10)])
    seen = [int(ids[i, 1]) for ids, _ in data.batches(5, 4, seed=1) for i in range(5)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(encode(" ".join(map(str, range(10)))))
    assert seen[:10] != seen[10:]
    _, labels = data.batch(torch.tensor([0]))
    assert labels[0, :2].tolist() == [IGNORED, IGNORED]


def test_the_rate_rises_and_falls_to_zero():
    factors = [schedule(step, 100) for step in range(101)]
    assert factors[4] == max(factors) == 1
    assert factors[100] == 0
    assert factors[0] == pytest.approx(0.2)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # in peft
@pytest.mark.parametrize("name", NAMES)
def test_every_method_trains(name):
    train, heldout = (Data(part) for part in TASKS["arithmetic"](32, 8, 0))
    model = make_model(0)
    optimizer = make(name, model, train, seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    budget = replace(BUDGET, steps=24)
    trained = fine_tune(model, optimizer, train, heldout, 1e-2, 0, budget)
    assert math.isfinite(trained.log_loss)
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if hasattr(optimizer, "active_layers"):
        blocks = sum(p.numel() for p in model.model.layers.parameters())
        total = sum(p.numel() for p in model.parameters())
        outside = 0 if "inside" in name else total - blocks
        quarters = {"active-1": 0.5, "active-4": 2.0}.get(name, 1.0)
        share = (blocks / 4 * quarters + outside) / total
        schedule = optimizer._scheduler.schedule
        probed = schedule.probe_steps / 24
        if "modules" not in name:
            assert trained.trained_share == pytest.approx(share * (1 - probed), rel=1e-6)
            return
        # Attention and MLP as they are drawn, within a budget, and all that is outside of them.
        sizes = [
            sum(p.numel() for p in getattr(layer, kind).parameters())
            for layer in model.model.layers
            for kind in ("self_attn", "mlp")
        ]
        most = total - sum(sizes) + blocks / 4
        least = most - min(sizes)  # otherwise one more would fit
        assert least * (1 - probed) < trained.trained_share * total <= most * (1 - probed) + 1


def test_rules_choose_by_the_true_norms():
    """The gradients of one layer are a hundred times as large."""
    train = Data(TASKS["arithmetic"](32, 8, 0)[0])
    counts = {}
    for name in ("signal-top", "signal-squared", "signal-inverse", "lowest"):
        model = make_model(0)
        optimizer = make(name, model, train, seed=0)
        for p in model.model.layers[5].parameters():
            trained = p.requires_grad
            p.requires_grad_(True).register_hook(lambda grad: 100 * grad)
            p.requires_grad_(trained)
        picked = []
        for ids, labels in train.batches(4, 100, 0):
            loss_of(model, ids, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            picked.append(5 in optimizer.active_layers)
        counts[name] = sum(picked[PERIOD:]) / len(picked[PERIOD:])  # the first draw is before the hooks
    assert counts["lowest"] == 0
    assert counts["signal-top"] == counts["signal-squared"] == 1
    assert counts["signal-inverse"] == 0


@pytest.mark.parametrize(("name", "steps"), [("remeasured", PERIOD), ("static-top", CONFIG.probe_steps)])
def test_a_control_has_the_probabilities_of_its_method_on_other_layers(name, steps):
    """Of one model and batches, both measure the same norms: in the step before the second draw, or in the probe."""
    train = Data(TASKS["arithmetic"](32, 8, 0)[0])
    probabilities = []
    for method in (name, f"{name}-shuffled"):
        model = make_model(0)
        optimizer = make(method, model, train, seed=0)
        for ids, labels in train.batches(4, steps, 0):
            loss_of(model, ids, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        probabilities.append(optimizer.probabilities)
    first, second = probabilities
    assert torch.allclose(first.sort().values, second.sort().values)
    assert first.argmax() != second.argmax()


def test_positions_train_each_layer_in_its_share_of_the_periods():
    shares = [0.8, 0.2, 0.2, 0.18, 0.14, 0.21, 0.15, 0.12]
    assert sum(shares) == pytest.approx(ACTIVE)
    choose, view = by_position(*shares), view_of()
    chosen = [choose(view, nothing(view)) for _ in range(4000)]
    assert all(len(set(layers)) == ACTIVE for layers in chosen)
    counts = torch.bincount(torch.tensor(chosen).flatten(), minlength=8) / len(chosen)
    assert counts.tolist() == pytest.approx(shares, abs=0.03)  # four deviations


def view_of(**periods):
    """A view of a model without moments, with counts of periods."""
    model = make_model(0)
    optimizer = make("uniform", model, Data(TASKS["arithmetic"](4, 1, 0)[0]), seed=0)
    view = View(model, optimizer, Data(TASKS["arithmetic"](32, 8, 0)[0]), torch.Generator().manual_seed(0))
    for name, values in periods.items():
        setattr(view, name, torch.tensor(values, dtype=torch.float64))
    return view


def test_rules_of_optimism_and_of_diminishing_returns_weigh_scores_by_periods():
    view = view_of(unseen=[0, 1, 2, 3, 0, 0, 0, 0], trained=[0, 0, 0, 0, 1, 2, 3, 4])
    assert hopeful(nothing)(view).tolist() == [1, 2, 3, 4, 1, 1, 1, 1]
    assert diminishing(nothing)(view).tolist() == pytest.approx([1, 1, 1, 1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])


def test_directions_are_signs_without_moments_and_ratios_of_moments_with_them():
    view = view_of()
    assert update(view).tolist() == pytest.approx([1.0] * 8, rel=1e-3)
    for p in view.blocks[3].parameters():
        view.optimizer.state[p].update(
            step=torch.tensor(1.0), exp_avg=0.1 * torch.ones_like(p), exp_avg_sq=0.004 * torch.ones_like(p)
        )
    # (0.1 / 0.1) / sqrt(0.004 / 0.001)
    assert update(view).tolist() == pytest.approx([1, 1, 1, 0.5, 1, 1, 1, 1], rel=1e-3)


def test_a_run_is_what_its_row_says(tmp_path):
    """The same job gives the same row, and another order another one."""
    torch.save(make_model(0).state_dict(), tmp_path / "base-0.pt")
    run = RunJob({"relations": BUDGET}, tmp_path)
    rows = [run(Job("relations", "uniform", 1e-3, 0, order)) for order in (0, 0, 1)]
    assert rows[0]["log_loss"] == rows[1]["log_loss"] != rows[2]["log_loss"]
    assert rows[0]["steps"] == BUDGET.steps
    assert sum(rows[0]["layers"]) == pytest.approx(2)
    begun = {("relations", 0): rows[0]["base_digest"]}
    again = replace(run, begun=begun)(Job("relations", "uniform", 1e-3, 0, 0))
    assert again["log_loss"] == rows[0]["log_loss"]
    torch.save(make_model(1).state_dict(), tmp_path / "base-0.pt")  # as trained on another machine
    with pytest.raises(
        GrassError, match=r"base model 0 .* is not the one with which other runs on relations began"
    ):
        replace(run, begun=begun)(Job("relations", "uniform", 1e-3, 0, 1))
    replace(run, begun={("arithmetic", 0): begun["relations", 0]})(Job("relations", "uniform", 1e-3, 0, 1))


def test_a_run_that_diverges_has_a_row_of_finite_numbers(tmp_path):
    """NaN is not JSON: strict readers refuse the whole file."""
    torch.save(make_model(0).state_dict(), tmp_path / "base-0.pt")
    found = RunJob({"relations": BUDGET}, tmp_path)(Job("relations", "full", 1e38, 0, 0))
    assert found["log_loss"] == math.inf  # written as null
    assert all(map(math.isfinite, found["curve"]))


# -- the study -----------------------------------------------------------------------------------------


DESIGN = Design(
    {
        "first": Part("arithmetic", ("grass", "uniform"), range(2), orders=3),
        "second": Part("arithmetic", ("cyclic", "signal", "signal-top", "tau-2"), range(2), orders=1),
        "third": Part("relations", ("grass", "uniform"), range(2), orders=1),
    }
)


def row(job, log_loss=1.0):
    return {**vars(job), **vars(DESIGN.budgets[job.task]), "log_loss": log_loss}


def searched():
    """Rows of searches, of which the rate in the middle is the best."""
    return [row(job, 1.0 + (job.lr != SEARCH.rates[1])) for job in DESIGN.jobs([])]


def test_rates_are_chosen_for_each_base_and_then_pairs_are_run():
    jobs = DESIGN.jobs([])
    assert {job.order for job in jobs} == set(SEARCH.orders)
    # Rates of their own: grass, uniform, cyclic and signal-top on the first task, two on the second.
    assert len(jobs) == len(SEARCH.rates) * 2 * (4 + 2)
    rows = searched()
    jobs = DESIGN.jobs(rows)
    assert {job.lr for job in jobs} == {SEARCH.rates[1]}
    assert Counter((job.task, job.method) for job in jobs) == {
        ("arithmetic", "grass"): 6,
        ("arithmetic", "uniform"): 6,
        ("arithmetic", "cyclic"): 2,
        ("arithmetic", "signal"): 2,
        ("arithmetic", "signal-top"): 2,
        ("arithmetic", "tau-2"): 2,
        ("relations", "grass"): 2,
        ("relations", "uniform"): 2,
    }
    assert [job.order for job in jobs] == sorted(job.order for job in jobs)
    assert DESIGN.jobs(rows + [row(job) for job in jobs]) == []


def test_rows_of_another_budget_do_not_count():
    rows = [r | {"steps": 60} for r in searched()]
    assert DESIGN.matching(rows) == []
    assert DESIGN.jobs(rows) == DESIGN.jobs([])


def test_searches_and_results_have_different_problems_and_share_training_ones():
    budget = Budget(steps=1, batch=1, train=50, heldout=20)
    train, heldout = problems("relations", budget, 3, is_search=False)
    again, validation = problems("relations", budget, 3, is_search=True)
    assert train.problems == again.problems
    assert not set(heldout.problems) & set(validation.problems)
    assert len(heldout) == len(validation) == 20


def test_the_study_has_the_pairs_that_it_needs():
    parts = STUDY.parts
    assert len(parts["key"].pairs) >= 32
    assert all(len(part.pairs) >= 8 for part in parts.values())
    for part in parts.values():
        assert set(part.methods) <= set(NAMES)
        assert not {order for _, order in part.pairs} & set(SEARCH.orders)
    assert set(NAMES) == {name for part in parts.values() for name in part.methods}


# -- statistics ------------------------------------------------------------------------------------------


def test_a_clear_difference_is_found_and_noise_is_undecided():
    rng = np.random.default_rng(0)
    values = -1 + 0.1 * rng.standard_normal(16)
    clear = contrast(values)
    assert clear.mean == pytest.approx(values.mean())
    assert clear.low < clear.mean < clear.high < 0
    assert verdict(clear, 0.001) == "better"
    assert verdict(contrast(-values), 0.001) == "worse"
    bases = [0] * 8 + [1] * 8
    assert verdict(contrast(values, bases), 0.001) == "better"
    turned = contrast([*values[:8], *(0.01 - values[8:] / 5)], bases)
    assert turned.high < 0
    assert not turned.same_sign
    assert verdict(turned, 0.001) == "undecided"
    assert verdict(clear, 0.06) == "undecided"
    noise = contrast(values - values.mean() + 0.001)
    assert verdict(noise, 0.001) == "undecided"
    with pytest.raises(ValueError, match="at least two pairs"):
        contrast([1.0])
    assert contrast([0.5, 0.5]).low == contrast([0.5, 0.5]).high == 0.5


def p_of(values):
    return corrected_p_values({"one": dict(enumerate(values))})["one"]


def test_holm_is_known_on_an_example():
    """Three values: 0.01 x 3, 0.02 x 2, and 0.03 x 1, which is not less than the one before."""
    assert holm({"a": 0.03, "b": 0.01, "c": 0.02}) == pytest.approx({"a": 0.04, "b": 0.03, "c": 0.04})
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_the_mean_of_bases_has_a_t_interval():
    """Of 1, 2, 3, 6: mean 3, standard error sqrt(14 / 3) / 2; the quantile of t with 3 degrees of freedom is 3.182."""
    of = mean_of([1.0, 2.0, 3.0, 6.0])
    error = math.sqrt(14 / 3) / 2
    assert (of.mean, of.size) == (3.0, 4)
    assert (of.low, of.high) == pytest.approx((3 - 3.1824 * error, 3 + 3.1824 * error), rel=1e-3)


def test_the_permutation_test_counts_signs():
    assert p_of([1.0, 1.1, 0.9]) == 2 / 8
    assert p_of([1.0, -1.0]) == 1.0
    assert p_of([1.0 + 0.01 * i for i in range(20)]) < 0.001
    assert p_of([0.0, 0.0, 0.0]) == 1.0


def test_false_alarms_and_misses_are_as_rare_as_stated():
    rng = np.random.default_rng(1)
    alarms = [p_of(rng.standard_normal(10)) <= 0.05 for _ in range(400)]
    assert 0.02 < np.mean(alarms) < 0.08
    for bases in ([0] * 16, [0, 1, 2, 3] * 4, [0, 1] * 4):
        found = []
        for _ in range(300):
            noise = rng.standard_normal(len(bases))
            shift = contrast(noise, bases).detectable / contrast(noise, bases).deviation
            values = shift + rng.standard_normal(len(bases))
            found.append(verdict(contrast(values, bases), p_of(values)) != "undecided")
        assert 0.7 < np.mean(found) < 0.9


def test_the_correction_holds_the_error_of_a_family_and_can_decide_with_eight_pairs():
    """Sixteen comparisons without a difference, which share half of their noise: at most 5 % of families alarm."""
    rng = np.random.default_rng(3)
    alarms = []
    for _ in range(300):
        shared = rng.standard_normal(8)
        family = {i: dict(enumerate(shared + rng.standard_normal(8))) for i in range(16)}
        alarms.append(min(corrected_p_values(family).values()) <= 0.05)
    assert 0.02 < np.mean(alarms) < 0.085
    family = {i: dict(enumerate(0.01 * rng.standard_normal(8))) for i in range(16)}
    family[3] = dict(enumerate(-0.08 + 0.005 * rng.standard_normal(8)))
    p_values = corrected_p_values(family)
    assert p_values[3] == 2 / 256  # Holm's smallest would be 16 times as much
    assert min(p for i, p in p_values.items() if i != 3) > 0.05


def test_comparisons_may_have_different_pairs():
    family = {"a": {0: 1.0, 1: 1.1, 2: 0.9}, "b": {1: 0.1, 2: -0.1, 3: 0.2}}
    p_values = corrected_p_values(family)
    assert p_values["a"] >= p_of([1.0, 1.1, 0.9])
    assert p_values["a"] < p_values["b"]


@pytest.mark.parametrize("count", [8, 32])
def test_intervals_hold_the_truth_as_often_as_stated(count):
    rng = np.random.default_rng(2)
    hits = []
    for seed in range(400):
        found = contrast(0.3 + rng.standard_normal(count), seed=seed)
        hits.append(found.low <= 0.3 <= found.high)
    assert 0.92 < np.mean(hits) < 0.98


def test_a_detectable_difference_of_bases_is_decided_in_four_of_five_studies():
    rng = np.random.default_rng(5)
    unit = rng.standard_normal(8)
    difference = detectable(unit / unit.std(ddof=1), comparisons=14)
    p_values = stats.ttest_1samp(rng.standard_normal((4000, 8)) + difference, 0.0, axis=1).pvalue
    assert (p_values < 0.05 / 14).mean() == pytest.approx(0.8, abs=0.03)
