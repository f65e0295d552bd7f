"""What every test starts from: the same random numbers, one thread, and memory that shows if it is read
before it is written."""

from collections.abc import Iterator

import pytest
import torch
import torch.utils.deterministic

pytest.register_assert_rewrite("tests.support")

try:
    from hypothesis import settings
except ImportError:  # tests/gpu does without
    pass
else:
    settings.register_profile("same in every run", deadline=None, derandomize=True, database=None)
    settings.load_profile("same in every run")


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, and no fight over cores
    torch.manual_seed(0)
    # torch.empty gives NaN instead of what was there before
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
