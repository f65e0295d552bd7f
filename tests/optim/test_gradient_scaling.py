"""Failures these tests catch: a loss scale in the importance, in a window or in the step; a scaler that
raises because the probe has freed every gradient; an overflow anywhere that the scaler does not see, that
enters the importance, or that updates a weight; `unscale_` and clipping that break either.
"""

import pytest
import torch
from torch import Tensor, nn

import grass
from tests.support import tiny

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")


class Overflow(nn.Module):
    """A block whose output's gradient is multiplied by a factor that a test sets."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * self.factor)
        return y


def overflowing(layer: int) -> tuple[nn.Module, Overflow]:
    """A stack in which one block's own gradients can be made to overflow, and no other's."""
    model = tiny.stack()
    inner = Overflow(model.blocks[layer].up)
    model.blocks[layer].up = inner
    return model, inner


def scaler(scale: float = 1024.0) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)


def scaled_steps(
    model, opt, amp, start: int, stop: int, clip: float | None = None, micro_batches: int = 1
) -> None:
    for index in range(start, stop):
        for micro in range(micro_batches):
            loss = tiny.loss_of(model, tiny.batch(index * micro_batches + micro)) / micro_batches
            amp.scale(loss).backward()
        if clip is not None:
            amp.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        amp.step(opt)
        amp.update()
        opt.zero_grad()


@pytest.mark.parametrize("clip", [None, 1e6])
@pytest.mark.parametrize("scale", [1.0, 1024.0, 2.0**20])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_scaled_run_is_an_unscaled_run(clip: float | None, scale: float, micro_batches: int) -> None:
    model, twin = tiny.stack(), tiny.stack()
    opt, plain = (grass.GrassAdamW(m, lr=1e-3, config=tiny.config()) for m in (model, twin))
    amp = scaler(scale)
    scaled_steps(model, opt, amp, 0, 3, clip, micro_batches)
    tiny.train(twin, plain, 0, 3, micro_batches)
    torch.testing.assert_close(opt.importance, plain.importance, rtol=1e-5, atol=0)
    assert plain.importance.min() > 0
    scaled_steps(model, opt, amp, 3, 12, clip, micro_batches)
    tiny.train(twin, plain, 3, 12, micro_batches)
    assert opt.draw_counts == plain.draw_counts
    torch.testing.assert_close(opt.importance, plain.importance, rtol=1e-4, atol=0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    assert amp.get_scale() == scale


@pytest.mark.parametrize("layer", range(5))
@pytest.mark.parametrize("unscale", [False, True])
def test_an_overflow_of_any_layer_in_the_probe_is_seen_by_the_scaler_alone(layer: int, unscale: bool) -> None:
    model, inner = overflowing(layer)
    opt = grass.GrassAdamW(model, config=tiny.config(), pattern="blocks.*", fused=True)
    amp = scaler()
    clean = overflowing(layer)[0]
    reference = grass.GrassAdamW(clean, config=tiny.config(probe_steps=2), pattern="blocks.*")
    before = tiny.weights(model)
    for index in range(3):
        inner.factor = float("inf") if index == 1 else 1.0
        scaled_steps(model, opt, amp, index, index + 1, clip=1e6 if unscale else None)
        assert amp.get_scale() == (1024 if index == 0 else 512)
        if index != 1:
            tiny.train(clean, reference, index, index + 1)
    torch.testing.assert_close(opt.importance, reference.importance, rtol=1e-5, atol=0)
    assert opt.nonfinite_norms > 0
    tiny.assert_identical(tiny.weights(model), before)
    scaled_steps(model, opt, amp, 3, 9)
    assert opt.importance.isfinite().all()


def test_a_layer_that_lacks_gradients_is_measured_before_they_are_unscaled() -> None:
    """At the end of the backward: `unscale_` divides the gradients that it finds."""
    model, twin = tiny.stack(), tiny.stack()
    for m in (model, twin):
        m.blocks[0].unused = nn.Parameter(torch.zeros(4))
        m.embed.requires_grad_(False)  # nothing follows the first layer
    opt, plain = (grass.GrassAdamW(m, config=tiny.config(), pattern="blocks.*") for m in (model, twin))
    scaled_steps(model, opt, scaler(), 0, 3, clip=1e6)
    tiny.train(twin, plain, 0, 3)
    torch.testing.assert_close(opt.importance, plain.importance, rtol=1e-5, atol=0)


def test_an_overflow_in_the_first_of_several_micro_batches_is_seen() -> None:
    model, inner = overflowing(2)
    opt = grass.GrassAdamW(model, config=tiny.config(), pattern="blocks.*")
    amp = scaler()
    for micro in range(3):
        inner.factor = float("nan") if micro == 0 else 1.0
        amp.scale(tiny.loss_of(model, tiny.batch(micro))).backward()
    amp.step(opt)
    amp.update()
    assert amp.get_scale() == 512
    scaled_steps(model, opt, amp, 1, 4)
    assert opt.importance.isfinite().all()


def test_an_overflow_in_a_window_skips_the_update_and_the_observation() -> None:
    model, inner = overflowing(0)
    opt = grass.GrassAdamW(
        model, config=tiny.config(active_layers=5, ema=1.0), pattern="blocks.*", fused=True
    )
    amp = scaler()
    scaled_steps(model, opt, amp, 0, 4)
    before, steps = tiny.weights(model), float(opt.state[model.head.weight]["step"])
    window = opt.state_dict()["param_groups"][0]["grass"]["importance"]
    inner.factor = float("inf")
    scaled_steps(model, opt, amp, 4, 5)
    inner.factor = 1.0
    tiny.assert_identical(tiny.weights(model), before)
    assert float(opt.state[model.head.weight]["step"]) == steps
    assert amp.get_scale() == 512
    after = opt.state_dict()["param_groups"][0]["grass"]["importance"]
    assert torch.equal(after["window_sum"], window["window_sum"])
    assert torch.equal(after["window_count"], window["window_count"])
    assert opt.step_count == 5
    assert opt.nonfinite_norms > 0
    scaled_steps(model, opt, amp, 5, 9)
    assert opt.importance.isfinite().all()


def test_gradients_are_not_rewritten_by_the_step() -> None:
    model = tiny.stack()
    opt = grass.GrassAdamW(model, config=tiny.config(probe_steps=0), fused=True)
    amp = scaler()
    amp.scale(tiny.loss_of(model, tiny.batch(0))).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    amp.step(opt)
    tiny.assert_identical({n: p.grad for n, p in model.named_parameters() if n in before}, before)


def test_float64_weights_are_scaled_by_the_scaler() -> None:
    model, twin = tiny.stack().double(), tiny.stack().double()
    opt, plain = (grass.GrassAdamW(m, lr=1e-3, config=tiny.config()) for m in (model, twin))
    scaled_steps(model, opt, scaler(), 0, 8)
    tiny.train(twin, plain, 0, 8)
    torch.testing.assert_close(opt.importance, plain.importance, rtol=1e-5, atol=0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
