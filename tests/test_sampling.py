"""Failures these tests catch: a wrong scale or softmax, probabilities that move with the gradients' size,
a floor that does not hold or does not sum to one, draws with replacement or off the Plackett-Luce law,
layers that cannot train being drawn, a draw that touches or depends on torch's global generator, a sampler
that does not continue where it was saved, probabilities lost to underflow.
"""

import io
import math
from itertools import permutations
from typing import get_args

import pytest
import torch
from scipy import stats
from torch import Tensor

from grass import ConfigError, GrassConfig
from grass.choices import SamplerName
from grass.layer_scheduler import LayerScheduler
from grass.sampling import SAMPLER_CLASSES, make_sampler, scale_importance

IMPORTANCE = torch.tensor([3e-4, 1e-4, 2e-4, 8e-4, 1.5e-4])


def sampler(layers: int = 5, eligible: list[bool] | None = None, **options: object):
    return make_sampler(GrassConfig(**options), eligible or [True] * layers)


def formula(values: list[float], kind: str, tau: float, floor: float = 0.0) -> list[float]:
    """The method's probabilities in plain Python."""
    count = len(values)
    mean = sum(values) / count
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / count)
    scaled = {
        "mean": [v / mean for v in values],
        "log": [math.log(v) for v in values],
        "zscore": [(v - mean) / spread for v in values],
        "none": values,
    }[kind]
    weights = [math.exp((s - max(scaled)) / tau) for s in scaled]
    return [(1 - count * floor) * w / sum(weights) + floor for w in weights]


def set_probabilities(p: list[float], gamma: int) -> dict[tuple[int, ...], float]:
    """Exact Plackett-Luce: each order of a set, each next layer in proportion among those left."""
    chances: dict[tuple[int, ...], float] = {}
    for order in permutations(range(len(p)), gamma):
        chance, left = 1.0, 1.0
        for layer in order:
            chance *= p[layer] / left
            left -= p[layer]
        key = tuple(sorted(order))
        chances[key] = chances.get(key, 0.0) + chance
    return chances


@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("kind", ["mean", "log", "zscore", "none"])
def test_probabilities_are_the_softmax_of_the_scaled_importance(kind: str, tau: float) -> None:
    s = sampler(importance_scale=kind, temperature=tau)
    s.refresh(IMPORTANCE * (1000 if kind == "none" else 1))
    wanted = formula([float(v) * (1000 if kind == "none" else 1) for v in IMPORTANCE], kind, tau)
    torch.testing.assert_close(s.probabilities, torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["mean", "log", "zscore"])
def test_the_size_of_the_gradients_does_not_matter(kind: str) -> None:
    s = sampler(importance_scale=kind)
    s.refresh(IMPORTANCE)
    before = s.probabilities
    s.refresh(IMPORTANCE * 1024)
    torch.testing.assert_close(s.probabilities, before, rtol=1e-6, atol=0)
    assert before.std() > 0.01


def test_log_scale_at_temperature_one_is_proportional_to_importance() -> None:
    s = sampler(importance_scale="log", temperature=1.0)
    s.refresh(IMPORTANCE)
    torch.testing.assert_close(s.probabilities, IMPORTANCE.double() / IMPORTANCE.double().sum())


@pytest.mark.parametrize("kind", ["mean", "log", "zscore", "none"])
@pytest.mark.parametrize("importance", [torch.zeros(4), torch.full((4,), 2e-5)])
def test_importance_that_tells_nothing_gives_equal_probabilities(kind: str, importance: Tensor) -> None:
    s = sampler(4, importance_scale=kind)
    s.refresh(importance)
    torch.testing.assert_close(s.probabilities, torch.full((4,), 0.25, dtype=torch.float64))


def test_a_layer_without_gradient_stays_drawable_on_the_log_scale() -> None:
    assert torch.isfinite(scale_importance(torch.tensor([0.0, 1.0, 2.0]), "log")).all()


@pytest.mark.parametrize("kind", ["mean", "log", "zscore", "none"])
@pytest.mark.parametrize("tau", [5e-324, 1e-3, 1e300])
def test_extreme_temperatures_give_probabilities(kind: str, tau: float) -> None:
    s = sampler(importance_scale=kind, temperature=tau)
    s.refresh(IMPORTANCE)
    assert torch.isfinite(s.probabilities).all()
    assert s.probabilities.sum().item() == pytest.approx(1)
    wanted = 3 if tau < 1 and not (kind == "none" and tau == 1e-3) else None
    if wanted is not None:
        assert s.probabilities.argmax() == wanted
    assert len(set(s.draw())) == 2


def test_before_any_refresh_all_layers_are_alike() -> None:
    assert sampler(5).probabilities.tolist() == [0.2] * 5


@pytest.mark.parametrize("floor", [0.05, 0.2])
def test_the_floor_holds_and_probabilities_sum_to_one(floor: float) -> None:
    s = sampler(temperature=0.1, importance_scale="mean", min_probability=floor)
    s.refresh(IMPORTANCE)
    wanted = formula([float(v) for v in IMPORTANCE], "mean", 0.1, floor)
    torch.testing.assert_close(
        s.probabilities, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-12
    )
    assert s.probabilities.min() >= floor - 1e-12
    assert s.probabilities.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_layers_that_cannot_train_are_never_drawn(name: str) -> None:
    eligible = [True, False, True, True, False, True]
    s = sampler(eligible=eligible, sampler=name, min_probability=0.1, active_layers=3)
    s.refresh(torch.tensor([1.0, 50.0, 2.0, 3.0, 50.0, 4.0]))
    drawn = {layer for _ in range(50) for layer in s.draw()}
    assert drawn == {0, 2, 3, 5}
    assert s.probabilities[[1, 4]].tolist() == [0, 0]
    assert s.probabilities.sum().item() == pytest.approx(1)


def test_what_cannot_be_drawn_does_not_count() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match="between 1 and 2"):
        LayerScheduler(GrassConfig(active_layers=3), "abc", [5, 0, 5], cpu)
    with pytest.raises(ConfigError, match=r"at most 0\.5"):
        LayerScheduler(GrassConfig(min_probability=0.6, active_layers=1), "abc", [5, 0, 5], cpu)


@pytest.mark.parametrize("name", SAMPLER_CLASSES)
@pytest.mark.parametrize("eligible", [[False] * 4, [False, True, False, False]], ids=["none", "one"])
def test_fewer_layers_than_active_ones_are_all_drawn(name: str, eligible: list[bool]) -> None:
    """Layers may be frozen after construction."""
    s = sampler(eligible=eligible, sampler=name, active_layers=2, min_probability=0.4)
    s.refresh(torch.ones(4))
    assert s.draw() == tuple(layer for layer, can in enumerate(eligible) if can)
    assert s.probabilities.sum().item() == sum(eligible)
    assert (s.probabilities >= 0).all()


@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_drawn_sets_follow_the_exact_plackett_luce_law(gamma: int) -> None:
    s = sampler(active_layers=gamma, seed=7)
    s.refresh(IMPORTANCE)
    chances = set_probabilities(s.probabilities.tolist(), gamma)
    counts = dict.fromkeys(chances, 0)
    total = 6000
    for _ in range(total):
        counts[s.draw()] += 1
    assert sum(chances.values()) == pytest.approx(1)
    found = stats.chisquare(list(counts.values()), [total * chance for chance in chances.values()])
    assert found.pvalue > 0.001
    # the test can fail: a uniform law is far away
    assert stats.chisquare(list(counts.values())).pvalue < 1e-6


def test_sets_are_ascending_and_without_repetition() -> None:
    s = sampler(active_layers=3, temperature=0.01, importance_scale="mean")
    s.refresh(IMPORTANCE)
    for _ in range(100):
        drawn = s.draw()
        assert list(drawn) == sorted(set(drawn))
        assert len(drawn) == 3
    assert s.num_draws == 100


def test_underflowed_probabilities_come_last_and_by_chance() -> None:
    s = sampler(6, active_layers=2, temperature=1e-4, importance_scale="mean")
    s.refresh(torch.tensor([1.0, 1.0, 9.0, 1.0, 1.0, 1.0]))
    assert (s.probabilities == 0).sum() == 5
    drawn = [s.draw() for _ in range(500)]
    assert all(2 in layers for layers in drawn)
    others = [next(layer for layer in layers if layer != 2) for layers in drawn]
    counts = [others.count(layer) for layer in (0, 1, 3, 4, 5)]
    assert stats.chisquare(counts).pvalue > 0.001


def test_draws_neither_touch_nor_follow_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    first = sampler(seed=3)
    sets = [first.draw() for _ in range(10)]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    again = sampler(seed=3)
    assert [again.draw() for _ in range(10)] == sets
    other = sampler(seed=4)
    assert [other.draw() for _ in range(10)] != sets


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_a_saved_sampler_continues_exactly(name: str) -> None:
    whole = sampler(sampler=name)
    whole.refresh(IMPORTANCE)
    for _ in range(3):
        whole.draw()
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = sampler(sampler=name)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(resumed.probabilities, whole.probabilities)
    assert [resumed.draw() for _ in range(8)] == [whole.draw() for _ in range(8)]
    assert resumed.num_draws == whole.num_draws == 11
    whole.refresh(IMPORTANCE.flip(0))
    resumed.refresh(IMPORTANCE.flip(0))
    assert torch.equal(resumed.probabilities, whole.probabilities)


def test_a_saved_state_is_a_copy() -> None:
    s = sampler(sampler="cyclic")
    s.draw()
    state = s.state_dict()
    kept = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    s.draw()
    s.refresh(IMPORTANCE)
    assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(kept[key])) for key in kept)


def test_which_samplers_probe_and_adapt() -> None:
    probes = {name for name in SAMPLER_CLASSES if sampler(sampler=name).probes}
    adapts = {name for name in SAMPLER_CLASSES if sampler(sampler=name).adapts}
    assert probes == {"adaptive", "static", "shuffled", "remeasured"}
    assert adapts == {"adaptive", "shuffled", "remeasured"}


def test_uniform_ignores_importance() -> None:
    s = sampler(sampler="uniform")
    s.refresh(IMPORTANCE)
    assert s.probabilities.tolist() == [0.2] * 5
    counts = [0] * 5
    for _ in range(2000):
        for layer in s.draw():
            counts[layer] += 1
    assert min(counts) > 0.35 * 2000
    assert max(counts) < 0.45 * 2000


def test_cyclic_goes_round_in_blocks() -> None:
    s = sampler(5, sampler="cyclic", active_layers=2)
    before = s.generator.get_state()
    assert [s.draw() for _ in range(6)] == [(0, 1), (2, 3), (0, 4), (1, 2), (3, 4), (0, 1)]
    assert s.probabilities.tolist() == [0.5, 0.5, 0, 0, 0]
    assert torch.equal(s.generator.get_state(), before)


def test_shuffled_gives_the_same_probabilities_to_other_layers() -> None:
    honest, shuffled = sampler(12), sampler(12, sampler="shuffled", seed=0)
    importance = torch.arange(1.0, 13.0)
    honest.refresh(importance)
    shuffled.refresh(importance)
    assert not torch.equal(honest.probabilities, shuffled.probabilities)
    torch.testing.assert_close(honest.probabilities.sort()[0], shuffled.probabilities.sort()[0])
    # the permutation is fixed: by a constructor, by the seed, over refreshes
    places = [int((honest.probabilities == p).nonzero()) for p in shuffled.probabilities]
    shuffled.refresh(importance.square())
    honest.refresh(importance.square())
    assert torch.equal(shuffled.probabilities, honest.probabilities[places])
    assert sorted(places) == list(range(12))
    assert all(place != layer for layer, place in enumerate(places))
    again, other = sampler(12, sampler="shuffled", seed=0), sampler(12, sampler="shuffled", seed=1)
    again.refresh(importance.square())
    other.refresh(importance.square())
    assert torch.equal(again.probabilities, shuffled.probabilities)
    assert not torch.equal(other.probabilities, shuffled.probabilities)
