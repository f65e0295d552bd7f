"""A model of all shapes that units must cope with, whose gradients cost nothing, and a record of its training."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import grass
from tests.support import tiny

MEBIBYTE = 2**20


@functools.lru_cache(maxsize=2000)  # a few MiB; drawn once for all runs
def noise(seed: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Normal random numbers, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Layer(nn.Module):
    """Two chunks and a bit, of which one begins inside a chunk; a transposed one, an empty one and a scalar."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(7))
        self.weight = nn.Parameter(torch.randn(130, wide))
        self.turned = nn.Parameter(torch.randn(96, 64).t())
        self.empty = nn.Parameter(torch.randn(0, 3))
        self.scale = nn.Parameter(torch.randn(()))


class Ragged(nn.Module):
    """Layers, and an outside larger than a small buffer. The loss is of the weights and of a step's number alone."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(50, 40))
        self.blocks = nn.ModuleList(Layer(140 - 3 * i) for i in range(layers))
        self.head = nn.Parameter(torch.randn(33000))

    def forward(self, index: int, without: Callable[[str, int], bool] | None = None) -> Tensor:
        """Sum of p^2 / 2 + p r, whose gradient is p + r, with r drawn for the parameter and the step."""
        total = torch.zeros(())
        for place, (name, p) in enumerate(self.named_parameters()):
            if p.requires_grad and not (without is not None and without(name, index)):
                r = noise(1000 * index + place, p.shape, p.dtype)
                total = total + (0.5 * p * p + p * r).sum()
        return total


def ragged(dtype: torch.dtype = torch.float32, layers: int = 4, seed: int = 0) -> Ragged:
    torch.manual_seed(seed)
    return Ragged(layers).to(dtype)


def smallest(p: Tensor, amsgrad: bool = False, **options: Any) -> int:
    """Bytes of a buffer for one chunk of all states of such a parameter."""
    widths = [4 if options.get("state_dtype") in (None, torch.float32) else 2] * (3 if amsgrad else 2)
    if options.get("master_weights") and p.dtype == torch.bfloat16:
        widths.append(2)
    return 16384 * sum(widths) + 256 * len(widths)


def config(**options: Any) -> grass.GrassConfig:
    """A probe of one step, then more than three periods of three; buffers of a chunk of float32 moments."""
    return tiny.config(**{"probe_steps": 1, "buffer_mb": (16384 * 8 + 512) / MEBIBYTE, **options})


class Moment(NamedTuple):
    """Results of a step, exact, by value."""

    grad_norm: Tensor
    layer_grad_norms: Tensor
    active: tuple[int, ...]
    coming: tuple[int, ...] | None
    importance: Tensor


def steps(
    model: nn.Module,
    opt: grass.GrassAdamW,
    start: int,
    stop: int,
    micro_batches: int = 1,
    without: Callable[[str, int], bool] | None = None,
    loss_of: Callable[[int], Tensor] | None = None,
) -> Iterator[Moment]:
    """Train, and tell of each step. Accumulation is declared, as fused backward wants it."""
    loss_of = loss_of or (lambda index: model(index, without))
    for index in range(start, stop):
        for micro in range(micro_batches - 1):
            with opt.accumulate():
                loss_of(index * micro_batches + micro).backward()
        loss_of((index + 1) * micro_batches - 1).backward()
        opt.step()
        norms = opt.grad_norm, opt.layer_grad_norms
        yield Moment(*norms, opt.active_layers, opt.next_active_layers, opt.importance)
        opt.zero_grad()


def state_of(opt: grass.GrassAdamW) -> dict[str, Any]:
    """The state dict, without what only fused backward has to say."""
    state = opt.state_dict()
    torn = state["param_groups"][0]["grass"].pop("torn", None)
    assert torn is None or bool((torn == -1).all())
    return state


def outcome(model: nn.Module, opt: grass.GrassAdamW, moments: list[Moment]) -> dict[str, Any]:
    """All that a run leaves, to be compared by `tiny.assert_identical`."""
    return {
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "steps": [moment._asdict() for moment in moments],
        "draws": opt.draw_counts,
        "state": state_of(opt),
    }
