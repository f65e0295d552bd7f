"""States that come and go, on a device.

Would catch: an update that begins before its states have come, a write-back before the update, a buffer that is
filled before its last unit has been written back, a state dict read while copies are in flight, a store that is not
pinned (copies would block the host), device memory that grows with the model, gradients that are freed below an
update that reads them, or kept while the host runs ahead.
"""

import functools
import gc

import pytest
import torch
from torch import Tensor, nn

import grass

MODES = {
    "by default": {},
    "streamed": {"offload": "streamed", "buffer_mb": 1.0},
    "streamed, two buffers": {"offload": "streamed", "buffer_mb": 1.0, "buffer_count": 2},
    "resident": {"offload": "resident"},
    "streamed, fused": {"offload": "streamed", "buffer_mb": 1.0, "fused_backward": True},
    "resident, fused": {"offload": "resident", "fused_backward": True},
}


class Blocks(nn.Module):
    """Large weights and hardly any arithmetic: copies take longer than everything else."""

    def __init__(self, layers: int, rows: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Embedding(rows, 256) for _ in range(layers))
        self.head = nn.Linear(256, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(sum(block(ids) for block in self.blocks))


@functools.cache
def train_in_place(device: torch.device, steps: int) -> list[Tensor]:
    return train(device, {"offload": "none"}, steps)


def train(device: torch.device, mode: dict, steps: int, save_at: int | None = None) -> list[Tensor]:
    """Parameters and states after some steps, on the CPU; saved and loaded in between if asked for."""
    on_gpu = device.type == "cuda"
    torch.manual_seed(0)
    model = Blocks(4, 20_000 if on_gpu else 96).to(device, torch.bfloat16)
    config = grass.GrassConfig(
        active_layers=3, probe_steps=1, sample_interval=3, update_interval=3, draw_ahead=1, **mode
    )  # with three a fused backward uses the memory of gradients again
    opt = grass.GrassAdamW(model, lr=1e-2, config=config, master_weights=True, pattern="blocks.*")
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        ids = torch.randint(0, 96, (4, 8), generator=generator).to(device)
        model(ids).float().square().mean().backward()
        opt.step()
        opt.zero_grad()
        if step == save_at:  # at once: whatever is under way must be waited for
            saved = opt.state_dict()
            saved["state"] = {
                key: {name: t.clone() for name, t in state.items()} for key, state in saved["state"].items()
            }
            opt.load_state_dict(saved)
    states = opt.state_dict()["state"]
    found = [t for key in sorted(states) for _, t in sorted(states[key].items())]
    return [t.detach().cpu().clone() for t in (*model.parameters(), *found)]


@pytest.mark.parametrize("save_at", [None, 4], ids=["", "saved and loaded"])
@pytest.mark.parametrize("mode", MODES)
def test_a_race_of_copies_is_won_by_nobody(device: torch.device, mode: str, save_at: int | None) -> None:
    steps = 12 if device.type == "cuda" else 6
    expected = train_in_place(device, steps)
    found = train(device, MODES[mode], steps, save_at)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_the_store_is_pinned_and_stays_so(cuda: torch.device) -> None:
    model = Blocks(3, 4096).to(cuda)
    config = grass.GrassConfig(active_layers=1, probe_steps=0, offload="streamed", buffer_mb=1.0)
    opt = grass.GrassAdamW(model, config=config, pattern="blocks.*")
    for turn in range(2):
        model(torch.arange(8, device=cuda)).square().mean().backward()
        opt.step()
        opt.zero_grad()
        moments = [t for state in opt.state.values() for key, t in state.items() if key != "step"]
        assert moments
        assert all(t.device.type == "cpu" and t.is_pinned() for t in moments), turn
        opt.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("rows", [4096, 65_536])
def test_device_memory_for_states_is_the_ring(cuda: torch.device, rows: int) -> None:
    model = Blocks(4, rows).to(cuda, torch.bfloat16)
    config = grass.GrassConfig(active_layers=2, probe_steps=0, offload="streamed", buffer_mb=2.0)
    opt = grass.GrassAdamW(model, config=config, pattern="blocks.*")

    def backward() -> None:
        model(torch.arange(8, device=cuda)).square().mean().backward()

    backward()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    opt.step()
    torch.cuda.synchronize()
    ring = config.buffer_count * 2 * 2**20
    assert opt.transfer_stats.ring_bytes == ring
    assert ring <= torch.cuda.max_memory_allocated() - before <= ring + 2**20


def test_states_are_in_host_memory_by_default(cuda: torch.device) -> None:
    for moved_late in (False, True):
        model = Blocks(3, 4096)
        if not moved_late:
            model.to(cuda)
        opt = grass.GrassAdamW(
            model, config=grass.GrassConfig(active_layers=1, probe_steps=1), pattern="blocks.*"
        )
        model.to(cuda)
        for _ in range(3):
            model(torch.arange(8, device=cuda)).square().mean().backward()
            opt.step()
            opt.zero_grad()
        moments = [t for state in opt.state.values() for key, t in state.items() if key != "step"]
        assert moments
        assert {t.device.type for t in moments} == {"cpu"}
        assert opt.transfer_stats.h2d_bytes > 0


def test_a_fused_backward_holds_the_gradients_of_few_layers(cuda: torch.device) -> None:
    layers = 8
    model = Blocks(layers, 65_536).to(cuda, torch.bfloat16)
    config = grass.GrassConfig(
        active_layers=layers, probe_steps=0, offload="streamed", buffer_mb=2.0, fused_backward=True
    )
    opt = grass.GrassAdamW(model, config=config, pattern="blocks.*")
    for step in range(3):
        loss = model(torch.arange(8, device=cuda)).square().mean()
        if step == 2:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_stats()["active_bytes.all.current"]
        loss.backward()
        opt.step()
        opt.zero_grad()
    torch.cuda.synchronize()
    more = torch.cuda.memory_stats()["active_bytes.all.peak"] - before
    one = 2 * 65_536 * 256
    assert (
        one <= more <= 3 * one + 2**20
    )  # one that is held, one that is complete, one that is being computed


def test_a_streamed_step_waits_for_nothing(cuda: torch.device) -> None:
    model = Blocks(3, 4096).to(cuda)
    config = grass.GrassConfig(
        active_layers=1,
        probe_steps=0,
        sample_interval=50,
        update_interval=50,
        offload="streamed",
        buffer_mb=1.0,
    )
    opt = grass.GrassAdamW(model, config=config, pattern="blocks.*")
    ids = torch.arange(8, device=cuda)
    for step in range(5):
        model(ids).square().mean().backward()
        torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")
        try:
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        opt.zero_grad()
