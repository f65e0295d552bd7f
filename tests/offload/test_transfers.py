"""Would catch: states that are moved twice, for nothing or not at all; device memory that is not the ring; figures that
count something else than what was moved.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grass
from tests.support.ragged import MEBIBYTE

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")


class Even(nn.Module):
    """Layers whose parameters have multiples of 128 elements: no bytes between them, so sums are easy."""

    def __init__(self, layers: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(64, 32))
        self.blocks = nn.ModuleList(nn.Linear(128, 128 * (2 + i)) for i in range(layers))

    def forward(self) -> Tensor:
        return sum((p * p).sum() for p in self.parameters() if p.requires_grad)


def even(active_layers: int = 2, model: Even | None = None, **options: Any) -> tuple[Even, grass.GrassAdamW]:
    model = Even() if model is None else model
    settings = {
        "active_layers": active_layers,
        "sampler": "cyclic",
        "sample_interval": 2,
        "update_interval": 2,
    }
    settings = {**settings, "draw_ahead": 1, **options}
    return model, grass.GrassAdamW(model, config=grass.GrassConfig(**settings), pattern="blocks.*")


def even_step(model: Even, opt: grass.GrassAdamW) -> None:
    model().backward()
    opt.step()
    opt.zero_grad()


def bytes_of(module: nn.Module, width: int = 8) -> int:
    return sum(p.numel() for p in module.parameters()) * width


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("megabytes", [0.2, 0.3, 64])
def test_streaming_moves_what_trains_and_holds_the_ring(count: int, megabytes: float, fused: bool) -> None:
    options = {"offload": "streamed", "buffer_mb": megabytes, "buffer_count": count, "fused_backward": fused}
    model, opt = even(**options)
    ring, updated, switches, seen = count * int(megabytes * MEBIBYTE), 0, 0, set()
    outside = model.table.numel() * 8
    for _ in range(11):
        active = opt.active_layers
        seen |= set(active)
        even_step(model, opt)
        updated += outside + sum(bytes_of(model.blocks[layer]) for layer in active)
        switches += opt.active_layers != active
        stats = opt.transfer_stats
        assert stats.ring_bytes == ring
        assert stats.d2h_bytes == updated
        # what was fetched and not updated: what is in the ring now, and what a switch made worthless
        assert updated <= stats.h2d_bytes <= updated + ring * (1 + switches)
        drawn = seen | set(opt.next_active_layers or ()) | set(opt.active_layers)
        assert stats.store_bytes == outside + sum(bytes_of(model.blocks[layer]) for layer in drawn)
    assert dict(stats) == {
        "h2d_bytes": stats.h2d_bytes,
        "d2h_bytes": updated,
        "store_bytes": outside + bytes_of(model.blocks),
        "ring_bytes": ring,
    }
    assert tuple(stats) == (stats.h2d_bytes, updated, stats.store_bytes, ring)


def test_streaming_fetches_nothing_twice_while_the_set_stays() -> None:
    model, opt = even(sample_interval=50, update_interval=50, offload="streamed", buffer_mb=0.3)
    for _ in range(8):
        even_step(model, opt)
    stats = opt.transfer_stats
    in_ring = stats.h2d_bytes - stats.d2h_bytes
    assert 0 < in_ring <= stats.ring_bytes


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("gamma", [2, 3, 4])
def test_resident_layers_move_when_the_set_changes_and_else_stay(gamma: int, ahead: int, fused: bool) -> None:
    model, opt = even(gamma, offload="resident", draw_ahead=ahead, fused_backward=fused)
    outside = model.table.numel() * 8
    fetched, sent, sets = 0, 0, set()
    held: set[int] = set()
    for index in range(15):
        active = set(opt.active_layers)
        if index == 0:
            fetched += outside
        fetched += sum(bytes_of(model.blocks[layer]) for layer in active - held)
        sent += sum(bytes_of(model.blocks[layer]) for layer in held - active)
        held = active
        sets.add(tuple(sorted(active)))
        even_step(model, opt)
        stats = opt.transfer_stats
        coming = set(opt.next_active_layers or opt.active_layers)
        # by the end of the step the next set has come, and at a switch the old one has gone
        soon = sum(bytes_of(model.blocks[layer]) for layer in coming - held)
        gone = 0
        if opt.next_active_layers is None:
            gone = sum(bytes_of(model.blocks[layer]) for layer in held - set(opt.active_layers))
        assert stats.h2d_bytes == fetched + soon
        assert stats.d2h_bytes == sent + gone
    assert len(sets) > 2
    largest = max(bytes_of(block) for block in model.blocks)
    assert stats.ring_bytes <= outside + 2 * gamma * largest, "two sets and the outside at most"


def test_resident_states_that_only_came_do_not_go_back() -> None:
    """Fetched, never updated (there were no gradients), and gone again: nothing to write."""
    model, opt = even(2, offload="resident", always_active="none")
    frozen = opt.active_layers
    for _ in range(2):  # steps in which one of two layers has no gradient
        sum((p * p).sum() for p in model.blocks[frozen[0]].parameters()).backward()
        opt.step()
        opt.zero_grad()
    assert opt.active_layers != frozen
    assert opt.transfer_stats.d2h_bytes == bytes_of(model.blocks[frozen[0]])


def test_without_offloading_all_figures_are_zero() -> None:
    model, opt = even()
    even_step(model, opt)
    assert dict(opt.transfer_stats) == dict.fromkeys(
        ("h2d_bytes", "d2h_bytes", "store_bytes", "ring_bytes"), 0
    )


@pytest.mark.parametrize("offload", ["streamed", "resident"])
def test_the_store_grows_as_layers_are_drawn_up_to_what_was_predicted(offload: str) -> None:
    model, opt = even(
        1, offload=offload, sample_interval=1, update_interval=1, probe_steps=2, sampler="adaptive"
    )
    assert opt.transfer_stats.store_bytes == 0, "nothing is taken while probing"
    sizes, predicted = [], opt._offload.store.max_bytes
    for _ in range(60):
        even_step(model, opt)
        sizes.append(opt.transfer_stats.store_bytes)
        if all(opt.draw_counts):
            break
    assert sizes[0] == 0
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 3, "one layer at a time"
    assert sizes[-1] == predicted == bytes_of(model)
