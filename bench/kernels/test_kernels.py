"""The most telling cases for pytest-benchmark: `pytest bench/ --benchmark-only`.

Wall time around a step and, on a GPU, the wait for it: the host's time is in it, and each variant runs by
itself. For the device's own time, interleaved, in % of a copy: `python -m bench kernels`.

GRASS_BENCH_SIZE sets the parameters of a case: 1e8 on a CUDA device, 1e6 on a CPU if it is not set.
"""

import os
from typing import Any

import pytest
import torch

from bench.kernels.cases import MIXTURES, Case, make_cases
from bench.kernels.peers import peer_variants
from bench.kernels.problem import Comparison, Problem
from bench.kernels.timing import Clock, make_clock
from bench.kernels.variants import CannotDoError, Variant, own_variants

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = int(float(os.environ.get("GRASS_BENCH_SIZE", "1e8" if DEVICE.type == "cuda" else "1e6")))
CASES = make_cases([SIZE])
VARIANTS = [*own_variants(DEVICE), *peer_variants(DEVICE)[0]]
LARGEST_ERROR = 8.0
"""In ulps: torch's loops round several times in low precision. 8-bit moments may be further off."""
LARGEST_ERROR_CLIPPED = 64.0
"""The same with clipping: torch sums a norm in fp32, and its error is in every gradient; 17 ulps of 1e6 on a CPU."""


@pytest.fixture(scope="module")
def clock() -> Clock:
    return make_clock()


def test_all_mixtures_are_here() -> None:
    assert {case.mixture for case in CASES} == set(MIXTURES)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(benchmark: Any, clock: Clock, case: Case, variant: Variant) -> None:
    problem = Problem(case, DEVICE)
    try:
        built = variant.build(problem)
    except CannotDoError as reason:
        pytest.skip(f"{variant.name}: {reason}")
    comparison = Comparison(problem, built.grad_dtype, built.shared_dtype)
    built.step()  # compiles, and makes what it keeps
    error = comparison.worst_ulps()

    def step() -> None:
        built.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = str(case)
    benchmark.extra_info.update(
        numel=case.numel,
        bytes=built.num_bytes,
        grad_dtype=str(built.grad_dtype),
        state_dtype=built.state_name,
        rounding=built.rounding,
        error_ulps=error,
        device=DEVICE.type,
        torch=torch.__version__,
    )
    benchmark.pedantic(step, setup=clock.flush, rounds=20 if DEVICE.type == "cuda" else 5)
    torchs_norm = case.clip and (DEVICE.type == "cpu" or not variant.is_ours)
    largest = LARGEST_ERROR_CLIPPED if torchs_norm else LARGEST_ERROR
    assert error <= largest or not built.state_is_shared, f"{variant.name} is {error} ulps off"
