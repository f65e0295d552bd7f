"""Failures these tests catch: a step between refreshes that waits for the device (reads a number from it,
or asks how many there are), a refresh that reads more than once.

A CPU never waits, so what would wait on a GPU is counted: a dispatch mode sees every operation. The update
itself is replaced: on a CPU it may read what its kernel reads on the device.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import grass
import grass_kernels
from tests.support import tiny

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")

WAITS = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "unique",
    "bincount",
)


class HostReads(TorchDispatchMode):
    """Lists the operations that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        boolean_index = name in ("index", "index_put", "index_put_") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1] if i is not None
        )
        to_device = name in ("_to_copy", "copy_") and kwargs and "device" in kwargs
        if name in WAITS or boolean_index or to_device:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class StubPlan:
    """A plan whose launches do nothing, as `grass_kernels.make_plan` returns it."""

    def __init__(self, *arguments: Any) -> None: ...

    def upload(self, *arguments: Any) -> None: ...

    def begin(self, **scales: Any) -> None: ...

    def run(self, unit: int, views: Any) -> None: ...

    def finish(self, sq_norms: Tensor, grad_scale: Tensor | None) -> None:
        sq_norms.fill_(1.0)


class StubNormPlan:
    """Stands for `grass_kernels.NormPlan`, for one layer."""

    def __init__(self, *arguments: Any) -> None: ...

    def is_valid(self, grads: list[Tensor]) -> bool:
        return True

    def run(self, grads: list[Tensor]) -> Tensor:
        return torch.ones(1)


@pytest.fixture
def _kernels_that_do_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grass_kernels, "make_plan", StubPlan)
    monkeypatch.setattr(grass_kernels, "NormPlan", StubNormPlan)


def reads_of_step(opt: grass.GrassAdamW) -> list[str]:
    with HostReads() as reads:
        opt.step()
    return reads.found


def test_the_measurement_sees_reads() -> None:
    with HostReads() as reads:
        float(torch.ones(()))
        bool(torch.ones(()) > 0)
        torch.ones(3)[torch.tensor([True, False, True])]
        torch.ones(2).nonzero()
    assert len(reads.found) >= 4


@pytest.mark.usefixtures("_kernels_that_do_not_read")
@pytest.mark.parametrize("moments", ["keep", "reset"])
@pytest.mark.parametrize("scaled", [False, True])
def test_no_step_between_refreshes_waits_for_the_device(moments: str, scaled: bool) -> None:
    model = tiny.stack()
    config = tiny.config(probe_steps=4, sample_interval=5, update_interval=10, moments=moments)
    opt = grass.GrassAdamW(model, config=config)
    if scaled:  # as GradScaler leaves them for the step
        opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    quiet = 0
    for index in range(40):
        draws, refreshes = opt.num_draws, opt.num_refreshes
        for _ in range(2):  # hooks of the probe run in backward
            loss = tiny.loss_of(model, tiny.batch(index))
            with HostReads() as in_backward:
                loss.backward()
            assert in_backward.found == []
        reads = reads_of_step(opt)
        opt.zero_grad()
        if index == 0:
            continue  # the very first step asks whether it is a checkpoint library's
        if opt.num_draws == draws and opt.num_refreshes == refreshes:
            assert reads == [], index
            quiet += 1
    assert quiet > 25
    assert opt.num_refreshes >= 4


def test_what_a_step_leaves_on_the_device_can_wait() -> None:
    """Norms are tensors, not numbers: reading them is the caller's choice."""
    model = tiny.stack()
    opt = grass.GrassAdamW(model, config=tiny.config())
    tiny.train(model, opt, 0, 5)
    assert isinstance(opt.grad_norm, Tensor)
    assert isinstance(opt.layer_grad_norms, Tensor)
