"""`grass.AdamW` where a user of `torch.optim.AdamW` meets it.

Would catch:

- checkpoints that torch cannot load, or that do not continue training as if nothing had happened;
- float32 moments of a bfloat16 or float16 parameter that a load, a copy or a pickle rounds;
- arithmetic in low precision, or rounding twice;
- gradients that are unscaled by the wrong factor or rewritten; an overflow that is not skipped whole;
- hyperparameters read once instead of at every step (lr, betas, a tensor lr, a new group);
- closures without autograd, hooks that run twice, a write that autograd does not see;
- sparse gradients refused too late, when parameters before them have moved;
- a gradient, parameter or moment walked in another order than its strides say, or beyond its elements;
- flags and dtypes that torch takes and we do not, or the other way round.
"""

import copy
import inspect
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import grass
import grass_kernels
from grass.optim.states import Options, takes_kernel

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")

LOW_PRECISION = (torch.bfloat16, torch.float16)
SHAPES = ((4, 5), (17,), ())


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(dtype=torch.float32, shapes=SHAPES):
    return [torch.nn.Parameter(normal(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(shapes)]


def copies(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def set_grads(params, step, scale=1.0):
    """Gradients that depend on nothing but the step and the position."""
    for i, p in enumerate(params):
        p.grad = (normal(*p.shape, seed=1000 * (step + 1) + i) * scale).to(p.dtype)


def train(optimizer, params, steps):
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def torch_loop(params, **kwargs):
    """Torch's for-loop, the implementation that is its specification."""
    return torch.optim.AdamW(params, **kwargs, foreach=False, fused=False)


def by_hand(
    param: Tensor,
    grads: list[Tensor],
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=1e-2,
    stored_as=torch.float64,
):
    """AdamW from its formula in float64; after each step the parameter is rounded to `stored_as`."""
    p = param.detach().double()
    m = v = torch.zeros_like(p)
    for t, grad in enumerate(grads, start=1):
        g = grad.double()
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        p = p - lr * weight_decay * p - lr * m_hat / (v_hat.sqrt() + eps)
        p = p.to(stored_as).double()
    return p, m, v


def assert_equal_to_the_bit(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_close(actual, expected, rtol=2e-6, atol=2e-7):
    """Float32 to some ulp, float64 to the bit: there torch's own code runs."""
    if actual.dtype == torch.float64:
        rtol = atol = 0
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def assert_same_training(optimizer, params, reference, reference_params, compare=assert_close):
    """Equal parameters, moments and counters, and hyperparameters."""
    for p, q in zip(params, reference_params, strict=True):
        compare(p.detach(), q.detach())
        state, expected = optimizer.state[p], reference.state[q]
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            compare(state[key], value.to(state[key].dtype))
    for group, expected in zip(optimizer.param_groups, reference.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k not in ("params", "foreach", "fused")} == {
            k: v for k, v in expected.items() if k not in ("params", "foreach", "fused")
        }


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Checkpoints


def two_groups(params):
    return [
        {"params": params[:1], "lr": 0.02, "weight_decay": 0.3},
        {"params": params[1:], "betas": (0.5, 0.75), "eps": 1e-3},
    ]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("first", "second"), [(torch.optim.AdamW, grass.AdamW), (grass.AdamW, torch.optim.AdamW)]
)
def test_training_moves_between_torch_and_us(first, second, dtype, amsgrad):
    params, never_moved = parameters(dtype), parameters(dtype)
    optimizer = first(two_groups(params), amsgrad=amsgrad)
    train(optimizer, params, range(4))
    saved = through_a_file(optimizer.state_dict())

    params = copies(params)
    optimizer = second([{"params": params[:1]}, {"params": params[1:]}])
    optimizer.load_state_dict(saved)
    train(optimizer, params, range(4, 8))

    reference = torch_loop(two_groups(never_moved), amsgrad=amsgrad)
    train(reference, never_moved, range(8))
    assert_same_training(optimizer, params, reference, never_moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_state_dict_has_torchs_layout(dtype):
    params = parameters(dtype)
    ours, of_torch = grass.AdamW(params, amsgrad=True), torch.optim.AdamW(params, amsgrad=True)
    train(ours, params, range(1))
    train(of_torch, params, range(1))
    saved, expected = ours.state_dict(), of_torch.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    assert saved["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert list(saved["state"][index]) == list(state)
        for key, value in state.items():
            assert saved["state"][index][key].shape == value.shape


def test_names_of_parameters_are_kept():
    model = torch.nn.Linear(3, 2)
    optimizer = grass.AdamW(model.named_parameters())
    train(optimizer, list(model.parameters()), range(1))
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]
    torch.optim.AdamW(model.named_parameters()).load_state_dict(saved)


def reload(optimizer, params):
    """A new optimizer on the same parameters, from a file."""
    fresh = grass.AdamW(params)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    return fresh, params


def copy_deeply(optimizer, params):
    copied = copy.deepcopy(optimizer)
    return copied, copied.param_groups[0]["params"]


def pickle_and_back(optimizer, params):
    restored = pickle.loads(pickle.dumps(optimizer))
    return restored, restored.param_groups[0]["params"]


@pytest.mark.parametrize("way", [reload, copy_deeply, pickle_and_back])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW_PRECISION])
def test_state_survives_to_the_bit(dtype, way):
    params = parameters(dtype)
    optimizer = grass.AdamW(params, amsgrad=True)
    train(optimizer, params, range(3))
    expected = copy.deepcopy(optimizer.state_dict())
    if dtype in LOW_PRECISION:
        exp_avg = expected["state"][0]["exp_avg"]
        assert exp_avg.dtype == torch.float32
        assert (exp_avg.to(dtype).float() != exp_avg).any(), "moments that any dtype could hold show nothing"

    restored, its_params = way(optimizer, params)
    assert type(restored) is grass.AdamW
    assert_equal_to_the_bit(restored.state_dict(), expected)
    for p in its_params:
        assert restored.state[p]["exp_avg"].dtype == (torch.float32 if dtype in LOW_PRECISION else dtype)

    # and it goes on as the original would, while the original stays where it is
    continued = copies(params)
    original = grass.AdamW(continued)
    original.load_state_dict(copy.deepcopy(expected))
    train(original, continued, range(3, 5))
    train(restored, its_params, range(3, 5))
    for p, q in zip(its_params, continued, strict=True):
        assert_equal_to_the_bit(p.detach(), q.detach())
    assert_equal_to_the_bit(restored.state_dict(), original.state_dict())
    if way is not reload:
        assert_equal_to_the_bit(optimizer.state_dict(), expected)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_torchs_low_precision_moments_become_float32(dtype):
    params = parameters(dtype)
    of_torch = torch.optim.AdamW(params, eps=1e-3)
    train(of_torch, params, range(2))
    saved = copy.deepcopy(of_torch.state_dict())
    optimizer = grass.AdamW(params)
    optimizer.load_state_dict(saved)
    for index, p in enumerate(params):
        for key in ("exp_avg", "exp_avg_sq"):
            assert saved["state"][index][key].dtype == dtype
            assert optimizer.state[p][key].dtype == torch.float32
            assert_equal_to_the_bit(optimizer.state[p][key], saved["state"][index][key].float())
    train(optimizer, params, range(2, 3))
    assert optimizer.state[params[0]]["step"].item() == 3


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_torch_takes_float32_moments_of_low_precision(dtype):
    params = parameters(dtype)
    optimizer = grass.AdamW(params, eps=1e-3)
    train(optimizer, params, range(2))
    of_torch = torch.optim.AdamW(params)
    of_torch.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(of_torch, params, range(2, 4))
    assert of_torch.state[params[0]]["exp_avg"].dtype == dtype
    assert of_torch.state[params[0]]["step"].item() == 4
    assert all(p.isfinite().all() for p in params)


def test_loading_does_not_share_counters():
    params = parameters()
    optimizer = grass.AdamW(params)
    train(optimizer, params, range(1))
    saved = optimizer.state_dict()
    other_params = copies(params)
    other = grass.AdamW(other_params)
    other.load_state_dict(saved)
    train(other, other_params, range(1, 3))
    assert [optimizer.state[p]["step"].item() for p in params] == [1] * len(params)


def test_a_checkpoint_of_other_groups_is_refused_and_changes_nothing():
    params = parameters()
    optimizer = grass.AdamW(params)
    train(optimizer, params, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    other = grass.AdamW(parameters(shapes=((3,), (4,))))
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(other.state_dict())
    assert_equal_to_the_bit(optimizer.state_dict(), before)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("exp_avg", None, "None, and must be a tensor"),
        ("exp_avg_sq", 0.5, "0.5, and must be a tensor"),
        ("step", None, "None, and must be a number"),
        ("step", torch.zeros(2), "and must be a number"),
    ],
)
def test_a_state_that_is_no_tensor_is_refused_and_changes_nothing(key, value, expected):
    params = parameters()
    optimizer = grass.AdamW(params)
    train(optimizer, params, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    damaged = copy.deepcopy(before)
    damaged["state"][1][key] = value
    damaged["state"][0]["exp_avg"].zero_()
    with pytest.raises(
        grass.StateMismatchError, match=f"{key} of a parameter of shape .* in the state dict is .*{expected}"
    ):
        optimizer.load_state_dict(damaged)
    assert_equal_to_the_bit(optimizer.state_dict(), before)


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_a_state_without_one_of_its_tensors_is_refused_and_changes_nothing(key):
    """torch raises a KeyError; a moment that started anew beside an old counter would be silent."""
    params = parameters()
    optimizer = grass.AdamW(params)
    train(optimizer, params, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    damaged = copy.deepcopy(before)
    del damaged["state"][1][key]
    with pytest.raises(
        grass.StateMismatchError, match=f"the state dict has no {key} of a parameter of shape"
    ):
        optimizer.load_state_dict(damaged)
    assert_equal_to_the_bit(optimizer.state_dict(), before)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_state_dict_of_another_optimizer_is_refused_and_changes_nothing(make):
    params = parameters()
    other = make(params, momentum=0.9)
    train(other, params, range(1))
    optimizer = grass.AdamW(params)
    train(optimizer, params, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(grass.StateMismatchError, match="group 0 of the state dict has no betas"):
        optimizer.load_state_dict(other.state_dict())
    assert_equal_to_the_bit(optimizer.state_dict(), before)
    train(optimizer, params, range(1))


@pytest.mark.parametrize("number", [np.int64(2), np.float32(2), 2, 2.0])
def test_a_counter_may_be_any_number(number):
    """As in files that were converted from arrays."""
    results = []
    for make in (grass.AdamW, torch.optim.AdamW):
        params = parameters()
        optimizer = make(params)
        train(optimizer, params, range(1))
        saved = copy.deepcopy(optimizer.state_dict())
        for entry in saved["state"].values():
            entry["step"] = number
        optimizer.load_state_dict(saved)
        train(optimizer, params, range(1, 3))
        results.append([optimizer.state[p]["step"].item() for p in params])
    assert results[0] == results[1] == [4.0] * len(params)


def test_maxima_survive_a_group_that_does_not_use_them():
    params = parameters(torch.bfloat16)
    optimizer = grass.AdamW(params, amsgrad=True)
    train(optimizer, params, range(2))
    expected = [optimizer.state[p]["max_exp_avg_sq"].clone() for p in params]
    optimizer.param_groups[0]["amsgrad"] = False
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_equal_to_the_bit([optimizer.state[p]["max_exp_avg_sq"] for p in params], expected)
    optimizer.param_groups[0]["amsgrad"] = True
    train(optimizer, params, range(2, 3))


@pytest.mark.parametrize("options", [{"master_weights": True}, {"stochastic_rounding": True}])
def test_a_model_that_becomes_float16_is_refused_as_at_construction(options):
    model = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    optimizer = grass.AdamW(model.parameters(), **options)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    model.half()
    before = copy.deepcopy(list(model.parameters()))
    with pytest.raises(ValueError, match=f"{next(iter(options))} is for bfloat16 parameters .*parameter 0"):
        optimizer.step()
    assert_equal_to_the_bit(list(model.parameters()), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_users_load_hook_sees_and_keeps_what_it_does(dtype):
    params = parameters(dtype)
    optimizer = grass.AdamW(params)
    train(optimizer, params, range(1))
    seen = []

    def halve(loaded):
        exp_avg = loaded.state[params[0]]["exp_avg"]
        seen.append(exp_avg.clone())
        loaded.state[params[0]]["exp_avg"] = exp_avg / 2

    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.register_load_state_dict_post_hook(halve)
    optimizer.load_state_dict(saved)
    assert_equal_to_the_bit(seen, [saved["state"][0]["exp_avg"]])
    assert_equal_to_the_bit(optimizer.state[params[0]]["exp_avg"], saved["state"][0]["exp_avg"] / 2)


def test_a_checkpoint_before_the_first_step():
    params = parameters(torch.bfloat16)
    optimizer = grass.AdamW(params, lr=0.5)
    fresh = grass.AdamW(params)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert fresh.param_groups[0]["lr"] == 0.5
    assert not fresh.state
    train(fresh, params, range(1))


# Numerics


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
def test_error_is_at_most_twice_torchs_own(dtype):
    shape, steps = (1000,), 20
    start = torch.nn.Parameter(normal(*shape, seed=0, dtype=dtype))
    hyper = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1}
    grads = [normal(*shape, seed=10 + t, dtype=dtype) for t in range(steps)]
    exact, exact_exp_avg, exact_exp_avg_sq = by_hand(start, grads, **hyper)

    def errors(make):
        (p,) = copies([start])
        optimizer = make([p], **hyper)
        for grad in grads:
            p.grad = grad.clone()
            optimizer.step()
        results = p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]
        exacts = exact, exact_exp_avg, exact_exp_avg_sq
        return [
            (result.double() - expected).norm().item()
            for result, expected in zip(results, exacts, strict=True)
        ]

    for ours, of_torch in zip(errors(grass.AdamW), errors(torch_loop), strict=True):
        assert ours <= 2 * of_torch


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_is_rounded_once_a_step(dtype):
    (p,) = parameters(dtype, ((1000,),))
    grads = [normal(1000, seed=10 + t, dtype=dtype) for t in range(5)]
    expected, exp_avg, exp_avg_sq = by_hand(p, grads, lr=0.05, weight_decay=0.2, stored_as=dtype)
    optimizer = grass.AdamW([p], lr=0.05, weight_decay=0.2)
    for grad in grads:
        p.grad = grad
        optimizer.step()
    # Where float32 and float64 fall on different sides of a tie, a parameter differs by one ulp: rarely.
    differs = p.detach().double() != expected
    assert differs.sum() <= 5
    torch.testing.assert_close(p.detach().double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"].double(), exp_avg, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"].double(), exp_avg_sq, rtol=1e-6, atol=0)


def test_small_changes_of_moments_are_not_lost():
    """In bfloat16 exp_avg_sq would stay at 1: what a step takes from it is a fifth of half an ulp."""
    (p,) = parameters(torch.bfloat16, ((64,),))
    optimizer = grass.AdamW([p])
    grads = [torch.full_like(p, g) for g in (32.0, *[0.5] * 20)]
    for grad in grads:
        p.grad = grad
        optimizer.step()
    _, _, expected = by_hand(p, grads)
    assert (expected < 1.01).all()
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"].double(), expected, rtol=1e-5, atol=0)


def test_non_finite_gradients_reach_the_parameters():
    """Without a scaler nobody decides for the user that a step is to be skipped; torch does not either."""
    params, reference_params = parameters(shapes=((6,),)), parameters(shapes=((6,),))
    for (p,), make in ((params, grass.AdamW), (reference_params, torch_loop)):
        p.grad = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e-30, 1e30])
        make([p]).step()
    torch.testing.assert_close(params[0], reference_params[0], equal_nan=True)


# GradScaler


def scaler(scale):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)


@pytest.mark.parametrize(
    ("dtype", "unscale_first"),
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
        (torch.float16, False),  # which torch refuses to unscale
    ],
)
def test_a_scaled_step_is_the_unscaled_step(dtype, unscale_first):
    params, plain = parameters(dtype), parameters(dtype)
    optimizer = grass.AdamW(params, amsgrad=True, fused=True)
    reference = grass.AdamW(plain, amsgrad=True)
    assert optimizer._step_supports_amp_scaling
    scale = scaler(64.0)
    scale.scale(torch.ones(()))  # a scaler makes its scale when it is first used
    for step in range(3):
        set_grads(params, step, scale=64.0)
        set_grads(plain, step)
        if unscale_first:
            scale.unscale_(optimizer)
        scaled = [p.grad.clone() for p in params]
        scale.step(optimizer)
        scale.update()
        reference.step()
        assert_equal_to_the_bit([p.grad for p in params], scaled)  # read-only
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
    assert_same_training(optimizer, params, reference, plain)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fused", [None, True])
def test_an_overflow_skips_the_whole_step(fused, dtype, unscale_first, bad):
    params = parameters(dtype)
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = grass.AdamW(groups, amsgrad=True, fused=fused)
    scale = scaler(64.0)
    scale.scale(torch.ones(()))
    for step in range(2):
        set_grads(params, step, scale=64.0)
        scale.step(optimizer)
        scale.update()
    before = copy.deepcopy([p.detach() for p in params]), copy.deepcopy(optimizer.state_dict())
    set_grads(params, 2, scale=64.0)
    params[-1].grad.fill_(bad)  # only in the last: those before it must not have moved
    if unscale_first:
        scale.unscale_(optimizer)
    grads = [p.grad.clone() for p in params]
    scale.step(optimizer)
    scale.update()
    assert scale.get_scale() == 32.0
    assert_equal_to_the_bit([p.detach() for p in params], before[0])
    assert_equal_to_the_bit(optimizer.state_dict(), before[1])
    if fused and not unscale_first:
        torch.testing.assert_close([p.grad for p in params], grads, rtol=0, atol=0, equal_nan=True)
    set_grads(params, 3, scale=32.0)
    scale.step(optimizer)
    assert [optimizer.state[p]["step"].item() for p in params] == [3] * len(params)


@pytest.mark.parametrize("fused", [None, True])
def test_what_torch_updates_is_unscaled_too(fused):
    """A float64 parameter beside others: unscaled by the scaler, or with fused=True inside the step."""
    params = [*parameters(), *parameters(torch.float64)]
    plain = copies(params)
    optimizer, reference = grass.AdamW(params, fused=fused), grass.AdamW(plain, fused=fused)
    scale = scaler(64.0)
    scale.scale(torch.ones(()))
    set_grads(params, 0, scale=64.0)
    set_grads(plain, 0)
    scale.step(optimizer)
    reference.step()
    for p, q in zip(params, plain, strict=True):
        assert_equal_to_the_bit(p.detach(), q.detach())


def test_clipping_between_unscale_and_step():
    params, plain = parameters(), parameters()
    optimizer, reference = grass.AdamW(params), torch_loop(plain)
    scale = scaler(2.0**12)
    for step in range(2):
        for own in (params, plain):
            loss = sum((p * normal(*p.shape, seed=step)).sum() for p in own)
            (scale.scale(loss) if own is params else loss).backward()
        scale.unscale_(optimizer)
        for own in (params, plain):
            torch.nn.utils.clip_grad_norm_(own, 0.1)
        scale.step(optimizer)
        scale.update()
        optimizer.zero_grad()
        reference.step()
        reference.zero_grad()
    assert_same_training(optimizer, params, reference, plain)


# Schedulers, closures, groups, hooks

SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: (epoch + 1) / 4),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),  # changes betas too
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.7)], [3]
    ),
}


@pytest.mark.parametrize("lr", [0.01, "tensor", "tensor of shape (1,)"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_drives_us_as_torch(name, lr):
    rates = [
        {"tensor": torch.tensor(0.01), "tensor of shape (1,)": torch.tensor([0.01])}.get(lr, lr) for _ in "ab"
    ]
    params, reference_params = parameters(), parameters()
    optimizer, reference = grass.AdamW(params, lr=rates[0]), torch_loop(reference_params, lr=rates[1])
    schedulers = SCHEDULERS[name](optimizer), SCHEDULERS[name](reference)
    for step in range(6):
        train(optimizer, params, [step])
        train(reference, reference_params, [step])
        for scheduler in schedulers:
            scheduler.step()
    assert_same_training(optimizer, params, reference, reference_params)


def test_a_plateau_lowers_the_rate():
    (p,) = parameters(shapes=((3,),))
    optimizer = grass.AdamW([p], lr=0.1, weight_decay=0.0, eps=0.0, betas=(0.0, 0.0))  # steps of lr
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for loss, moved_by in ((1.0, 0.1), (1.0, 0.1), (1.0, 0.05)):
        before = p.detach().clone()
        p.grad = torch.ones_like(p)
        optimizer.step()
        torch.testing.assert_close(before - p.detach(), torch.full_like(p, moved_by), rtol=1e-5, atol=1e-6)
        scheduler.step(loss)


def test_a_tensor_lr_is_read_at_every_step():
    params, reference_params = parameters(), parameters()
    rates = torch.tensor(0.01), torch.tensor(0.01)
    optimizer, reference = grass.AdamW(params, lr=rates[0]), torch_loop(reference_params, lr=rates[1])
    for step in range(3):
        for rate in rates:
            rate.fill_(0.01 * (step + 1))
        train(optimizer, params, [step])
        train(reference, reference_params, [step])
    assert_same_training(optimizer, params, reference, reference_params)


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_a_closure_runs_once_with_autograd(grad_enabled):
    (p,) = parameters(shapes=((5,),))
    optimizer, before, losses = grass.AdamW([p]), p.detach().clone(), []

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        losses.append(loss)
        return loss

    with torch.set_grad_enabled(grad_enabled):
        returned = optimizer.step(closure)
        assert torch.is_grad_enabled() == grad_enabled
    assert len(losses) == 1
    assert returned is losses[0]
    assert_equal_to_the_bit(p.grad, 2 * before)
    assert_close(p.detach(), by_hand(before, [2 * before])[0].float())
    assert optimizer.step() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_group_added_in_mid_training(dtype):
    params, late = parameters(dtype), parameters(dtype, ((6, 2), (3,)))
    alone = copies(params), copies(late)
    optimizer = grass.AdamW(params, lr=0.1)
    train(optimizer, params, range(2))
    optimizer.add_param_group({"params": late, "lr": 0.03, "amsgrad": True})
    train(optimizer, [*params, *late], range(2, 4))

    first = grass.AdamW(alone[0], lr=0.1)
    train(first, alone[0], range(4))
    second = grass.AdamW(alone[1], lr=0.03, amsgrad=True)
    for step in range(2, 4):
        for i, p in enumerate(alone[1], start=len(params)):
            p.grad = normal(*p.shape, seed=1000 * (step + 1) + i, dtype=torch.float32).to(dtype)
        second.step()
    for p, q in zip([*params, *late], [*alone[0], *alone[1]], strict=True):
        assert_equal_to_the_bit(p.detach(), q.detach())
    assert [optimizer.state[p]["step"].item() for p in late] == [2, 2]
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": params[:1]})


@pytest.mark.parametrize("torch_first", [False, True])
def test_step_hooks_run_once(torch_first):
    params = parameters()
    if torch_first:  # torch wraps the class's step when the first instance is made
        torch.optim.AdamW(params)
        torch.optim.Adam(params)
    grass.AdamW(params)
    optimizer, calls = grass.AdamW(params), []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append(("before", o)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(("after", o)))
    handles = [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: calls.append(("any before", o))),
        register_optimizer_step_post_hook(lambda o, args, kwargs: calls.append(("any after", o))),
    ]
    try:
        train(optimizer, params, range(1))
    finally:
        for handle in handles:
            handle.remove()
    assert calls == [(name, optimizer) for name in ("any before", "before", "after", "any after")]


def test_a_subclass_has_step_hooks_once():
    class Own(grass.AdamW):
        pass

    params, calls = parameters(), []
    grass.AdamW(params)
    optimizer = Own(params)
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(o))
    train(optimizer, params, range(1))
    assert calls == [optimizer]


def test_a_step_inside_a_capture_is_refused_as_torch_refuses_it(monkeypatch):
    """The check itself needs a GPU; that it is asked, before anything moves, does not."""
    name = "_accelerator_graph_capture_health_check"
    if not hasattr(torch.optim.Optimizer, name):
        name = "_cuda_graph_capture_health_check"

    def refuse(self):
        raise RuntimeError("Attempting CUDA graph capture")

    params = parameters()
    optimizer = grass.AdamW(params)
    monkeypatch.setattr(torch.optim.Optimizer, name, refuse)
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match="Attempting CUDA graph capture"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_backward_through_a_changed_parameter_raises(dtype):
    (p,) = parameters(dtype, ((4, 4),))
    optimizer = grass.AdamW([p])
    loss = p.square().sum()
    version = p._version
    set_grads([p], 0)
    optimizer.step()
    assert p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_written_is_seen_by_version(dtype):
    (p,) = parameters(dtype, ((4, 4),))
    optimizer = grass.AdamW([p], amsgrad=True)
    train(optimizer, [p], range(1))
    before = {key: value._version for key, value in optimizer.state[p].items()}
    grad_version = p.grad._version
    optimizer.step()
    assert all(value._version > before[key] for key, value in optimizer.state[p].items())
    assert p.grad._version == grad_version


# What torch refuses, or does itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_gradients_are_refused_before_anything_changes(dtype):
    first, second = parameters(dtype), torch.nn.Embedding(5, 3, sparse=True).to(dtype)
    optimizer = grass.AdamW([{"params": first}, {"params": second.parameters()}])
    train(optimizer, first, range(1))
    before = copy.deepcopy([p.detach() for p in first]), copy.deepcopy(optimizer.state_dict())
    second(torch.tensor([1, 3])).sum().backward()
    set_grads(first, 1)
    with pytest.raises(RuntimeError) as of_torch:
        torch.optim.AdamW(second.parameters()).step()
    with pytest.raises(RuntimeError) as ours:
        optimizer.step()
    assert str(ours.value) == str(of_torch.value)
    assert_equal_to_the_bit([p.detach() for p in first], before[0])
    assert_equal_to_the_bit(optimizer.state_dict(), before[1])


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_have_torchs_result(dtype, amsgrad):
    def make():
        return torch.nn.Parameter(
            torch.complex(*(normal(3, 4, seed=i, dtype=torch.float64) for i in (0, 1))).to(dtype)
        )

    ours, of_torch = make(), make()
    optimizer = grass.AdamW([ours], amsgrad=amsgrad)
    reference = torch_loop([of_torch], amsgrad=amsgrad)
    for step in range(3):
        for p in (ours, of_torch):
            p.grad = torch.complex(*(normal(3, 4, seed=step + i) for i in (5, 50))).to(dtype)
        optimizer.step()
        reference.step()
    assert_equal_to_the_bit(ours.detach(), of_torch.detach())
    assert_equal_to_the_bit(optimizer.state_dict()["state"], reference.state_dict()["state"])
    resumed = grass.AdamW([ours])
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_equal_to_the_bit(resumed.state_dict()["state"], optimizer.state_dict()["state"])


def test_complex_parameters_cannot_be_fused():
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(
        RuntimeError, match="`fused=True` requires all the params to be floating point"
    ) as of_torch:
        torch.optim.AdamW([p], fused=True).step()
    optimizer = grass.AdamW([p], fused=True)
    with pytest.raises(RuntimeError) as ours:
        optimizer.step()
    assert str(ours.value) == str(of_torch.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_autograd_through_a_differentiable_step(dtype):
    """d parameter / d (start, lr) after two steps, against torch and, in float64, against the formula."""

    def through(make):
        start = normal(6, seed=0, dtype=dtype).requires_grad_()
        lr = torch.tensor(0.1, dtype=dtype, requires_grad=True)
        p = start.clone()
        optimizer = make([p], lr=lr, differentiable=True)
        for step in range(2):
            p.grad = normal(6, seed=step + 1, dtype=dtype)
            optimizer.step()
        assert p.requires_grad
        p.square().sum().backward()
        return p.detach(), start.grad, lr.grad

    result = through(grass.AdamW)
    assert_equal_to_the_bit(result, through(torch.optim.AdamW))
    if dtype != torch.float64:
        return
    start = normal(6, seed=0, dtype=dtype).requires_grad_()
    lr = torch.tensor(0.1, dtype=dtype, requires_grad=True)
    p = start
    m = v = torch.zeros_like(start)
    for t in (1, 2):
        g = normal(6, seed=t, dtype=dtype)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - lr * 0.01 * p - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    p.square().sum().backward()
    # torch's counter is float32, and so are the corrections it computes from it here
    torch.testing.assert_close(result, (p.detach(), start.grad, lr.grad), rtol=1e-5, atol=1e-5)


def test_capturable_on_a_cpu_is_refused_before_anything_changes():
    """torch asserts it group by group, when those before have been updated."""
    params, capturable = parameters(), parameters()
    set_grads([*params, *capturable], 0)
    before = copy.deepcopy([p.detach() for p in (*params, *capturable)])
    (twin,) = copies(capturable[:1])
    twin.grad = capturable[0].grad
    with pytest.raises(AssertionError, match="If capturable=True, params and state_steps must be on"):
        torch.optim.AdamW([twin], capturable=True).step()
    optimizer = grass.AdamW([{"params": params}, {"params": capturable, "capturable": True}])
    with pytest.raises(RuntimeError, match="capturable=True needs parameters on a device"):
        optimizer.step()
    assert_equal_to_the_bit([p.detach() for p in (*params, *capturable)], before)
    assert not any(optimizer.state.values())


# Flags and hyperparameters


@pytest.mark.parametrize(
    "kwargs",
    [
        {"maximize": True},
        {"foreach": True},
        {"fused": True},
        {"fused": True, "maximize": True, "amsgrad": True, "lr": torch.tensor(0.02)},
        {"betas": (torch.tensor(0.8), torch.tensor(0.9))},
        {"betas": (torch.tensor([0.8]), torch.tensor([[0.9]])), "amsgrad": True},
        {"betas": (0.0, 0.0)},
        {"betas": (0.3, 0.4)},
        {"eps": 0.0},
        {"weight_decay": 0.0},
        {"weight_decay": 5, "lr": 1},
        {"lr": 0},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_hyperparameters_are_torchs(dtype, kwargs):
    params = parameters(dtype)
    shadows = [
        torch.nn.Parameter(p.detach().to(torch.float64 if dtype == torch.bfloat16 else dtype)) for p in params
    ]
    optimizer = grass.AdamW(params, **kwargs)
    reference = torch_loop(shadows, **{k: v for k, v in kwargs.items() if k not in ("foreach", "fused")})
    for step in range(3):
        set_grads(params, step)
        for p, shadow in zip(params, shadows, strict=True):
            shadow.grad = p.grad.to(shadow.dtype)
        optimizer.step()
        reference.step()
        for p, shadow in zip(params, shadows, strict=True):
            if dtype == torch.bfloat16:
                torch.testing.assert_close(
                    p.detach().double(), shadow.detach(), rtol=0.501 * 2**-7, atol=1e-6
                )
                with torch.no_grad():
                    shadow.copy_(p)
            else:
                torch.testing.assert_close(
                    p.detach(),
                    shadow.detach(),
                    **{torch.float32: {"rtol": 2e-6, "atol": 1e-6}}.get(dtype, {}),
                )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_tensor_betas_on_a_device_are_left_to_torch(dtype, monkeypatch):
    """Our kernels would read them on the host, and wait for the device; low precision has no other way."""
    calls = []
    make_plan = grass_kernels.make_plan
    monkeypatch.setattr(grass_kernels, "make_plan", lambda *args: calls.append(args) or make_plan(*args))
    params = parameters(dtype)
    optimizer = grass.AdamW(params, betas=(torch.tensor(0.5), torch.tensor(0.75)))
    train(optimizer, params, range(1))
    assert calls
    on_a_device = {**optimizer.param_groups[0], "betas": (torch.tensor(0.5, device="meta"), 0.75)}
    assert takes_kernel(on_a_device, params[0], Options()) == (dtype == torch.bfloat16)


def test_constructor_has_torchs_signature():
    ours = inspect.signature(grass.AdamW.__init__).parameters
    for name, expected in inspect.signature(torch.optim.AdamW.__init__).parameters.items():
        assert ours[name].default == expected.default, name
        assert ours[name].kind == expected.kind, name
    params = parameters()
    assert grass.AdamW(params).defaults == torch.optim.AdamW(params).defaults
    assert isinstance(grass.AdamW(params), torch.optim.AdamW)


@pytest.mark.parametrize("state_dtype", [torch.float16, torch.float64, "float32"])
def test_a_bad_state_dtype_is_refused(state_dtype):
    with pytest.raises(ValueError, match=r"state_dtype must be None, torch\.float32 or torch\.bfloat16"):
        grass.AdamW(parameters(), state_dtype=state_dtype)


def test_state_dtype_float32_is_the_default():
    params = parameters(torch.bfloat16)
    optimizer = grass.AdamW(params, state_dtype=torch.float32)
    train(optimizer, params, range(1))
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32


# Parameters of all kinds

LAYOUTS = {
    "contiguous": lambda: normal(2, 3, 4, 5, seed=0),
    "channels_last": lambda: normal(2, 3, 4, 5, seed=0).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: normal(5, 3, 4, 2, seed=0).transpose(0, 3),
    "permuted": lambda: normal(5, 2, 4, 3, seed=0).permute(1, 3, 2, 0),
    "every second": lambda: normal(2, 3, 4, 10, seed=0)[..., ::2],
    "inner block": lambda: normal(4, 5, 6, 7, seed=0)[1:3, 1:4, 1:5, 1:6],
    "misaligned": lambda: normal(121, seed=0)[1:].view(2, 3, 4, 5),
}


def in_layout(name, values, dtype):
    """`values` in memory laid out as `name` says."""
    place = LAYOUTS[name]().to(dtype)
    place.copy_(values)
    return place


def whole_storage(t):
    return t.detach().as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_contiguous_result(layout, grad_layout, dtype):
    values = normal(2, 3, 4, 5, seed=1, dtype=dtype)
    p = torch.nn.Parameter(in_layout(layout, values, dtype))
    plain = torch.nn.Parameter(values.clone())
    of_torch = torch_loop([torch.nn.Parameter(p.detach())], amsgrad=True)
    stride, storage = p.stride(), whole_storage(p).clone()
    optimizer, reference = grass.AdamW([p], amsgrad=True), grass.AdamW([plain], amsgrad=True)
    for step in range(2):
        grad = normal(2, 3, 4, 5, seed=2 + step, dtype=dtype)
        p.grad, plain.grad = in_layout(grad_layout, grad, dtype), grad
        optimizer.step()
        reference.step()
        assert_equal_to_the_bit(p.grad.contiguous(), grad)
    assert_equal_to_the_bit(p.detach().contiguous(), plain.detach())
    for key, value in reference.state[plain].items():
        assert_equal_to_the_bit(optimizer.state[p][key].contiguous(), value)
    assert p.stride() == stride
    # memory between and around the parameter's elements is somebody else's
    between = torch.ones_like(whole_storage(p), dtype=torch.bool)
    between.as_strided(p.shape, p.stride(), p.storage_offset()).fill_(False)
    assert_equal_to_the_bit(whole_storage(p)[between], storage[between])
    # and moments are laid out as torch would
    (twin,) = of_torch.param_groups[0]["params"]
    twin.grad = torch.zeros_like(twin)
    of_torch.step()
    assert optimizer.state[p]["exp_avg"].stride() == of_torch.state[twin]["exp_avg"].stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_without_strides_of_their_own(dtype):
    """An expanded gradient, and one whose dimensions of size 1 have any stride."""
    values = normal(4, 1, 6, seed=0, dtype=dtype)
    one = normal(1, 1, 6, seed=1, dtype=dtype)
    odd = one.repeat(4, 1, 1).as_strided((4, 1, 6), (6, 1, 1))
    results = []
    for grad in (one.repeat(4, 1, 1), one.expand(4, 1, 6), odd):
        p = torch.nn.Parameter(values.clone())
        p.grad = grad
        grass.AdamW([p]).step()
        results.append(p.detach())
    assert_equal_to_the_bit(results[1], results[0])
    assert_equal_to_the_bit(results[2], results[0])


def test_moments_loaded_in_another_layout():
    values, grad = normal(2, 3, 4, 5, seed=0), normal(2, 3, 4, 5, seed=1)
    plain = torch.nn.Parameter(values.clone())
    first = grass.AdamW([plain])
    plain.grad = grad
    first.step()
    saved = copy.deepcopy(first.state_dict())
    p = torch.nn.Parameter(plain.detach().clone(memory_format=torch.channels_last))
    optimizer = grass.AdamW([p])
    optimizer.load_state_dict(saved)
    plain.grad, p.grad = grad, grad
    first.step()
    optimizer.step()
    assert_equal_to_the_bit(p.detach().contiguous(), plain.detach())
    assert_equal_to_the_bit(optimizer.state[p]["exp_avg_sq"].contiguous(), first.state[plain]["exp_avg_sq"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_parameters_without_elements(dtype):
    params = parameters(dtype, ((0,), (3,), (2, 0, 4)))
    alone = copies(params[1:2])
    optimizer = grass.AdamW(params, amsgrad=True)
    set_grads(params, 0)
    optimizer.step()
    reference = grass.AdamW(alone, amsgrad=True)
    alone[0].grad = params[1].grad
    reference.step()
    assert_equal_to_the_bit(params[1].detach(), alone[0].detach())
    for p in params:
        assert optimizer.state[p]["exp_avg"].shape == p.shape
        assert optimizer.state[p]["step"].item() == 1
    only_empty = grass.AdamW(params[:1])
    only_empty.step()
    assert only_empty.state[params[0]]["step"].item() == 1
    fresh = grass.AdamW(params)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    fresh.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_frozen_parameters_do_not_move(dtype):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)).to(dtype)
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    optimizer = grass.AdamW(model.parameters(), lr=0.1)
    model(normal(3, 4, seed=0, dtype=dtype)).square().sum().backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("0."), name
    assert set(optimizer.state) == set(model[1].parameters())
    # its counter begins when it is first trained
    model[0].requires_grad_(True)
    optimizer.zero_grad()
    model(normal(3, 4, seed=1, dtype=dtype)).square().sum().backward()
    optimizer.step()
    assert optimizer.state[model[0].weight]["step"].item() == 1
    assert optimizer.state[model[1].weight]["step"].item() == 2


def test_one_call_takes_many_dtypes():
    params = [
        p
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16)
        for p in parameters(dtype)
    ]
    apart = copies(params)
    optimizer = grass.AdamW(params)
    train(optimizer, params, range(2))
    for i, p in enumerate(apart):
        one = grass.AdamW([p])
        for step in range(2):
            p.grad = normal(*p.shape, seed=1000 * (step + 1) + i).to(p.dtype)
            one.step()
        assert_equal_to_the_bit(params[i].detach(), p.detach())


def test_a_parameter_longer_than_a_block():
    """Many blocks, the last one partial, beside short neighbours."""
    params = parameters(shapes=((3,), (20_011,), (5,)))
    reference_params = copies(params)
    optimizer, reference = grass.AdamW(params), torch_loop(reference_params)
    train(optimizer, params, range(2))
    train(reference, reference_params, range(2))
    assert_same_training(optimizer, params, reference, reference_params)


def test_trains_a_model_as_torch_does():
    def trained(make):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(2, 4, 3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(144, 3)
        ).to(memory_format=torch.channels_last)
        optimizer = make(model.parameters(), lr=1e-2)
        x, target = normal(8, 2, 8, 8, seed=0), torch.arange(8) % 3
        losses = []
        for _ in range(10):
            loss = torch.nn.functional.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    ours, of_torch = trained(grass.AdamW), trained(torch_loop)
    assert ours[-1] < 0.5 * ours[0]
    assert ours == pytest.approx(of_torch, rel=1e-3)
