"""Training by FSDP2 on many GPUs, predicted: fake tensors in a process group whose other ranks do not exist."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from grass.errors import ConfigError
from grass.layers import LayerMap

GATHER, SCATTER, REDUCE = "c10d::_allgather_base_", "c10d::_reduce_scatter_base_", "c10d::allreduce_"


@dataclass(frozen=True)
class Cluster:
    """GPUs that train one model by FSDP2, in machines of equal size.

    Args:
        world_size: number of GPUs.
        shard: number of neighbouring GPUs over which one copy of the model is sharded. With fewer than all there are
            `world_size` / `shard` copies (HSDP).
        node_size: number of GPUs in a machine.
        link_gbs: bandwidth of a GPU to the others in its machine in each direction, 1e9 bytes per second.
        network_gbs: share of a GPU in the bandwidth between machines in each direction, 1e9 bytes per second.

    Raises:
        ConfigError: numbers below 1, or copies that do not divide the GPUs.
    """

    world_size: int
    shard: int
    node_size: int = 8
    link_gbs: float = 450.0
    network_gbs: float = 50.0

    def __post_init__(self) -> None:
        if min(self.world_size, self.shard, self.node_size) < 1 or self.world_size % self.shard:
            raise ConfigError(
                f"{self.world_size} GPUs cannot have copies of the model on {self.shard} GPUs each: pass a shard size "
                "that divides the number of GPUs"
            )

    @property
    def replicas(self) -> int:
        """Number of copies of the model."""
        return self.world_size // self.shard

    def sent(self, name: str, num_bytes: int) -> float:
        """Return the bytes that a GPU sends in a collective by a ring.

        Args:
            name: name of the operator.
            num_bytes: size of the whole tensor, that is the result of a gather and the input of a reduction.
        """
        if name == REDUCE:
            return 2 * num_bytes * (self.replicas - 1) / self.replicas
        return num_bytes * (self.shard - 1) / self.shard

    def seconds(self, sharded: float, replicated: float) -> float:
        """Return a lower bound of the time of a step's collectives: that of the slower kind, since they may overlap.

        A ring over machines crosses each border once. All GPUs of a machine share what the rings through it carry: one
        for each copy of the model, to gather and scatter; one for each shard, to reduce over copies.

        Args:
            sharded: bytes that a GPU sends to gather weights and to reduce and scatter gradients.
            replicated: bytes that a GPU sends to reduce gradients of its shard over copies.
        """
        border = self.node_size * self.network_gbs
        within = self.link_gbs if self.shard <= self.node_size else min(self.link_gbs, border)
        between = self.link_gbs
        if self.world_size > self.node_size:
            between = min(between, border / min(self.shard, self.node_size))
        return max(sharded / (within * 1e9), replicated / (between * 1e9))

    @contextmanager
    def simulated(self) -> Iterator[Any]:
        """Return the mesh of a process group whose other ranks do not exist, until the end of the context.

        Its collectives leave their results as they are, which fake tensors do not notice.
        """
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=self.world_size)
        try:
            if self.replicas == 1:
                yield init_device_mesh("cpu", (self.shard,), mesh_dim_names=("shard",))
            else:
                shape = self.replicas, self.shard
                yield init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        finally:
            dist.destroy_process_group()


def shard(model: nn.Module, mesh: Any) -> None:
    """Shard a model as examples/fsdp2.py does: layer by layer, then the rest."""
    from torch.distributed.fsdp import fully_shard

    for name in LayerMap.from_model(model).names:
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)
