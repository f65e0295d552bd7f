"""Hooks on a step: what they see, what they may replace, and when they run.

Would catch: a hook that sees other arguments than torch's shows it, for any way to call a step; a closure, gradients,
settings or states that a hook before the step replaces and the step does not take; hooks that run in another order, too
often or not at all: of an instance, of all optimizers, registered or removed between steps, of the method in its probe
and after it, of copies, under a scaler and schedules; a profiler that does not find the step.

Oracle: `torch.optim.AdamW`. Runs in both passes: with ``TRITON_INTERPRET=1`` steps go by plans.
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import grass
from tests.support import tiny
from tests.support.twins import F32, KINDS, Model, Twins, method, normal

Calls = list[tuple[str, tuple, dict]]
MAKES: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "torch": lambda params: torch.optim.AdamW(params, lr=0.01),
    "AdamW": lambda params: grass.AdamW(params, lr=0.01),
}
OURS = ["AdamW", *(kind for kind in KINDS if kind != "AdamW")]


def make(kind: str) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    """An optimizer with gradients."""
    model = Model(F32)
    params = model.ordered()
    optimizer = MAKES[kind](params) if kind in MAKES else method(model, params, KINDS[kind], lr=0.01)
    set_grads(params)
    return optimizer, params


def set_grads(params: list[nn.Parameter], seed: int = 0) -> None:
    for i, p in enumerate(params):
        p.grad = normal(*p.shape, seed=100 * (seed + 1) + i)


@pytest.fixture
def handles() -> Iterator[list]:
    """Hooks on all optimizers, removed at the end."""
    kept: list = []
    yield kept
    for handle in kept:
        handle.remove()


def record(optimizer: torch.optim.Optimizer, handles: list, names: str = "abcd") -> Calls:
    """Calls of hooks: before and after the step, of the instance and global."""
    calls: Calls = []

    def hook(name):
        def seen(opt, args, kwargs):
            assert opt is optimizer
            calls.append((name, tuple("self" if x is optimizer else x for x in args), dict(kwargs)))

        return seen

    optimizer.register_step_pre_hook(hook(names[0]))
    optimizer.register_step_post_hook(hook(names[1]))
    handles.append(register_optimizer_step_pre_hook(hook(names[2])))
    handles.append(register_optimizer_step_post_hook(hook(names[3])))
    return calls


def closure() -> float:
    return 0.25


CALLS = {
    "no argument": lambda optimizer: optimizer.step(),
    "closure": lambda optimizer: optimizer.step(closure),
    "closure by name": lambda optimizer: optimizer.step(closure=closure),
    "None": lambda optimizer: optimizer.step(None),
    "None by name": lambda optimizer: optimizer.step(closure=None),
}


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("call", CALLS)
def test_hooks_see_what_torchs_see(call, kind):
    seen, returned = [], []
    for each in ("torch", kind):
        handles: list = []
        optimizer, _ = make(each)
        calls = record(optimizer, handles)
        for _ in range(2):
            returned.append(CALLS[call](optimizer))
        for handle in handles:
            handle.remove()
        seen.append(calls)
    assert seen[1] == seen[0]
    assert returned[2:] == returned[:2]


@pytest.mark.parametrize("kind", OURS)
def test_hooks_of_one_kind_only(kind, handles):
    """Each alone is enough to be called."""
    for register in range(4):
        calls: list[Any] = []
        optimizer, _ = make(kind)

        def hook(opt, args, kwargs, calls=calls):
            calls.append((args, kwargs))

        ways = (
            optimizer.register_step_pre_hook, optimizer.register_step_post_hook,
            register_optimizer_step_pre_hook, register_optimizer_step_post_hook,
        )  # fmt: skip
        handle = ways[register](hook)
        handles.append(handle)
        optimizer.step()
        assert calls == [((optimizer,), {})]
        handle.remove()
        optimizer.step()
        assert len(calls) == 1


# What a hook replaces


@pytest.mark.parametrize("call", ["no argument", "closure", "closure by name"])
@pytest.mark.parametrize("kind", ["torch", *OURS])
def test_a_hook_replaces_the_closure(call, kind):
    """Once, with gradients enabled; hooks after the step see what it was replaced by."""
    optimizer, params = make(kind)
    ran = []

    def replacement():
        ran.append(torch.is_grad_enabled())
        set_grads(params, seed=5)
        return 0.75

    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt,), {"closure": replacement}))
    after = []
    optimizer.register_step_post_hook(lambda opt, args, kwargs: after.append((args, kwargs)))
    assert CALLS[call](optimizer) == 0.75
    assert ran == [True]
    assert after == [((optimizer,), {"closure": replacement})]
    optimizer.state_dict()  # waits for copies
    torch.testing.assert_close(optimizer.state[params[1]]["exp_avg"], 0.1 * params[1].grad)


@pytest.mark.parametrize("kind", ["torch", *OURS])
def test_a_hook_changes_the_kwargs_it_was_given(kind):
    optimizer, _ = make(kind)

    def wrap(opt, args, kwargs):
        given = kwargs["closure"]
        return args, {**kwargs, "closure": lambda: 2 * given()}

    optimizer.register_step_pre_hook(wrap)
    optimizer.register_step_pre_hook(wrap)
    assert optimizer.step(closure=closure) == 1.0


@pytest.mark.parametrize("kind", ["torch", *OURS])
def test_a_hook_passes_the_closure_by_place(kind):
    optimizer, _ = make(kind)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, closure), {}))
    assert optimizer.step() == 0.25


@pytest.mark.parametrize("kind", ["torch", *OURS])
def test_a_hook_takes_the_closure_away(kind):
    optimizer, _ = make(kind)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: (args, {"closure": None}))
    assert optimizer.step(closure=closure) is None


@pytest.mark.parametrize("returned", [(1,), [(), {}], 7, ((), {}, None)], ids=str)
@pytest.mark.parametrize("kind", ["torch", *OURS])
def test_a_hook_that_returns_something_else_is_refused(kind, returned):
    optimizer, params = make(kind)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: returned)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"must return None or a tuple of \(new_args, new_kwargs\)"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("kind", ["torch", *OURS])
def test_an_argument_that_a_step_does_not_know_is_refused(kind):
    """As it is without hooks."""
    optimizer, _ = make(kind)
    with pytest.raises(TypeError):
        optimizer.step(other=1)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: (args, {"other": 1}))
    with pytest.raises(TypeError):
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_change_gradients_settings_and_states(kind):
    twins = Twins(kind)

    def before(opt, args, kwargs):
        for group in opt.param_groups:
            group["lr"] *= 1.5
            for p in group["params"]:
                p.grad = p.grad.clamp(-0.5, 0.5)
        nn.utils.clip_grad_norm_([p for group in opt.param_groups for p in group["params"]], 0.25)

    def after(opt, args, kwargs):
        for group in opt.param_groups:
            for p in group["params"]:
                p.data.mul_(0.75)

    twins.both(lambda optimizer, params: optimizer.register_step_pre_hook(before))
    twins.both(lambda optimizer, params: optimizer.register_step_post_hook(after))
    twins.go(3)
    twins.compare_states()


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_takes_gradients_away(kind):
    """The step is one without those parameters."""
    twins = Twins(kind)

    def before(opt, args, kwargs):
        opt.param_groups[0]["params"][1].grad = None

    twins.go()
    twins.both(lambda optimizer, params: optimizer.register_step_pre_hook(before))
    twins.go(2)
    twins.compare_states()


@pytest.mark.parametrize("kind", ["torch", *OURS])
def test_errors_of_hooks_and_closures_reach_the_caller(kind):
    """Hooks after the step do not run then, and the next step goes on."""
    optimizer, params = make(kind)
    after = []
    optimizer.register_step_post_hook(lambda opt, args, kwargs: after.append(1))

    def fails(*args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(fails)
    handle = optimizer.register_step_pre_hook(fails)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    handle.remove()
    assert not after
    assert not optimizer.state.get(params[0])
    optimizer.step()
    assert after == [1]


# When hooks run


@pytest.mark.parametrize("kind", ["torch", *OURS])
def test_hooks_come_and_go_between_steps(kind):
    optimizer, _ = make(kind)
    calls: list[str] = []
    expected: list[str] = []
    handles = {}
    for step in range(5):
        if step in (1, 3):
            handles[step] = optimizer.register_step_pre_hook(lambda *_, s=step: calls.append(f"before {s}"))
        if step == 2:
            handles[step] = optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        if step == 4:
            handles.pop(1).remove()
        optimizer.step()
        expected += {1: ["before 1"], 2: ["before 1", "after"], 3: ["before 1", "before 3", "after"]}.get(
            step, []
        )
        expected += ["before 3", "after"] if step == 4 else []
        assert calls == expected


@pytest.mark.parametrize("kind", ["torch", *OURS])
def test_copies_have_no_hooks_of_the_instance_and_those_of_all(kind, handles):
    optimizer, _ = make(kind)
    own, of_all = [], []
    optimizer.register_step_pre_hook(lambda *_: own.append(1))
    handles.append(register_optimizer_step_pre_hook(lambda *_: of_all.append(1)))
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        set_grads([p for group in copied.param_groups for p in group["params"]])
        copied.step()
    assert (len(own), len(of_all)) == (0, 2)


@pytest.mark.parametrize("kind", ["torch", *OURS])
def test_hooks_stay_when_a_state_is_loaded(kind):
    optimizer, _ = make(kind)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["torch", *OURS])
def test_hooks_run_once_where_steps_are_wrapped(kind):
    """By a schedule, a scaler, and a function in the instance."""
    optimizer, _ = make(kind)
    calls = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: calls.append((args[1:], kwargs)))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
    original = optimizer.step
    optimizer.step = lambda *args, **kwargs: original(*args, **kwargs)
    optimizer.step()
    assert calls == [((), {})] * 2


@pytest.mark.parametrize(
    "mode", [{"offload": "none"}, {"offload": "streamed", "fused_backward": True}], ids=str
)
def test_hooks_of_the_method_run_in_both_phases(mode, handles):
    model = tiny.stack(layers=3)
    config = tiny.config(active_layers=1, probe_steps=2, sample_interval=2, update_interval=2, **mode)
    opt = grass.GrassAdamW(model, lr=1e-2, config=config, pattern="blocks.*")
    phases = []
    calls = record(opt, handles)
    opt.register_step_pre_hook(lambda *_: phases.append(opt.phase))
    tiny.train(model, opt, 0, 5)
    assert [name for name, _, _ in calls] == ["c", "a", "b", "d"] * 5
    assert all((args, kwargs) == (("self",), {}) for _, args, kwargs in calls)
    assert phases == ["probe"] * 2 + ["adapt"] * 3


def test_hooks_change_nothing_of_a_run_of_the_method(handles):
    runs = []
    for hooked in (False, True):
        model = tiny.stack(layers=3)
        config = tiny.config(active_layers=1, probe_steps=2, sample_interval=2, update_interval=2)
        opt = grass.GrassAdamW(model, lr=1e-2, config=config, pattern="blocks.*")
        if hooked:
            record(opt, handles)
        tiny.train(model, opt, 0, 5)
        runs.append(tiny.weights(model))
    tiny.assert_identical(*runs)


def test_a_step_of_the_method_with_a_closure_that_a_hook_replaces():
    """In the probe, where gradients are measured as they come."""
    model = tiny.stack(layers=3)
    opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(probe_steps=2), pattern="blocks.*")

    def backward():
        opt.zero_grad()
        loss = tiny.loss_of(model, tiny.batch(0))
        loss.backward()
        return loss.detach()

    opt.register_step_pre_hook(lambda o, args, kwargs: (args, {"closure": backward}))
    assert opt.step() > 0
    assert opt.step_count == 1


# A profiler


@pytest.mark.parametrize("kind", ["torch", *OURS])
def test_a_profiler_finds_each_step(kind):
    optimizer, _ = make(kind)
    name = f"Optimizer.step#{type(optimizer).__name__}.step"
    optimizer.step()
    with torch.autograd.profiler.profile() as profile:
        for _ in range(2):
            optimizer.step()
    assert [event.name for event in profile.function_events].count(name) == 2
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as other:
        optimizer.step(closure)
    assert [event.name for event in other.events()].count(name) == 1


def test_a_profiler_finds_the_step_of_a_subclass():
    class Own(grass.AdamW):
        pass

    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = Own([p])
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
    assert [event.name for event in profile.function_events].count("Optimizer.step#Own.step") == 1


# A compiled step


@pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")
@pytest.mark.filterwarnings("ignore:Profiler record function")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["torch", "AdamW"])
def test_a_compiled_step_calls_hooks_once(kind, handles):
    torch._dynamo.reset()
    optimizer, _ = make(kind)
    calls: list[str] = []
    handles.append(optimizer.register_step_pre_hook(lambda *_: calls.append("before")))
    handles.append(optimizer.register_step_post_hook(lambda *_: calls.append("after")))
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    step()
    step()
    assert calls == ["before", "after"] * 2
