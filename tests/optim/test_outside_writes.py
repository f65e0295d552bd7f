"""Parameters with exact weights that somebody else writes to: what is left of their remainders.

Would catch: a remainder that outlives a write from outside, in the optimizer or in a copy that is made of it then; one
that does not outlive a step, a look or the loading of a model; parameters that share a version counter, of which each
update would look like a write to the other; versions that nobody's write has advanced.

Runs in both passes.
"""

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn

import grass
from tests.support import tiny
from tests.support.exact import (
    BF16,
    F32,
    HYPER,
    assert_bits,
    assert_same_state,
    copy_deeply,
    exact_weights,
    normal,
    parameters,
    pickle_and_back,
    reload,
    set_grads,
    train,
)


def write_in_place(model: nn.Module, values: Tensor) -> None:
    with torch.no_grad():
        model.weight.copy_(values)


def replace_data(model: nn.Module, values: Tensor) -> None:
    model.weight.data = values.clone()


def load(model: nn.Module, values: Tensor) -> None:
    model.load_state_dict({"weight": values})


def write_half(model: nn.Module, values: Tensor) -> None:
    """The other half keeps its visible value, and starts anew too: a version belongs to the whole tensor."""
    with torch.no_grad():
        model.weight[:2] = values[:2]


@pytest.mark.parametrize("write", [write_in_place, replace_data, load, write_half])
@pytest.mark.parametrize("with_gradient", [True, False], ids=["at once", "after a step without it"])
def test_who_writes_a_parameter_starts_it_anew(write, with_gradient):
    model, values = nn.Linear(5, 4, bias=False).to(BF16), normal(4, 5, seed=7).to(BF16)
    other = parameters()
    optimizer = grass.AdamW([model.weight, *other], **HYPER, master_weights=True)
    train(optimizer, [model.weight, *other], range(4))
    assert (optimizer.state[model.weight]["remainder"] != 0).any()
    kept = {key: value.clone() for key, value in optimizer.state[model.weight].items()}
    others = [exact_weights(optimizer, p) for p in other]
    write(model, values)
    if not with_gradient:
        model.weight.grad = None
        set_grads(other, 4)
        optimizer.step()
        others = [exact_weights(optimizer, p) for p in other]

    fresh = nn.Parameter(model.weight.detach().clone())
    reference = grass.AdamW([fresh], **HYPER, master_weights=True)
    saved = reference.state_dict()
    saved["state"] = {0: {**kept, "remainder": torch.zeros_like(kept["remainder"])}}
    reference.load_state_dict(saved)
    model.weight.grad = fresh.grad = normal(4, 5, seed=77).to(BF16)
    for p in other:
        p.grad = None
    optimizer.step()
    reference.step()
    assert_same_state(optimizer, [model.weight], reference, [fresh])
    for p, expected in zip(other, others, strict=True):
        assert_bits(exact_weights(optimizer, p), expected)


def test_who_does_not_write_keeps_it():
    """Reading, freezing, views, gradients, a step of no effect and one that is skipped are no writes."""
    params, untouched = parameters(), parameters()
    optimizer = grass.AdamW(params, **HYPER, master_weights=True, max_grad_norm=1e6)
    reference = grass.AdamW(untouched, **HYPER, master_weights=True, max_grad_norm=1e6)
    train(optimizer, params, range(3))
    train(reference, untouched, range(3))
    for p in params:
        p.detach().float().sum()
        p.requires_grad_(False).requires_grad_(True)
        p.view(-1)
        copy.deepcopy(p)
    sum((p * p).sum() for p in params).backward()
    optimizer.zero_grad()
    optimizer.step()  # without gradients
    set_grads(params, 8)
    params[0].grad[0, 0] = torch.inf
    optimizer.step()
    optimizer.found_inf = torch.tensor(1.0)
    train(optimizer, params, [9])
    del optimizer.found_inf
    train(optimizer, params, range(3, 5))
    train(reference, untouched, range(3, 5))
    assert_same_state(optimizer, params, reference, untouched)


# Copies


@pytest.mark.parametrize("way", [reload, copy_deeply, pickle_and_back])
@pytest.mark.parametrize("with_gradient", [True, False], ids=["of the last step", "of an earlier step"])
def test_what_was_written_before_a_copy_is_anew_in_it(way, with_gradient):
    """And the original goes on as if nobody had looked."""
    params, untouched = parameters(), parameters()
    optimizers = [grass.AdamW(own, **HYPER, master_weights=True) for own in (params, untouched)]
    for optimizer, own in zip(optimizers, (params, untouched), strict=True):
        train(optimizer, own, range(3))
        if not with_gradient:
            own[0].grad = None
            set_grads(own[1:], 3)
            optimizer.step()
        assert (optimizer.state[own[0]]["remainder"] != 0).any()
        with torch.no_grad():
            own[0].fill_(1.0)
    optimizer, reference = optimizers
    kept = [exact_weights(optimizer, p) for p in params[1:]]
    other, its_params = way(optimizer, params)
    for group in other.param_groups:
        group["lr"] = 0.0
    train(other, its_params, [4])
    assert_bits(exact_weights(other, its_params[0]), torch.ones(4, 5))
    for p, expected in zip(its_params[1:], kept, strict=True):
        assert_bits(exact_weights(other, p), expected)
    assert (other.state[its_params[1]]["remainder"] != 0).any()

    train(optimizer, params, [4, 5])
    train(reference, untouched, [4, 5])
    assert_same_state(optimizer, params, reference, untouched)


def test_a_copy_notices_writes_after_its_first_step():
    """Those before are taken for the loading of its model."""
    params = parameters()
    optimizer = grass.AdamW(params, **HYPER, master_weights=True)
    train(optimizer, params, range(3))
    copied, its_params = copy_deeply(optimizer, params)
    train(copied, its_params, [3])
    with torch.no_grad():
        its_params[0].fill_(1.0)
    for group in copied.param_groups:
        group["lr"] = 0.0
    train(copied, its_params, [4])
    assert (copied.state[its_params[0]]["remainder"] == 0).all()
    assert (copied.state[its_params[1]]["remainder"] != 0).any()


@pytest.mark.parametrize("weights_first", [True, False], ids=["weights first", "weights last"])
def test_a_run_taken_back_has_the_remainders_of_its_weights(weights_first):
    """To load a model is to write to it: what `load_state_dict` brings is not dropped for that."""
    model = nn.Linear(5, 4).to(BF16)
    params = list(model.parameters())
    optimizer = grass.AdamW(params, **HYPER, master_weights=True)
    train(optimizer, params, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(optimizer, params, range(3, 6))
    expected = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    if weights_first:
        model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    if not weights_first:
        model.load_state_dict(saved[0])
    assert any((state["remainder"] != 0).any() for state in optimizer.state.values())
    train(optimizer, params, range(3, 6))
    tiny.assert_identical(
        (dict(model.state_dict()), optimizer.state_dict()), (dict(expected[0]), expected[1])
    )


# Version counters: who shares one cannot tell the optimizer's own update from a write


def views(dtype: torch.dtype = BF16) -> list[nn.Parameter]:
    """A parameter of its own, and two of one buffer."""
    buffer = normal(64, seed=5).to(dtype)
    return [nn.Parameter(normal(3, seed=6).to(dtype)), nn.Parameter(buffer[:32]), nn.Parameter(buffer[32:])]


REFUSAL = r"parameter 1 shares its version counter with parameter 2, .*views of one buffer.*p\.data = buffer"


def test_views_of_one_buffer_are_refused():
    params = views()
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=REFUSAL):
        grass.AdamW(params, master_weights=True)
    assert_bits([p.detach() for p in params], before)


def test_they_are_refused_by_name():
    named = list(zip("abc", views(), strict=True))
    with pytest.raises(ValueError, match=r"and b shares its version counter with c, "):
        grass.AdamW(named, master_weights=True)


def test_a_group_with_a_view_of_the_same_buffer_is_refused_and_not_added():
    params = views()
    optimizer = grass.AdamW(params[:2], **HYPER, master_weights=True)
    train(optimizer, params[:2], range(2))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=REFUSAL):
        optimizer.add_param_group({"params": params[2:]})
    assert_bits(optimizer.state_dict(), before)
    remainder = exact_weights(optimizer, params[1])
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, params[:2], [2])
    assert_bits(exact_weights(optimizer, params[1]), remainder)


def test_the_method_refuses_them_too():
    model, buffer = tiny.stack().to(BF16), normal(32, seed=5).to(BF16)
    for place, block in enumerate(model.blocks[:2]):
        block.up.bias = nn.Parameter(buffer[16 * place : 16 * (place + 1)])
    with pytest.raises(
        ValueError, match=r"shares its version counter with parameter \d+, .*p\.data = buffer"
    ):
        grass.GrassAdamW(model, config=tiny.config(), master_weights=True)
    assert all(p.requires_grad for p in model.parameters())


def test_data_that_are_views_of_one_buffer_have_counters_of_their_own():
    """What the message recommends is as good as tensors of their own."""
    buffer, params = normal(64, seed=5).to(BF16), []
    for start in (0, 32):
        p = nn.Parameter(torch.empty(0, dtype=BF16))
        p.data = buffer[start : start + 32]
        params.append(p)
    apart = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = grass.AdamW(params, **HYPER, master_weights=True)
    reference = grass.AdamW(apart, **HYPER, master_weights=True)
    for own, each in ((params, optimizer), (apart, reference)):
        train(each, own, range(3))
        own[0].grad = None  # a step of the one alone
        set_grads(own[1:], 3)
        each.step()
        train(each, own, range(4, 6))
    assert_same_state(optimizer, params, reference, apart)
    assert all((optimizer.state[p]["remainder"] != 0).any() for p in params)
    assert_bits(buffer, torch.cat([p.detach() for p in apart]))


@pytest.mark.parametrize(("dtype", "exact"), [(F32, True), (BF16, False)], ids=["float32", "not exact"])
def test_views_without_remainders_are_served(dtype, exact):
    params = views(dtype)
    apart = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = grass.AdamW(params[:2], **HYPER, master_weights=exact)
    optimizer.add_param_group({"params": params[2:]})
    reference = grass.AdamW(apart, **HYPER)
    train(optimizer, params, range(3))
    train(reference, apart, range(3))
    assert_same_state(optimizer, params, reference, apart)


@pytest.mark.parametrize("refused", [False, True])
def test_construction_is_no_write(refused):
    """A backward that begins before it, and has saved the parameters, ends after it."""
    params = views() if refused else parameters()
    versions = [p._version for p in params]
    loss = sum((p * p).float().sum() for p in params)
    with pytest.raises(ValueError, match=REFUSAL) if refused else contextlib.nullcontext():
        grass.AdamW(params, master_weights=True)
    optimizer = grass.AdamW(params[:1], master_weights=True)
    with pytest.raises(ValueError, match=REFUSAL) if refused else contextlib.nullcontext():
        optimizer.add_param_group({"params": params[1:]})
    assert [p._version for p in params] == versions
    loss.backward()
    assert_bits([p.grad for p in params], [2 * p.detach() for p in params])
