"""Inputs of the GPU tests: guarded lists of tensors for the kernels, parameters for the optimizers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grass_kernels import rounding
from grass_kernels.table import BLOCK, CHUNK
from tests.support.oracle import BF16, COMBINATIONS, F16, F32

SIZES = (0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK + 77)
HYPER = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
FIELDS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "remainders", "steps")

_GUARD = 64  # elements on each side of a tensor; keeps the alignment of its allocation
_SENTINELS = {
    F32: (torch.int32, 0x7FC5A5A5),
    BF16: (torch.int16, 0x7FC5),
    F16: (torch.int16, 0x7E5A),
    torch.int16: (torch.int16, 0x2A2A),
}


class Mixture(NamedTuple):
    """Dtypes of parameters, gradients and moments, and how parameters are stored."""

    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype
    rounding: str = "nearest"

    def __str__(self) -> str:
        return "-".join([*(str(t).removeprefix("torch.") for t in self[:3]), self.rounding])


MIXTURES = [Mixture(*dtypes) for dtypes in COMBINATIONS] + [
    Mixture(*dtypes, rounding)
    for rounding in ("master", "stochastic")
    for dtypes in COMBINATIONS
    if dtypes[0] == BF16
]


def bits(t: Tensor) -> Tensor:
    """The bit patterns of a tensor, on the CPU."""
    t = t.detach().cpu().contiguous()
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, except that one NaN is as good as another."""
    equal = bits(a) == bits(b)
    if a.is_floating_point():
        equal = equal | (a.detach().cpu().isnan() & b.detach().cpu().isnan())
    return a.dtype == b.dtype and bool(equal.all())


class Problem:
    """The lists of one call, the same values for a seed on every device, with sentinels around each tensor.

    Args:
        mixture: dtypes and rounding.
        device: where the tensors are.
        amsgrad: with running maxima.
        shift: elements by which addresses are off a multiple of 16 bytes.
        sizes: elements of each tensor.
        seed: of the values.
    """

    def __init__(
        self,
        mixture: Mixture,
        device: torch.device | str,
        *,
        amsgrad: bool = False,
        shift: int = 0,
        sizes: Sequence[int] = SIZES,
        seed: int = 0,
    ) -> None:
        self.mixture = mixture
        self._device, self._shift = torch.device(device), shift
        self._placed: list[tuple[Tensor, int, int, int]] = []
        generator = torch.Generator().manual_seed(seed)

        def draw(function: Callable[..., Tensor]) -> list[Tensor]:
            return [function(size, generator=generator) for size in sizes]

        weights = draw(torch.randn)
        self.remainders: list[Tensor] = []
        if mixture.rounding == "master":
            halves = [rounding.split_fp32(w) for w in weights]
            weights = [upper for upper, _ in halves]
            self.remainders = self._place([lower for _, lower in halves], torch.int16)
        self.params = self._place(weights, mixture.param)
        self.grads = self._place(draw(torch.randn), mixture.grad)
        self.exp_avgs = self._place(draw(torch.randn), mixture.state)
        self.exp_avg_sqs = self._place(draw(torch.rand), mixture.state)
        self.max_exp_avg_sqs = self._place(draw(torch.rand), mixture.state) if amsgrad else []
        self.steps = [torch.tensor(float(i), device=device) for i in range(len(sizes))]

    def _place(self, columns: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        integer, sentinel = _SENTINELS[dtype]
        placed = []
        for values in columns:
            first, last = _GUARD + self._shift, _GUARD + self._shift + values.numel()
            buffer = torch.full((last + _GUARD,), sentinel, dtype=integer, device=self._device)
            tensor = buffer.view(dtype)[first:last]
            tensor.copy_(values)
            self._placed.append((buffer, first, last, sentinel))
            placed.append(tensor)
        return placed

    def update(self, function: Callable[..., None], **options: object) -> None:
        """Run `function` on the lists."""
        if self.max_exp_avg_sqs:
            options["max_exp_avg_sqs"] = self.max_exp_avg_sqs
        if self.remainders:
            options["remainders"] = self.remainders
        if self.mixture.rounding == "stochastic":
            options["rounding_seeds"] = [7 + (i << 40) for i in range(len(self.params))]
        function(self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps, **options)

    def assert_same(self, other: "Problem") -> None:
        """Every tensor has the other's bits, and nothing around any has changed."""
        for field in FIELDS:
            pairs = zip(getattr(self, field), getattr(other, field), strict=True)
            for position, (a, b) in enumerate(pairs):
                assert same_bits(a, b), (
                    f"{field}[{position}]: {int((bits(a) != bits(b)).sum())} elements differ"
                )
        for buffer, first, last, sentinel in (*self._placed, *other._placed):
            around = torch.cat([buffer[:first], buffer[last:]])
            assert bool((around == sentinel).all()), "written outside of a tensor"


def parameters(
    device: torch.device,
    dtype: torch.dtype = BF16,
    sizes: Sequence[int] = (BLOCK + 300, 40, 7),
    seed: int = 0,
) -> list[nn.Parameter]:
    """Parameters without gradients, the same values for a seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(n, generator=generator).to(device, dtype)) for n in sizes]


def gradients(params: Sequence[Tensor], index: int) -> list[Tensor]:
    """New gradients for step `index`, the same values at every call."""
    generator = torch.Generator().manual_seed(1000 + index)
    return [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in params]


def snapshot(params: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and all of their states, copied to the CPU."""
    found = {}
    for index, p in enumerate(params):
        found[f"{index}.param"] = p.detach().cpu().clone()
        for key, value in optimizer.state[p].items():
            found[f"{index}.{key}"] = value.detach().cpu().clone()
    return found


def assert_same_snapshot(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Equal in every bit."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert same_bits(value, b[key]), key
