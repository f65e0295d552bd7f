"""Rows of study A, made up, and rows of the stability of norms, measured."""

import pytest
import torch

from bench.quality import stability
from bench.quality.training import Budget, make_model
from tests.support.study import rows_of


@pytest.fixture
def rows():
    """GRASS better than uniform by 0.03, as good as static with noise, worse than full."""
    values = {"full": (-0.1, 0.005), "uniform": (0.03, 0.005), "static": (0.0, 0.02), "grass": (0.0, 0.005)}
    return [r for method, (shift, noise) in values.items() for r in rows_of(method, shift, noise)]


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    torch.save(make_model(0).state_dict(), folder / "base-0.pt")
    budget = Budget(steps=130, batch=2, train=40, heldout=2)
    before = stability.BATCHES, stability.SIZES, stability.REFERENCE
    stability.BATCHES, stability.SIZES, stability.REFERENCE = 4, (4, 16, 64), 8
    try:
        return stability.measure(0, 1e-3, budget, folder)
    finally:
        stability.BATCHES, stability.SIZES, stability.REFERENCE = before
