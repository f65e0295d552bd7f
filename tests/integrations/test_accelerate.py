"""Failures these tests catch: an optimizer that accelerate's wrapper breaks: preparation that loses or changes
the method's state, accumulation whose skipped steps count, clipping, a scaler, saved and resumed states that
do not continue bit by bit, attributes that cannot be reached.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

import grass
from tests.support import tiny


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def start(seed: int = 0, **options: object) -> tuple[nn.Module, grass.GrassAdamW]:
    model = tiny.stack(seed)
    return model, grass.GrassAdamW(model, lr=1e-2, config=tiny.config(**options))


def train(accelerator: Accelerator, model: nn.Module, opt, start: int, stop: int) -> None:
    """Micro-batches ``start`` to ``stop``."""
    for index in range(start, stop):
        with accelerator.accumulate(model):
            accelerator.backward(tiny.loss_of(model, tiny.batch(index)))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_prepared_run_is_the_plain_run(micro_batches: int) -> None:
    model, opt = start()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
    model, wrapped = accelerator.prepare(model, opt)
    train(accelerator, model, wrapped, 0, 14 * micro_batches)
    plain, plain_opt = start()

    def clip(_: int) -> None:
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)

    tiny.train(plain, plain_opt, 0, 14, micro_batches, before_step=clip)
    assert opt.step_count == 14, "steps inside an accumulation must not count"
    tiny.assert_same_run(accelerator.unwrap_model(model), opt, plain, plain_opt)


def test_attributes_are_reached_through_the_wrapper() -> None:
    model, opt = start()
    model, wrapped = Accelerator(cpu=True).prepare(model, opt)
    assert wrapped.optimizer is opt
    assert wrapped.optimizer.phase == "probe"
    assert wrapped.state_dict().keys() == opt.state_dict().keys()
    assert wrapped.param_groups is opt.param_groups


@pytest.mark.parametrize("steps", [0, 2, 5])
def test_preparing_a_run_that_has_begun_changes_nothing(steps: int) -> None:
    model, opt = start()
    tiny.train(model, opt, 0, steps)
    before = tiny.flat(opt.state_dict())
    on = [p.requires_grad for p in model.parameters()]
    accelerator = Accelerator(cpu=True)
    model, wrapped = accelerator.prepare(model, opt)
    tiny.assert_identical(tiny.flat(opt.state_dict()), before)
    assert [p.requires_grad for p in model.parameters()] == on
    twin, other = start()
    tiny.train(twin, other, 0, 12)
    tiny.train(model, wrapped, steps, 12)
    tiny.assert_same_run(model, opt, twin, other)


@pytest.mark.parametrize("stop", [1, 3, 5, 8])
def test_a_saved_state_continues_bit_by_bit(tmp_path: Path, stop: int) -> None:
    def prepared(seed: int = 0) -> tuple[Accelerator, nn.Module, object, grass.GrassAdamW]:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        model, opt = start(seed)
        accelerator = Accelerator(cpu=True)
        model, wrapped = accelerator.prepare(model, opt)
        return accelerator, model, wrapped, opt

    accelerator, whole, wrapped, opt = prepared()
    train(accelerator, whole, wrapped, 0, stop)
    accelerator.save_state(str(tmp_path))
    train(accelerator, whole, wrapped, stop, 14)
    accelerator, model, wrapped, resumed = prepared(seed=4)
    accelerator.load_state(str(tmp_path))
    assert resumed.step_count == stop
    train(accelerator, model, wrapped, stop, 14)
    tiny.assert_same_run(model, resumed, whole, opt)


class Inf(nn.Module):
    """A block whose parameters get gradients that overflow when told so."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.factor = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block(x)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * self.factor)
        return y


def test_a_scaler_in_the_wrapper_sees_an_overflow_in_the_probe() -> None:
    model = tiny.stack()
    model.blocks[0].up = Inf(model.blocks[0].up)
    opt = grass.GrassAdamW(model, config=tiny.config(), pattern="blocks.*")
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    prepared, wrapped = accelerator.prepare(model, opt)
    for index in range(9):
        model.blocks[0].up.factor = float("inf") if index == 1 else 1.0
        accelerator.backward(accelerator.scaler.scale(tiny.loss_of(prepared, tiny.batch(index))))
        wrapped.step()
        wrapped.zero_grad()
    assert accelerator.scaler.get_scale() == 128
    assert opt.phase == "adapt"
    assert opt.importance.isfinite().all()


# -- an Accelerator that was left inside an accumulation ---------------------------------------------------------------


def leave_an_accumulation() -> Accelerator:
    """Another training in this process, which failed in the first of two micro-batches."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    other = accelerator.prepare(tiny.stack(seed=9))
    with pytest.raises(RuntimeError, match="out of memory"), accelerator.accumulate(other):
        raise RuntimeError("out of memory")
    assert not GradientState().sync_gradients
    return accelerator


def test_an_accumulation_left_elsewhere_does_not_delay_fused_updates() -> None:
    leave_an_accumulation()
    model, opt = start(probe_steps=0, fused_backward=True)
    tiny.loss_of(model, tiny.batch(0)).backward()
    assert opt.torn_layers, "no layer was updated inside backward"
    assert all(p.grad is None for p in model.parameters())


def test_accelerate_still_declares_accumulation_for_what_it_has_prepared() -> None:
    accelerator = leave_an_accumulation()
    model, opt = start(probe_steps=0, fused_backward=True)
    prepared, wrapped = accelerator.prepare(model, opt)
    for index in range(4):
        with accelerator.accumulate(prepared):
            accelerator.backward(tiny.loss_of(prepared, tiny.batch(index)))
            assert bool(opt.torn_layers) == accelerator.sync_gradients
            wrapped.step()
            wrapped.zero_grad()
    assert opt.step_count == 2


def test_accelerate_may_have_prepared_a_part_of_the_model() -> None:
    model = nn.ModuleDict({"inner": tiny.stack(), "extra": nn.Linear(2, 2)})
    opt = grass.GrassAdamW(
        model, config=tiny.config(probe_steps=0, fused_backward=True), pattern="inner.blocks.*"
    )
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    inner, _ = accelerator.prepare(model["inner"], opt)
    with accelerator.accumulate(inner):
        accelerator.backward(tiny.loss_of(inner, tiny.batch(0)))
    assert not opt.torn_layers
