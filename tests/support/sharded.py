"""Trainings that one process does with whole batches, and several ranks with shards and parts of the batches."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import grass
from grass.optim.sharding import local
from tests.support import tiny

BATCH = 4


class Ragged(tiny.Block):
    """A block whose first parameter has one element: all ranks but one have an empty shard of it."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * (super().forward(x) - x)


class Checkpointed(tiny.Block):
    """A block that computes its activations again in backward."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


BLOCKS = {"plain": tiny.Block, "ragged": Ragged, "checkpointed": Checkpointed}


@dataclass(frozen=True)
class Training:
    """A model, its optimizer and how it is trained.

    Args:
        mesh: shape of the mesh: (shards,) or (replicas, shards). None for one process.
        config, options: of the optimizer.
        block: kind of the blocks, in `BLOCKS`.
        width: width of the model; 7 divides by no number of ranks.
        micro_batches: number of backward passes a step.
        no_sync: reduce gradients in the last backward of a step only.
        joined: one backward of all micro-batches of a step together.
    """

    mesh: Sequence[int] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    block: str = "plain"
    width: int = 8
    tied: bool = False
    dtype: torch.dtype = torch.float64
    micro_batches: int = 1
    no_sync: bool = False
    joined: bool = False
    offload_policy: bool = False
    mixed_precision: bool = False

    def make(self) -> tuple[nn.Module, grass.GrassAdamW]:
        """Return the model, sharded, and its optimizer."""
        torch.manual_seed(0)
        model = tiny.Stack(0, self.width)
        model.blocks.extend(BLOCKS[self.block](self.width) for _ in range(5))
        if self.tied:
            model.head.weight = model.embed.weight
        model.to(self.dtype)
        if self.mesh is not None:
            self.shard(model)
        return model, grass.GrassAdamW(
            model, config=tiny.config(**self.config), **{"lr": 1e-3, "eps": 1e-3, **self.options}
        )

    def shard(self, model: nn.Module) -> None:
        """Shard a model, block by block."""
        assert self.mesh is not None
        names = ("replicate", "shard")[-len(self.mesh) :]
        settings: dict[str, Any] = {"mesh": init_device_mesh("cpu", tuple(self.mesh), mesh_dim_names=names)}
        if self.offload_policy:
            settings["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        if self.mixed_precision:
            settings["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        for block in model.blocks:
            fully_shard(block, **settings)
        fully_shard(model, **settings)

    def loss(self, model: nn.Module, micro_batch: int) -> Tensor:
        """Return the loss of this rank's part of a batch."""
        ids = tiny.batch(micro_batch, size=BATCH)
        if self.mesh is not None:
            ids = ids.chunk(dist.get_world_size())[dist.get_rank()]
        return tiny.loss_of(model, ids)

    def step(self, model: nn.Module, opt: torch.optim.Optimizer, index: int) -> None:
        """Take one step."""
        if self.joined:
            first = index * self.micro_batches
            ids = [tiny.batch(micro, size=BATCH) for micro in range(first, first + self.micro_batches)]
            tiny.loss_of(model, torch.cat(ids)).backward()
            opt.step()
            opt.zero_grad()
            return
        for micro in range(self.micro_batches):
            is_last = micro == self.micro_batches - 1
            context: AbstractContextManager[None] = nullcontext()
            if not is_last and isinstance(opt, grass.GrassAdamW):
                context = opt.accumulate()
            if self.no_sync and self.mesh is not None:
                model.set_requires_gradient_sync(is_last)
            with context:
                (self.loss(model, index * self.micro_batches + micro) / self.micro_batches).backward()
        opt.step()
        opt.zero_grad()

    def run(self, model: nn.Module, opt: torch.optim.Optimizer, start: int, stop: int) -> None:
        """Take some steps."""
        for index in range(start, stop):
            self.step(model, opt, index)


@dataclass
class Result:
    """Result of a training.

    Attributes:
        weights: whole weights, by name.
        draws: active layers of each step.
        importance: importance at the end.
        moved: names of parameters outside of the active layers that a step has changed.
    """

    weights: dict[str, Tensor]
    draws: list[tuple[int, ...]]
    importance: Tensor
    moved: set[str]


def whole(t: Tensor) -> Tensor:
    """Return a copy of a whole tensor, sharded or not."""
    found = t.full_tensor() if isinstance(t, DTensor) else t
    return found.detach().clone()


def train(training: Training, steps: int = 50) -> Result:
    """Train from the beginning, and see that no frozen layer changes."""
    model, opt = training.make()
    draws: list[tuple[int, ...]] = []
    moved: set[str] = set()
    for index in range(steps):
        active = opt.active_layers
        before = {name: local(p).detach().clone() for name, p in model.named_parameters()}
        training.step(model, opt, index)
        for name, p in model.named_parameters():
            layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
            if layer is not None and layer not in active and not torch.equal(local(p), before[name]):
                moved.add(name)
        draws.append(active)
    return Result({name: whole(p) for name, p in model.named_parameters()}, draws, opt.importance, moved)


def distance(result: Result, other: Result) -> float:
    """Return the largest difference of a weight."""
    return max(
        float((p.double() - other.weights[name].double()).abs().max()) for name, p in result.weights.items()
    )
