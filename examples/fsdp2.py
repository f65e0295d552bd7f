"""GRASS on several GPUs, by PyTorch's own engine: torchrun --nproc-per-node 2 examples/fsdp2.py.

Without GPUs the ranks are processes on the CPU.
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny_model import make_model
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import grass


def main(folder: str = "runs/fsdp2") -> None:
    """Train for 24 steps, with a checkpoint half way; train on from it on any number of GPUs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()

    model = make_model().to(device)
    # (copies, shards) as the second argument, with two names, for copies of the model: see docs/scale.md
    mesh = init_device_mesh(device, (world_size,), mesh_dim_names=("shard",))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    config = grass.GrassConfig(active_layers=2, probe_steps=4, sample_interval=4, update_interval=8)
    optimizer = grass.GrassAdamW(model, lr=1e-3, config=config, max_grad_norm=1.0)

    if os.path.exists(f"{folder}/.metadata"):
        load(model, optimizer, folder)
    while optimizer.step_count < 24:
        step = optimizer.step_count
        batch = torch.randint(3, 16, (8, 16), generator=torch.Generator().manual_seed(step))
        ids = batch.chunk(world_size)[rank].to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.step_count == 12:
            dcp.save(state_of(model, optimizer), checkpoint_id=folder)
        if rank == 0 and step % 4 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {optimizer.phase}, layers {optimizer.active_layers}")
    if rank == 0:
        print("draws of each layer:", optimizer.draw_counts)
    optimizer.release()
    dist.destroy_process_group()


def state_of(model: torch.nn.Module, optimizer: grass.GrassAdamW) -> dict:
    """Return what a checkpoint holds: weights, and states of the optimizer with that of the method."""
    weights, states = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": states}


def load(model: torch.nn.Module, optimizer: grass.GrassAdamW, folder: str) -> None:
    """Load a checkpoint that any number of ranks has saved."""
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


if __name__ == "__main__":
    main(*sys.argv[1:])
