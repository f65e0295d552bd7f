"""Failures these tests catch: a probe that does not measure the mean root-mean-square gradient, or holds,
leaves or updates with the gradients it measured; pending sums that survive zero_grad; a step that counts
without a backward; accumulation that averages instead of summing; a loss scale or an overflow in the
importance; an overflow that the scaler does not see; a NaN that poisons the importance; windows after the
probe that measure something else; layers whose gradients are not complete (experts without tokens, a backward that
fails) and are lost, counted twice or kept; a plan that is built again in every step.
"""

import pytest
import torch
from torch import Tensor, nn

import grass
import grass_kernels
from tests.support import tiny

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")

PROBE = 3


def measured(model: nn.Module, opt: grass.GrassAdamW, ids: list[Tensor]) -> Tensor:
    """Root-mean-square gradient of each layer for a list of micro-batches, by plain autograd, in float64."""
    layers = tiny.layer_names(model, opt)
    sums, counts = torch.zeros(len(opt.layers), dtype=torch.float64), torch.zeros(len(opt.layers))
    names, params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    for part in ids:
        grads = torch.autograd.grad(tiny.loss_of(model, part) / len(ids), params, allow_unused=True)
        for name, grad in zip(names, grads, strict=True):
            if grad is not None and layers[name] >= 0:
                sums[layers[name]] += grad.double().square().sum()
    for name, p in model.named_parameters():
        if p.requires_grad and layers[name] >= 0:
            counts[layers[name]] += p.numel()
    return (sums / counts).sqrt().float()


def run_probe(model: nn.Module, opt: grass.GrassAdamW, micro_batches: int = 1) -> Tensor:
    """Take the probe; what it should give."""
    seen = []
    for step in range(PROBE):
        ids = [tiny.batch(step * micro_batches + micro) for micro in range(micro_batches)]
        seen.append(measured(model, opt, ids))
        for part in ids:
            (tiny.loss_of(model, part) / micro_batches).backward()
        opt.step()
        opt.zero_grad()
    return torch.stack(seen).mean(0)


@pytest.mark.parametrize("kind", ["llama", "tied", "t5", "stack"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_importance_is_the_mean_root_mean_square_gradient(kind: str, micro_batches: int) -> None:
    makers = {"llama": tiny.llama, "tied": lambda: tiny.llama(tied=True), "t5": tiny.t5, "stack": tiny.stack}
    model = makers[kind]()
    opt = grass.GrassAdamW(model, config=tiny.config())
    wanted = run_probe(model, opt, micro_batches)
    torch.testing.assert_close(opt.importance, wanted, rtol=1e-5, atol=0)
    assert wanted.std() / wanted.mean() > 0.02, "layers that are all alike would show nothing"


def test_windows_after_the_probe_measure_the_gradients_the_step_consumes() -> None:
    model = tiny.llama()
    opt = grass.GrassAdamW(model, lr=1e-3, config=tiny.config(ema=0.25))
    wanted = run_probe(model, opt)
    layers = tiny.layer_names(model, opt)
    window: dict[int, list[float]] = {}
    for step in range(PROBE, PROBE + 20):
        for micro in range(2):
            (tiny.loss_of(model, tiny.batch(100 + 2 * step + micro)) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for layer in opt.active_layers:
            grads = [p.grad.double().flatten() for n, p in model.named_parameters() if layers[n] == layer]
            window.setdefault(layer, []).append(torch.cat(grads).square().mean().sqrt().item())
        before = opt.num_refreshes
        opt.step()
        opt.zero_grad()
        if opt.num_refreshes > before:
            for layer, values in window.items():
                wanted[layer] = 0.25 * sum(values) / len(values) + 0.75 * wanted[layer]
            window = {}
        torch.testing.assert_close(opt.importance, wanted, rtol=1e-5, atol=0)
    assert opt.num_refreshes >= 4


def test_the_step_norms_can_be_read() -> None:
    model = tiny.stack()
    opt = grass.GrassAdamW(model, config=tiny.config())
    assert opt.grad_norm is None
    assert opt.layer_grad_norms is None
    run_probe(model, opt)
    tiny.loss_of(model, tiny.batch(50)).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    total = torch.cat([g.flatten() for g in grads.values()]).norm()
    layers, active = tiny.layer_names(model, opt), opt.active_layers
    opt.step()
    torch.testing.assert_close(opt.grad_norm, total)
    for layer in range(5):
        parts = [g.flatten() for n, g in grads.items() if layers[n] == layer]
        own = torch.cat(parts).norm() if layer in active else torch.tensor(0.0)
        torch.testing.assert_close(opt.layer_grad_norms[layer], own)


def test_gradients_are_gone_after_backward_but_for_the_smallest() -> None:
    model = tiny.llama()
    opt = grass.GrassAdamW(model, config=tiny.config())
    tiny.loss_of(model, tiny.batch(0)).backward()
    left = [p for p in model.parameters() if p.grad is not None]
    assert len(left) == 1
    assert left[0].numel() == min(p.numel() for p in model.parameters())
    opt.step()
    assert all(p.grad is None for p in model.parameters())


class Experts(nn.Module):
    """Two experts, of which one sees the tokens: the other's parameters get no gradient."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList([block, nn.Linear(8, 8)])
        self.chosen = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[self.chosen](x)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_layers_that_lack_gradients_are_measured_and_freed(micro_batches: int) -> None:
    model = tiny.stack()
    model.blocks = nn.ModuleList(Experts(block) for block in model.blocks)
    model.embed.requires_grad_(False)  # nothing follows the first layer
    opt = grass.GrassAdamW(model, config=tiny.config(), pattern="blocks.*")
    wanted = []
    for step in range(PROBE):
        ids = [tiny.batch(step * micro_batches + micro) for micro in range(micro_batches)]
        seen = 0.0
        for micro, part in enumerate(ids):
            for index, block in enumerate(model.blocks):
                block.chosen = (step + micro + index) % 2
            seen = seen + measured(model, opt, [part]).double().square() / micro_batches**2
            (tiny.loss_of(model, part) / micro_batches).backward()
            assert sum(p.grad is not None for p in model.parameters()) == 1
        wanted.append(seen.sqrt().float())
        opt.step()
        opt.zero_grad()
    torch.testing.assert_close(opt.importance, torch.stack(wanted).mean(0), rtol=1e-5, atol=0)


def fail_in_backward(model: tiny.Stack, block: int) -> None:
    """Run a backward that fails when the second gradient of a block has arrived, after those of the blocks above."""
    arrived = []

    def fail(_: Tensor) -> None:
        arrived.append(None)
        if len(arrived) == 2:
            raise InterruptedError

    handles = [p.register_post_accumulate_grad_hook(fail) for p in model.blocks[block].parameters()]
    with pytest.raises(InterruptedError):
        (1000 * tiny.loss_of(model, tiny.batch(77))).backward()
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("clear", ["model", "optimizer"])
def test_what_a_backward_that_failed_has_left_is_discarded_with_its_gradients(block: int, clear: str) -> None:
    model = tiny.stack()
    model.head.requires_grad_(False)  # so that gradients of the block are the first, if it is the last
    opt = grass.GrassAdamW(model, config=tiny.config())
    fail_in_backward(model, block)
    (model if clear == "model" else opt).zero_grad()
    opt.step()
    assert opt.step_count == 0
    wanted = run_probe(model, opt)
    torch.testing.assert_close(opt.importance, wanted, rtol=1e-5, atol=0)
    assert opt.state_dict()["param_groups"][0]["grass"]["importance"]["accumulated"] == 0


@pytest.mark.parametrize("block", [2, 4])
def test_a_step_after_a_backward_that_failed_takes_what_there_is(block: int) -> None:
    model = tiny.stack()
    model.head.requires_grad_(False)
    opt = grass.GrassAdamW(model, config=tiny.config())
    fail_in_backward(model, block)
    left = [p.grad.norm() for p in model.blocks[block].parameters() if p.grad is not None]
    opt.step()
    assert opt.step_count == 1
    torch.testing.assert_close(opt.layer_grad_norms[block], torch.stack(left).norm())
    assert (opt.layer_grad_norms > 0).tolist() == [layer >= block for layer in range(5)]
    assert all(p.grad is None for p in model.parameters())


def test_a_plan_serves_a_bucket_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[int] = []  # gradients of each plan that is made
    runs: list[int] = []

    class Counted(grass_kernels.NormPlan):
        def __init__(self, grads: list[Tensor], *arguments: object) -> None:
            plans.append(len(grads))
            super().__init__(grads, *arguments)

        def run(self, grads: list[Tensor]) -> Tensor:
            runs.append(len(grads))
            return super().run(grads)

    monkeypatch.setattr(grass_kernels, "NormPlan", Counted)
    model = tiny.stack()
    opt = grass.GrassAdamW(model, config=tiny.config())
    run_probe(model, opt, micro_batches=2)
    assert plans == [1, 6, 6, 6, 6, 6, 1]  # head, blocks, embedding
    assert runs == 2 * PROBE * plans


def test_a_gradient_of_another_dtype_gets_another_plan() -> None:
    model = tiny.stack().bfloat16()
    opt = grass.GrassAdamW(model, config=tiny.config())
    wanted = []
    for step, dtype in enumerate((torch.bfloat16, torch.float32, torch.float64)):
        model.to(dtype)
        wanted.append(measured(model, opt, [tiny.batch(step)]))
        tiny.loss_of(model, tiny.batch(step)).backward()
        opt.step()
        opt.zero_grad()
    torch.testing.assert_close(opt.importance, torch.stack(wanted).mean(0), rtol=1e-4, atol=0)


def test_zero_grad_discards_what_was_measured() -> None:
    model = tiny.stack()
    opt = grass.GrassAdamW(model, config=tiny.config())
    for _ in range(2):  # measured twice, thrown away
        (1000 * tiny.loss_of(model, tiny.batch(77))).backward()
    opt.zero_grad()
    opt.step()
    assert opt.step_count == 0
    wanted = run_probe(model, opt)
    torch.testing.assert_close(opt.importance, wanted, rtol=1e-5, atol=0)
    # and it leaves no belief in micro-batches, which would rescale the unsampled layers
    assert opt.state_dict()["param_groups"][0]["grass"]["importance"]["accumulated"] == 0


def test_a_step_without_a_backward_does_nothing_and_does_not_count() -> None:
    model = tiny.stack()
    opt = grass.GrassAdamW(model, config=tiny.config())
    state = opt.state_dict()
    for _ in range(5):
        opt.step()
    assert opt.phase == "probe"
    tiny.assert_identical(opt.state_dict(), state)
    tiny.train(model, opt, 0, 5)
    before, state = tiny.weights(model), opt.state_dict()
    frozen_before = tiny.flat(state)
    opt.step()
    tiny.assert_identical(tiny.weights(model), before)
    tiny.assert_identical(tiny.flat(opt.state_dict()), frozen_before)


def test_an_accumulating_probe_is_brought_to_the_scale_of_windows() -> None:
    model = tiny.stack()
    config = tiny.config(ema=1.0, update_interval=3)
    opt = grass.GrassAdamW(model, lr=0.0, weight_decay=0.0, config=config)
    for step in range(PROBE):
        tiny.train(model, opt, step, step + 1, micro_batches=4)
    probed, first = opt.importance, list(opt.active_layers)
    others = [layer for layer in range(5) if layer not in first]
    assert first
    while opt.num_refreshes < 2:
        tiny.train(model, opt, opt.step_count, opt.step_count + 1, micro_batches=4)
    ratio = opt.importance / probed  # at ema 1 the sampled layers stand at their window
    assert (ratio[first] != 1).all()
    torch.testing.assert_close(ratio[others], ratio[first].mean().expand(3))
    before = opt.importance
    while opt.num_refreshes < 3:
        tiny.train(model, opt, opt.step_count, opt.step_count + 1, micro_batches=4)
    assert torch.equal(before == opt.importance, torch.tensor(opt.draw_counts) == 0), "corrected once"


class NanAt(nn.Module):
    """Multiplies the gradient that passes by a number."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * self.factor)
        return y


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_never_enters_the_importance(bad: float) -> None:
    model = tiny.stack()
    model.blocks[2] = NanAt(model.blocks[2])  # layers 0, 1, 2 and the embedding get what it makes
    opt = grass.GrassAdamW(model, config=tiny.config(), pattern="blocks.*")
    clean = []
    for step in range(PROBE):
        model.blocks[2].factor = bad if step == 1 else 1.0
        grads = measured(model, opt, [tiny.batch(step)])
        clean.append(grads)
        tiny.loss_of(model, tiny.batch(step)).backward()
        opt.step()
        opt.zero_grad()
    wanted = torch.stack(clean)
    finite = wanted.isfinite()
    assert finite.sum(0).tolist() == [2, 2, 2, 3, 3]
    wanted = wanted.where(finite, 0.0).sum(0) / finite.sum(0)
    torch.testing.assert_close(opt.importance, wanted, rtol=1e-5, atol=0)
    assert opt.nonfinite_norms == 3
    # and in a window: weights suffer as with torch, the importance does not
    model.blocks[2].factor = bad
    while opt.num_refreshes < 2:
        tiny.loss_of(model, tiny.batch(9)).backward()
        opt.step()
        opt.zero_grad()
    assert opt.importance.isfinite().all()
    assert opt.probabilities.isfinite().all()
    assert opt.nonfinite_norms > 3


@pytest.mark.parametrize("where", ["between", "before the step"])
def test_gradients_cleared_by_the_model_are_discarded_too(where: str) -> None:
    model = tiny.stack()
    opt = grass.GrassAdamW(model, config=tiny.config())
    (1000 * tiny.loss_of(model, tiny.batch(77))).backward()
    model.zero_grad()  # a batch that the loop decided to drop
    if where == "before the step":
        opt.step()
        assert opt.step_count == 0
    wanted = run_probe(model, opt)
    torch.testing.assert_close(opt.importance, wanted, rtol=1e-5, atol=0)


def test_a_parameter_alone_on_its_device_is_measured_over_micro_batches() -> None:
    """The gradient that is kept is measured like the others, though it stays."""
    model = tiny.stack()
    model.requires_grad_(False)
    model.blocks[1].down.bias.requires_grad_(True)
    opt = grass.GrassAdamW(model, config=tiny.config(active_layers=1))
    wanted = run_probe(model, opt, micro_batches=3)
    assert wanted[1] > 0
    torch.testing.assert_close(opt.importance[1], wanted[1], rtol=1e-4, atol=0)


def test_the_mark_in_the_gradient_that_is_kept_is_not_measured() -> None:
    """Gradients smaller than the mark, of two micro-batches: the second is added to it."""
    model = tiny.stack()
    model.requires_grad_(False)
    bias = model.blocks[1].down.bias.requires_grad_(True)
    opt = grass.GrassAdamW(model, config=tiny.config(active_layers=1))
    (grad,) = torch.autograd.grad(1e-5 * tiny.loss_of(model, tiny.batch(0)), [bias])
    for _ in range(2):
        (1e-5 * tiny.loss_of(model, tiny.batch(0))).backward()
    opt.step()
    torch.testing.assert_close(opt.layer_grad_norms[1], grad.norm() * 2**0.5, rtol=1e-4, atol=0)


def test_a_sparse_gradient_is_refused_by_its_step_as_torch_does() -> None:
    model = tiny.stack()
    model.embed = nn.Embedding(tiny.VOCAB, 8, sparse=True)
    opt = grass.GrassAdamW(model, config=tiny.config(), pattern="blocks.*")
    tiny.loss_of(model, tiny.batch(0)).backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        opt.step()


def test_a_logged_norm_is_near_zero_and_clipping_touches_nothing() -> None:
    model, twin = tiny.stack(), tiny.stack()
    opt, plain = (grass.GrassAdamW(m, config=tiny.config()) for m in (model, twin))
    norms = []

    def clip(_: int) -> None:
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1e-3).item())

    tiny.train(model, opt, 0, PROBE, before_step=clip)
    tiny.train(twin, plain, 0, PROBE)
    assert max(norms) < 1e-5
    assert torch.equal(opt.importance, plain.importance)


@pytest.mark.parametrize("always_active", ["outside", "none"])
def test_gradients_that_are_assigned_are_measured_too(always_active: str) -> None:
    """As by ``torch.autograd.grad``, which calls no hook."""
    runs = []
    for assigned in (False, True):
        model = tiny.stack()
        opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(always_active=always_active))
        for index in range(8):
            loss = tiny.loss_of(model, tiny.batch(index))
            if assigned:
                params = [p for p in model.parameters() if p.requires_grad]
                for p, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
                    p.grad = grad
            else:
                loss.backward()
            opt.step()
            if opt.phase == "probe":
                assert all(p.grad is None for p in model.parameters())
            opt.zero_grad()
        assert opt.step_count == 8
        runs.append((opt.importance, opt.grad_norm, *tiny.weights(model).values()))
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_users_hook_sees_gradients_before_the_probe_frees_them() -> None:
    model = tiny.stack()
    seen = {}
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.clone()}))
    opt = grass.GrassAdamW(model, config=tiny.config())
    tiny.loss_of(model, tiny.batch(0)).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert [int(grad.count_nonzero()) for grad in grads] == [1]
    opt.step()
    total = torch.stack([grad.square().sum() for grad in seen.values()]).sum().sqrt()
    assert len(seen) == len(list(model.parameters()))
    torch.testing.assert_close(opt.grad_norm, total)
