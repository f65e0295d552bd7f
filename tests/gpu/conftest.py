"""One body, two devices: CUDA, and the CPU in Triton's interpreter, where no GPU is at hand.

A test that takes `device` runs on both; one that takes `cuda` is about what only a GPU has. With no GPU and
without TRITON_INTERPRET=1 everything here is skipped.
"""

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from grass_kernels import _triton

# Every test runs with deterministic algorithms, and cuBLAS then wants its workspace stated.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

CUDA = pytest.param(
    "cuda",
    id="cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
        pytest.mark.skipif(
            _triton.INTERPRETING, reason="TRITON_INTERPRET=1 interprets what a GPU should run"
        ),
    ],
)
INTERPRETER = pytest.param(
    "cpu",
    id="interpreter",
    marks=pytest.mark.skipif(
        not _triton.INTERPRETING, reason="the same body in the interpreter: run with TRITON_INTERPRET=1"
    ),
)


@pytest.fixture(params=[CUDA, INTERPRETER])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    yield from _device(request.param)


@pytest.fixture(params=[CUDA])
def cuda(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    yield from _device(request.param)


def _device(kind: str) -> Iterator[torch.device]:
    if kind == "cpu":
        yield torch.device("cpu")
        return
    yield torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize()  # what a kernel of this test did wrong belongs to this test
    gc.collect()
    torch.cuda.empty_cache()
