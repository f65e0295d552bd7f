"""Fewer cases than a full product: every pair of values still meets in one of them."""

from collections.abc import Hashable, Iterable
from itertools import combinations
from typing import TypeVar

Row = TypeVar("Row", bound=tuple[Hashable, ...])


def _pairs(row: tuple[Hashable, ...]) -> set[Hashable]:
    return set(combinations(enumerate(row), 2))


def pairwise(rows: Iterable[Row]) -> list[Row]:
    """Return rows that hold every pair of values, in any two columns, that `rows` hold.

    Most faults need one value or two to show: a wrong conversion of a gradient's dtype, a mask that is wrong in
    misaligned tensors with norms. Rows that may not be combined are left out of `rows` by the caller.

    Greedy, so few rows but not always the fewest; the same ones in the same order in every run.

    Args:
        rows: tuples of equal length, as `itertools.product` gives them.
    """
    candidates = [(row, _pairs(row)) for row in rows]
    missing: set[Hashable] = set().union(*(pairs for _, pairs in candidates))
    taken: list[Row] = []
    while missing:
        best, pairs = max(candidates, key=lambda candidate: len(candidate[1] & missing))
        taken.append(best)
        missing -= pairs
    return taken
