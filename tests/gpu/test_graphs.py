"""Steps in CUDA graphs. In the interpreter, which has none, what would be captured is run instead of replayed.

Would catch: a learning rate or a gradient's address that a graph froze though it may change, or took anew though
it may not; a replay that reads a staging slot which a later step has written; clipping decided on the host; a
counter that a replay does not advance; two graphs that share inputs; eager steps and replays that disturb each
other; a capture that is begun too early and leaves states in the graph's memory, or is refused without a remedy.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import grass
from tests.support.device_problem import BF16, F32, assert_same_snapshot, gradients, parameters, snapshot

REPLAYS = 5

# torch says it of every step outside of a graph, the one that must come before a capture too
pytestmark = pytest.mark.filterwarnings(
    "ignore:This instance was constructed with capturable=True:UserWarning"
)


def make(
    device: torch.device, dtype: torch.dtype = BF16, **options: object
) -> tuple[list, grass.AdamW, Tensor]:
    """Parameters, an optimizer that can be captured, and its learning rate on the device."""
    params = parameters(device, dtype)
    lr = torch.tensor(1e-2, device=device)
    # Elsewhere torch refuses the flag, and there is nothing to capture.
    on_gpu = {"capturable": device.type == "cuda"}
    half = len(params) // 2
    groups = [{"params": params[:half], "weight_decay": 0.1}, {"params": params[half:], "betas": (0.8, 0.9)}]
    opt = grass.AdamW(groups, lr=lr, foreach=False, **{**on_gpu, **options})
    assert all(group["lr"] is lr for group in opt.param_groups)
    return params, opt, lr


def capture(device: torch.device, work: Callable[[], object]) -> Callable[[], object]:
    """`work` in a graph: what replays it."""
    if device.type == "cpu":
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def set_gradients(params: list[nn.Parameter], index: int) -> None:
    """Gradients of step `index`, in place where there are some."""
    for p, g in zip(params, gradients(params, index), strict=True):
        if p.grad is None:
            p.grad = g
        else:
            p.grad.copy_(g)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 0.5},
        {"amsgrad": True},
        {"master_weights": True, "max_grad_norm": 1e6},
        {"stochastic_rounding": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_replays_are_eager_steps(device: torch.device, options: dict) -> None:
    params, opt, lr = make(device, **options)
    twins, eager, twin_lr = make(device, **options)
    set_gradients(params, 0)
    opt.step()
    replay = capture(device, opt.step)
    for index in range(REPLAYS + 1):
        set_gradients(twins, index)
        twin_lr.fill_(1e-2 / (index + 1))
        eager.step()
        if index:
            set_gradients(params, index)
            lr.fill_(1e-2 / (index + 1))
            replay()
            torch.testing.assert_close(opt.layer_grad_norms, eager.layer_grad_norms, rtol=0, atol=0)
    assert_same_snapshot(snapshot(params, opt), snapshot(twins, eager))
    assert opt.state[params[0]]["step"].item() == REPLAYS + 1


def test_a_norm_that_is_not_finite_skips_a_replay(device: torch.device) -> None:
    params, opt, _ = make(device, max_grad_norm=1.0)
    set_gradients(params, 0)
    opt.step()
    replay = capture(device, opt.step)
    before = snapshot(params, opt)
    params[0].grad[0] = torch.inf
    replay()
    assert_same_snapshot(snapshot(params, opt), before)
    set_gradients(params, 1)
    replay()
    assert opt.state[params[0]]["step"].item() == 2


def test_gradients_made_inside_the_graph(device: torch.device) -> None:
    """Backward and step in one capture: gradients then live in the graph's own memory."""

    def make_step(params: list[nn.Parameter], opt: grass.AdamW, x: Tensor) -> Callable[[], None]:
        def step() -> None:
            opt.zero_grad()
            # Element by element, so that any way of computing it gives the same bits.
            sum(((p.float() * x).sin() * p.float()).sum() for p in params).backward()
            opt.step()

        return step

    params, opt, _ = make(device)
    twins, eager, _ = make(device)
    x, twin_x = torch.tensor(0.5, device=device), torch.tensor(0.5, device=device)
    step, twin_step = make_step(params, opt, x), make_step(twins, eager, twin_x)
    if device.type == "cuda":  # what autograd wants: a warm-up on a stream of its own
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
    else:
        step()
    opt.zero_grad()
    replay = capture(device, step)
    twin_step()
    for index in range(REPLAYS):
        for value in (x, twin_x):
            value.fill_(0.1 * index + 0.3)
        replay()
        twin_step()
    assert_same_snapshot(snapshot(params, opt), snapshot(twins, eager))


def test_eager_steps_between_replays(device: torch.device) -> None:
    """Eager steps have other gradients, at other addresses, and come often enough to use every staging slot."""
    params, opt, lr = make(device, max_grad_norm=10.0)
    twins, eager, twin_lr = make(device, max_grad_norm=10.0)
    set_gradients(params, 0)
    opt.step()
    captured = [p.grad for p in params]
    replay = capture(device, opt.step)
    set_gradients(twins, 0)
    eager.step()
    for index in range(1, 16):
        for value in (lr, twin_lr):
            value.fill_(1e-2 / index)
        for p, g in zip(params, captured, strict=True):
            p.grad = g
        if index % 3 == 0:
            set_gradients(params, index)
            replay()
        else:
            for p, g in zip(params, gradients(params, index), strict=True):
                p.grad = g
            opt.step()
        set_gradients(twins, index)
        eager.step()
    assert_same_snapshot(snapshot(params, opt), snapshot(twins, eager))


def test_two_graphs_of_one_optimizer(device: torch.device) -> None:
    """Each reads its own gradients; a step between the captures puts a slot at hand for the second."""
    params, opt, _ = make(device)
    twins, eager, _ = make(device)
    replays, buffers = [], []
    for index in range(2):
        for p, g in zip(params, gradients(params, index), strict=True):
            p.grad = g
        opt.step()
        buffers.append([p.grad for p in params])
        replays.append(capture(device, opt.step))
        set_gradients(twins, index)
        eager.step()
    for index in (0, 1, 1, 0, 1):
        for p, g in zip(params, buffers[index], strict=True):
            p.grad = g
        replays[index]()
        set_gradients(twins, index)
        eager.step()
    assert_same_snapshot(snapshot(params, opt), snapshot(twins, eager))


def test_two_captures_without_a_step_between_work_or_are_refused(cuda: torch.device) -> None:
    """Nothing can be pinned during a capture: the second has a slot, or says that it lacks one."""
    params, opt, _ = make(cuda)
    twins, eager, _ = make(cuda)
    for some in (params, twins):
        set_gradients(some, 0)
    opt.step()
    eager.step()
    replays, scratch = [capture(cuda, opt.step)], torch.zeros((), device=cuda)
    refused = []
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scratch.add_(1)
        try:
            opt.step()
        except RuntimeError as error:
            refused.append(str(error))
    if refused:
        assert "before the capture" in refused[0]
    else:
        replays.append(graph.replay)
    for replay in replays:
        replay()
        eager.step()
    assert_same_snapshot(snapshot(params, opt), snapshot(twins, eager))


def test_a_number_as_learning_rate_stays_what_it_was(cuda: torch.device) -> None:
    params, twins = parameters(cuda, F32), parameters(cuda, F32)
    opt, eager = (grass.AdamW(some, lr=1e-2, capturable=True) for some in (params, twins))
    for some, optimizer in ((params, opt), (twins, eager)):
        set_gradients(some, 0)
        optimizer.step()
    replay = capture(cuda, opt.step)
    opt.param_groups[0]["lr"] = 1e-5
    replay()
    eager.step()  # at 1e-2
    opt.step()  # at 1e-5
    eager.param_groups[0]["lr"] = 1e-5
    eager.step()
    assert_same_snapshot(snapshot(params, opt), snapshot(twins, eager))


def test_the_first_step_is_not_captured(cuda: torch.device) -> None:
    """Refused with the remedy, before anything is made; after a step like it a capture works."""
    params, opt, _ = make(cuda)
    set_gradients(params, 0)
    scratch = torch.zeros((), device=cuda)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        scratch.add_(1)
        with pytest.raises(RuntimeError, match="take one step like it before the capture"):
            opt.step()
    assert not opt.state
    opt.step()
    capture(cuda, opt.step)()
    assert opt.state[params[0]]["step"].item() == 2


def test_not_without_the_flag(cuda: torch.device) -> None:
    params = parameters(cuda)
    opt = grass.AdamW(params)
    set_gradients(params, 0)
    opt.step()
    scratch = torch.zeros((), device=cuda)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        scratch.add_(1)
        with pytest.raises(RuntimeError, match="capturable"):
            opt.step()
    assert opt.state[params[0]]["step"].item() == 1
