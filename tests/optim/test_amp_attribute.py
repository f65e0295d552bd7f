"""GradScaler, and who else asks whether a step reads its scale: `_step_supports_amp_scaling`.

Would catch: an answer other than torch's, when made, copied, loaded or changed, which makes Lightning refuse to clip
and hides skipped steps from accelerate (tests/integrations/test_skipped_steps.py); a scaled step that differs from
torch's in parameters, states, gradients or the scaler's own state: plain, with an overflow, unscaled and clipped first,
with several optimizers, with parameters of several dtypes of which a step with ``fused=True`` forgets to unscale some.

Oracle: `torch.optim.AdamW` with the same flags. Runs in both passes: with ``TRITON_INTERPRET=1`` steps go by plans.
"""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import grass
from grass_kernels import _triton
from tests.support import tiny
from tests.support.twins import BF16, F16, F32, F64, KINDS, Model, method, normal

FLAGS = (None, False, True)
BOTH = (torch.optim.AdamW, grass.AdamW)
SHAPES = ((4, 4), (33,), (2, 3))


def supports(optimizer: torch.optim.Optimizer) -> bool:
    """As GradScaler, accelerate and Lightning ask."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def parameters(*dtypes: torch.dtype) -> list[nn.Parameter]:
    return [
        nn.Parameter(normal(*SHAPES[i % len(SHAPES)], seed=i).to(dtype)) for i, dtype in enumerate(dtypes)
    ]


# The answer

MADE = {
    "plain": lambda cls, p, fused: cls([p], fused=fused),
    "by groups": lambda cls, p, fused: cls([{"params": [p], "fused": fused}]),
    "foreach": lambda cls, p, fused: cls([p], fused=fused, foreach=None if fused else True),
    "amsgrad": lambda cls, p, fused: cls([p], fused=fused, amsgrad=True),
    "tensor lr": lambda cls, p, fused: cls([p], fused=fused, lr=torch.tensor(0.1)),
    "named": lambda cls, p, fused: cls([("name", p)], fused=fused),
}


@pytest.mark.parametrize("fused", FLAGS)
@pytest.mark.parametrize("made", MADE)
def test_it_is_torchs_when_made(made, fused):
    theirs, ours = (MADE[made](cls, nn.Parameter(torch.ones(3)), fused) for cls in BOTH)
    assert supports(ours) == supports(theirs)


@pytest.mark.parametrize("fused", FLAGS)
@pytest.mark.parametrize("dtypes", [(BF16,), (F16,), (F64,), (F32, F64)], ids=str)
def test_it_is_torchs_for_every_dtype(dtypes, fused):
    theirs, ours = (cls(parameters(*dtypes), fused=fused) for cls in BOTH)
    assert supports(ours) == supports(theirs)


def stepped(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def loaded(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer


def loaded_from(fused):
    def load(optimizer):
        p = nn.Parameter(torch.ones(3))
        optimizer.load_state_dict(stepped(type(optimizer)([p], fused=fused)).state_dict())
        return optimizer

    return load


def with_a_group(fused):
    def add(optimizer):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=F64))], "fused": fused})
        return optimizer

    return add


def group_changed(fused):
    def change(optimizer):
        optimizer.param_groups[0]["fused"] = fused
        return optimizer

    return change


AFTER = {
    "a step": stepped,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "deepcopy of a copy": lambda optimizer: copy.deepcopy(copy.copy(optimizer)),
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "loading its own state": lambda optimizer: loaded(stepped(optimizer)),
    "loading a fused one's": loaded_from(True),
    "loading another's": loaded_from(None),
    "a fused group": with_a_group(True),
    "a float64 group": with_a_group(None),
    "a group that became fused": group_changed(True),
    "a group that is fused no more": group_changed(None),
    "another's state set": lambda optimizer: (optimizer.__setstate__(optimizer.__getstate__()), optimizer)[1],
}


@pytest.mark.parametrize("fused", FLAGS)
@pytest.mark.parametrize("after", AFTER)
def test_it_is_torchs_after(after, fused):
    theirs, ours = (AFTER[after](cls([nn.Parameter(torch.ones(3))], fused=fused)) for cls in BOTH)
    assert supports(ours) == supports(theirs)


def test_who_sets_it_is_heard():
    """Some switch it off, to clip fused optimizers under Lightning."""
    optimizer = grass.AdamW([nn.Parameter(torch.ones(3))], fused=True)
    optimizer._step_supports_amp_scaling = False
    assert not supports(optimizer)


@pytest.mark.parametrize("fused", FLAGS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "AdamW"])
def test_it_is_torchs_for_the_method(kind, fused):
    model = Model(F32)
    opt = method(model, model, KINDS[kind], fused=fused)
    assert supports(opt) == bool(fused)
    assert supports(stepped(opt)) == bool(fused)
    assert supports(loaded(opt)) == bool(fused)
    theirs = copy.deepcopy(torch.optim.AdamW([nn.Parameter(torch.ones(3))], fused=fused))
    assert supports(copy.deepcopy(opt)) == supports(theirs)


@pytest.mark.parametrize("probe_steps", [0, 3])
def test_it_is_torchs_in_both_phases(probe_steps):
    model = tiny.stack(layers=3)
    opt = grass.GrassAdamW(model, config=tiny.config(probe_steps=probe_steps), pattern="blocks.*")
    for step in range(5):
        assert not supports(opt), step
        tiny.train(model, opt, step, step + 1)


# Lightning


def clip_as_lightning(optimizer: torch.optim.Optimizer, limit: float) -> None:
    """Its precision plugins ask before they clip, in bfloat16 without a scaler too."""
    if limit > 0 and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise RuntimeError("does not allow for gradient clipping because it performs unscaling internally")
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], limit)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_lightning_clips(dtype, fused):
    """Both give one result, with gradients that were clipped before the step."""
    params = parameters(dtype, dtype)
    twins = [nn.Parameter(p.detach().float()) for p in params]
    ours = grass.AdamW(params, lr=0.01, fused=fused)
    theirs = torch.optim.AdamW(twins, lr=0.01, fused=fused)
    for step in range(3):
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            p.grad = normal(*p.shape, seed=10 * step + i).to(dtype)
            q.grad = p.grad.float()
        for optimizer in (ours, theirs):
            clip_as_lightning(optimizer, 0.5)
            optimizer.step()
        for p, q in zip(params, twins, strict=True):
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(p.detach().float(), q.detach(), rtol=20 * eps, atol=2 * eps)
            q.data.copy_(p.data)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "AdamW"])
def test_lightning_clips_the_method(kind):
    model = Model(F32)
    opt = method(model, model, KINDS[kind])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    clip_as_lightning(opt, 0.5)
    opt.step()


# Whole scaled runs


class Scaled:
    """Our optimizer and torch's, each with a scaler of its own, on equal parameters; ours and theirs in lists."""

    def __init__(self, *dtypes: torch.dtype, fused: bool | None, optimizers: int = 1, **options: Any) -> None:
        self.sides = []
        for cls in (grass.AdamW, torch.optim.AdamW):
            params = [parameters(*dtypes) for _ in range(optimizers)]
            made = [cls(own, lr=0.01, fused=fused, **options) for own in params]
            scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
            scaler.scale(torch.ones(()))  # a scaler makes its scale when it is first used
            self.sides.append((params, made, scaler))

    def set_grads(self, step: int, overflow: float | None = None, of: int = 0) -> None:
        """Scaled gradients; an overflow in one element of the last parameter of an optimizer."""
        for params, _, scaler in self.sides:
            for k, own in enumerate(params):
                for i, p in enumerate(own):
                    value = normal(*p.shape, seed=1000 * step + 10 * k + i)
                    p.grad = (value * scaler.get_scale()).to(p.dtype)
                if overflow is not None and k == of:
                    own[-1].grad.view(-1)[0] = overflow

    def step(self, clip: float | None = None) -> None:
        for params, optimizers, scaler in self.sides:
            for own, optimizer in zip(params, optimizers, strict=True):
                if clip is not None:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(own, clip)
                scaler.step(optimizer)
            scaler.update()
            assert not hasattr(optimizers[0], "grad_scale")
            assert not hasattr(optimizers[0], "found_inf")

    def compare(self, gradients: bool) -> None:
        (params, ours, scaler), (twins, theirs, their_scaler) = self.sides
        assert scaler.state_dict() == their_scaler.state_dict()
        for own, other, mine, torchs in zip(params, twins, ours, theirs, strict=True):
            for p, q in zip(own, other, strict=True):
                # torch's bfloat16 moments are rounded in every step, ours are not
                tolerance = (
                    {"rtol": 1e-5, "atol": 1e-6} if p.dtype.itemsize > 2 else {"rtol": 0.02, "atol": 0.02}
                )
                torch.testing.assert_close(p, q, **tolerance)
                state, expected = mine.state.get(p, {}), torchs.state.get(q, {})
                counts = [float(s["step"]) if s else 0.0 for s in (state, expected)]
                assert counts[0] == counts[1]
                if p.dtype.itemsize > 2 and expected:
                    for key in ("exp_avg", "exp_avg_sq"):
                        found = state.get(key, torch.zeros_like(p))  # zeros are as good as none
                        torch.testing.assert_close(found, expected[key], **tolerance)
                if gradients:
                    torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, equal_nan=True)


DTYPES = {
    "float32": (F32, F32),
    "bfloat16": (BF16, BF16),
    "float64": (F64, F64),
    "all": (F64, BF16, F32, F64),
}


@pytest.mark.parametrize("clip", [None, 0.5], ids=["plain", "clipped"])
@pytest.mark.parametrize("fused", FLAGS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_a_scaled_run_is_torchs(dtypes, fused, clip):
    """Gradients too, where the scaler unscales them: ours are read-only where the step does."""
    run = Scaled(*DTYPES[dtypes], fused=fused)
    for step in range(5):
        run.set_grads(step, overflow={1: math.inf, 3: math.nan}.get(step))
        run.step(clip)
        run.compare(gradients=not fused)


@pytest.mark.parametrize("fused", FLAGS)
def test_an_overflow_in_the_first_step(fused):
    """There are no states yet, and torch makes none where the scaler skips the step."""
    run = Scaled(F32, F64, fused=fused)
    for step in range(3):
        run.set_grads(step, overflow=math.inf if step == 0 else None)
        run.step()
        run.compare(gradients=not fused)


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.0}], ids=str)
@pytest.mark.parametrize("fused", FLAGS)
def test_a_scaled_run_with_options_is_torchs(options, fused):
    run = Scaled(F32, F64, fused=fused, **options)
    for step in range(4):
        run.set_grads(step, overflow=math.inf if step == 2 else None)
        run.step()
        run.compare(gradients=not fused)


@pytest.mark.parametrize("of", [0, 1], ids=["of the first", "of the second"])
@pytest.mark.parametrize("fused", FLAGS)
def test_several_optimizers_share_a_scaler(fused, of):
    """An overflow of one skips its step only; all have the next scale."""
    run = Scaled(F32, F64, fused=fused, optimizers=2)
    for step in range(4):
        run.set_grads(step, overflow=math.inf if step in (0, 2) else None, of=of)
        run.step(clip=0.5 if step == 3 else None)
        run.compare(gradients=not fused)


def test_optimizers_of_several_kinds_share_a_scaler():
    sides = []
    for cls in BOTH:
        params = [parameters(F32) for _ in range(3)]
        made = [cls(params[0], fused=True), cls(params[1]), torch.optim.SGD(params[2], lr=0.1)]
        sides.append((params, made, torch.amp.GradScaler("cpu", init_scale=64.0)))
    for step in range(3):
        for params, made, scaler in sides:
            scaler.scale(torch.ones(()))
            for i, (own, optimizer) in enumerate(zip(params, made, strict=True)):
                own[0].grad = normal(*own[0].shape, seed=10 * step + i) * scaler.get_scale()
                if step == 1 and i == 1:
                    own[0].grad[0] = math.inf
                scaler.step(optimizer)
            scaler.update()
    (theirs, _, their_scaler), (ours, _, scaler) = sides
    assert scaler.state_dict() == their_scaler.state_dict()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own[0], other[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_a_copy_of_a_fused_optimizer_takes_scaled_steps(dtype):
    """It has lost the answer, as torch's has: the scaler unscales before its steps."""
    sides = []
    for cls in BOTH:
        optimizer = copy.deepcopy(stepped(cls(parameters(dtype, dtype), lr=0.01, fused=True)))
        params = optimizer.param_groups[0]["params"]
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scaler.scale(torch.ones(()))
        for i, p in enumerate(params):
            p.grad = (normal(*p.shape, seed=i) * 64).to(dtype)
        scaler.step(optimizer)
        scaler.update()
        sides.append((params, [p.grad for p in params]))
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == BF16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(sides[1], sides[0], **tolerance)


def outcome(cls: type, fused: bool | None, unscale_first: bool) -> object:
    """The error of a scaled step in float16, or that there is none."""
    (p,) = parameters(F16)
    optimizer = cls([p], fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))
    p.grad = torch.ones_like(p)
    try:
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("fused", FLAGS)
def test_float16_gradients_are_refused_where_torch_refuses_them(fused, unscale_first):
    """The scaler does not unscale them; only a step that reads the scale itself can take them."""
    assert outcome(grass.AdamW, fused, unscale_first) == outcome(torch.optim.AdamW, fused, unscale_first)


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("fused", FLAGS)
def test_norms_are_of_unscaled_gradients(fused, unscale_first):
    params = parameters(F32, F64, BF16)
    optimizer = grass.AdamW(params, lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))
    norms = []
    for i, p in enumerate(params):
        value = normal(*p.shape, seed=i).to(p.dtype)
        p.grad = value * 64
        norms.append(value.double().norm().float())
    if unscale_first:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    torch.testing.assert_close(optimizer.layer_grad_norms, torch.stack(norms), rtol=1e-5, atol=0)


@pytest.mark.parametrize("fused", FLAGS)
def test_clipping_inside_the_step_is_of_unscaled_gradients(fused):
    """`max_grad_norm` beside a scaler does what `unscale_` and `clip_grad_norm_` do for torch."""
    params, twins = parameters(F32, F64), parameters(F32, F64)
    ours = grass.AdamW(params, lr=0.01, fused=fused, max_grad_norm=0.5)
    theirs = torch.optim.AdamW(twins, lr=0.01, fused=fused)
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in range(2)]
    for step in range(3):
        for own, optimizer, scaler in zip((params, twins), (ours, theirs), scalers, strict=True):
            scaler.scale(torch.ones(()))
            for i, p in enumerate(own):
                p.grad = (normal(*p.shape, seed=10 * step + i) * scaler.get_scale()).to(p.dtype)
            if step == 1:
                own[1].grad[0] = math.inf
            if optimizer is theirs:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(own, 0.5)
            scaler.step(optimizer)
            scaler.update()
        torch.testing.assert_close(params, twins, rtol=1e-5, atol=1e-6)
    assert scalers[0].state_dict() == scalers[1].state_dict()


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("options", [{"master_weights": True}, {"stochastic_rounding": True}], ids=str)
def test_scaled_low_precision_runs_are_unscaled_ones(options, fused):
    """A power of two loses no bit of a gradient."""
    runs = []
    for scaled in (True, False):
        params = parameters(BF16, BF16)
        optimizer = grass.AdamW(params, lr=1e-3, fused=fused, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
        scaler.scale(torch.ones(()))
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = (normal(*p.shape, seed=10 * step + i) * (64 if scaled else 1)).to(BF16)
            scaler.step(optimizer)
            scaler.update()
        runs.append([p.detach() for p in params])
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


# The method


def scaled_run(scale: float | None, fused: bool | None, **config: Any) -> Any:
    """The weights after some steps."""
    model = tiny.stack(layers=3)
    opt = grass.GrassAdamW(
        model, lr=1e-3, fused=fused, config=tiny.config(probe_steps=2, **config), pattern="blocks.*"
    )
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=scale or 1.0, growth_interval=1000, enabled=scale is not None
    )
    for step in range(5 if _triton.INTERPRETING else 8):
        scaler.scale(tiny.loss_of(model, tiny.batch(step))).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    return tiny.weights(model), opt


@pytest.mark.parametrize(("offload", "fused"), [("none", None), ("none", True), ("streamed", None)])
def test_a_scaled_run_of_the_method_is_an_unscaled_one(offload, fused):
    scaled, opt = scaled_run(64.0, fused, offload=offload)
    plain, reference = scaled_run(None, fused, offload=offload)
    assert opt.draw_counts == reference.draw_counts
    for name, value in plain.items():
        torch.testing.assert_close(scaled[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("overflow", [(1,), (0, 1, 4)], ids=str)
def test_the_method_is_untouched_by_steps_that_overflow(overflow, fused):
    """In the probe and after it: weights and states change by nothing."""
    model = tiny.stack(layers=3)
    config = tiny.config(probe_steps=2, active_layers=3, sample_interval=100, update_interval=100)
    opt = grass.GrassAdamW(model, lr=1e-3, fused=fused, config=config, pattern="blocks.*")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1000)
    for step in range(6):
        before = tiny.weights(model), states(opt)
        loss = tiny.loss_of(model, tiny.batch(step))
        scaler.scale(loss * math.inf if step in overflow else loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        if step in overflow:
            tiny.assert_identical(tiny.weights(model), before[0])
            tiny.assert_identical(states(opt), before[1])
    assert scaler.get_scale() == 2.0 ** (12 - len(overflow))
    assert opt.importance.isfinite().all()


def states(opt: grass.GrassAdamW) -> dict[Any, Any]:
    return {i: {key: value.clone() for key, value in s.items()} for i, s in opt.state_dict()["state"].items()}


@pytest.mark.parametrize("fused", [None, True])
def test_updates_inside_backward_still_refuse_a_scaler_by_name(fused):
    model = tiny.stack(layers=3)
    config = tiny.config(probe_steps=0, fused_backward=True)
    opt = grass.GrassAdamW(model, lr=1e-3, fused=fused, config=config, pattern="blocks.*")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(tiny.loss_of(model, tiny.batch(0))).backward()
    with pytest.raises(grass.GrassError, match="fused_backward and a GradScaler exclude each other"):
        scaler.step(opt)
