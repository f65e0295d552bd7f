"""Process groups of one, two and four ranks, which live over the tests of a session."""

from collections.abc import Iterator

import pytest

from tests.support.ranks import RankPool


@pytest.fixture(scope="session")
def _pools() -> Iterator[dict[int, RankPool]]:
    pools = {size: RankPool(size) for size in (1, 2, 4)}
    yield pools
    for pool in pools.values():
        pool.stop()


@pytest.fixture
def two(_pools) -> RankPool:
    return _pools[2]


@pytest.fixture
def four(_pools) -> RankPool:
    return _pools[4]


@pytest.fixture
def one(_pools) -> RankPool:
    return _pools[1]
