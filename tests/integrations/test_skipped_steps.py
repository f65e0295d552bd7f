"""Steps that a scaler skips under accelerate, and who must know: the learning-rate schedule, Trainer, the method.

Would catch: an optimizer whose skipped step accelerate does not see, so that `step_was_skipped` is False where it is
True for torch's, and the schedule advances, Trainer's too; a wrapped step that differs from torch's in parameters,
rates or the scaler's state; a prepared optimizer that has lost torch's answer.

Oracle: `torch.optim.AdamW` in the same wrapper.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

import grass
from tests.support import tiny

OVERFLOWS = (0, 2, 3)
STEPS = 7


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def accelerator_with_scaler(**options: Any) -> Accelerator:
    """As with ``mixed_precision="fp16"`` on a GPU, but on the CPU."""
    accelerator = Accelerator(cpu=True, **options)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    return accelerator


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def run(make: Any, clip: float | None = None, micro_batches: int = 1) -> dict[str, Any]:
    """A prepared training with overflows: which steps were skipped, the rates, the weights."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = accelerator_with_scaler(gradient_accumulation_steps=micro_batches)
    model = tiny.stack(layers=2)
    optimizer = make(model)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, schedule(optimizer))
    skipped, rates = [], []
    for step in range(STEPS):
        for micro in range(micro_batches):
            with accelerator.accumulate(model):
                loss = tiny.loss_of(model, tiny.batch(micro_batches * step + micro))
                overflows = step in OVERFLOWS and micro == 0
                accelerator.backward(loss * math.inf if overflows else loss)
                if clip is not None and accelerator.sync_gradients:
                    accelerator.scaler.unscale_(optimizer.optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        skipped.append((optimizer.step_was_skipped, accelerator.optimizer_step_was_skipped))
        rates.append(optimizer.param_groups[0]["lr"])
    return {
        "skipped": skipped,
        "rates": rates,
        "scaler": accelerator.scaler.state_dict(),
        "weights": tiny.weights(accelerator.unwrap_model(model)),
    }


def ours(**options: Any) -> Any:
    return lambda model: grass.AdamW(model.parameters(), lr=1e-3, **options)


def theirs(**options: Any) -> Any:
    return lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, **options)


def the_method(fused: bool | None, offload: str = "none", probe_steps: int = 0) -> Any:
    """With all layers active."""

    def make(model: nn.Module) -> grass.GrassAdamW:
        config = tiny.config(
            active_layers=2,
            probe_steps=probe_steps,
            sample_interval=100,
            update_interval=100,
            offload=offload,
        )
        return grass.GrassAdamW(model, lr=1e-3, fused=fused, config=config, pattern="blocks.*")

    return make


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["skipped"] == expected["skipped"]
    assert found["rates"] == expected["rates"]
    assert found["scaler"] == expected["scaler"]
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.1], ids=["plain", "clipped"])
@pytest.mark.parametrize("fused", [None, False, True])
def test_skipped_steps_are_seen_as_torchs_are(fused, clip):
    expected = run(theirs(fused=fused), clip)
    if not fused:
        assert expected["skipped"] == [(step in OVERFLOWS,) * 2 for step in range(STEPS)]
        assert expected["rates"][-1] == 1e-3 * 0.5 ** (STEPS - len(OVERFLOWS))
    compare(run(ours(fused=fused), clip), expected)


@pytest.mark.parametrize("fused", [None, True])
def test_skipped_steps_under_accumulation(fused):
    compare(run(ours(fused=fused), micro_batches=2), run(theirs(fused=fused), micro_batches=2))


@pytest.mark.parametrize(
    ("fused", "offload"), [(None, "none"), (True, "none"), (None, "streamed"), (None, "resident")]
)
def test_skipped_steps_of_the_method_are_seen_as_torchs_are(fused, offload):
    compare(run(the_method(fused, offload)), run(theirs(fused=fused)))


@pytest.mark.parametrize("fused", [None, True])
def test_skipped_steps_of_a_probe_are_seen_as_torchs_are(fused):
    """The scaler sees an overflow in the probe too, which measures gradients and frees them."""
    found, expected = run(the_method(fused, probe_steps=100)), run(theirs(fused=fused))
    assert found["skipped"] == expected["skipped"]
    assert found["rates"] == expected["rates"]
    assert found["scaler"] == expected["scaler"]


@pytest.mark.parametrize("fused", [None, False, True])
def test_preparation_keeps_torchs_answer(fused):
    """accelerate saves and loads the state when it prepares an optimizer."""
    answers = []
    for make in (ours(fused=fused), theirs(fused=fused), the_method(fused)):
        optimizer = make(tiny.stack(layers=2))
        prepared = accelerator_with_scaler().prepare(optimizer)
        answers.append(bool(getattr(prepared.optimizer, "_step_supports_amp_scaling", False)))
    assert answers == [bool(fused)] * 3


def test_trainers_schedule_waits_for_a_step():
    """Trainer advances its schedule unless `accelerator.optimizer_step_was_skipped`, and in every step anew."""
    for cls in (torch.optim.AdamW, grass.AdamW):
        AcceleratorState._reset_state(True)
        accelerator = accelerator_with_scaler()
        (p,) = (nn.Parameter(torch.ones(3)),)
        optimizer = cls([p], lr=1.0)
        scheduler = schedule(optimizer)
        optimizer = accelerator.prepare(optimizer)
        advanced = []
        for step in range(4):
            accelerator.scaler.scale(torch.ones(()))
            p.grad = torch.full((3,), math.inf if step in (0, 2) else 1024.0)
            optimizer.step()
            if not accelerator.optimizer_step_was_skipped:
                scheduler.step()
                advanced.append(step)
        assert advanced == [1, 3], cls
        assert scheduler.get_last_lr() == [0.25], cls
