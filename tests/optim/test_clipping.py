"""`max_grad_norm`: clipping inside the step.

Would catch: a norm of one group, dtype or device taken for the norm of all; a coefficient that is applied twice, to
the norms, or to the gradients themselves; a loss scale that is in the norm but not in the update, or the other way
round; an infinite or NaN norm that moves a parameter, a moment or a counter of any path, or spoils the next step;
norms that differ from torch's; limits that mean nothing and are accepted; a frozen layer's gradient in the norm, or
a clipped one in the importance.

Runs in both passes.
"""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import grass
from grass_kernels import _triton
from tests.support import tiny

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHAPES = ((4, 5), (517,), (), (3, 2), (0,))
STEPS = 3 if _triton.INTERPRETING else 8


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def parameters(dtypes=(F32,)) -> list[nn.Parameter]:
    return [
        nn.Parameter(normal(*shape, seed=i).to(dtypes[i % len(dtypes)])) for i, shape in enumerate(SHAPES)
    ]


def copies(params: list[nn.Parameter], dtype: torch.dtype | None = None) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for p in params]


def set_grads(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    """Rounded through bf16, so that every dtype gets the same; a new size each step, now above the limit, now below."""
    size = (0.02, 1.0, 0.001)[step % 3]
    for i, p in enumerate(params):
        p.grad = (normal(*p.shape, seed=1000 * (step + 1) + i) * size).to(BF16).to(p.dtype) * scale


def exact_norm(params: list[nn.Parameter]) -> float:
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in params if p.grad is not None))


def assert_bits(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


GROUPS = {
    "one group": lambda p: [{"params": p}],
    "several groups": lambda p: [
        {"params": p[:1], "lr": 0.02, "betas": (0.5, 0.9)},
        {"params": p[1:3], "eps": 1e-3, "weight_decay": 0.3, "maximize": True},
        {"params": p[3:], "amsgrad": True, "betas": (0.8, 0.99)},
    ],
}


@pytest.mark.parametrize("max_norm", [0.3, 1e9, 1e-4, 1, math.inf])
@pytest.mark.parametrize("groups", GROUPS)
def test_it_is_clip_grad_norm_and_adamw(groups, max_norm):
    params = parameters()
    plain = copies(params)
    optimizer = grass.AdamW(GROUPS[groups](params), lr=0.01, max_grad_norm=max_norm)
    reference = torch.optim.AdamW(GROUPS[groups](plain), lr=0.01, foreach=False)
    clipped = []
    for step in range(STEPS):
        set_grads(params, step)
        set_grads(plain, step)
        before = [p.grad.clone() for p in params]
        total = torch.nn.utils.clip_grad_norm_(plain, max_norm)
        clipped.append(bool(total > max_norm))
        optimizer.step()
        reference.step()
        assert_bits([p.grad for p in params], before)
        torch.testing.assert_close(optimizer.grad_norm, total, rtol=1e-6, atol=0)
        for p, q in zip(params, plain, strict=True):
            torch.testing.assert_close(p, q, rtol=3e-6, atol=3e-7)
            for key, value in reference.state[q].items():
                # terms of a first moment cancel: some ulp of the largest
                atol = 2e-6 * float(value.abs().max()) if key == "exp_avg" and value.numel() else 0
                torch.testing.assert_close(optimizer.state[p][key], value, rtol=5e-6, atol=atol)
    assert any(clipped) == (max_norm <= 1)


MIXTURES = {
    "fp32 and bf16": (F32, BF16),
    "bf16 and fp16": (BF16, F16),
    "fp32 and float64": (F32, F64),
    "float64": (F64,),
    "all": (F32, BF16, F16, F64),
}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_one_norm_for_all_dtypes(mixture, groups):
    """Against a step of its own on gradients that were scaled by the coefficient of a norm in float64.

    Gradients are powers of two times the same numbers, so that scaling them by a half is exact in every dtype.
    """
    params = parameters(MIXTURES[mixture])
    plain = copies(params)
    set_grads(params, 1)
    for p, q in zip(params, plain, strict=True):
        q.grad = p.grad / 2
    limit = exact_norm(params) / 2 + 0.5e-6  # of which the coefficient is a half
    optimizer = grass.AdamW(GROUPS[groups](params), lr=0.01, max_grad_norm=limit)
    reference = grass.AdamW(GROUPS[groups](plain), lr=0.01)
    before = [p.grad.clone() for p in params]
    optimizer.step()
    reference.step()
    assert_bits([p.grad for p in params], before)
    assert float(optimizer.grad_norm) == pytest.approx(exact_norm(params), rel=1e-6)
    for p, q in zip(params, plain, strict=True):
        # The coefficient has fp32's precision; a parameter may land on the other side of a tie.
        units = 2e-6 if p.dtype in (F32, F64) else 1.01 * torch.finfo(p.dtype).eps
        torch.testing.assert_close(p, q, rtol=units, atol=1e-7)
        for key, value in reference.state[q].items():
            torch.testing.assert_close(optimizer.state[p][key], value, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (F16, F32)])
@pytest.mark.parametrize("scale", [2.0**7, 3.0])
def test_the_norm_is_of_unscaled_gradients(dtypes, scale):
    """A GradScaler's way to a step: the scale in `grad_scale`, the gradients scaled."""
    params = parameters(dtypes)
    plain = copies(params)
    optimizer = grass.AdamW(params, lr=0.01, max_grad_norm=0.3)
    reference = grass.AdamW(plain, lr=0.01, max_grad_norm=0.3)
    for step in range(STEPS):
        set_grads(params, step, scale)
        set_grads(plain, step)
        if scale == 3.0:  # which is not exact in low precision: what was scaled is what counts
            for p, q in zip(params, plain, strict=True):
                q.grad = p.grad.float() / 3 if p.dtype == F32 else p.grad / 3
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        optimizer.step()
        reference.step()
        exact_scale = scale != 3.0
        torch.testing.assert_close(
            optimizer.grad_norm, reference.grad_norm, rtol=1e-6 if exact_scale else 2e-3, atol=0
        )
    for p, q in zip(params, plain, strict=True):
        if exact_scale or dtypes == (F32,):
            units = 2e-6 if p.dtype == F32 else 1.01 * torch.finfo(p.dtype).eps
            torch.testing.assert_close(p, q, rtol=units, atol=1e-6)


def test_a_scaler_and_clipping_together():
    """`scaler.step` alone does what `unscale_`, `clip_grad_norm_` and a step do."""
    params = parameters()
    plain = copies(params)
    optimizer = grass.AdamW(params, lr=0.01, max_grad_norm=0.3)
    reference = torch.optim.AdamW(plain, lr=0.01, foreach=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    other = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for one in (scaler, other):
        one.scale(torch.ones(()))
    for step in range(STEPS):
        set_grads(params, step, 2.0**10)
        set_grads(plain, step, 2.0**10)
        scaler.step(optimizer)
        scaler.update()
        other.unscale_(reference)
        torch.nn.utils.clip_grad_norm_(plain, 0.3)
        other.step(reference)
        other.update()
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_exact_weights_and_rounding_by_chance_are_clipped_too(dtype):
    for option in ({"master_weights": True}, {"stochastic_rounding": True}, {"state_dtype": BF16}):
        params = parameters((dtype,))
        plain = copies(params)
        set_grads(params, 1)
        for p, q in zip(params, plain, strict=True):
            q.grad = p.grad / 2
        limit = exact_norm(params) / 2 + 0.5e-6
        grass.AdamW(params, lr=0.01, max_grad_norm=limit, **option).step()
        grass.AdamW(plain, lr=0.01, **option).step()
        for p, q in zip(params, plain, strict=True):
            units = 2e-6 if dtype == F32 else 1.01 * torch.finfo(dtype).eps
            torch.testing.assert_close(p, q, rtol=units, atol=1e-6)


@pytest.mark.parametrize(
    "bad",
    ["inf", "nan", *([] if _triton.INTERPRETING else ["-inf", "overflow"])],  # it is slow
)
@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (F32, BF16, F16, F64), (F64,)])
def test_a_norm_that_is_not_finite_skips_the_step(dtypes, bad):
    """Wherever it comes from. The next step is as if this one had not been."""
    for place in range(len(dtypes)):
        params = parameters(dtypes)
        options = {"lr": 0.01, "max_grad_norm": 0.3, "amsgrad": True}
        if dtypes == (BF16,):
            options["master_weights"] = True
        never = copies(params)
        optimizer, reference = (
            grass.AdamW([{"params": own[:2]}, {"params": own[2:]}], **options) for own in (params, never)
        )
        for step in (0, 1):
            set_grads(params, step)
            set_grads(never, step)
            optimizer.step()
            reference.step()
        before = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
        set_grads(params, 2)
        if bad == "overflow":  # each finite, their squares not
            if params[place].dtype == F16:
                continue
            params[place].grad.fill_(3e38)
        else:
            params[place].grad.view(-1)[-1] = float(bad)
        grads = [p.grad.clone() for p in params]
        optimizer.step()
        assert not math.isfinite(float(optimizer.grad_norm))
        assert_bits([p.detach() for p in params], before[0])
        assert_bits(optimizer.state_dict()["state"], before[1]["state"])
        assert_bits([p.grad for p in params], grads)
        for step in (3, 4):
            set_grads(params, step)
            set_grads(never, step)
            optimizer.step()
            reference.step()
        assert_bits([p.detach() for p in params], [p.detach() for p in never])
        assert_bits(optimizer.state_dict()["state"], reference.state_dict()["state"])
        assert math.isfinite(float(optimizer.grad_norm))


def test_without_clipping_nothing_is_skipped():
    params = parameters()
    optimizer = grass.AdamW(params)
    set_grads(params, 0)
    params[1].grad[3] = math.nan
    optimizer.step()
    assert params[1][3].isnan()
    assert optimizer.state[params[0]]["step"] == 1
    assert optimizer.grad_norm.isnan()


def test_an_overflow_that_the_scaler_found_is_skipped_with_clipping_too():
    params = parameters()
    optimizer = grass.AdamW(params, max_grad_norm=0.3)
    set_grads(params, 0)
    before = [p.detach().clone() for p in params]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    optimizer.step()
    assert_bits([p.detach() for p in params], before)
    assert optimizer.state[params[0]]["step"] == 0


@pytest.mark.parametrize("max_norm", [None, 0.3])
@pytest.mark.parametrize("dtypes", [(F32,), (BF16, F32), (F32, F64), (F16,)])
def test_norms_are_torchs(dtypes, max_norm):
    params = parameters(dtypes)
    optimizer = grass.AdamW(GROUPS["several groups"](params), max_grad_norm=max_norm)
    assert optimizer.grad_norm is None
    assert optimizer.layer_grad_norms is None
    for step, missing in ((1, 0), (2, 1), (4, None)):
        set_grads(params, step)
        if missing is not None:
            params[missing].grad = None
        optimizer.step()
        expected = [
            0.0 if p.grad is None else float(torch.linalg.vector_norm(p.grad.double())) for p in params
        ]
        assert optimizer.layer_grad_norms.dtype == F32
        assert optimizer.layer_grad_norms.shape == (len(params),)
        assert optimizer.layer_grad_norms.tolist() == pytest.approx(expected, rel=1e-6)
        assert optimizer.grad_norm.dtype == F32
        assert optimizer.grad_norm.shape == ()
        assert float(optimizer.grad_norm) == pytest.approx(exact_norm(params), rel=1e-6)
        if missing is not None:
            assert optimizer.layer_grad_norms[missing] == 0
    norms, total = optimizer.layer_grad_norms, optimizer.grad_norm
    kept = norms.clone(), total.clone()
    set_grads(params, 5)
    optimizer.step()
    assert_bits((norms, total), kept)  # what was read does not change under the reader


def test_norms_are_of_unscaled_gradients_without_clipping():
    params = parameters()
    optimizer = grass.AdamW(params)
    set_grads(params, 1, 64.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(64.0), torch.tensor(0.0)
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(exact_norm(params) / 64, rel=1e-6)


@pytest.mark.parametrize("limit", [np.float32(0.5), np.float64(0.5), np.int64(1), 1])
def test_a_limit_may_be_any_number(limit):
    results = []
    for given in (limit, float(limit)):
        params = parameters()
        optimizer = grass.AdamW(params, max_grad_norm=given)
        set_grads(params, 1, 64.0)
        optimizer.step()
        results.append(params)
    assert_bits(*results)


@pytest.mark.parametrize("bad", [0, 0.0, -1.0, -math.inf, math.nan, "1.0", (1.0,), torch.tensor(1.0), 1j])
def test_a_limit_that_means_nothing_is_refused(bad):
    params = parameters()
    with pytest.raises(ValueError, match="max_grad_norm must be a positive number, or None"):
        grass.AdamW(params, max_grad_norm=bad)
    model = tiny.stack()
    with pytest.raises(ValueError, match="max_grad_norm must be a positive number, or None"):
        grass.GrassAdamW(model, max_grad_norm=bad)
    assert all(p.requires_grad for p in model.parameters())


def test_a_copy_clips_too():
    params = parameters()
    optimizer = grass.AdamW(params, lr=0.01, max_grad_norm=0.3)
    copied = copy.deepcopy(optimizer)
    its_params = copied.param_groups[0]["params"]
    for own, one in ((params, optimizer), (its_params, copied)):
        set_grads(own, 1)
        one.step()
    assert_bits([p.detach() for p in params], [p.detach() for p in its_params])


# With the method


def twins(max_norm: float | None, steps: int):
    """A run of the method, and the norms that plain torch finds of what it trained, step by step."""
    model = tiny.stack()
    config = tiny.config(probe_steps=1, sample_interval=2, update_interval=2)
    opt = grass.GrassAdamW(model, lr=1e-3, config=config, pattern="blocks.*", max_grad_norm=max_norm)
    found = []
    for step in range(steps):

        def look(_: int) -> None:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            found.append((opt.phase, exact_norm(list(model.parameters())), len(grads)))

        tiny.train(model, opt, step, step + 1, before_step=look)
        found[-1] += (float(opt.grad_norm), opt.layer_grad_norms)
    return model, opt, found


def test_the_methods_norm_is_of_active_gradients():
    _, opt, found = twins(0.05, 6)
    adapt = [entry for entry in found if entry[0] == "adapt"]
    assert len(adapt) == 5
    for _, expected, count, ours, layers in adapt:
        assert 0 < count < 40
        assert ours == pytest.approx(expected, rel=1e-5)
        assert int((layers > 0).sum()) == len(opt.active_layers)
    assert min(entry[1] for entry in adapt) > 0.05, "nothing was clipped"


def test_the_methods_step_is_clipped_as_by_torch():
    """Against a run whose gradients torch has clipped before the step."""
    model, opt, _ = twins(0.05, 1)
    other, reference, _ = twins(None, 1)

    def clip(_: int) -> None:
        torch.nn.utils.clip_grad_norm_([p for p in other.parameters() if p.grad is not None], 0.05)

    # the first window: afterwards importance, which sees what was clipped outside, decides otherwise
    tiny.train(model, opt, 1, 3)
    tiny.train(other, reference, 1, 3, before_step=clip)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_importance_is_of_norms_before_clipping():
    """At lr = 0 weights stay, and so do gradients: with a limit the importance is the same to the bit."""
    importance = []
    for max_norm in (None, 0.05):
        model = tiny.stack(layers=3)
        config = tiny.config(active_layers=1, probe_steps=1, sample_interval=2, update_interval=2)
        opt = grass.GrassAdamW(model, lr=0.0, config=config, pattern="blocks.*", max_grad_norm=max_norm)
        tiny.train(model, opt, 0, 6)
        assert opt.num_refreshes > 1
        importance.append((opt.importance, opt.draw_counts))
    assert_bits(importance[0], importance[1])


def test_a_step_the_method_skips_changes_no_weight():
    model = tiny.stack()
    config = tiny.config(probe_steps=0)
    opt = grass.GrassAdamW(model, lr=1e-3, config=config, pattern="blocks.*", max_grad_norm=0.05)
    tiny.train(model, opt, 0, 2)
    before, steps = tiny.weights(model), opt.state[model.head.weight]["step"].clone()

    def spoil(_: int) -> None:
        model.head.weight.grad[0, 0] = math.inf

    tiny.train(model, opt, 2, 3, before_step=spoil)
    tiny.assert_identical(tiny.weights(model), before)
    assert opt.state[model.head.weight]["step"] == steps
    tiny.train(model, opt, 3, 5)
    assert opt.importance.isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())
