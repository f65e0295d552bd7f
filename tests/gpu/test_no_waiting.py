"""Steps under torch's own watch for synchronisation, in mode "error".

Would catch: a step that reads a number from the device, copies from memory that is not pinned, or asks how many
there are: with clipping, under a GradScaler, with another learning rate, with gradients at new addresses, and in
every step of GrassAdamW that is no refresh, backward of the probe included.
"""

import contextlib
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import grass
from tests.support.device_problem import BF16, F32, gradients, parameters


@contextlib.contextmanager
def no_waiting(device: torch.device, watched: bool = True) -> Iterator[None]:
    """Everything in here that waits for the device is an error."""
    if device.type != "cuda" or not watched:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is young
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def _as_users_run() -> None:
    """Deterministic algorithms may wait, and fill new tensors: not what is asked here."""
    torch.use_deterministic_algorithms(False)


def test_the_watch_sees_a_wait(cuda: torch.device) -> None:
    x = torch.ones((), device=cuda)
    with no_waiting(cuda), pytest.raises(RuntimeError, match="synchroniz"):
        x.item()
    x.item()


@pytest.mark.parametrize("moved", [False, True], ids=["in-place", "moved"])
@pytest.mark.parametrize(
    ("options", "scaled"),
    [
        ({}, False),
        ({"max_grad_norm": 0.5}, False),
        ({}, True),
        ({"max_grad_norm": 0.5}, True),
        ({"amsgrad": True}, False),
        ({"master_weights": True}, False),
        ({"stochastic_rounding": True}, True),
        ({"state_dtype": BF16}, False),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else ("scaled" if value else ""),
)
def test_steps_of_adamw(device: torch.device, options: dict, scaled: bool, moved: bool) -> None:
    """The first step, which makes states and tables, too: nothing in it needs an answer."""
    params = parameters(device) + parameters(device, F32, sizes=(33,), seed=1)
    opt = grass.AdamW(params, **options)
    prepared = [gradients(params, index if moved else 0) for index in range(12)]
    if scaled:  # as GradScaler leaves them for the step
        opt.grad_scale, opt.found_inf = (torch.full((1,), x, device=device) for x in (2.0, 0.0))
    for index, grads in enumerate(prepared):
        with no_waiting(device):
            for p, g in zip(params, grads if moved or index == 0 else [p.grad for p in params], strict=True):
                p.grad = g
            opt.param_groups[0]["lr"] = 1e-3 / (index // 2 + 1)
            opt.step()
            norm = opt.grad_norm
    assert norm.isfinite().item()
    assert opt.state[params[0]]["step"].item() == 12


def test_a_learning_rate_on_the_device(device: torch.device) -> None:
    params = parameters(device)
    lr = torch.tensor(1e-3, device=device)
    opt = grass.AdamW(params, lr=lr, foreach=False)
    for p, g in zip(params, gradients(params, 0), strict=True):
        p.grad = g
    before = params[0].detach().clone()
    with no_waiting(device):
        for _ in range(5):
            opt.step()
            lr.mul_(0.5)
    assert not torch.equal(before, params[0])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Model(nn.Module):
    """No embedding: its backward may wait, which is not ours to answer for."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def refreshes(opt: grass.GrassAdamW, model: nn.Module, x: Tensor, steps: int) -> list[int]:
    """Which of the first steps are refreshes: a schedule counts, so any run of it tells."""
    found = []
    for index in range(steps):
        before = opt.num_refreshes
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
        if opt.num_refreshes != before:
            found.append(index)
    return found


@pytest.mark.parametrize(("moments", "clip"), [("keep", None), ("reset", 0.5)])
def test_steps_of_grass_between_refreshes(device: torch.device, moments: str, clip: float | None) -> None:
    config = grass.GrassConfig(
        active_layers=1, probe_steps=2, sample_interval=2, update_interval=4, moments=moments, offload="none"
    )
    x = torch.randn(8, 16).to(device)
    models = [Model().to(device) for _ in range(2)]
    waits = refreshes(grass.GrassAdamW(models[0], config=config), models[0], x, 16)
    assert len(waits) >= 3
    opt = grass.GrassAdamW(models[1], config=config, max_grad_norm=clip)
    draws = 0
    for index in range(16):
        with no_waiting(device, watched=index > 0):  # the first makes cuBLAS's workspace
            models[1](x).square().mean().backward()
        before = opt.num_draws
        # the very first step asks whether it is a checkpoint library's
        with no_waiting(device, watched=index > 0 and index not in waits):
            opt.step()
        draws += opt.num_draws > before and index not in waits
        opt.zero_grad()
    assert draws >= 3  # the next set is drawn, its moments made, and layers switched without waiting
