"""How bf16 parameters are stored: exactly in two parts, or up or down by chance.

Would catch: a value that the two parts do not give back (a tie, a denormal, the largest finite one, either
zero), in the reference or in a kernel; a NaN that becomes an infinity or a number; a visible half that is not
the nearest bf16; draws that depend on blocks, alignment, chunks or the tensors beside, or not on seed, step or
place; rounding that leans to one side, that moves exact values, or that draws the same for neighbours. What is
drawn: test_random_bits.py.
"""

# ruff: noqa: N803 - constexpr arguments are in capitals, as everywhere in Triton

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from grass_kernels import _triton, masked_adamw_, rounding
from grass_kernels._triton import jit, launch, tl
from grass_kernels.conversions import join_fp32, round_stochastically, split_fp32
from grass_kernels.reference import PIECE
from grass_kernels.table import BLOCK, CHUNK
from tests.support.buffers import Buffers, bits, interpreter_only, same_bits
from tests.support.oracle import BF16, F32

CPU = torch.device("cpu")
N = 1 << 16
LOWER = [0, 1, 2, 0x00FF, 0x7FFF, 0x8000, 0x8001, 0xABCD, 0xFFFE, 0xFFFF]
Z = 6.0
"""Standard deviations from the mean at which a statistical test fails: were the draws another generator's and
perfect, with a probability of 2e-9 each. Here they are fixed by their seeds, and so are the tests."""


def from_bits(patterns: Tensor) -> Tensor:
    """Unsigned 32-bit patterns in int64 as fp32."""
    return patterns.to(torch.int32).view(torch.float32)


def all_upper(lower: int) -> Tensor:
    """fp32 of each of the 65,536 upper halves, with one lower half."""
    return from_bits((torch.arange(N) << 16) + lower)


def random_patterns(seed: int = 0) -> Tensor:
    return from_bits(torch.from_numpy(np.random.default_rng(seed).integers(0, 1 << 32, N)))


SAMPLES = {f"{lower:04x}": all_upper(lower) for lower in LOWER} | {"random": random_patterns()}


# Exact weights


@pytest.mark.parametrize("sample", SAMPLES)
def test_the_visible_half_is_the_nearest(sample):
    """torch rounds to the nearest too, ties to even: there, and only there, it may take the smaller neighbour."""
    x = SAMPLES[sample]
    visible, remainder = rounding.split_fp32(x)
    nearest = x.to(BF16)
    tie = (bits(x) & 0xFFFF) == 0x8000
    assert same_bits(visible[~tie], nearest[~tie])
    finite_ties = tie & ~x.isnan()
    assert (visible.double().abs() > x.double().abs())[finite_ties].all()
    assert visible.isnan().equal(x.isnan())
    assert (remainder[x.isnan()] == 0).all()
    assert visible.dtype == BF16
    assert remainder.dtype == torch.int16


@jit()
def _split_and_join_kernel(x_ptr, upper_ptr, remainder_ptr, joined_ptr, N: tl.constexpr):
    index = tl.arange(0, N)
    upper, remainder = split_fp32(tl.load(x_ptr + index))
    tl.store(upper_ptr + index, upper.to(tl.int16, bitcast=True))
    tl.store(remainder_ptr + index, remainder)
    tl.store(joined_ptr + index, join_fp32(upper, remainder))


def check_split_and_join(x: Tensor) -> None:
    """The halves give `x` again bitwise (a NaN stays one); those of the kernels are the reference's.

    Where no finite bf16 is nearest, the value is infinite.
    """
    visible, expected = rounding.split_fp32(x)
    back = rounding.join_fp32(visible, expected)
    survivors = torch.where(visible.isinf(), visible.float(), x)
    assert same_bits(back, survivors)
    assert back.isnan().equal(x.isnan())
    if not _triton.INTERPRETING:
        return
    upper, remainder = torch.empty(N, dtype=torch.int16), torch.empty(N, dtype=torch.int16)
    joined = torch.full((N,), torch.nan)
    launch(
        _split_and_join_kernel, 1, CPU, x_ptr=x, upper_ptr=upper, remainder_ptr=remainder, joined_ptr=joined, N=N
    )  # fmt: skip
    assert same_bits(upper.view(BF16), visible)
    assert torch.equal(remainder, expected)
    assert same_bits(joined, survivors)
    assert joined.isnan().equal(x.isnan())


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_sample_survives_bit_by_bit(sample):
    check_split_and_join(SAMPLES[sample])


@pytest.mark.parametrize("bit", range(16))
def test_every_upper_half_survives_bit_by_bit(bit):
    """All 65,536, with the lower halves around a bit, around it off the tie, and below the end of the range."""
    step = 1 << bit
    lower = {step + d for d in (-1, 0, 1)} | {
        0x8000 + sign * step + d for sign in (-1, 1) for d in (-1, 0, 1)
    }
    lower |= {0xFFFF - step, 0x10000 - step}
    for half in sorted(half for half in lower if 0 <= half < N):
        check_split_and_join(all_upper(half))


# Zeros, denormals (smallest, largest), the smallest normal, the two below one and one, the largest, infinities
# and the NaN beside them, other NaN; of both signs.
UPPER = [
    sign | upper
    for sign in (0, 0x8000)
    for upper in (0x0000, 0x0001, 0x007F, 0x0080, 0x3F7E, 0x3F7F, 0x3F80, 0x7F7F, 0x7F80, 0x7FC0)
]


@pytest.mark.parametrize("upper", UPPER, ids=lambda upper: f"{upper:04x}")
def test_every_lower_half_survives_bit_by_bit(upper):
    check_split_and_join(from_bits((upper << 16) + torch.arange(N)))


@jit()
def _join_kernel(upper_ptr, remainder_ptr, joined_ptr, N: tl.constexpr):
    index = tl.arange(0, N)
    upper = tl.load(upper_ptr + index).to(tl.uint16, bitcast=True)
    tl.store(joined_ptr + index, join_fp32(upper, tl.load(remainder_ptr + index)))


@interpreter_only
@pytest.mark.parametrize("remainder", [0, 1, -1, 255, 0x7FFF, -0x7FFF, -0x8000])
def test_kernels_join_any_remainder_as_the_reference(remainder):
    """Also pairs that no split gives: a parameter may be written between two steps."""
    upper = (torch.arange(N) - (1 << 15)).to(torch.int16)
    remainders, joined = torch.full((N,), remainder, dtype=torch.int16), torch.empty(N)
    launch(_join_kernel, 1, CPU, upper_ptr=upper, remainder_ptr=remainders, joined_ptr=joined, N=N)
    expected = rounding.join_fp32(upper.view(BF16), remainders)
    assert torch.equal(bits(joined), bits(expected))
    magnitude = upper.to(torch.int64) & 0x7FFF
    own = torch.full((N,), remainder).where(magnitude != 0, torch.tensor(max(remainder, 0)))
    own = own.where(magnitude != 0x7F80, torch.tensor(0))
    assert torch.equal(bits(expected), ((upper.to(torch.int64) << 16) + own).to(torch.int32))


# By chance


@jit()
def _round_kernel(x_ptr, random_ptr, out_ptr, N: tl.constexpr):
    index = tl.arange(0, N)
    random = tl.load(random_ptr + index).to(tl.uint32)
    upper = round_stochastically(tl.load(x_ptr + index), random)
    tl.store(out_ptr + index, upper.to(tl.int16, bitcast=True))


@pytest.mark.parametrize("random", ["0000", "0001", "8000", "ffff", "drawn"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_one_of_the_two_neighbours_is_taken(sample, random):
    """The farther from zero if and only if the draw and the lost bits together carry."""
    x = SAMPLES[sample]
    drawn = rounding.random_16_bits(1, 1, 0, N, CPU)
    draws = drawn if random == "drawn" else torch.full((N,), int(random, 16))
    patterns = bits(x).to(torch.int64) & 0xFFFFFFFF
    carried = (patterns & 0xFFFF) + draws >= N
    expected = ((patterns >> 16) + carried).to(torch.int16).view(BF16)
    expected = torch.where(x.isnan(), torch.nan, expected)
    found = [rounding.round_stochastically(x, draws)]
    if _triton.INTERPRETING:
        out = torch.empty(N, dtype=torch.int16)
        launch(_round_kernel, 1, CPU, x_ptr=x, random_ptr=draws.to(torch.int32), out_ptr=out, N=N)
        found.append(out.view(BF16))
    for result in found:
        assert same_bits(result, expected)


class Decay:
    """bf16 parameters that one update multiplies by a factor, so that the exact result is known to the bit."""

    def __init__(self, params: list[Tensor], seeds: list[int], factor: float, step: float = 0.0) -> None:
        self.params, self.seeds, self.factor = params, seeds, factor
        self.steps = [torch.tensor(step) for _ in params]
        self.exact = [p.float() * torch.tensor(factor) for p in params]

    def update(self) -> "Decay":
        zeros = [[torch.zeros(p.shape, dtype=d) for p in self.params] for d in (BF16, F32, F32)]
        hyper = {"lr": 1.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1 - self.factor}
        masked_adamw_(self.params, *zeros, self.steps, rounding_seeds=self.seeds, **hyper)
        return self


def rounded_by_place(exact: Tensor, seed: int, step: int) -> Tensor:
    draws = rounding.random_16_bits(seed, step, 0, exact.numel(), CPU)
    return rounding.round_stochastically(exact.flatten(), draws).view(exact.shape)


FACTOR = 1 - 2.0**-7 * 0.3


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(BF16)


@pytest.mark.parametrize("shift", [0, 1, 7])
def test_an_update_draws_by_place(buffers: Buffers, shift):
    """Sizes around blocks, chunks and the torch path's pieces, at any alignment, beside others and alone."""
    long = CHUNK if _triton.INTERPRETING else PIECE
    sizes = [1, 9, 0, 511, BLOCK + 1, long + 77]
    seeds = [0, 1, 2, 3, (1 << 62) + 5, 1 << 33]
    params = [buffers.place(normal(n, n), BF16, shift=shift) for n in sizes]
    before = [p.clone() for p in params]
    together = Decay(params, seeds, FACTOR, step=6.0).update()
    for p, seed, exact in zip(params, seeds, together.exact, strict=True):
        assert same_bits(p, rounded_by_place(exact, seed, 7))
    alone = Decay([before[-1].clone()], seeds[-1:], FACTOR, step=6.0).update()
    assert same_bits(alone.params[0], params[-1])
    short = Decay([before[-1][:1000].clone()], seeds[-1:], FACTOR, step=6.0).update()
    assert same_bits(short.params[0], params[-1][:1000])


def test_other_steps_seeds_and_places_draw_otherwise():
    values = torch.full((4096,), 1.0, dtype=BF16)
    by_seed = Decay([values.clone(), values.clone()], [0, 1], FACTOR, step=1.0).update().params
    (later,) = Decay([values.clone()], [0], FACTOR, step=2.0).update().params
    (again,) = Decay([values.clone()], [0], FACTOR, step=1.0).update().params
    assert torch.equal(again, by_seed[0])
    for one, other in (
        (by_seed[0], by_seed[1]),
        (by_seed[0], later),
        (by_seed[0][:2048], by_seed[0][2048:]),
        (by_seed[0][:-1], by_seed[0][1:]),
    ):
        assert 0.3 < float((one != other).double().mean()) < 0.5  # 0.3 of the way: 2 * 0.3 * 0.7


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("lost", [0, 1, 0x4000, 0x8000, 0xC000, 0xFFFF, 0x2F0B])
def test_rounding_is_unbiased(lost, sign):
    """As often up as the value is near the upper neighbour: binomial, within six standard deviations."""
    count = 1 << 16
    exact = torch.tensor(0x3F100000 + lost, dtype=torch.int32).view(torch.float32)
    step = Decay([torch.full((count,), sign, dtype=BF16)], [21], exact.item()).update()
    assert (step.exact[0] == sign * exact).all(), "the update does not give the value that is to be rounded"
    lower, upper = (torch.tensor(bits, dtype=torch.int16).view(BF16) * sign for bits in (0x3F10, 0x3F11))
    ups = int((step.params[0] == upper).sum())
    assert ups + int((step.params[0] == lower).sum()) == count
    share = lost / N
    assert abs(ups - count * share) <= Z * math.sqrt(count * share * (1 - share))
    error = float((step.params[0].double() - step.exact[0].double()).mean())
    unit = float((upper - lower).abs())
    assert abs(error) <= Z * unit * math.sqrt(share * (1 - share) / count)


def test_what_bf16_can_hold_does_not_move():
    """All 65,536 patterns: infinities, NaN, denormals and the largest finite ones among them."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(BF16)
    (after,) = Decay([patterns.clone()], [3], 1.0).update().params
    assert same_bits(after, patterns)


def test_denormals_and_the_edge_of_the_range_go_to_a_neighbour():
    tiny, largest = 2.0**-133, torch.finfo(BF16).max
    count = 4096
    (after,) = Decay([torch.full((count,), tiny, dtype=BF16)], [3], 0.5).update().params
    assert set(after.double().tolist()) == {0.0, tiny}
    (after,) = Decay([torch.full((count,), largest, dtype=BF16)], [3], 1 + 2.0**-9).update().params
    assert set(after.double().tolist()) == {largest, math.inf}


def test_fp32_parameters_are_stored_as_they_are():
    """A seed changes nothing where there is nothing to round."""
    results = []
    for seeds in (None, [5]):
        tensors = [torch.randn(100, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        state = [torch.zeros(100)]
        masked_adamw_(
            tensors[:1], tensors[1:2], [torch.zeros(100)], state, [torch.tensor(0.0)],
            lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, rounding_seeds=seeds,
        )  # fmt: skip
        results.append(tensors[0])
    assert same_bits(*results)
