"""fp32 to storage types and back.

Would catch: bf16 truncated instead of rounded; ties not to even; a NaN that becomes an infinity; bf16
denormals flushed; an interpreter whose fp16 differs from torch's.
"""

# ruff: noqa: N803 - constexpr arguments are in capitals, as everywhere in Triton

import numpy as np
import pytest
import torch
from torch import Tensor

from grass_kernels._triton import jit, launch, tl, tl_dtype
from grass_kernels.conversions import load_fp32, pointer, store_fp32
from tests.support.buffers import bits, interpreter_only, same_bits

pytestmark = interpreter_only
N = 1 << 16


@jit()
def _copy_kernel(from_address, to_address, FROM: tl.constexpr, TO: tl.constexpr, N: tl.constexpr):
    index = tl.arange(0, N)
    x = load_fp32(pointer(from_address, FROM) + index, None)
    store_fp32(pointer(to_address, TO) + index, x, None)


def convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(x), dtype=dtype)
    launch(
        _copy_kernel, 1, x.device, from_address=x.data_ptr(), to_address=out.data_ptr(),
        FROM=tl_dtype(x.dtype), TO=tl_dtype(dtype), N=len(x),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_pattern_widens_exactly_and_comes_back(dtype):
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = convert(patterns, torch.float32)
    assert same_bits(wide, patterns.float())
    assert same_bits(convert(wide, dtype), patterns)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_to_nearest_even_around_every_tie(dtype):
    """Each value of the type, and the point half way to the next: below, at and above it."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    values, following = patterns.view(dtype).float(), (patterns + 1).view(dtype).float()
    half_way = ((values.double() + following.double()) / 2).float()
    below = torch.nextafter(half_way, torch.tensor(-np.inf))
    above = torch.nextafter(half_way, torch.tensor(np.inf))
    for x in (half_way, below, above):
        x = torch.where(x.isnan(), 0.0, x)
        assert same_bits(convert(x, dtype), x.to(dtype))


def test_random_bit_patterns_round_as_torch_does():
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 1 << 32, N, dtype=np.uint32)).view(
        torch.float32
    )
    assert x.isnan().any()
    assert same_bits(convert(x, torch.bfloat16), x.to(torch.bfloat16))
    assert same_bits(convert(x, torch.float32), x)


def test_nan_stays_a_quiet_nan():
    signalling = torch.tensor([0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1], dtype=torch.int32).view(torch.float32)
    narrow = convert(signalling, torch.bfloat16)
    assert narrow.isnan().all()
    assert (bits(narrow) & 0x40).all()
