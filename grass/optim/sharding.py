"""Sharded parameters: the part that this process has, and sums over all processes.

FSDP2 (`torch.distributed.fsdp.fully_shard`) makes each parameter a DTensor, of which every rank has a shard; a small
parameter may leave some ranks with an empty one. ``requires_grad``, hooks and gradients belong to the DTensor. Kernels,
states and offloading see the local shard, an ordinary tensor. State dicts have DTensors again, which
`torch.distributed.checkpoint` can load on any number of ranks.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grass.errors import ConfigError, GrassError, ParameterError, StateMismatchError

_REPLICAS = (
    "shard it by torch.distributed.fsdp.fully_shard; a mesh of shape (ranks, 1) keeps a whole copy on each"
)


def is_sharded(t: Tensor) -> bool:
    """Return True for a DTensor."""
    return hasattr(t, "_local_tensor")


def local(t: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor; another tensor is returned as it is.

    It is the same object in every call until FSDP2 replaces it, as after ``model.to()``.
    """
    found: Tensor = getattr(t, "_local_tensor", t)
    return found


def as_shard_of(p: Any, value: Any) -> Any:
    """Return a state of a parameter's local shard as a DTensor like the parameter, without a copy.

    The state may be on another device than the parameter: offloaded states are in host memory.
    """
    if not is_sharded(p) or not isinstance(value, Tensor) or value.shape != local(p).shape:
        return value
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    if value.storage_offset():
        # A DTensor takes the offset of its shard, without the storage: `dcp.async_save` would read at that address.
        value = torch.from_dlpack(value.detach())
    meta = TensorMeta(p.shape, p.stride(), value.dtype)
    spec = DTensorSpec(p.device_mesh, p.placements, tensor_meta=meta)
    # as FSDP2 makes its parameters: `from_local` would move the state to the device of the mesh
    return DTensor(value, spec, requires_grad=False)


def shard_for(p: Tensor, value: Any, name: str) -> Any:
    """Return the part of a saved state that belongs to a parameter's local shard.

    Raises:
        StateMismatchError: a whole tensor for a sharded parameter, or one that is sharded otherwise.
    """
    if not isinstance(value, Tensor) or (value.dim() == 0 and p.dim() > 0):
        return value
    if is_sharded(value):
        same = is_sharded(p) and (value.device_mesh, value.placements) == (p.device_mesh, p.placements)  # type: ignore[attr-defined]
        if not same:
            raise StateMismatchError(
                f"{name} in the state dict is sharded otherwise than the parameter: load it by "
                "torch.distributed.checkpoint, which reshards"
            )
        return local(value)
    if is_sharded(p) and value.shape != local(p).shape:
        raise StateMismatchError(
            f"{name} in the state dict is not sharded, and the parameter is: load it by "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, with StateDictOptions("
            "full_state_dict=True)"
        )
    return value


class Ranks:
    """All processes of the run, which train one model together.

    Args:
        mesh: mesh of the sharded parameters.
        placements: their placements.
    """

    def __init__(self, mesh: Any, placements: Sequence[Any]) -> None:
        self.size: int = mesh.size()
        self.replicas = 1
        for size, placement in zip(mesh.shape, placements, strict=True):
            if placement.is_replicate():
                self.replicas *= size
        self._device_type: str = mesh.device_type

    def sum(self, values: Tensor) -> Tensor:
        """Return sums over all shards, the same on every rank: one all-reduce, without device sync on a GPU.

        Args:
            values: sums over the local shards, float32 or float64.
        """
        total = values.to(self._device, copy=True)
        torch.distributed.all_reduce(total)
        if self.replicas > 1:
            total /= self.replicas
        return total.to(values.device)

    @property
    def _device(self) -> torch.device:
        if self._device_type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device(self._device_type)

    def check_equal(self, values: Mapping[str, Any]) -> None:
        """Check that all ranks have the same values: one all-gather of a few numbers, and a device sync.

        Args:
            values: what to compare, by the name in the message: anything that JSON can write.

        Raises:
            GrassError: they differ; the message has a rank and the names. All ranks raise it.
        """
        checksums = [zlib.crc32(json.dumps(value, default=str).encode()) for value in values.values()]
        own = torch.tensor(checksums, dtype=torch.int64, device=self._device)
        all_ranks = [torch.empty_like(own) for _ in range(self.size)]
        torch.distributed.all_gather(all_ranks, own)
        table = torch.stack(all_ranks).tolist()  # a device sync: before the first forward pass, and at draws
        for rank, row in enumerate(table):
            different = [
                name for name, found, first in zip(values, row, table[0], strict=True) if found != first
            ]
            if different:
                raise GrassError(
                    f"rank {rank} differs from rank 0 in {', '.join(different)}: all ranks must train the same model "
                    "with the same settings, and draw the same layers"
                )


def ranks_of(params: Sequence[Tensor]) -> Ranks | None:
    """Return the processes that train some parameters together; None in a run of one process.

    Args:
        params: the trainable parameters.

    Raises:
        ConfigError: parameters that are whole on every rank, whose copies would drift apart, or that are sharded by
            something else than FSDP2, or over some of the ranks only.
    """
    world = num_ranks()
    sharded = [p for p in params if is_sharded(p)]
    if not sharded:
        if world > 1 and params:
            raise ConfigError(
                f"each of {world} ranks has a copy of the model, and nothing here keeps them equal: {_REPLICAS}. "
                "DistributedDataParallel, DeepSpeed and ZeroRedundancyOptimizer are not supported, since they reduce "
                "gradients of frozen layers or hide parameters"
            )
        return None
    first: Any = sharded[0]
    mesh, placements = first.device_mesh, first.placements
    for p in sharded:
        if not _is_by_fsdp(p):
            raise ConfigError(
                f"a parameter is sharded as {_describe(p)}, as by tensor parallelism: only FSDP2 and HSDP are "
                "supported, which shard one dimension"
            )
    for p in sharded:
        placed: Any = p
        if (placed.device_mesh, placed.placements) != (mesh, placements):
            raise ConfigError(
                "the parameters are sharded over different meshes, or in different ways "
                f"({_describe(placed)} and {_describe(first)}): shard all by fully_shard with one mesh"
            )
    if mesh.size() != world:
        raise ConfigError(
            f"the parameters are sharded over {mesh.size()} of {world} ranks: use a mesh of all ranks"
        )
    if world > 1 and len(sharded) < len(params):
        whole = next(p for p in params if not is_sharded(p))
        raise ConfigError(
            f"{len(params) - len(sharded)} trainable parameters, one of shape {tuple(whole.shape)}, are not sharded: "
            "their copies on the ranks would drift apart; call fully_shard on the whole model too, or freeze them"
        )
    return Ranks(mesh, placements) if world > 1 else None


def is_distributed() -> bool:
    """Return True in a process group, of one process, too."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def num_ranks() -> int:
    """Return the number of processes of the run."""
    return torch.distributed.get_world_size() if is_distributed() else 1


def wait_for_copy(grad: Tensor) -> None:
    """Wait until a gradient that FSDP2 copies to host memory (``CPUOffloadPolicy``) has arrived.

    A hook may be called while the copy is in flight: torch waits for it at the end of backward only. This blocks the
    host, which is to read the gradient; with gradients on the device nothing is done.
    """
    if is_sharded(grad) and local(grad).device.type == "cpu" and grad.device_mesh.device_type == "cuda":  # type: ignore[attr-defined]
        torch.cuda.current_stream().synchronize()


def _is_by_fsdp(p: Any) -> bool:
    kinds = [type(placement).__name__ for placement in p.placements]
    return kinds.count("Shard") == 1 and kinds.count("Replicate") == len(kinds) - 1


def _describe(p: Any) -> str:
    return f"{tuple(p.placements)} over {tuple(p.device_mesh.shape)}"


def refuse_wrapper(model: nn.Module) -> None:
    """Raise for wrappers of a model that are known not to work, before anything is changed.

    Raises:
        ConfigError: a wrapper of data parallelism other than FSDP2.
    """
    for module in model.modules():
        names = {cls.__name__ for cls in type(module).__mro__}
        found = names & {
            "DistributedDataParallel",
            "DataParallel",
            "FullyShardedDataParallel",
            "DeepSpeedEngine",
            "PipelineEngine",
        }
        if found:
            raise ConfigError(
                f"the model is in a {found.pop()}, which reduces gradients of frozen layers or hides parameters: "
                f"{_REPLICAS}"
            )
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ConfigError(f"the model is partitioned by DeepSpeed: {_REPLICAS}")
    if any(is_sharded(p) for p in model.parameters()) and not any(
        "FSDPModule" in {cls.__name__ for cls in type(module).__mro__} for module in model.modules()
    ):
        raise ConfigError(
            "the model has DTensors that fully_shard did not make, as by tensor parallelism: only FSDP2 and HSDP are "
            "supported"
        )


def refuse_sharded_later(model: nn.Module, params: Sequence[Tensor]) -> None:
    """Raise if a model has been sharded, and an optimizer has the parameters from before.

    Args:
        model: the model.
        params: the optimizer's parameters.

    Raises:
        ParameterError: the parameters are whole, and the model has sharded ones.
    """
    if not any(is_sharded(p) for p in params) and any(is_sharded(p) for p in model.parameters()):
        raise ParameterError(
            "the model was sharded after this optimizer was made, which has the parameters from before: make the "
            "optimizer after fully_shard; accelerate's prepare needs the optimizer together with the model"
        )
