"""AdamW on a device among the things of torch that meet it there: GradScaler, the compiler, autograd, memory.

Would catch: gradients of a scaled loss updated with the scale in them, or an overflow that is not skipped; a step
in a compiled function that the compiler traces into, or recompiles for; a write that autograd does not notice, so
that backward goes on with what stands there now; copies of parameters, gradients or moments kept beside them.
"""

import pytest
import torch
from torch import nn

import grass
from tests.support.device_problem import BF16, F16, F32, assert_same_snapshot, gradients, parameters, snapshot

SCALE = 1024.0
MIB = 1 << 20


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}], ids=["plain", "clipped"])
@pytest.mark.parametrize("dtype", [F16, F32], ids=["fp16", "fp32"])
def test_a_scaled_run_is_an_unscaled_run(device: torch.device, dtype: torch.dtype, options: dict) -> None:
    """GradScaler's own way: it looks for overflows, and the step divides. Powers of two lose nothing."""
    params, twins = parameters(device, dtype), parameters(device, dtype)
    opt, plain = (grass.AdamW(some, lr=1e-2, fused=True, **options) for some in (params, twins))
    scaler = torch.amp.GradScaler(device.type, init_scale=SCALE, growth_interval=1000)
    scaler.scale(torch.zeros((), device=device))  # makes the scale
    for index in range(6):
        unscaled = [g / 16 for g in gradients(params, index)]  # in fp16 the scaled ones stay finite
        for p, twin, g in zip(params, twins, unscaled, strict=True):
            p.grad, twin.grad = g * SCALE, g
        scaler.step(opt)
        scaler.update()
        plain.step()
    assert scaler.get_scale() == SCALE
    assert_same_snapshot(snapshot(params, opt), snapshot(twins, plain))
    assert opt.grad_norm.item() == plain.grad_norm.item()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_an_overflow_skips_the_step_and_lowers_the_scale(device: torch.device, value: float) -> None:
    params = parameters(device, F16)
    opt = grass.AdamW(params, lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=SCALE, growth_interval=1000)
    scaler.scale(torch.zeros((), device=device))
    for index, spoiled in enumerate((False, True, False)):
        for p, g in zip(params, gradients(params, index), strict=True):
            p.grad = g
        if spoiled:
            params[1].grad[3] = value
            before = snapshot(params, opt)
        scaler.step(opt)
        scaler.update()
        if spoiled:
            assert_same_snapshot(snapshot(params, opt), before)
    assert scaler.get_scale() == SCALE / 2
    assert opt.state[params[0]]["step"].item() == 2


def test_training_with_autocast_and_a_scaler(device: torch.device) -> None:
    """The usual loop, fp32 weights and fp16 arithmetic: the loss goes down."""
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1)).to(device)
    opt = grass.AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler(device.type)
    x = torch.randn(32, 16).to(device)
    y = x.sum(1, keepdim=True)
    losses = []
    for _ in range(12):
        with torch.autocast(device.type, dtype=F16 if device.type == "cuda" else BF16):
            loss = nn.functional.mse_loss(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.filterwarnings("ignore")  # the compiler's advice
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_function_that_steps(device: torch.device, backend: str) -> None:
    if backend == "inductor" and device.type == "cpu":
        pytest.skip("compiled for the CPU the same code would say nothing about the device")
    torch._dynamo.reset()
    params, twins = parameters(device, F32), parameters(device, F32)
    opt, plain = grass.AdamW(params, lr=1e-2), grass.AdamW(twins, lr=1e-2)

    def train(params: list[nn.Parameter], opt: grass.AdamW, x: torch.Tensor) -> None:
        for p in params:
            p.grad = p.detach() * x
        opt.step()

    compiled = torch.compile(train, backend=backend)
    for index in range(4):
        x = torch.tensor(0.5 * (index + 1), device=device)
        compiled(params, opt, x)
        train(twins, plain, x)
    assert_same_snapshot(snapshot(params, opt), snapshot(twins, plain))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_autograd_notices_a_step(device: torch.device, dtype: torch.dtype) -> None:
    """Of a parameter, and of a moment that somebody uses in a loss."""
    params = parameters(device, dtype)
    opt = grass.AdamW(params)
    for p, g in zip(params, gradients(params, 0), strict=True):
        p.grad = g
    opt.step()
    for saved in (params[0], opt.state[params[0]]["exp_avg"]):
        x = torch.ones((), device=device, dtype=saved.dtype, requires_grad=True)
        loss = (saved * x).sum()
        opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_the_current_device_and_stream_are_left_alone(cuda: torch.device) -> None:
    params = parameters(cuda)
    opt = grass.AdamW(params, max_grad_norm=1.0)
    stream = torch.cuda.Stream(cuda)
    with torch.cuda.stream(stream):
        for p, g in zip(params, gradients(params, 0), strict=True):
            p.grad = g
        opt.step()
        assert torch.cuda.current_stream() == stream
        assert torch.cuda.current_device() == cuda.index
    stream.synchronize()


@pytest.mark.parametrize(
    ("options", "state_bytes"),
    [({}, 8), ({"max_grad_norm": 1.0}, 8), ({"amsgrad": True}, 12), ({"master_weights": True}, 10)],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else "",
)
def test_memory_is_that_of_the_moments(cuda: torch.device, options: dict, state_bytes: int) -> None:
    """After construction and a step: states and 1 %. In the steps that follow: hardly anything on top."""
    numel = 1 << 23
    params = [nn.Parameter(torch.zeros(numel, dtype=BF16, device=cuda)) for _ in range(8)]
    for p in params:
        p.grad = torch.zeros_like(p)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    opt = grass.AdamW(params, **options)
    torch.cuda.reset_peak_memory_stats()
    opt.step()
    torch.cuda.synchronize()
    states = len(params) * numel * state_bytes
    assert torch.cuda.max_memory_allocated() - before <= 1.01 * states + MIB
    after = torch.cuda.memory_allocated()
    assert states <= after - before <= 1.01 * states + MIB
    moved = [torch.zeros_like(p) for p in params]  # at other addresses
    with_gradients = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for grads in (moved, [p.grad for p in params]):
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        opt.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - with_gradients <= MIB
