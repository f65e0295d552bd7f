"""Master weights and stochastic rounding of bf16 parameters in plain torch: the specification of `conversions`.

With master weights an fp32 value is stored in two parts of 16 bits, a bf16 parameter and a remainder. Stochastic
rounding goes up or down at random, without bias.
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_INFINITY = 0x7F80  # of bf16


def join_fp32(param: Tensor, remainder: Tensor) -> Tensor:
    """Join bf16 `param` and int16 `remainder` to fp32 values of their shape.

    ``(bits(param) << 16) + remainder``, modulo 2^32. A stale remainder, of a parameter that was written since, moves
    the value by at most half a bf16 unit in the last place: at ±0 negative remainders count as 0, since they would give
    NaN, and at ±inf all remainders.
    """
    upper = param.view(torch.int16)  # conditions on 16 bits take half the time
    magnitude = upper & 0x7FFF
    stale = (magnitude == 0).logical_and_(remainder < 0).logical_or_(magnitude == _INFINITY)
    bits = upper.to(torch.int32).bitwise_left_shift_(16)
    return bits.add_(remainder.masked_fill(stale, 0)).view(torch.float32)


def split_fp32(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split fp32 `x` into the nearest bf16 (ties away from zero) and a signed int16 remainder.

    `join_fp32` restores every value whose nearest bf16 is finite, bitwise; the others stay infinite or NaN.
    """
    bits, is_nan = x.view(torch.int32), x.isnan()
    remainder = bits.to(torch.int16).masked_fill_(is_nan, 0)  # the lower half
    upper = (bits + 0x8000).bitwise_right_shift_(16).to(torch.int16)  # overflows for NaN only
    return upper.masked_fill_(is_nan, 0x7FC0).view(torch.bfloat16), remainder


def round_stochastically(x: Tensor, random: Tensor) -> Tensor:
    """Round fp32 `x` to one of its two neighbouring bf16, at random and without bias.

    Args:
        x: Values, fp32, any shape.
        random: 16 uniform random bits per element, int64, of the shape of `x`.
    """
    bits = (x.view(torch.int32).to(torch.int64) & _LOW) + random
    return torch.where(x.isnan(), 0x7FC0, bits >> 16).to(torch.int16).view(torch.bfloat16)


def random_16_bits(seed: int, step: int, start: int, count: int, device: torch.device) -> Tensor:
    """Return 16 random bits for each of `count` elements of a tensor, from element `start` on: int64 ``[count]``.

    A function of seed, step and position only. Eight elements share one call of Philox 4x32 with 10 rounds (Salmon
    et al., Parallel random numbers: as easy as 1, 2, 3, 2011), with counter ``(position // 8, step, 0, 0)`` and key
    `seed`; each takes half a word, the lower half first.
    """
    first, last = start // 8, (start + count + 7) // 8
    position = torch.arange(first, last, device=device)
    words = philox_4x32(
        (position, torch.full_like(position, step), torch.zeros_like(position), torch.zeros_like(position)),
        seed,
    )
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1).flatten()[start - 8 * first :][:count]


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox 4x32-10: four random 32-bit words (in int64) from four counter words and a 64-bit key."""
    c0, c1, c2, c3 = (c & _LOW for c in counter)
    key0, key1 = key & _LOW, key >> 32 & _LOW
    for _ in range(10):
        high0, low0 = _wide_product(c0, _MULTIPLIERS[0])
        high1, low1 = _wide_product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _KEY_STEPS[0]) & _LOW, (key1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def _wide_product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the upper and lower 32 bits of a product of 32-bit numbers, computed in two parts in int64."""
    upper, lower = (x >> 16) * factor, (x & 0xFFFF) * factor
    middle = (upper & 0xFFFF_FFFF_FFFF) + (lower >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | lower & 0xFFFF
