"""Failures these tests catch: frozen layers that are not measured, or measured at other weights or data than the active
ones; a measurement that changes what the active layers learn, or leaves gradients or ``requires_grad`` behind; norms
of an accumulated step beside those of micro-batches; a loss scale or an overflow in the importance.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grass
from tests.optim.test_probe import measured
from tests.support import tiny

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter"),
]
PROBE = 3
SETTINGS: dict[str, Any] = {"sampler": "remeasured", "sample_interval": 4, "update_interval": 8, "ema": 0.25}


def is_remeasured(step: int) -> bool:
    """Return if the importance is updated at the end of a step: one step before a switch, as draw_ahead is 1."""
    return step >= PROBE and (step + 1 - PROBE + 1) % 8 == 0


def backward(model: nn.Module, opt: grass.GrassAdamW, ids: list[Tensor]) -> None:
    for part in ids[:-1]:
        with opt.accumulate():
            (tiny.loss_of(model, part) / len(ids)).backward()
    (tiny.loss_of(model, ids[-1]) / len(ids)).backward()


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["llama", "tied", "t5", "stack"])
def test_the_importance_follows_the_norms_of_all_layers(kind: str, fused: bool, micro_batches: int) -> None:
    """Of several micro-batches the first one counts, for all: to a layer that trains the others are added."""
    makers = {"llama": tiny.llama, "tied": lambda: tiny.llama(tied=True), "t5": tiny.t5, "stack": tiny.stack}
    model = makers[kind]()
    opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(fused_backward=fused, **SETTINGS))
    owner = tiny.layer_names(model, opt)
    num_remeasured = 0
    for step in range(36):
        active, importance = opt.active_layers, opt.importance
        for name, p in model.named_parameters():
            trains = owner[name] in (*active, -1)
            assert p.requires_grad == (opt.phase == "probe" or is_remeasured(step) or trains)
        ids = [tiny.batch(step * micro_batches + micro) for micro in range(micro_batches)]
        if is_remeasured(step):
            rms = measured(model, opt, ids[:1]) * micro_batches**-0.5
        backward(model, opt, ids)
        held = [
            name
            for name, p in model.named_parameters()
            if p.grad is not None and owner[name] not in (*active, -1)
        ]
        assert len(held) <= 1, "one small gradient is kept for a GradScaler"
        opt.step()
        opt.zero_grad()
        if is_remeasured(step):
            num_remeasured += 1
            torch.testing.assert_close(opt.importance, 0.25 * rms + 0.75 * importance, rtol=1e-5, atol=0)
        elif step != PROBE - 1:
            assert torch.equal(opt.importance, importance)
    assert (num_remeasured, opt.num_refreshes) == (4, 5)


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({}, None),
        ({}, 0.1),
        ({"fused_backward": True}, None),
        ({"offload": "streamed"}, 0.1),
        ({"offload": "resident", "fused_backward": True}, None),
    ],
    ids=str,
)
def test_measuring_changes_nothing_that_is_trained(changes: dict[str, Any], limit: float | None) -> None:
    """If the probabilities do not depend on the importance, every bit is that of adaptive sampling."""
    results = []
    for sampler in ("adaptive", "remeasured"):
        model = tiny.llama()
        config = tiny.config(**{**SETTINGS, "sampler": sampler}, **changes, temperature=1e9)
        opt = grass.GrassAdamW(model, lr=1e-2, max_grad_norm=limit, config=config)
        norms = []
        for step in range(24):
            backward(model, opt, [tiny.batch(2 * step), tiny.batch(2 * step + 1)])
            opt.step()
            norms.append(opt.grad_norm)
            opt.zero_grad()
        results.append((tiny.weights(model), opt.state_dict()["state"], norms[PROBE:]))
        assert min(opt.draw_counts) < max(opt.draw_counts), "not all layers are always trained"
    tiny.assert_identical(results[0][0], results[1][0])
    for index, state in results[0][1].items():
        for key, value in state.items():
            assert torch.equal(value, results[1][1][index][key])
    torch.testing.assert_close(results[0][2], results[1][2])


def test_layers_that_never_train_are_measured_again() -> None:
    """The importance of a layer that was frozen since the probe follows its gradient; by default it is old."""
    for sampler, moves in (("adaptive", False), ("remeasured", True)):
        model = tiny.stack()
        config = tiny.config(**{**SETTINGS, "sampler": sampler}, temperature=0.001)
        opt = grass.GrassAdamW(model, lr=1e-2, config=config)
        tiny.train(model, opt, 0, PROBE)
        probed = opt.importance
        tiny.train(model, opt, PROBE, 12)
        never = [layer for layer, count in enumerate(opt.draw_counts) if not count]
        assert never
        assert torch.equal(opt.importance[never], probed[never]) != moves


def test_no_step_is_lost_without_a_probe() -> None:
    model = tiny.stack()
    opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(**{**SETTINGS, "probe_steps": 0}))
    for step in range(16):
        before = tiny.weights(model)
        tiny.train(model, opt, step, step + 1)
        assert any(not torch.equal(before[name], now) for name, now in tiny.weights(model).items())
    assert opt.num_refreshes == 2
    assert opt.importance.std() > 0


@pytest.mark.parametrize("unscale", [False, True])
def test_a_loss_scale_does_not_enter_the_importance(unscale: bool) -> None:
    """With a GradScaler, which clips if it unscales; the clipping of this library does not see frozen layers."""
    results = []
    for scale in (None, 2.0**10):
        model = tiny.stack()
        opt = grass.GrassAdamW(model, lr=1e-3, config=tiny.config(**SETTINGS))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(PROBE + 9):
            scaler.scale(tiny.loss_of(model, tiny.batch(step))).backward()
            if unscale:
                scaler.unscale_(opt)
                total = nn.utils.clip_grad_norm_(model.parameters(), 1e6)
                owner = tiny.layer_names(model, opt)
                kept = [
                    p.grad
                    for name, p in model.named_parameters()
                    if p.grad is not None and owner[name] in (*opt.active_layers, -1)
                ]
                if opt.phase == "adapt":
                    torch.testing.assert_close(total, torch.nn.utils.get_total_norm(kept), rtol=1e-5, atol=0)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        results.append(opt.importance)
        assert opt.num_refreshes == 2
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("scaled", [False, True])
def test_an_overflow_in_a_frozen_layer_is_left_out(scaled: bool) -> None:
    """The step is neither skipped nor clipped to nothing, as the gradients of what trains are finite."""
    results = []
    for factor in (1.0, float("inf")):
        model = tiny.stack()
        opt = grass.GrassAdamW(model, lr=1e-3, config=tiny.config(**{**SETTINGS, "probe_steps": 0}))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=scaled)
        owner = tiny.layer_names(model, opt)
        for step in range(7):
            frozen = next(layer for layer in range(len(opt.layers)) if layer not in opt.active_layers)
            p = next(p for name, p in model.named_parameters() if owner[name] == frozen)
            if step == 6:
                assert p.requires_grad
                p.register_hook(lambda grad, factor=factor: grad * factor)
            scaler.scale(tiny.loss_of(model, tiny.batch(step))).backward()
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            before = tiny.weights(model)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        assert any(not torch.equal(before[name], now) for name, now in tiny.weights(model).items())
        results.append((tiny.weights(model), opt.importance))
    assert opt.nonfinite_norms == 1
    tiny.assert_identical(results[0][0], results[1][0])
    others = [layer for layer in range(len(opt.layers)) if layer != frozen]
    assert torch.equal(results[0][1][others], results[1][1][others])
    assert results[1][1][frozen] == 1, "not measured"


def test_nothing_is_left_behind() -> None:
    model = tiny.stack()
    config = tiny.config(**{**SETTINGS, "sample_interval": 1, "update_interval": 1})
    opt = grass.GrassAdamW(model, lr=1e-3, config=config)
    tiny.train(model, opt, 0, 5)
    handles = len(opt._lease.handles)
    tiny.train(model, opt, 5, 10)
    assert len(opt._lease.handles) == handles
    tiny.loss_of(model, tiny.batch(10)).backward()
    owner, active = tiny.layer_names(model, opt), opt.active_layers
    opt.release()
    left = {owner[name] for name, p in model.named_parameters() if p.grad is not None}
    assert left == {-1, *active}


def test_gradients_from_autograd_grad_are_measured_too() -> None:
    """They are assigned, so that no hook sees them."""
    model = tiny.stack()
    opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(**{**SETTINGS, "ema": 1.0}))
    for step in range(PROBE + 7):
        before, active = tiny.weights(model), opt.active_layers
        if is_remeasured(step):
            wanted = measured(model, opt, [tiny.batch(step)])
        params = [p for p in model.parameters() if p.requires_grad]
        for p, grad in zip(
            params, torch.autograd.grad(tiny.loss_of(model, tiny.batch(step)), params), strict=True
        ):
            p.grad = grad
        opt.step()
        opt.zero_grad()
        owner, now = tiny.layer_names(model, opt), tiny.weights(model)
        changed = {owner[name] for name in now if not torch.equal(now[name], before[name])}
        assert changed == ({-1, *active} if active else set())
    torch.testing.assert_close(opt.importance, wanted, rtol=1e-5, atol=0)
