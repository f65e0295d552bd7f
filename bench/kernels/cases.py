"""Cases: the work of a step, and the bytes that it must move."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPE_NAMES = {F32: "fp32", BF16: "bf16", F16: "fp16"}

SIZES = (100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000, 2_000_000_000)
TENSORS = 300  # a 7B Llama has 291
LAYERS = 16


@dataclass(frozen=True)
class Mixture:
    """Dtypes of parameters, gradients and moments, and rounding of parameters.

    Args:
        param: dtype of the parameters.
        grad: dtype of the gradients.
        state: dtype of the moments.
        rounding: "nearest"; "master": bf16 with remainders, as with ``master_weights``; or "stochastic".
    """

    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype
    rounding: str = "nearest"

    def __str__(self) -> str:
        text = "-".join(DTYPE_NAMES[dtype] for dtype in (self.param, self.grad, self.state))
        return text if self.rounding == "nearest" else f"{text}-{self.rounding}"

    @property
    def update_bytes(self) -> int:
        """Bytes of one update per parameter: parameter and moments read and written, gradient read."""
        remainder = 2 * 2 if self.rounding == "master" else 0
        return 2 * self.param.itemsize + self.grad.itemsize + 4 * self.state.itemsize + remainder

    def of_one_dtype(self) -> "Mixture":
        """Return the mixture that all optimizers of torch support: one dtype for all."""
        return Mixture(self.param, self.param, self.param)


BASE = Mixture(BF16, BF16, F32)
MIXTURES = (
    BASE,
    Mixture(F32, F32, F32),
    Mixture(BF16, BF16, BF16),
    Mixture(BF16, BF16, F32, "master"),
    Mixture(BF16, BF16, F32, "stochastic"),
    Mixture(BF16, F32, F32),
    Mixture(F16, F16, F32),
    Mixture(F32, F32, BF16),
    Mixture(BF16, F32, BF16),
    Mixture(F16, F32, F32),
    Mixture(F16, F16, BF16),
    Mixture(F16, F32, BF16),
)


@dataclass(frozen=True)
class Case:
    """One step over many tensors.

    Args:
        numel: total number of elements.
        tensors: number of tensors; layers are ranges of neighbouring tensors.
        mixture: dtypes and rounding.
        active_share: share of the layers that is updated; the others have no gradients.
        norms: whether gradient norms by layer are computed.
        clip: whether gradients are clipped to a total norm.
        zeros: whether gradients and moments are 0, as for rows of an embedding that have never been read.
    """

    numel: int
    tensors: int = TENSORS
    mixture: Mixture = BASE
    active_share: float = 1.0
    norms: bool = True
    clip: bool = False
    zeros: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.tensors <= self.numel:
            raise ValueError(f"{self.tensors} tensors cannot hold {self.numel} parameters")
        if self.active_share * self.num_layers < 1:
            raise ValueError(f"{self.active_share} of {self.num_layers} layers is less than one layer")

    def __str__(self) -> str:
        work = {(False, False): "plain", (True, False): "norms", (False, True): "clip"}
        return "/".join(
            [
                size_name(self.numel),
                f"{self.tensors}t",
                str(self.mixture),
                f"active1:{round(1 / self.active_share)}",
                work.get((self.norms, self.clip), "norms+clip"),
                *(["zeros"] if self.zeros else []),
            ]
        )

    @property
    def num_layers(self) -> int:
        """Layers; fewer tensors than 16 are one layer."""
        return LAYERS if self.tensors >= LAYERS else 1

    @property
    def tensor_sizes(self) -> list[int]:
        """Elements of each tensor: equal, and multiples of 256 where they can be, but for the last.

        Sizes that no vector access, or no block of 8-bit moments, divides would take others' slow paths; the
        sizes of real weights do not.
        """
        size = self.numel // self.tensors
        for multiple in (256, 4):
            if size >= multiple:
                size -= size % multiple
                break
        return [size] * (self.tensors - 1) + [self.numel - size * (self.tensors - 1)]

    @property
    def layer_index(self) -> list[int]:
        """The layer of each tensor."""
        return [i * self.num_layers // self.tensors for i in range(self.tensors)]

    @property
    def active(self) -> list[bool]:
        """Mask of the layers that are updated, evenly spread."""
        every = round(1 / self.active_share)
        return [layer % every == 0 for layer in range(self.num_layers)]

    @property
    def active_sizes(self) -> list[int]:
        """Elements of each tensor of the active layers."""
        active = self.active
        pairs = zip(self.tensor_sizes, self.layer_index, strict=True)
        return [size for size, layer in pairs if active[layer]]

    @property
    def active_numel(self) -> int:
        """Parameters of the active layers."""
        return sum(self.active_sizes)

    @property
    def is_default(self) -> bool:
        """True if nothing but size and mixture differs from the standard case, as a chart over sizes needs."""
        return self == Case(self.numel, min(TENSORS, self.numel), self.mixture)

    def extra_bytes(self, grad: torch.dtype) -> int:
        """Bytes per parameter of norms and clipping as separate passes over the gradients.

        Norms read the gradients; clipping computes a norm too, and then rewrites them. In our kernels norms and
        clipping are part of the update, except for the norm before clipping.

        Args:
            grad: dtype of the gradients.
        """
        return grad.itemsize * ((1 if self.norms or self.clip else 0) + (2 if self.clip else 0))


def size_name(numel: int) -> str:
    """Return a short, exact name of a size: 1e9, 25e5, 1234567."""
    digits = str(numel).rstrip("0")
    zeros = len(str(numel)) - len(digits)
    return f"{digits}e{zeros}" if zeros > 2 else str(numel)


def make_cases(sizes: Sequence[int]) -> list[Case]:
    """All cases of these sizes, the most telling first: a run that ends early has measured those.

    Every mixture at every size; the mixtures that torch's fused AdamW takes with norms, without, and with
    clipping; and, with the base mixture at every size, other numbers of tensors, shares of active layers, no
    norms, clipping. The anchor is the largest size up to 1e9: its cases come before
    those of other sizes, and it alone has a case of zeros.
    """
    anchor = max((size for size in sizes if size <= 1_000_000_000), default=min(sizes))
    others = sorted((size for size in sizes if size != anchor), reverse=True)
    ordered: list[Case] = [*_by_mixture(anchor, (BASE,)), *_as_torch(anchor), *_by_work(anchor)]
    ordered += itertools.chain.from_iterable(_by_mixture(size, (BASE,)) for size in others)
    ordered += [*_by_mixture(anchor, MIXTURES), Case(anchor, min(TENSORS, anchor), zeros=True)]
    for size in others:
        ordered += [*_as_torch(size), *_by_mixture(size, MIXTURES), *_by_work(size)]
    return list(dict.fromkeys(ordered))


def _by_mixture(numel: int, mixtures: Sequence[Mixture]) -> list[Case]:
    return [Case(numel, min(TENSORS, numel), mixture) for mixture in mixtures]


def _as_torch(numel: int) -> list[Case]:
    """Cases that torch runs in the same dtypes: with the same bytes, a ratio speaks of the kernels alone."""
    work = ({"norms": False}, {"norms": True}, {"norms": False, "clip": True})
    return [
        Case(numel, min(TENSORS, numel), mixture, **options)
        for mixture in MIXTURES
        if mixture.param == mixture.grad == mixture.state
        for options in work
    ]


def _by_work(numel: int) -> list[Case]:
    """The base mixture with everything else varied, one thing at a time."""
    base = Case(numel, min(TENSORS, numel))
    return [
        replace(base, norms=False, clip=True),
        replace(base, norms=True, clip=True),
        replace(base, norms=False, clip=False),
        *(replace(base, active_share=share) for share in (1 / 2, 1 / 16) if base.num_layers >= LAYERS),
        *(replace(base, tensors=tensors) for tensors in (1, 16, 5000) if tensors <= numel),
    ]
