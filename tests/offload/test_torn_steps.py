"""Would catch: a backward that failed and left weights, moments and counters that do not agree, a state that cannot be
saved, an optimizer that cannot go on, or one that updates twice without a word.
"""

import copy
import io
import re
import warnings
from typing import Any

import pytest
import torch

import grass
import grass_kernels
from grass.errors import BackwardError
from tests.support import tiny
from tests.support.fused import FUSED, MODES, STEPS, backward, compare, failing, stack, torn

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")


@pytest.mark.parametrize("offload", MODES)
def test_a_bad_setting_of_a_later_group_tears_nothing(offload: str) -> None:
    """The head is complete first: with its group's good settings it would be updated, and then the rest refused."""
    model = tiny.stack()
    head = list(model.head.parameters())
    rest = [p for p in model.parameters() if all(p is not q for q in head)]
    config = tiny.config(probe_steps=1, **FUSED, **MODES[offload])
    opt = grass.GrassAdamW([{"params": rest}, {"params": head}], model=model, lr=1e-2, config=config)
    tiny.train(model, opt, 0, 3)
    before, count = tiny.weights(model), opt.step_count
    opt.param_groups[0]["eps"] = -1.0
    with pytest.raises(grass_kernels.KernelArgumentError, match="eps"):
        backward(model, 3)
    assert opt.torn_layers == ()
    assert all(torch.equal(before[name], value) for name, value in tiny.weights(model).items())
    opt.param_groups[0]["eps"] = 1e-8
    opt.zero_grad()
    tiny.train(model, opt, 3, 5)
    assert opt.step_count == count + 2


@pytest.mark.parametrize("offload", MODES)
def test_a_torn_step_is_whole_in_every_layer(offload: str) -> None:
    model, opt = stack(active_layers=3, **MODES[offload])
    tiny.train(model, opt, 1, 3)
    *finished, lowest = sorted(opt.active_layers, reverse=True)
    # torch's own AdamW, with the states of before, for one more step on the same gradients
    twin = copy.deepcopy(model)
    own = dict(twin.named_parameters())
    independent = torch.optim.AdamW(
        [q for q in twin.parameters() if q.requires_grad], lr=1e-2, foreach=False, fused=False
    )
    opt.state_dict()  # brings resident states home
    for name, p in model.named_parameters():
        if p.requires_grad:
            independent.state[own[name]] = {key: value.clone() for key, value in opt.state[p].items()}
    backward(twin, 3)
    independent.step()
    before = tiny.weights(model)
    counters = {name: float(opt.state[p]["step"]) for name, p in model.named_parameters() if p.requires_grad}

    failing(model, 3, lowest)
    assert opt.torn_layers == (5, *finished)
    assert opt.step_count == 3
    opt.state_dict()
    owner = tiny.layer_names(model, opt)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, before[name])
        elif owner[name] in finished or name == "head.weight":
            assert float(opt.state[p]["step"]) == counters[name] + 1
            torch.testing.assert_close(p, own[name], rtol=1e-5, atol=1e-7)
            assert not torch.equal(p, before[name])
            for key in ("exp_avg", "exp_avg_sq"):
                expected = independent.state[own[name]][key]
                torch.testing.assert_close(opt.state[p][key], expected, rtol=1e-5, atol=1e-9)
        else:
            assert torch.equal(p, before[name])
            assert float(opt.state[p]["step"]) == counters[name]


@pytest.mark.parametrize("resume", [{}, MODES["streamed"], {**MODES["resident"], **FUSED}, FUSED], ids=str)
@pytest.mark.parametrize("offload", MODES)
def test_a_torn_state_is_saved_and_loading_it_warns(offload: str, resume: dict[str, Any]) -> None:
    model, opt = torn(offload)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    twin = tiny.stack(seed=7)
    settings = tiny.config(probe_steps=1, active_layers=3, sample_interval=6, **resume)
    other = grass.GrassAdamW(twin, lr=1e-2, config=settings)
    twin.load_state_dict(state["model"])
    with pytest.warns(UserWarning, match=r"inside a step that did not end: .* one update ahead"):
        other.load_state_dict(state["optimizer"])
    assert other.torn_layers == ()
    opt.zero_grad()
    tiny.train(model, opt, 4, STEPS)
    tiny.train(twin, other, 4, STEPS)
    compare(model, opt, twin, other)


def test_the_warning_names_what_torn_layers_names() -> None:
    _, opt = torn()
    names = list(opt.torn_layers)
    assert names[0] == 5, "what is in no layer, by the number after the last layer's"
    with pytest.warns(UserWarning, match=re.escape(str(names))):
        torn()[1].load_state_dict(opt.state_dict())


def test_a_state_that_is_not_torn_does_not_warn() -> None:
    model, opt = stack()
    tiny.train(model, opt, 1, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stack()[1].load_state_dict(opt.state_dict())


@pytest.mark.parametrize("offload", MODES)
@pytest.mark.parametrize("how", ["step", "zero_grad"])
def test_after_a_failure_training_goes_on(how: str, offload: str) -> None:
    model, opt = torn(offload)
    count, slots = opt.step_count, opt.torn_layers
    if how == "step":
        opt.step()
        norms = opt.layer_grad_norms
        assert all(norms[slot] > 0 for slot in slots if slot < 5)
    opt.zero_grad()
    assert opt.torn_layers == ()
    assert all(p.grad is None for p in model.parameters())
    assert opt.step_count == count + (how == "step")
    tiny.train(model, opt, 4, STEPS)
    assert opt.step_count == count + (how == "step") + STEPS - 4
    assert opt.importance.isfinite().all()
    # with or without offloading: the same
    twin, other = torn()
    if how == "step":
        other.step()
    other.zero_grad()
    tiny.train(twin, other, 4, STEPS)
    compare(model, opt, twin, other)


def half_way(model: Any, opt: Any, index: int) -> None:
    """A backward that fails when some gradients of an active layer have arrived."""
    layer = model.blocks[min(opt.active_layers)]
    arrived = []

    def fail(p: torch.Tensor) -> None:
        arrived.append(p)
        if len(arrived) == 2:
            raise MemoryError

    handles = [p.register_post_accumulate_grad_hook(fail) for p in layer.parameters()]
    with pytest.raises(MemoryError):
        backward(model, index)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("offload", MODES)
@pytest.mark.parametrize("fail", [failing, half_way], ids=["between layers", "inside a layer"])
def test_after_an_error_the_models_own_zero_grad_leads_on(fail: Any, offload: str) -> None:
    """As finders of a batch size do it after running out of memory: they do not know the optimizer."""
    runs = []
    for clear in ("model", "optimizer"):
        model, opt = stack(active_layers=3, sample_interval=6, **MODES[offload])
        tiny.train(model, opt, 1, 3)
        if fail is failing:
            failing(model, 3, min(opt.active_layers))
        else:
            half_way(model, opt, 3)
        if clear == "model":
            model.zero_grad()
            with pytest.warns(UserWarning, match="an earlier backward has failed after"):
                backward(model, 4)
            opt.step()
            opt.zero_grad()
            tiny.train(model, opt, 5, STEPS)
        else:
            opt.zero_grad()
            tiny.train(model, opt, 4, STEPS)
        runs.append((model, opt))
    compare(*runs[0], *runs[1])


def test_gradients_of_a_backward_that_failed_are_refused_in_the_next() -> None:
    model, opt = stack(active_layers=3, sample_interval=6)
    tiny.train(model, opt, 1, 3)
    half_way(model, opt, 3)
    with pytest.raises(BackwardError, match="some of its gradients are still there"):
        backward(model, 3)
