"""Statistics of paired runs: differences, intervals, tests corrected for many comparisons, and what can be told at all.

Two methods are compared on the same bases and orders of the data. The unit of a `Contrast` is a pair of runs, so all
its statements are about these bases; of a difference that is decided, all bases have the sign. The unit of a `Mean` is
a base.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000
Array = NDArray[np.float64]
Name = TypeVar("Name", bound=Hashable)


class Contrast(NamedTuple):
    """Difference between two methods.

    Attributes:
        mean: mean of the paired differences.
        low, high: bootstrap interval of the mean.
        deviation: standard deviation of the differences.
        num_pairs: number of pairs.
        same_sign: whether the mean difference of every base has the sign of the mean.
        detectable: difference that would have been decided in 80 % of such experiments.
    """

    mean: float
    low: float
    high: float
    deviation: float
    num_pairs: int
    same_sign: bool
    detectable: float


def contrast(
    differences: Sequence[float], bases: Sequence[Hashable] = (), comparisons: int = 1, seed: int = 0
) -> Contrast:
    """Compare two methods by their paired differences.

    The interval is that of a studentized bootstrap, since that of percentiles is too short for eight pairs.

    Args:
        differences: of the pairs; at least two.
        bases: base of each pair; by default all pairs are of one base.
        comparisons: number of comparisons for which `detectable` is corrected.
        seed: seed of the resampling.

    Raises:
        ValueError: there are fewer than two.
    """
    values = np.asarray(differences, dtype=float)
    count = len(values)
    if count < 2:
        raise ValueError(f"a difference needs at least two pairs, not {count}")
    rng = np.random.default_rng(seed)
    tail = (1 - CONFIDENCE) / 2
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    resampled = values[rng.integers(0, count, (RESAMPLES, count))]
    scale = resampled.std(axis=1, ddof=1)
    varied = scale > 1e-9 * deviation  # not the same pair each time
    low, high = mean, mean
    if varied.any():
        ratios = (resampled.mean(axis=1)[varied] - mean) / scale[varied]
        below, above = np.quantile(ratios, [tail, 1 - tail])
        low, high = mean - above * deviation, mean - below * deviation
    groups = _groups(bases or [0] * count)
    means = np.array([values[group].mean() for group in groups])
    same_sign = bool((np.sign(means) == np.sign(mean)).all())
    least = deviation * _detectable(tuple(map(tuple, groups)), comparisons)
    return Contrast(mean, float(low), float(high), deviation, count, same_sign, least)


class Mean(NamedTuple):
    """Mean of independent observations, with the interval and the p-value of a t test.

    Attributes:
        mean: the mean.
        low, high: 95 % interval.
        p_value: that the mean is 0, of this mean alone.
        size: number of observations.
    """

    mean: float
    low: float
    high: float
    p_value: float
    size: int


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean of at least two observations, with Student's t test."""
    mean, count = float(np.mean(values)), len(values)
    error = max(float(np.std(values, ddof=1)), 1e-12 * abs(mean), 1e-300) / math.sqrt(count)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    p_value = 2 * float(stats.t.sf(abs(mean) / error, count - 1))
    return Mean(mean, mean - reach, mean + reach, p_value, count)


def detectable(values: Sequence[float], comparisons: int) -> float:
    """Return the difference that a t test of such observations, corrected for its number, decides in 80 % of cases."""
    return float(np.std(values, ddof=1)) * _detectable((tuple(range(len(values))),), comparisons)


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Return p-values corrected for their number.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    corrected, largest = {}, 0.0
    for place, (name, p_value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_value))
        corrected[name] = largest
    return corrected


def _groups(bases: Sequence[Hashable]) -> list[list[int]]:
    """Return the positions of the pairs of each base."""
    return [[i for i, other in enumerate(bases) if other == base] for base in dict.fromkeys(bases)]


@cache
def _detectable(groups: tuple[tuple[int, ...], ...], comparisons: int) -> float:
    """Return the difference, in deviations of a pair, that `verdict` decides in 80 % of experiments.

    Simulated with normal differences whose mean is the same on all bases, and with Bonferroni's correction of a t test,
    which is about that of `corrected_p_values`.
    """
    count = sum(map(len, groups))
    noise = np.random.default_rng(0).standard_normal((RESAMPLES, count))
    critical = stats.t.ppf(1 - (1 - CONFIDENCE) / 2 / comparisons, count - 1)
    needed = critical * noise.std(axis=1, ddof=1) / math.sqrt(count) - noise.mean(axis=1)
    for group in groups:
        needed = np.maximum(needed, -noise[:, list(group)].mean(axis=1))
    return float(np.quantile(needed, 0.8))


def corrected_p_values(family: Mapping[Name, Mapping[Any, float]], seed: int = 0) -> dict[Name, float]:
    """Return two-sided p-values that the means are zero, corrected for the number of comparisons (max t).

    The signs of all differences of a pair are flipped together, and each t statistic is compared with the largest of
    the family. Unlike a multiple of the p-value of each, this can tell differences of as few as eight pairs.

    Args:
        family: for each comparison the difference of each pair; comparisons may have different pairs.
        seed: seed of the signs, which are all there are if there are at most twelve pairs.

    Source: Westfall and Young, Resampling-Based Multiple Testing, 1993.
    """
    pairs = list(dict.fromkeys(pair for of in family.values() for pair in of))
    if len(pairs) <= 12:
        signs = np.array(np.meshgrid(*[[1.0, -1.0]] * len(pairs))).reshape(len(pairs), -1).T
    else:
        signs = np.random.default_rng(seed).choice([1.0, -1.0], (RESAMPLES, len(pairs)))
        signs[0] = 1.0  # the observed ones are among them
    statistics = {}
    for name, of in family.items():
        values = np.array(list(of.values()))
        flipped = signs[:, [pairs.index(pair) for pair in of]] * values
        mean = flipped.mean(axis=1)
        squares = np.maximum(np.square(values).mean() - np.square(mean), 1e-12 * np.square(values).mean())
        statistics[name] = np.abs(mean) / np.sqrt(squares + 1e-300) * math.sqrt(len(values) - 1)
    largest = np.max(np.stack(list(statistics.values())), axis=0)
    return {name: float((largest >= of[0] - 1e-9).mean()) for name, of in statistics.items()}


def verdict(found: Contrast, p_corrected: float, *, lower_is_better: bool = True) -> str:
    """Return "better", "worse" or "undecided" for a method against the one it is compared with."""
    if p_corrected > 1 - CONFIDENCE or found.low <= 0 <= found.high or not found.same_sign:
        return "undecided"
    return "better" if (found.mean < 0) == lower_is_better else "worse"
