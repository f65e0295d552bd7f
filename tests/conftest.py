"""Fixtures of every test: the same random numbers, one thread, and memory that shows if it is read
before it is written."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.utils.deterministic

from grass_kernels import _triton

pytest.register_assert_rewrite("tests.support")

try:
    from hypothesis import settings
except ImportError:  # tests/gpu does without
    pass
else:
    settings.register_profile("same in every run", deadline=None, derandomize=True, database=None)
    settings.load_profile("same in every run")


def pytest_configure() -> None:
    """Use one thread, in fixtures of the session as well, and make the interpreter's pass short."""
    torch.set_num_threads(1)
    if _triton.INTERPRETING:
        from tests.support.interpreter import patch_once_a_launch

        patch_once_a_launch()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter's pass takes whole folders: what says that it is of the plain pass alone is skipped there."""
    if not _triton.INTERPRETING:
        return
    for item in items:
        mark = item.get_closest_marker("plain_only")
        if mark is not None:
            item.add_marker(pytest.mark.skip(reason=f"plain pass only: {mark.kwargs['reason']}"))


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    torch.set_num_threads(1)  # sums in one order, and no fight over cores
    torch.manual_seed(0)
    # torch.empty gives NaN instead of what was there before
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def llm_adapters():
    """Folder of LLM-Adapters' data sets: `GRASS_LLM_ADAPTERS`, or shared/data/llm-adapters beside the checkout."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "llm-adapters"
    folder = Path(os.environ.get("GRASS_LLM_ADAPTERS") or beside)
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: set GRASS_LLM_ADAPTERS to the folder of LLM-Adapters' data sets")
    return folder
