"""Would catch: a pair of values that no case has, a case that may not be, cases that differ from run to run or between
the workers of one run, about as many cases as the full product has.
"""

from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.pairwise import pairwise


def pairs(rows):
    return {pair for row in rows for pair in combinations(enumerate(row), 2)}


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 4), max_size=60))
def test_every_pair_of_the_rows_is_in_what_is_left_of_them(rows):
    few = pairwise(rows)
    assert pairs(few) == pairs(rows)
    assert set(few) <= set(rows)
    assert len(set(few)) == len(few)
    assert pairwise(rows) == few


@pytest.mark.parametrize(
    ("sizes", "most"), [((2,) * 4, 6), ((2,) * 10, 12), ((5, 3, 2, 2, 2), 18), ((4, 4), 16)]
)
def test_there_are_few(sizes, most):
    """Five of 16 and six of 1,024 are the fewest for two values."""
    assert len(pairwise(product(*map(range, sizes)))) <= most


def test_what_may_not_be_combined_is_not():
    rows = [row for row in product("ab", "xy", (0, 1)) if row[:2] != ("a", "x")]
    assert all(row[:2] != ("a", "x") for row in pairwise(rows))
