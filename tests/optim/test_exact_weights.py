"""`grass.AdamW` with the options that decide how parameters and moments are stored.

Would catch: bf16 training with `master_weights` that is not float32 training; remainders lost, rounded or cast on
the way through a file, a copy, a pickle, torch's own optimizer, or a group that is added; remainders invented or kept
where the option is off; options refused too late or not at all; moments of another dtype than asked for, or computed
in it; rounding by chance that stalls, leans to one side, or cannot be repeated.

Runs in both passes: with ``TRITON_INTERPRET=1`` the kernels compute, and bit for bit as in float32.
"""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import grass
from grass_kernels import _triton
from tests.support import tiny
from tests.support.exact import (
    BF16,
    F16,
    F32,
    HYPER,
    assert_as_fp32,
    assert_bits,
    assert_same_state,
    copy_deeply,
    exact_weights,
    normal,
    parameters,
    pickle_and_back,
    reload,
    set_grads,
    through_a_file,
    train,
)

# Exact weights


@pytest.mark.parametrize(
    "options",
    [{}, {"amsgrad": True, "maximize": True}, {"state_dtype": BF16}, {"max_grad_norm": 0.5}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_exact_bf16_training_is_float32_training(options):
    params, wide = parameters(BF16), parameters(F32)
    optimizer = grass.AdamW(params, **HYPER, master_weights=True, **options)
    reference = grass.AdamW(wide, **HYPER, **options)
    for step in range(6 if _triton.INTERPRETING else 30):
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 1e-4 * (1 + step % 3)
        train(optimizer, params, [step])
        train(reference, wide, [step])
    moved = 0
    for p, q in zip(params, wide, strict=True):
        state, expected = optimizer.state[p], reference.state[q]
        assert p.dtype == BF16
        assert state["remainder"].dtype == torch.int16
        assert_as_fp32(exact_weights(optimizer, p), q.detach())
        for key in expected:
            assert_as_fp32(state[key], expected[key])
        moved += int((state["remainder"] != 0).sum())
    assert moved > 500, "had the remainders been zero, this would have shown nothing"


def test_a_model_with_other_dtypes_beside():
    """Only bfloat16 parameters have remainders."""
    params = [*parameters(BF16), *parameters(F32), nn.Parameter(normal(3, seed=5).double())]
    optimizer = grass.AdamW(params, master_weights=True)
    train(optimizer, params, range(2))
    assert [("remainder" in optimizer.state[p]) for p in params] == [p.dtype == BF16 for p in params]


@pytest.mark.parametrize("way", [reload, copy_deeply, pickle_and_back])
def test_remainders_survive_and_training_goes_on_to_the_bit(way):
    params = parameters()
    optimizer = grass.AdamW(params, **HYPER, master_weights=True)
    train(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][0]["remainder"].dtype == torch.int16
    other, its_params = way(optimizer, params)
    assert_bits(other.state_dict()["state"], saved["state"])
    assert_same_state(other, its_params, optimizer, params)
    train(optimizer, params, range(3, 6))
    train(other, its_params, range(3, 6))
    assert_same_state(other, its_params, optimizer, params)


def test_the_order_of_loading_does_not_matter():
    """Weights before the optimizer's state or after it: a resumed run has the remainders of its weights."""
    model = nn.Linear(4, 3).to(BF16)
    optimizer = grass.AdamW(model.parameters(), **HYPER, master_weights=True)
    train(optimizer, list(model.parameters()), range(3))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    train(optimizer, list(model.parameters()), range(3, 5))
    for weights_first in (True, False):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed = nn.Linear(4, 3).to(BF16)
        again = grass.AdamW(resumed.parameters(), master_weights=True)
        if weights_first:
            resumed.load_state_dict(saved[0])
        again.load_state_dict(saved[1])
        if not weights_first:
            resumed.load_state_dict(saved[0])
        train(again, list(resumed.parameters()), range(3, 5))
        assert_same_state(again, list(resumed.parameters()), optimizer, list(model.parameters()))


def test_a_group_added_in_mid_training():
    params, late = parameters(), parameters(first=10)
    optimizer = grass.AdamW(params, **HYPER, master_weights=True)
    train(optimizer, params, range(2))
    optimizer.add_param_group({"params": late, "lr": 3e-4})
    train(optimizer, [*params, *late], range(2, 4))
    alone = parameters()
    reference = grass.AdamW(alone, **HYPER, master_weights=True)
    train(reference, alone, range(4))
    assert_same_state(optimizer, params, reference, alone)
    wide = parameters(F32, first=10)
    in_fp32 = grass.AdamW(wide, lr=3e-4, weight_decay=0.1)
    for step in (2, 3):
        for i, p in enumerate(wide, start=len(params)):
            p.grad = normal(*p.shape, seed=1000 * (step + 1) + i).to(BF16).float()
        in_fp32.step()
    for p, q in zip(late, wide, strict=True):
        assert_as_fp32(exact_weights(optimizer, p), q.detach())


def test_without_the_option_remainders_are_dropped():
    params = parameters()
    optimizer = grass.AdamW(params, **HYPER, master_weights=True)
    train(optimizer, params, range(2))
    plain = grass.AdamW(params, **HYPER)
    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    assert all(set(plain.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in params)
    train(plain, params, range(2, 3))
    assert all("remainder" not in state for state in plain.state_dict()["state"].values())
    of_torch = torch.optim.AdamW(params)
    of_torch.load_state_dict(through_a_file(plain.state_dict()))


def test_with_the_option_they_begin_at_zero():
    """A run without exact weights, continued with them: what is visible is what there is."""
    params = parameters()
    optimizer = grass.AdamW(params, **HYPER)
    train(optimizer, params, range(2))
    saved = through_a_file(optimizer.state_dict())
    wide = [nn.Parameter(p.detach().float()) for p in params]
    exact = grass.AdamW(params, **HYPER, master_weights=True)
    exact.load_state_dict(saved)
    reference = grass.AdamW(wide, **HYPER)
    reference.load_state_dict(copy.deepcopy(saved))
    train(exact, params, range(2, 5))
    train(reference, wide, range(2, 5))
    for p, q in zip(params, wide, strict=True):
        assert_as_fp32(exact_weights(exact, p), q.detach())


@pytest.mark.parametrize("file", [copy.deepcopy, through_a_file], ids=["copied", "through a file"])
def test_a_remainder_that_torch_has_cast_begins_at_zero(file):
    """torch's optimizer takes a remainder along as a bfloat16 number, and its steps leave it as it was."""
    params = parameters()
    optimizer = grass.AdamW(params, **HYPER, master_weights=True)
    train(optimizer, params, range(3))
    of_torch = torch.optim.AdamW(params, **HYPER, foreach=False)
    of_torch.load_state_dict(file(optimizer.state_dict()))
    assert of_torch.state[params[0]]["remainder"].dtype == BF16
    train(of_torch, params, [3])
    saved = file(of_torch.state_dict())
    twins = [nn.Parameter(p.detach().clone()) for p in params]

    back = grass.AdamW(params, **HYPER, master_weights=True)
    back.load_state_dict(saved)
    reference = grass.AdamW(twins, **HYPER, master_weights=True)
    for state in saved["state"].values():
        state.pop("remainder", None)
    reference.load_state_dict(saved)
    train(back, params, [4])
    train(reference, twins, [4])
    assert_same_state(back, params, reference, twins)


# Refusals


@pytest.mark.parametrize("option", ["master_weights", "stochastic_rounding"])
def test_float16_is_refused_by_name(option):
    model = nn.Sequential(nn.Linear(4, 3).to(BF16), nn.Linear(3, 2).to(F16))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"{option}.*float16.*\(2, 3\).*convert the model to bfloat16"):
        grass.AdamW(model.parameters(), **{option: True})
    assert_bits(dict(model.state_dict()), dict(before))


@pytest.mark.parametrize("option", ["master_weights", "stochastic_rounding"])
def test_a_float16_group_is_refused_and_not_added(option):
    params = parameters()
    optimizer = grass.AdamW(params, **HYPER, **{option: True})
    train(optimizer, params, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=rf"{option} .*float16"):
        optimizer.add_param_group({"params": parameters(F16)})
    assert_bits(optimizer.state_dict(), before)
    train(optimizer, params, range(2, 3))


def test_the_error_names_the_parameter():
    """Of a model with a hundred matrices of one shape, which one."""
    model = nn.Sequential(nn.Linear(4, 4).to(BF16), nn.Linear(4, 4).to(F16))
    with pytest.raises(ValueError, match=r"1\.weight"):
        grass.AdamW(model.named_parameters(), master_weights=True)


def test_both_options_exclude_each_other():
    with pytest.raises(
        ValueError, match=r"master_weights and stochastic_rounding exclude each other.*pass one"
    ):
        grass.AdamW(parameters(), master_weights=True, stochastic_rounding=True)


def test_float16_is_refused_by_the_method_too():
    model = tiny.stack().half()
    with pytest.raises(ValueError, match=r"master_weights.*float16"):
        grass.GrassAdamW(model, master_weights=True)
    assert all(p.requires_grad for p in model.parameters())


# The dtype of moments


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_bf16_moments_against_float64(dtype, amsgrad):
    """Each step computed in float64 from what is stored; moments rounded once, to half a unit of bf16."""
    params = parameters(dtype)
    optimizer = grass.AdamW(params, lr=1e-2, weight_decay=0.1, state_dtype=BF16, amsgrad=amsgrad)
    stored = [[torch.zeros(p.shape, dtype=torch.float64) for _ in range(3)] for p in params]
    for t in range(1, 6):
        before = [p.detach().double() for p in params]
        train(optimizer, params, [t])
        for p, old, moments in zip(params, before, stored, strict=True):
            state, g = optimizer.state[p], p.grad.double()
            m, v = 0.9 * moments[0] + 0.1 * g, 0.999 * moments[1] + 0.001 * g * g
            largest = torch.maximum(moments[2], v)
            root = ((largest if amsgrad else v) / (1 - 0.999**t)).sqrt()
            expected = old - 1e-2 * (0.1 * old + m / (1 - 0.9**t) / (root + 1e-8))
            half_a_unit = 0.502 * torch.finfo(BF16).eps
            names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad
            for place, (key, exact) in enumerate(zip(names, (m, v, largest), strict=False)):
                assert state[key].dtype == BF16
                # cancelling terms of a first moment: half a unit of the larger of them
                atol = 1e-6 if key == "exp_avg" else 0
                torch.testing.assert_close(state[key].double(), exact, rtol=half_a_unit, atol=atol)
                moments[place] = state[key].double()
            rtol = 2e-6 if dtype == F32 else 0.502 * torch.finfo(dtype).eps
            torch.testing.assert_close(p.detach().double(), expected, rtol=rtol, atol=2e-6)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_bf16_moments_survive_a_file(dtype):
    params = parameters(dtype)
    optimizer = grass.AdamW(params, **HYPER, state_dtype=BF16)
    train(optimizer, params, range(3))
    copied = [nn.Parameter(p.detach().clone()) for p in params]
    fresh = grass.AdamW(copied, state_dtype=BF16)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_state(fresh, copied, optimizer, params)
    train(optimizer, params, range(3, 5))
    train(fresh, copied, range(3, 5))
    assert_same_state(fresh, copied, optimizer, params)


def test_loading_gives_moments_the_dtype_that_was_asked_for():
    params = parameters(F32)
    optimizer = grass.AdamW(params, **HYPER)
    train(optimizer, params, range(2))
    narrow = grass.AdamW(params, state_dtype=BF16)
    narrow.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in params:
        assert narrow.state[p]["exp_avg"].dtype == BF16
        assert_bits(narrow.state[p]["exp_avg"], optimizer.state[p]["exp_avg"].to(BF16))
    train(narrow, params, range(2, 3))


# By chance


def test_small_updates_are_not_lost_on_average():
    """A thousandth of a unit a step: to the nearest nothing ever moves, by chance the mean does."""
    count, steps = 8192, 8 if _triton.INTERPRETING else 100
    moved = {}
    for stochastic in (False, True):
        p = nn.Parameter(torch.full((count,), 1.0, dtype=BF16))
        optimizer = grass.AdamW([p], lr=2.0**-13, weight_decay=0.0, eps=0.0, stochastic_rounding=stochastic)
        for _ in range(steps):
            p.grad = torch.ones_like(p)  # every step is of lr
            optimizer.step()
        moved[stochastic] = 1 - float(p.detach().double().mean())
    assert moved[False] == 0
    # Below 1 the units are 2^-8: a walk of steps of that length, taken with probability 2^-5.
    expected, deviation = steps * 2.0**-13, 2.0**-8 * (steps * 2.0**-5 / count) ** 0.5
    assert abs(moved[True] - expected) < 6 * deviation
    assert expected > 12 * deviation


def test_a_run_by_chance_can_be_repeated_and_resumed():
    params, again = parameters(), parameters()
    optimizer = grass.AdamW(params, lr=1e-2, stochastic_rounding=True)
    train(optimizer, params, range(6))
    torch.rand(100)  # other random numbers have nothing to do with it
    first = grass.AdamW(again, lr=1e-2, stochastic_rounding=True)
    train(first, again, range(3))
    resumed = grass.AdamW(again, lr=1e-2, stochastic_rounding=True)
    resumed.load_state_dict(through_a_file(first.state_dict()))
    train(resumed, again, range(3, 6))
    assert_same_state(resumed, again, optimizer, params)


def test_equal_parameters_are_rounded_apart():
    """In one group and in another."""
    params = [nn.Parameter(torch.full((512,), 1.0, dtype=BF16)) for _ in range(3)]
    optimizer = grass.AdamW(
        [{"params": params[:2]}, {"params": params[2:]}], lr=1e-3, stochastic_rounding=True
    )
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(params[one], params[other])
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], optimizer.state[params[1]]["exp_avg"])


def test_a_missing_gradient_does_not_change_what_others_draw():
    params, others = parameters(), parameters()
    optimizers = [grass.AdamW(own, lr=1e-2, stochastic_rounding=True) for own in (params, others)]
    for own, optimizer in zip((params, others), optimizers, strict=True):
        set_grads(own, 0)
        if own is others:
            own[0].grad = None
        optimizer.step()
    for p, q in zip(params[1:], others[1:], strict=True):
        assert_bits(p.detach(), q.detach())


# With the method


def method(**options) -> tuple[nn.Module, grass.GrassAdamW]:
    model = tiny.stack().to(BF16)
    config = tiny.config(active_layers=1, probe_steps=1, sample_interval=2, update_interval=4, **options)
    return model, grass.GrassAdamW(model, lr=1e-3, master_weights=True, config=config, pattern="blocks.*")


def test_the_method_resumes_exact_weights():
    model, opt = method()
    tiny.train(model, opt, 0, 5)
    saved = through_a_file((model.state_dict(), opt.state_dict()))
    tiny.train(model, opt, 5, 9)
    again, resumed = method()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    tiny.train(again, resumed, 5, 9)
    tiny.assert_same_run(again, resumed, model, opt)


@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_remainders_of_a_frozen_layer_stay(moments):
    """A layer that leaves and comes back goes on from its exact weights; `reset` resets its moments alone."""
    model, opt = method(moments=moments)
    exact: dict[str, Tensor] = {}
    left = 0
    for step in range(8 if _triton.INTERPRETING else 24):
        active = opt.active_layers
        tiny.train(model, opt, step, step + 1)
        for layer, block in enumerate(model.blocks):
            for name, p in block.named_parameters():
                key = f"{layer}.{name}"
                if layer in active:
                    assert "remainder" in opt.state[p] or layer not in opt.active_layers, key
                    if "remainder" in opt.state[p]:
                        exact[key] = exact_weights(opt, p)
                elif key in exact:
                    assert "remainder" in opt.state[p], f"{key} has lost its remainder at step {step}"
                    assert_bits(exact_weights(opt, p), exact[key])
                    left += 1
    assert left, "no layer has left the active set"
