"""The random bits that bf16 parameters are rounded with.

Would catch: a generator that is not Philox 4x32-10; kernels that draw other bits than the reference; a key or a
place cut to 32 bits; draws that depend on where a call begins; draws that are not uniform, or not independent
of their neighbours', the next step's or another seed's.
"""

# ruff: noqa: N803 - constexpr arguments are in capitals, as everywhere in Triton

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from grass_kernels import rounding
from grass_kernels._triton import jit, launch, tl
from grass_kernels.conversions import random_16_bits
from grass_kernels.table import CHUNK
from tests.support.buffers import interpreter_only

CPU = torch.device("cpu")
N = 1 << 16
Z = 6.0
"""Standard deviations from the mean at which a statistical test fails: were the draws another generator's and
perfect, with a probability of 2e-9 each. Here they are fixed by their seeds, and so are the tests."""

KNOWN = [  # of Philox 4x32-10, as its authors published them: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_reference_is_philox(counter, key, words):
    found = rounding.philox_4x32(tuple(torch.tensor([c]) for c in counter), key[0] | key[1] << 32)
    assert tuple(int(word) for word in found) == words


@jit()
def _philox_kernel(counter_ptr, seed_ptr, out_ptr):
    index = tl.arange(0, 1)
    c0 = tl.load(counter_ptr + index).to(tl.uint32)
    c1 = tl.load(counter_ptr + 1 + index).to(tl.uint32)
    c2 = tl.load(counter_ptr + 2 + index).to(tl.uint32)
    c3 = tl.load(counter_ptr + 3 + index).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), c0, c1, c2, c3)
    tl.store(out_ptr + index, w0.to(tl.int64))
    tl.store(out_ptr + 1 + index, w1.to(tl.int64))
    tl.store(out_ptr + 2 + index, w2.to(tl.int64))
    tl.store(out_ptr + 3 + index, w3.to(tl.int64))


@interpreter_only
@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_kernels_generator_is_philox(counter, key, words):
    seed = np.array([key[0] | key[1] << 32], dtype=np.uint64).view(np.int64)
    out = torch.zeros(4, dtype=torch.int64)
    launch(
        _philox_kernel, 1, CPU,
        counter_ptr=torch.tensor(counter), seed_ptr=torch.from_numpy(seed), out_ptr=out,
    )  # fmt: skip
    assert tuple(out.tolist()) == words


def philox_by_hand(counter: list[int], key: list[int]) -> list[int]:
    """In Python's integers, from the definition."""
    for _ in range(10):
        left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (right >> 32) ^ counter[1] ^ key[0],
            right & 0xFFFFFFFF,
            (left >> 32) ^ counter[3] ^ key[1],
            left & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


DRAWS = [  # seed, step, start
    (0, 0, 0),
    (1, 1, 0),
    (5, 7, CHUNK),
    ((1 << 63) - 1, (1 << 24) - 1, 8 * 1000),
    (1 << 32, 3, 1 << 31),
    (0x0123456789ABCDEF, 2, (1 << 35) - 1024),
]


@pytest.mark.parametrize(("seed", "step", "start"), DRAWS)
def test_draws_by_hand(seed, step, start):
    """Eight elements share the words of one counter, (place / 8, step, 0, 0); the lower half of a word is first."""
    found = rounding.random_16_bits(seed, step, start, 24, CPU).tolist()
    expected = []
    for place in range(start // 8, start // 8 + 3):
        words = philox_by_hand([place & 0xFFFFFFFF, step, 0, 0], [seed & 0xFFFFFFFF, seed >> 32])
        expected += [half for word in words for half in (word & 0xFFFF, word >> 16)]
    assert found == expected


def test_the_first_draws_are_the_published_words():
    """Counter and key zero: seed 0, step 0, the first eight elements."""
    expected = [0xE8D5, 0x6627, 0xC58D, 0xE169, 0xAC4C, 0xBC57, 0xDBD8, 0x9B00]
    assert rounding.random_16_bits(0, 0, 0, 8, CPU).tolist() == expected


@jit()
def _draw_kernel(seed_ptr, step_ptr, start_ptr, out_ptr, BLOCK: tl.constexpr):
    random = random_16_bits(tl.load(seed_ptr), tl.load(step_ptr), tl.load(start_ptr), BLOCK)
    tl.store(out_ptr + tl.arange(0, BLOCK), random.to(tl.int32, bitcast=True))


@interpreter_only
@pytest.mark.parametrize("block", [8, 512, 2048])
@pytest.mark.parametrize(("seed", "step", "start"), DRAWS)
def test_kernels_draw_the_references_bits(seed, step, start, block):
    """The counter of steps is fp32, as the optimizer keeps it."""
    out = torch.zeros(block, dtype=torch.int32)
    launch(
        _draw_kernel, 1, CPU, seed_ptr=torch.tensor([seed]), step_ptr=torch.tensor([float(step)]),
        start_ptr=torch.tensor([start]), out_ptr=out, BLOCK=block,
    )  # fmt: skip
    assert out.tolist() == rounding.random_16_bits(seed, step, start, block, CPU).tolist()


def test_a_draw_depends_on_its_place_alone():
    whole = rounding.random_16_bits(3, 9, 0, 5000, CPU)
    for start, count in ((0, 1), (1, 1), (7, 2), (8, 8), (1023, 3001), (4999, 1), (40, 0)):
        assert torch.equal(rounding.random_16_bits(3, 9, start, count, CPU), whole[start : start + count])


def correlation(a: Tensor, b: Tensor) -> float:
    """The correlation of two equal runs of draws, in standard deviations of what independent ones give."""
    a, b = a.double() / 65535 - 0.5, b.double() / 65535 - 0.5
    return float((a * b).mean() * 12 * math.sqrt(len(a)))


def test_draws_are_uniform():
    """Chi-square over the 65,536 values, and each of the 16 bits."""
    count = 1 << 20
    draws = rounding.random_16_bits(11, 4, 0, count, CPU)
    expected = count / N
    chi_square = float(((torch.bincount(draws, minlength=N) - expected) ** 2 / expected).sum())
    assert abs(chi_square - (N - 1)) < Z * math.sqrt(2 * (N - 1))
    for bit in range(16):
        ones = int(((draws >> bit) & 1).sum())
        assert abs(ones - count / 2) < Z * math.sqrt(count) / 2, f"bit {bit}"


def test_draws_are_independent_of_their_neighbours():
    """Of the next elements (of the same word, call and beyond), steps and seeds."""
    count = 1 << 18
    draws = rounding.random_16_bits(11, 4, 0, count + 64, CPU)
    for lag in (1, 2, 3, 4, 7, 8, 16, 64):
        assert abs(correlation(draws[:count], draws[lag : count + lag])) < Z, f"lag {lag}"
    for seed, step in ((11, 5), (12, 4), (11, 4 + (1 << 16)), (11 + (1 << 32), 4)):
        others = rounding.random_16_bits(seed, step, 0, count, CPU)
        assert abs(correlation(draws[:count], others)) < Z, f"seed {seed}, step {step}"
        assert float((others == draws[:count]).double().mean()) < 1e-3
