"""Remainders beside an upper half that was written by others: the fp32 value that the two halves stand for.

Would catch: a remainder that wraps beside ±0 or ±infinity, in the reference, on the torch path or in a kernel; one
that moves the value by more than half a bfloat16 unit; a NaN that becomes a number or an infinity that becomes finite;
a clamp that also changes pairs which a step has stored; a layout, an alignment or an option that takes another way.

The rule: beside ±0 a negative remainder counts as 0, beside ±infinity any remainder does. Runs in both passes.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from grass_kernels import masked_adamw_, reference
from tests.support.buffers import Buffers
from tests.support.oracle import BF16, F32

N = 1 << 16
REMAINDERS = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
# Zero, the smallest and the largest denormal, the smallest normal, numbers, the largest finite, infinity, NaN.
MAGNITUDES = (0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x4049, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF)
UPPER = [sign | magnitude for sign in (0, 0x8000) for magnitude in MAGNITUDES]
EDGES = (0x0000, 0x8000, 0x7F80, 0xFF80)
UPDATES = {"entry point": masked_adamw_, "reference": reference.masked_adamw_}
OPTIONS = {
    "plain": {},
    "maxima": {"maxima": True},
    "scaled": {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(0.0)},
    "clipped": {"clip_coef": torch.tensor(0.5)},
    "norms": {"norms": True},
}


def from_upper(upper: int | Tensor) -> Tensor:
    """bfloat16 of these 16 bits."""
    bits = torch.as_tensor(upper)
    return torch.where(bits >= N // 2, bits - N, bits).to(torch.int16).view(BF16)


def value_of(upper: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 value that a bfloat16 and a remainder stand for, by the rule."""
    bits = upper.view(torch.int16).to(torch.int64)
    magnitude, low = bits & 0x7FFF, remainder.to(torch.int64)
    low = torch.where(((magnitude == 0) & (low < 0)) | (magnitude == 0x7F80), 0, low)
    return ((bits << 16) + low).to(torch.int32).view(F32)


def half_unit(upper: Tensor) -> Tensor:
    """Half of the distance from a finite bfloat16 to the next one farther from zero, in float64."""
    exponent = ((upper.view(torch.int16).to(torch.int64) >> 7) & 0xFF).clamp(min=1)
    return torch.ldexp(torch.ones(upper.shape, dtype=torch.float64), exponent - 127 - 8)


def step_without_effect(
    update: Callable[..., None],
    params: list[Tensor],
    remainders: list[Tensor],
    *,
    maxima: bool = False,
    norms: bool = False,
    **options: Tensor,
) -> None:
    """A step whose learning rate is 0: it reads both halves and stores what they stand for."""
    moments = [[torch.zeros_like(p, dtype=F32) for p in params] for _ in range(3)]
    update(
        params,
        [torch.ones_like(p) for p in params],
        moments[0],
        moments[1],
        [torch.zeros(()) for _ in params],
        layer_index=[0] * len(params),
        sq_norms=torch.empty(1) if norms else None,
        lr=0.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        max_exp_avg_sqs=moments[2] if maxima else None,
        remainders=remainders,
        **options,
    )


def check(params: list[Tensor], remainders: list[Tensor], before: list[tuple[Tensor, Tensor]]) -> None:
    """The halves stand for what they stood for, which is near the upper half as it was written."""
    for p, remainder, (upper, lower) in zip(params, remainders, before, strict=True):
        found, expected = value_of(p, remainder), value_of(upper, lower)
        assert torch.equal(found.isnan(), upper.isnan())
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found[upper.isinf()], upper[upper.isinf()].float())
        assert torch.equal(p[upper.isinf()], upper[upper.isinf()])
        finite = upper.isfinite()
        moved = (found.double() - upper.double()).abs()
        assert (moved <= half_unit(upper))[finite].all()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("update", UPDATES)
def test_every_remainder_beside_an_upper_half(update, options):
    chosen = UPPER if options == "plain" else EDGES
    params = [from_upper(upper).expand(N).clone() for upper in chosen]
    remainders = [REMAINDERS.clone() for _ in chosen]
    before = [(p.clone(), r.clone()) for p, r in zip(params, remainders, strict=True)]
    step_without_effect(UPDATES[update], params, remainders, **OPTIONS[options])
    check(params, remainders, before)


@pytest.mark.parametrize("update", UPDATES)
def test_every_upper_half_beside_extreme_remainders(update):
    lows = (-0x8000, -0x7FFF, -1, 0, 1, 0x7FFF)
    params = [from_upper(torch.arange(N)) for _ in lows]
    remainders = [torch.full((N,), low, dtype=torch.int16) for low in lows]
    before = [(p.clone(), r.clone()) for p, r in zip(params, remainders, strict=True)]
    step_without_effect(UPDATES[update], params, remainders)
    check(params, remainders, before)


@pytest.mark.parametrize("update", UPDATES)
def test_halves_that_a_step_has_stored_stay_to_the_bit(update):
    """Pairs whose value is a finite fp32 with a finite nearest bfloat16: no clamp may touch them."""
    finite = [upper for upper in UPPER if upper & 0x7FFF < 0x7F80]
    params = [from_upper(upper).expand(N).clone() for upper in finite]
    remainders = [REMAINDERS.clamp(min=0) if upper & 0x7FFF == 0 else REMAINDERS.clone() for upper in finite]
    before = [(p.clone(), r.clone()) for p, r in zip(params, remainders, strict=True)]
    step_without_effect(UPDATES[update], params, remainders)
    for p, remainder, (upper, lower) in zip(params, remainders, before, strict=True):
        assert torch.equal(p.view(torch.int16), upper.view(torch.int16))
        assert torch.equal(remainder, lower)


@pytest.mark.parametrize("shape", [(1,), (7, 9), (2049,)])
@pytest.mark.parametrize("layout", ["aligned", "misaligned", "transposed", "with gaps"])
def test_every_layout_clamps(buffers: Buffers, layout, shape):
    """Full blocks, partial ones, and parameters that are updated by way of copies."""
    shape = (*shape, 4)
    count = torch.Size(shape).numel()
    upper = from_upper(torch.tensor(EDGES)).repeat(count)[:count].view(shape)
    lower = torch.tensor([-1, 1, -0x8000, 0x7FFF, -77], dtype=torch.int16).repeat(count)[:count].view(shape)
    strides = {
        "transposed": tuple(reversed(torch.empty(shape[::-1]).stride())),
        "with gaps": tuple(2 * stride for stride in torch.empty(shape).stride()),
    }.get(layout)
    shift = int(layout == "misaligned")
    p = buffers.place(upper, BF16, shift=shift, strides=strides)
    remainder = buffers.place(lower, torch.int16, shift=shift, strides=strides)
    step_without_effect(masked_adamw_, [p], [remainder])
    check([p], [remainder], [(upper, lower)])


@pytest.mark.parametrize("update", UPDATES)
def test_an_update_starts_from_the_clamped_value(update):
    """Weight decay and the update are those of fp32 from the clamped value: no remainder is read a second time."""
    upper = from_upper(torch.tensor(EDGES)).repeat_interleave(64)
    lower = torch.linspace(-0x8000, 0x7FFF, len(upper)).to(torch.int16)
    start = value_of(upper, lower)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(len(upper), generator=generator).to(BF16)
    p, remainder, twin = upper.clone(), lower.clone(), start.clone()
    hyper = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    for param, gradient, remainders in ((p, grad, [remainder]), (twin, grad.float(), None)):
        states = [[torch.zeros(len(upper))] for _ in range(2)]
        UPDATES[update]([param], [gradient], *states, [torch.zeros(())], remainders=remainders, **hyper)
    assert not twin.isnan().any()
    torch.testing.assert_close(value_of(p, remainder), twin, rtol=2e-6, atol=1e-8)
