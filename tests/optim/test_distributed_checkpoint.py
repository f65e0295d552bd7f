"""Failures these tests catch: a method that `torch.distributed.checkpoint` loses, half loads or disturbs by
looking at it; state of frozen or never drawn layers that gets lost on the way; a run that continues otherwise.
"""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import grass
from tests.support import tiny

# The library's own remarks about one process, and its own use of names that torch deprecates
pytestmark = [
    pytest.mark.slow,
    pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter"),
    pytest.mark.filterwarnings("ignore:.*torch.distributed is (disabled, )?unavailable:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]

STOPS = [0, 1, 3, 5, 7, 11]
END = 15


def start(kind: str = "stack", seed: int = 0, **options: object) -> tuple[nn.Module, grass.GrassAdamW]:
    model = {"stack": tiny.stack, "tied": lambda s: tiny.llama(s, tied=True)}[kind](seed)
    return model, grass.GrassAdamW(model, lr=1e-2, config=tiny.config(**options))


def finished(kind: str, **options: object) -> tuple[nn.Module, grass.GrassAdamW]:
    model, opt = start(kind, **options)
    tiny.train(model, opt, 0, END)
    return model, opt


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("kind", ["stack", "tied"])
def test_a_state_goes_through_names_and_back(kind: str, stop: int) -> None:
    whole = finished(kind)
    model, opt = start(kind)
    tiny.train(model, opt, 0, stop)
    before = copy.deepcopy(tiny.flat(opt.state_dict()))
    state = copy.deepcopy(get_optimizer_state_dict(model, opt))
    weights = copy.deepcopy(get_model_state_dict(model))
    if stop:
        tiny.assert_identical(tiny.flat(opt.state_dict()), before)
    fresh = start(kind, seed=3)
    set_model_state_dict(fresh[0], weights)
    set_optimizer_state_dict(*fresh, state)
    assert fresh[1].step_count == stop
    tiny.train(*fresh, stop, END)
    tiny.assert_same_run(*fresh, *whole)
    tiny.train(model, opt, stop, END)  # whoever was looked at goes on undisturbed
    tiny.assert_same_run(model, opt, *whole)


@pytest.mark.parametrize("sampler", ["uniform", "cyclic"])
@pytest.mark.parametrize("stop", [0, 4])
def test_without_a_probe(sampler: str, stop: int) -> None:
    whole = finished("stack", sampler=sampler)
    model, opt = start(sampler=sampler)
    tiny.train(model, opt, 0, stop)
    state = copy.deepcopy(get_optimizer_state_dict(model, opt))
    weights = copy.deepcopy(get_model_state_dict(model))
    fresh = start(seed=3, sampler=sampler)
    set_model_state_dict(fresh[0], weights)
    set_optimizer_state_dict(*fresh, state)
    tiny.train(*fresh, stop, END)
    tiny.assert_same_run(*fresh, *whole)
    tiny.train(model, opt, stop, END)
    tiny.assert_identical(tiny.weights(model), tiny.weights(whole[0]))


@pytest.mark.parametrize("stop", STOPS)
def test_saved_to_disk_and_loaded_in_place(tmp_path: Path, stop: int) -> None:
    whole = finished("stack")
    model, opt = start()
    tiny.train(model, opt, 0, stop)
    weights, state = get_state_dict(model, opt)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    fresh = start(seed=3)
    weights, state = get_state_dict(*fresh)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(*fresh, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    assert fresh[1].step_count == stop
    assert fresh[1].active_layers == opt.active_layers
    tiny.train(*fresh, stop, END)
    tiny.assert_same_run(*fresh, *whole)


def test_into_an_optimizer_that_has_trained_it_loads_whole_or_says_why_not() -> None:
    """The library drops the state of what does not require grad: of every frozen layer."""
    model, opt = start()
    tiny.train(model, opt, 0, 10)
    state = copy.deepcopy(get_optimizer_state_dict(model, opt))
    weights = copy.deepcopy(get_model_state_dict(model))
    other = start(seed=3)
    tiny.train(*other, 0, 10)
    set_model_state_dict(other[0], weights)
    before = tiny.flat(other[1].state_dict())
    with pytest.raises(grass.StateMismatchError, match="construct the optimizer anew"):
        set_optimizer_state_dict(*other, state)
    tiny.assert_identical(tiny.flat(other[1].state_dict()), before)


def test_the_flat_form_says_that_it_has_lost_the_method() -> None:
    """It keeps of a group only what the optimizer's own groups have, so what is loaded is plain AdamW's."""
    model, opt = start()
    tiny.train(model, opt, 0, 5)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = copy.deepcopy(get_optimizer_state_dict(model, opt, options=options))
    fresh = start(seed=3)
    with pytest.warns(UserWarning, match="the method starts at its beginning"):
        set_optimizer_state_dict(*fresh, state, options=options)
    assert fresh[1].phase == "probe"
    for p, q in zip(fresh[0].parameters(), model.parameters(), strict=True):
        if opt.state.get(q) and opt.state[q]["step"] > 0:
            assert torch.equal(fresh[1].state[p]["exp_avg"], opt.state[q]["exp_avg"])
