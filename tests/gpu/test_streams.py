"""Streams, devices, and a host that runs far ahead. On a CPU, where everything waits, the same bodies run in order.

Would catch: an upload, a table or a moment on another stream than the step's; a staging slot written again before
the copy that read it has run; a learning rate or an address that a later step has already replaced; a launch on
the current device instead of the tensors' own; parameters of two devices updated with each other's inputs.
"""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import grass
from tests.support.device_problem import F32, assert_same_snapshot, gradients, parameters, snapshot

STEPS = 24  # three times the staging slots


def sleep(device: torch.device) -> None:
    """Keep the current stream busy for some tens of milliseconds."""
    if device.type == "cuda":
        torch.cuda._sleep(50_000_000)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reference_run(device: torch.device, options: dict) -> tuple[list[nn.Parameter], grass.AdamW]:
    """All steps on the default stream, the host waiting after each."""
    params = parameters(device)
    opt = grass.AdamW(params, **options)
    for index in range(STEPS):
        set_step(params, opt, index)
        opt.step()
        synchronize(device)
    return params, opt


def set_step(params: list[nn.Parameter], opt: grass.AdamW, index: int) -> None:
    for p, g in zip(params, gradients(params, index), strict=True):
        p.grad = g
    opt.param_groups[0]["lr"] = 1e-2 / (index + 1)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}], ids=["plain", "clipped"])
def test_the_host_may_be_many_steps_ahead(device: torch.device, options: dict) -> None:
    """The device sleeps while the host prepares all steps, each with its learning rate and its gradients."""
    params = parameters(device)
    opt = grass.AdamW(params, **options)
    prepared = [gradients(params, index) for index in range(STEPS)]  # all alive, so at addresses of their own
    synchronize(device)
    for index, grads in enumerate(prepared):
        if index % 10 == 1:  # the first step compiles: sleep after it
            sleep(device)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        opt.param_groups[0]["lr"] = 1e-2 / (index + 1)
        opt.step()
    assert_same_snapshot(snapshot(params, opt), snapshot(*reference_run(device, options)))


def test_the_host_may_be_ahead_with_the_learning_rate_alone(device: torch.device) -> None:
    """Gradients stay where they are, so that only the hyperparameters travel; beside a run in which they move."""
    runs = []
    for ahead in (True, False):
        params = parameters(device)
        opt = grass.AdamW(params)
        grads = gradients(params, 0)
        for index in range(STEPS):
            if ahead and index == 1:
                sleep(device)
            for p, g in zip(params, grads, strict=True):
                p.grad = g if ahead else g.clone()
            opt.param_groups[0]["lr"] = 1e-2 / (index + 1)
            opt.step()
            if not ahead:
                synchronize(device)
        runs.append(snapshot(params, opt))
    assert_same_snapshot(*runs)


class Lanes:
    """Streams that take turns, each waiting for the one before; nothing at all on a CPU."""

    def __init__(self, device: torch.device, count: int) -> None:
        self._streams = [torch.cuda.Stream(device) for _ in range(count)] if device.type == "cuda" else []
        self._last: torch.cuda.Stream | None = torch.cuda.current_stream(device) if self._streams else None

    @contextlib.contextmanager
    def take(self, number: int) -> Iterator[None]:
        if not self._streams:
            yield
            return
        stream = self._streams[number]
        stream.wait_stream(self._last)
        with torch.cuda.stream(stream):
            yield
        self._last = stream


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}], ids=["plain", "clipped"])
@pytest.mark.parametrize("steppers", [(1,), (1, 2)], ids=["one-stream", "two-streams"])
def test_steps_on_streams_of_their_own(
    device: torch.device, options: dict, steppers: tuple[int, ...]
) -> None:
    """Gradients are made on one stream, after a sleep; steps are taken on one or two others."""
    if device.type == "cpu" and len(steppers) > 1:
        pytest.skip("a CPU has no streams: this is the body of the case with one")
    params = parameters(device)
    opt = grass.AdamW(params, **options)
    prepared = [gradients(params, index) for index in range(STEPS)]
    kept = []  # no gradient's memory is reused while another stream may read it
    synchronize(device)
    lanes = Lanes(device, 3)
    for index in range(STEPS):
        with lanes.take(0):
            if index % 10 == 1:
                sleep(device)
            kept.append([g.clone() for g in prepared[index]])
        for p, g in zip(params, kept[-1], strict=True):
            p.grad = g
        opt.param_groups[0]["lr"] = 1e-2 / (index + 1)
        with lanes.take(steppers[index % len(steppers)]):
            opt.step()
    synchronize(device)
    assert_same_snapshot(snapshot(params, opt), snapshot(*reference_run(device, options)))


def test_norms_are_the_step_s_own(device: torch.device) -> None:
    """Read late, after many steps were enqueued on another stream, and still the last step's."""
    params = parameters(device)
    opt = grass.AdamW(params)
    lanes, kept = Lanes(device, 1), []
    with lanes.take(0):
        for index in range(5):
            set_step(params, opt, index)
            kept.append([p.grad for p in params])
            opt.step()
        norm = opt.grad_norm
    synchronize(device)
    expected = torch.stack([g.double().norm() for g in kept[-1]]).norm()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-5)


def second_device() -> torch.device:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    return torch.device("cuda", 1)


def test_the_current_device_need_not_be_the_parameters_own(cuda: torch.device) -> None:
    other = second_device()
    params = parameters(other)
    opt = grass.AdamW(params)
    with torch.cuda.device(cuda):
        for index in range(STEPS):
            set_step(params, opt, index)
            opt.step()
            assert torch.cuda.current_device() == cuda.index
    synchronize(other)
    assert_same_snapshot(snapshot(params, opt), snapshot(*reference_run(cuda, {})))


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1e6}], ids=["plain", "clipped"])
def test_parameters_of_two_devices(cuda: torch.device, options: dict) -> None:
    """One optimizer, one step, two devices: as two optimizers would."""
    devices = (cuda, second_device())
    halves = [parameters(where, F32, seed=seed) for seed, where in enumerate(devices)]
    twins = [parameters(where, F32, seed=seed) for seed, where in enumerate(devices)]
    opt = grass.AdamW([*halves[0], *halves[1]], **options)
    alone = [grass.AdamW(part, **options) for part in twins]
    for index in range(STEPS):
        for part, twin, optimizer in zip(halves, twins, alone, strict=True):
            set_step(part, opt, index)
            set_step(twin, optimizer, index)
            optimizer.step()
        opt.step()
    for part, twin, optimizer in zip(halves, twins, alone, strict=True):
        assert_same_snapshot(snapshot(part, opt), snapshot(twin, optimizer))
