"""Failures these tests catch: a reprobe that updates something, or that measures the active layers only; frozen layers
that stay trainable after it; a state in host memory that is not where it is needed after it; norms of an accumulated
step mixed with those of micro-batches; integrations that take it for the probe at the beginning.
"""

import pytest
import torch

import grass
from grass.integrations.monitor import has_trained_nothing
from tests.optim.test_probe import measured
from tests.support import tiny

pytestmark = pytest.mark.filterwarnings("error")
SETTINGS = {"reprobe_steps": 1, "sample_interval": 4, "update_interval": 8, "ema": 0.25}


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("fused", [False, True])
def test_it_measures_all_layers_and_updates_nothing(micro_batches: int, fused: bool) -> None:
    model = tiny.llama()
    opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(fused_backward=fused, **SETTINGS))
    owner = tiny.layer_names(model, opt)
    num_measured = 0
    for step in range(40):
        active, importance, before = opt.active_layers, opt.importance, tiny.weights(model)
        is_reprobe = step >= 3 and (step + 1 - 3 + 1) % 8 == 0
        assert opt.phase == ("probe" if step < 3 or is_reprobe else "adapt")
        assert has_trained_nothing(opt) == (step < 3)
        for name, p in model.named_parameters():
            assert p.requires_grad == (opt.phase == "probe" or owner[name] in (*active, -1))
        ids = [tiny.batch(step * micro_batches + micro) for micro in range(micro_batches)]
        rms = measured(model, opt, ids)
        for part in ids[:-1]:
            with opt.accumulate():
                (tiny.loss_of(model, part) / micro_batches).backward()
        (tiny.loss_of(model, ids[-1]) / micro_batches).backward()
        opt.step()
        opt.zero_grad()
        if is_reprobe:
            num_measured += 1
            assert active == ()
            tiny.assert_identical(tiny.weights(model), before)
            torch.testing.assert_close(opt.importance, 0.25 * rms + 0.75 * importance, rtol=1e-5, atol=0)
        elif step != 2:
            assert torch.equal(opt.importance, importance)
    assert num_measured == 4
    assert opt.num_refreshes == 5


def test_training_goes_on_with_the_layers_of_the_period() -> None:
    """Each parameter is stepped in the steps in which its layer is active, and only there."""
    model = tiny.stack()
    opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(**SETTINGS))
    owner = tiny.layer_names(model, opt)
    stepped = dict.fromkeys([-1, *range(5)], 0)
    for step in range(39):
        if opt.phase == "adapt":
            for layer in (-1, *opt.active_layers):
                stepped[layer] += 1
        tiny.train(model, opt, step, step + 1)
    assert stepped[-1] == 39 - 3 - 4
    for name, p in model.named_parameters():
        assert float(opt.state[p]["step"]) == stepped[owner[name]]
    assert sum(opt.draw_counts) == 2 * 36 // 4


def test_frozen_weights_are_measured_again_though_they_never_train() -> None:
    """The importance of a layer that was frozen since the probe follows its gradient."""
    for reprobe_steps, moves in ((0, False), (1, True)):
        config = tiny.config(**{**SETTINGS, "reprobe_steps": reprobe_steps}, temperature=0.001)
        model = tiny.stack()
        opt = grass.GrassAdamW(model, lr=1e-2, config=config)
        tiny.train(model, opt, 0, 3)
        probed = opt.importance
        tiny.train(model, opt, 3, 12)
        never = [layer for layer, count in enumerate(opt.draw_counts) if not count]
        assert never
        assert torch.equal(opt.importance[never], probed[never]) != moves
