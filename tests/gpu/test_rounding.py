"""bfloat16 as the device rounds it, beside the integers of the reference, which the interpreter runs.

Would catch: a device whose conversion does not round to nearest even, flushes denormals, or makes an infinity of a NaN
or of a number that has a nearest.
"""

# ruff: noqa: N803 - constexpr arguments are in capitals, as everywhere in Triton

import pytest
import torch
from torch import Tensor

from grass_kernels._triton import jit, launch, tl
from grass_kernels.conversions import load_fp32, pointer, store_fp32
from tests.support.device_problem import same_bits

BLOCK = 2048
CHUNK = 1 << 26  # patterns at a time


@jit()
def _round_kernel(from_ptr, to_address, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    store_fp32(pointer(to_address, tl.bfloat16) + index, load_fp32(from_ptr + index, None), None)


def rounded(x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    launch(_round_kernel, len(x) // BLOCK, x.device, from_ptr=x, to_address=out.data_ptr(), BLOCK=BLOCK)
    return out


def by_integers(x: Tensor) -> Tensor:
    """Round to nearest, ties to even: adds just under half a unit, and the last bit."""
    bits = x.view(torch.int32).long() & 0xFFFFFFFF
    upper = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
    upper = torch.where(x.isnan(), 0x7FC0, upper)
    return torch.where(upper >= 1 << 15, upper - (1 << 16), upper).to(torch.int16).view(torch.bfloat16)


def test_every_number_is_rounded_as_by_integers(cuda: torch.device) -> None:
    for start in range(-(1 << 31), 1 << 31, CHUNK):
        x = torch.arange(start, start + CHUNK, device=cuda).to(torch.int32).view(torch.float32)
        found, expected = rounded(x), by_integers(x)
        equal = (found.view(torch.int16) == expected.view(torch.int16)) | (found.isnan() & expected.isnan())
        assert bool(equal.all()), f"from {x[~equal][0].item()!r}"


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_ties_and_their_neighbours(device: torch.device, shift: int) -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int64)
    patterns = ((patterns << 16) + 0x8000 + shift).to(torch.int32)
    x = patterns.view(torch.float32).to(device)
    assert same_bits(rounded(x), by_integers(x))
