"""Statistics of paired runs: differences, intervals, tests corrected for many comparisons, and what can be told at all.

Two methods are compared on the same bases and data orders. The unit is a pair of runs; the difference of a base is the
mean over its orders, so bases, of which there are few, are told from orders.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000


class Contrast(NamedTuple):
    """Difference between two methods.

    Attributes:
        mean: mean of the paired differences.
        low, high: bootstrap interval of the mean.
        deviation: standard deviation of the differences.
        num_pairs: number of pairs.
        p_value: two-sided, of a sign-flip permutation test.
        detectable: difference that would have been found in 80 % of such experiments (two-sided, 5 %).
    """

    mean: float
    low: float
    high: float
    deviation: float
    num_pairs: int
    p_value: float
    detectable: float


def contrast(differences: Sequence[float], seed: int = 0) -> Contrast:
    """Compare two methods by their paired differences.

    Args:
        differences: of the pairs; at least two.
        seed: seed of the resampling.

    Raises:
        ValueError: there are fewer than two.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        raise ValueError(f"a difference needs at least two pairs, not {len(values)}")
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    deviation = float(values.std(ddof=1))
    # Of a paired t test with a power of 80 %.
    count = len(values)
    factor = stats.t.ppf(1 - tail, count - 1) + stats.t.ppf(0.8, count - 1)
    detectable = float(factor * deviation / math.sqrt(count))
    return Contrast(
        float(values.mean()), float(low), float(high), deviation, count, sign_flip(values, rng), detectable
    )


def sign_flip(values: NDArray[np.float64], rng: np.random.Generator) -> float:
    """Return the two-sided p-value that the mean is zero: all signs if there are few, else random ones."""
    observed = abs(values.mean()) - 1e-12
    if len(values) <= 12:
        signs = np.array(np.meshgrid(*[[-1, 1]] * len(values))).reshape(len(values), -1).T
        return float((np.abs((signs * values).mean(axis=1)) >= observed).mean())
    signs = rng.choice([-1, 1], (RESAMPLES, len(values)))
    hits = int((np.abs((signs * values).mean(axis=1)) >= observed).sum())
    return (hits + 1) / (RESAMPLES + 1)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values corrected for their number, by Holm's method."""
    corrected: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = largest
    return corrected


def verdict(found: Contrast, p_corrected: float, *, lower_is_better: bool = True) -> str:
    """Return "better", "worse" or "undecided" for a method against the one it is compared with."""
    if p_corrected > 1 - CONFIDENCE or found.low <= 0 <= found.high:
        return "undecided"
    return "better" if (found.mean < 0) == lower_is_better else "worse"
