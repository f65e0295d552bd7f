"""Failures these tests catch: the method as a whole off its formula at any step (norms observed by the
wrong set, a refresh before the last observation or after the draw, probabilities of an earlier refresh),
samplers that measure or adapt when they should not, draw counts off, the state of another layer map or
configuration accepted, a refused state that leaves a trace.
"""

import math

import pytest
import torch

from grass import GrassConfig, StateMismatchError
from grass.layer_scheduler import LayerScheduler
from grass.sampling import SAMPLER_CLASSES

SIZES = [10, 20, 40, 10, 30]
NAMES = [f"layers.{i}" for i in range(5)]
CONFIG = {"active_layers": 2, "probe_steps": 4, "sample_interval": 3, "update_interval": 6, "ema": 0.3}


def scheduler(names: list[str] = NAMES, sizes: list[int] = SIZES, **options: object) -> LayerScheduler:
    return LayerScheduler(GrassConfig(**{**CONFIG, **options}), names, sizes, torch.device("cpu"))


def norms(step: int) -> list[float]:
    return torch.rand(5, generator=torch.Generator().manual_seed(step)).square().tolist()


def advance(method: LayerScheduler, start: int, stop: int) -> list[tuple]:
    history = []
    for step in range(start, stop):
        observed = [method.probing or layer in method.active for layer in range(5)]
        sq_norms = torch.tensor([n if seen else 0.0 for n, seen in zip(norms(step), observed, strict=True)])
        method.finish_step(sq_norms, observed)
        history.append((method.active, method.next_active))
    return history


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_importance_and_probabilities_follow_the_formula_at_every_step(ahead: int) -> None:
    method = scheduler(draw_ahead=ahead)
    importance, window = [0.0] * 5, [[] for _ in range(5)]
    for step in range(40):
        trains = range(5) if step < 4 else method.active
        for layer in trains:
            window[layer].append(math.sqrt(norms(step)[layer] / SIZES[layer]))
        advance(method, step, step + 1)
        taken = step + 1
        if taken == 4:
            importance = [sum(seen) / len(seen) for seen in window]
            window = [[] for _ in range(5)]
        elif taken > 4 and (taken - 4 + ahead) % 6 == 0:
            for layer, seen in enumerate(window):
                if seen:
                    importance[layer] = 0.3 * sum(seen) / len(seen) + 0.7 * importance[layer]
            window = [[] for _ in range(5)]
        wanted = torch.tensor(importance)
        torch.testing.assert_close(method.importance.importance, wanted, rtol=1e-5, atol=0)
        p = wanted / wanted.sum() if taken >= 4 else torch.full((5,), 0.2)  # "log" at temperature 1
        torch.testing.assert_close(method.sampler.probabilities.float(), p, rtol=1e-5, atol=0)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("probe_steps", [0, 4])
def test_remeasured_takes_the_norms_of_the_last_step_of_a_window(ahead: int, probe_steps: int) -> None:
    """Norms of other steps, of active layers only, are left out."""
    method = scheduler(
        sampler="remeasured", draw_ahead=ahead, probe_steps=probe_steps, sample_interval=4, update_interval=8
    )
    importance, num_measured = [0.0 if probe_steps else 1.0] * 5, 0
    for step in range(40):
        is_measured = step >= probe_steps and (step + 1 - probe_steps + ahead) % 8 == 0
        assert method.probing == (step < probe_steps)
        assert method.remeasuring == is_measured
        assert method.reads_norms == (is_measured or method.probing)
        observed = [True] * 5 if method.reads_norms else [layer in method.active for layer in range(5)]
        method.finish_step(torch.tensor(norms(step)), observed)
        rms = [math.sqrt(n / size) for n, size in zip(norms(step), SIZES, strict=True)]
        if step < probe_steps:
            importance = [m + r / probe_steps for m, r in zip(importance, rms, strict=True)]
        elif is_measured:
            importance = [0.3 * r + 0.7 * m for m, r in zip(importance, rms, strict=True)]
            num_measured += 1
        if step >= probe_steps - 1:
            torch.testing.assert_close(
                method.importance.importance, torch.tensor(importance), rtol=1e-5, atol=0
            )
    assert num_measured == (40 - probe_steps + ahead) // 8


def test_a_refresh_counts_for_the_draw_of_the_same_step() -> None:
    """The draw uses the probabilities just made: with a cold temperature it must take the new favourite."""
    method = scheduler(temperature=0.01, ema=1.0, active_layers=1, draw_ahead=1, update_interval=3)
    for step in range(20):
        observed = [method.probing or layer in method.active for layer in range(5)]
        favourite = 1 if step < 4 else 3
        sq_norms = torch.tensor([float(size) for size in SIZES])
        sq_norms[favourite] *= 100
        if step >= 4:
            sq_norms *= 0.0001  # whoever trains falls behind those that do not
        sq_norms[[i for i, seen in enumerate(observed) if not seen]] = 0
        before = method.importance.importance.clone()
        change = method.finish_step(sq_norms, observed)
        if change.drawn is not None:
            importance = method.importance.importance
            assert importance[list(change.drawn)] == importance.max()
            if step > 4:
                assert not torch.equal(before, method.importance.importance)


def test_static_keeps_the_probe_and_adaptive_does_not() -> None:
    for name in ("static", "adaptive", "shuffled", "remeasured"):
        method = scheduler(sampler=name)
        advance(method, 0, 4)
        probed = method.importance.importance.clone()
        assert probed.min() > 0
        advance(method, 4, 30)
        assert torch.equal(method.importance.importance, probed) == (name == "static")


@pytest.mark.parametrize("name", ["uniform", "cyclic"])
def test_samplers_without_gradients_draw_before_the_first_step(name: str) -> None:
    method = scheduler(sampler=name)
    assert not method.probing
    assert len(method.active) == 2
    assert method.importance.importance.tolist() == [1] * 5
    advance(method, 0, 20)
    assert method.importance.importance.tolist() == [1] * 5


def test_without_a_probe_importance_starts_at_ones_and_moves() -> None:
    method = scheduler(probe_steps=0)
    assert len(method.active) == 2
    assert method.importance.importance.tolist() == [1] * 5
    assert method.sampler.probabilities.tolist() == [0.2] * 5
    first = method.active
    advance(method, 0, 6)
    moved = (method.importance.importance != 1).nonzero().flatten().tolist()
    assert set(first) <= set(moved) < set(range(5))


def test_weight_norms_are_the_importance_for_good() -> None:
    weights = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2])
    config = GrassConfig(**CONFIG, sampler="weight_norm")
    method = LayerScheduler(config, NAMES, SIZES, torch.device("cpu"), weights)
    torch.testing.assert_close(method.sampler.probabilities.float(), weights)
    advance(method, 0, 20)
    torch.testing.assert_close(method.sampler.probabilities.float(), weights)
    assert torch.equal(method.importance.importance, weights)


def test_draw_counts_and_changes_agree_with_the_sets() -> None:
    method = scheduler()
    counts, active = [0] * 5, ()
    for step in range(40):
        observed = [method.probing or layer in method.active for layer in range(5)]
        change = method.finish_step(torch.tensor(norms(step)), observed)
        for layer in change.drawn or ():
            counts[layer] += 1
        if change.left is not None:
            assert change.left == tuple(layer for layer in active if layer not in method.active)
            active = method.active
        assert method.active == active
    assert method.draw_counts == counts
    assert sum(counts) == 2 * method.sampler.num_draws


@pytest.mark.parametrize(
    "options", [{}, {"sampler": "uniform"}, {"draw_ahead": 2}, {"draw_ahead": 0}], ids=str
)
def test_trained_draws_are_those_with_a_step(options: dict[str, object]) -> None:
    """Neither sets that are drawn ahead, nor those that the next step will train first."""
    method, resumed = scheduler(**options), scheduler(**options)
    counts, before, fewer = [0] * 5, None, 0
    for step in range(40):
        trained = None if method.probing else (method.active, method.schedule.adapt_steps // 3)
        if trained is not None and trained != before:
            for layer in method.active:
                counts[layer] += 1
        before = trained
        advance(method, step, step + 1)
        assert method.trained_draws == counts, step
        resumed.load_state_dict(method.state_dict())
        assert resumed.trained_draws == counts
        fewer += counts != method.draw_counts
    assert fewer >= 10


@pytest.mark.parametrize("name", SAMPLER_CLASSES)
def test_resumed_anywhere_the_method_continues_exactly(name: str) -> None:
    whole = scheduler(sampler=name)
    history = advance(whole, 0, 24)
    for stop in range(24):
        first, resumed = scheduler(sampler=name), scheduler(sampler=name)
        advance(first, 0, stop)
        state = first.state_dict()
        resumed.check(state)
        resumed.load_state_dict(state)
        assert advance(resumed, stop, 24) == history[stop:]
        assert torch.equal(resumed.importance.importance, whole.importance.importance)


def test_the_state_of_another_method_is_refused_with_what_differs() -> None:
    method = scheduler()
    before = repr(method.state_dict())
    other = scheduler(temperature=0.5, sampler="static", seed=3).state_dict()
    with pytest.raises(StateMismatchError) as raised:
        method.check(other)
    for part in (
        "temperature: saved 0.5, now 1.0",
        "sampler: saved static, now adaptive",
        "seed: saved 3, now 0",
    ):
        assert part in str(raised.value)
    assert 'delete param_groups[0]["grass"]' in str(raised.value)
    with pytest.raises(StateMismatchError, match=r"different GrassConfig \(always_active\)"):
        method.check(scheduler(always_active="none").state_dict())
    with pytest.raises(StateMismatchError, match="different layer map"):
        method.check(scheduler(names=[f"h.{i}" for i in range(5)]).state_dict())
    with pytest.raises(StateMismatchError, match="different layer map"):
        method.check(scheduler(sizes=[10, 20, 40, 10, 31]).state_dict())
    with pytest.raises(StateMismatchError, match="format 99; this version reads"):
        method.check({**method.state_dict(), "format": 99})
    assert repr(method.state_dict()) == before


def test_the_configuration_is_saved_as_plain_numbers() -> None:
    import numpy

    state = scheduler(temperature=numpy.float64(0.5)).state_dict()
    assert {type(value) for value in state["config"].values()} <= {int, float}
