"""Tensors that an optimizer owns, shares or keeps alive: loading, copies, lifetime, inference mode, swapped tensors.

Would catch: moments, counters or remainders that a loaded dict shares, so that the next loading of it, or another
optimizer, begins elsewhere; a state dict that is no view of the state; a shallow copy that does not share as torch's,
or a deep one that shares; parameters, gradients, moments, closures or loaded dicts that live on when everybody else has
dropped them; tensors made in inference mode, or swapped by torch's own utilities, that fail where torch works, or fail
in the middle of a step.

Oracle: `torch.optim.AdamW`. Runs in both passes: with ``TRITON_INTERPRET=1`` steps go by plans.
"""

import copy
import gc
import io
import itertools
import pickle
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import grass
from tests.support import tiny
from tests.support.twins import (
    BF16,
    F32,
    F64,
    KINDS,
    Model,
    Twins,
    assert_unchanged,
    method,
    normal,
    refusal,
    snapshot,
)

METHODS = [kind for kind in KINDS if kind != "AdamW"]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    for i, p in enumerate(params):
        p.grad = normal(*p.shape, seed=100 * (step + 1) + i).to(p.dtype)


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], *steps: int) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def make(
    kind: str, dtype: torch.dtype = F32, **options: Any
) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    """An optimizer of ours or torch's on the same parameters every time."""
    model = Model(dtype)
    params = model.ordered()
    if kind == "torch":
        return torch.optim.AdamW(params, lr=0.01, foreach=False, **options), params
    if kind == "AdamW":
        return grass.AdamW(params, lr=0.01, **options), params
    return method(model, params, KINDS[kind], lr=0.01, **options), params


def values(saved: dict[str, Any]) -> dict[Any, Tensor]:
    """Copies of the tensors of a state dict."""
    state = saved["state"]
    return {(i, key): t.clone() for i in state for key, t in state[i].items() if isinstance(t, Tensor)}


def assert_same_values(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=0, msg=lambda m, k=key: f"{k}: {m}")


def assert_same_run(one: tuple, other: tuple) -> None:
    (optimizer, params), (reference, twins) = one, other
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
    assert_same_values(values(optimizer.state_dict()), values(reference.state_dict()))


# Loading

TRAININGS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (F32, {}),
    "float64": (F64, {}),
    "exact weights": (BF16, {"master_weights": True}),
    "maxima, fused": (F32, {"amsgrad": True, "fused": True}),
}
CASES = [
    *(("AdamW", name) for name in TRAININGS),
    *((kind, "float32") for kind in METHODS),
    ("streamed", "exact weights"),
]


def trained(kind: str, name: str, *steps: int) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    dtype, options = TRAININGS[name]
    optimizer, params = make(kind, dtype, **options)
    train(optimizer, params, *steps)
    return optimizer, params


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_two_optimizers_of_one_dict_go_their_own_ways(kind, name):
    source, _ = trained(kind, name, 0, 1)
    saved = copy.deepcopy(source.state_dict())
    before = values(saved)
    one, other, alone = (trained(kind, name, 0, 1) for _ in range(3))
    one[0].load_state_dict(saved)
    other[0].load_state_dict(saved)
    for step in (2, 3):
        train(*one, step)
        train(*other, step)
    assert_same_values(values(saved), before)
    alone[0].load_state_dict(copy.deepcopy(saved))
    train(*alone, 2, 3)
    assert_same_run(one, alone)
    assert_same_run(other, alone)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_dict_can_be_loaded_again(kind, name):
    """After steps that would have written to it: the run is taken back to where it was, moments and counters alike."""
    optimizer, params = trained(kind, name, 0, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in params]
    train(optimizer, params, 2, 3)
    expected = [p.detach().clone() for p in params], values(optimizer.state_dict())
    for _ in range(2):
        with torch.no_grad():
            for p, value in zip(params, weights, strict=True):
                p.copy_(value)
        optimizer.load_state_dict(saved)
        assert_same_values(values(optimizer.state_dict()), values(saved))
        train(optimizer, params, 2, 3)
        if name != "exact weights":
            assert all(torch.equal(p, q) for p, q in zip(params, expected[0], strict=True))
            assert_same_values(values(optimizer.state_dict()), expected[1])


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_an_optimizer_loads_its_own_state(kind, name):
    """As accelerate does when it prepares one; what was given is then left as it was."""
    optimizer, params = trained(kind, name, 0, 1)
    saved = optimizer.state_dict()
    before = values(saved)
    optimizer.load_state_dict(saved)
    train(optimizer, params, 2, 3)
    if kind in ("AdamW", "none"):  # a store's tensors stay where they are
        assert_same_values(values(saved), before)
    assert_same_run((optimizer, params), trained(kind, name, 0, 1, 2, 3))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_who_writes_to_a_loaded_dict_changes_no_optimizer(kind, name):
    optimizer, params = trained(kind, name, 0, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    for entry in saved["state"].values():
        for t in entry.values():
            t.fill_(99)
    for group in saved["param_groups"]:
        group["lr"] = 99.0
    train(optimizer, params, 2)
    assert_same_run((optimizer, params), trained(kind, name, 0, 1, 2))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_loading_leaves_the_dict_as_it_was(kind, name):
    """The tensors themselves too: none is moved into a store."""
    source, _ = trained(kind, name, 0)
    saved = copy.deepcopy(source.state_dict())
    tensors = {(i, key): t for i, entry in saved["state"].items() for key, t in entry.items()}
    described = {key: (id(t), t.data_ptr(), t.dtype, t.device) for key, t in tensors.items()}
    keys = (
        [list(entry) for entry in saved["state"].values()],
        [list(group) for group in saved["param_groups"]],
    )
    optimizer, params = trained(kind, name)
    optimizer.load_state_dict(saved)
    train(optimizer, params, 1)
    assert {
        (i, key): (id(t), t.data_ptr(), t.dtype, t.device)
        for i, entry in saved["state"].items()
        for key, t in entry.items()
    } == described
    assert keys == (
        [list(entry) for entry in saved["state"].values()], [list(group) for group in saved["param_groups"]]
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["torch", "AdamW"])
def test_a_dict_of_torchs_can_be_loaded_by_many(kind):
    """torch itself shares what it need not convert; ours owns moments and counters."""
    source, _ = make("torch")
    train(source, source.param_groups[0]["params"], 0, 1)
    saved = source.state_dict()
    before = values(saved)
    optimizer, params = make(kind)
    optimizer.load_state_dict(saved)
    train(optimizer, params, 2)
    shared = any(not torch.equal(t, before[key]) for key, t in values(saved).items())
    assert shared == (kind == "torch")


@pytest.mark.parametrize(("kind", "name"), [("torch", "float32"), *CASES])
def test_a_state_dict_is_the_state_itself(kind, name):
    """No copy, as in torch: who wants one makes it."""
    optimizer, params = trained(kind, name, 0)
    saved = optimizer.state_dict()["state"]
    for i, p in enumerate(params):
        assert saved[i].keys() == optimizer.state[p].keys()
        for key, t in saved[i].items():
            assert t is optimizer.state[p][key], key
    if kind in ("torch", "AdamW", "none"):
        train(optimizer, params, 1)
        assert all(float(entry["step"]) == 2 for entry in saved.values())
        for i, p in enumerate(params):
            assert all(torch.equal(t, optimizer.state[p][key]) for key, t in saved[i].items())


# Copies


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("kind", ["torch", *KINDS])
def test_a_shallow_copy_shares_state_and_groups(kind, steps):
    optimizer, params = make(kind)
    train(optimizer, params, *range(steps))
    copied = copy.copy(optimizer)
    assert copied.state is optimizer.state
    assert copied.param_groups is optimizer.param_groups
    assert copied.defaults is optimizer.defaults
    assert type(copied) is type(optimizer)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_shallow_copy_and_its_original_step_as_one(steps):
    runs = []
    for kind in ("torch", "AdamW"):
        optimizer, params = make(kind)
        train(optimizer, params, *range(steps))
        copied = copy.copy(optimizer)
        train(copied, params, 10)
        train(optimizer, params, 11)
        copied.param_groups[0]["lr"] = 0.1
        train(optimizer, params, 12)
        optimizer.state.pop(params[0])
        train(copied, params, 13)
        runs.append(([p.detach() for p in params], values(optimizer.state_dict())))
    (theirs, their_values), (ours, our_values) = runs
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert our_values.keys() == their_values.keys()
    for key, value in their_values.items():
        torch.testing.assert_close(our_values[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", METHODS)
def test_a_shallow_copy_of_the_method_goes_on(kind):
    """It is the newer optimizer of the model: it steps as the original would have."""
    optimizer, params = make(kind)
    train(optimizer, params, 0, 1)
    copied = copy.copy(optimizer)
    train(copied, params, 2, 3)
    assert_same_run((copied, params), trained(kind, "float32", 0, 1, 2, 3))


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "deepcopy of a shallow copy": lambda optimizer: copy.deepcopy(copy.copy(optimizer)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_deep_copy_shares_nothing(way, kind):
    optimizer, params = make(kind)
    train(optimizer, params, 0, 1)
    for p in params:
        p.grad = None
    before = [p.detach().clone() for p in params], values(optimizer.state_dict())
    copied = WAYS[way](optimizer)
    own = [p for group in copied.param_groups for p in group["params"]]
    train(copied, own, 2, 3)
    copied.param_groups[0]["lr"] = 1.0
    assert all(torch.equal(p, q) for p, q in zip(params, before[0], strict=True))
    assert optimizer.param_groups[0]["lr"] == 0.01
    if "shallow" not in way or kind == "AdamW":  # a copy of the method takes its model over
        assert_same_values(values(optimizer.state_dict()), before[1])
        train(optimizer, params, 2, 3)
        assert_same_run((optimizer, params), (copied, own))


# Lifetime


def references(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> dict[str, weakref.ref]:
    """Of a parameter, its gradient and its states."""
    named = {"parameter": p, "gradient": p.grad, **optimizer.state[p]}
    return {name: weakref.ref(t) for name, t in named.items() if isinstance(t, Tensor)}


def assert_collected(refs: dict[str, weakref.ref]) -> None:
    gc.collect()
    assert not [name for name, ref in refs.items() if ref() is not None]


def without_group(optimizer, params):
    del optimizer.param_groups[1]


def out_of_the_list(optimizer, params):
    optimizer.param_groups[1]["params"].pop()


def another_in_its_place(optimizer, params):
    optimizer.param_groups[1]["params"][0] = nn.Parameter(torch.ones(5))


def new_list(optimizer, params):
    optimizer.param_groups[1]["params"] = []


def new_groups(optimizer, params):
    optimizer.param_groups = optimizer.param_groups[:1]


DROPS = [without_group, out_of_the_list, another_in_its_place, new_list, new_groups]
LIVES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "torch": ("torch", F32, {}),
    "float32": ("AdamW", F32, {}),
    "float64": ("AdamW", F64, {}),
    "exact weights": ("AdamW", BF16, {"master_weights": True}),
    "clipped": ("AdamW", F32, {"max_grad_norm": 1.0}),
}


DROPPED = [
    *((drop, "float32", then) for drop in DROPS for then in ("right away", "after a step")),
    *((without_group, life, "right away") for life in LIVES if life != "float32"),
    *((without_group, life, "after a step") for life in LIVES if life != "float32"),
    (without_group, "float32", "after a step without gradients"),
]


@pytest.mark.parametrize(("drop", "life", "then"), DROPPED)
def test_a_dropped_parameter_is_collected(drop, life, then):
    kind, dtype, options = LIVES[life]
    params = [nn.Parameter(normal(4, 4, seed=i).to(dtype)) for i in range(3)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    cls = torch.optim.AdamW if kind == "torch" else grass.AdamW
    optimizer = cls(groups, lr=0.01, **options)
    del groups
    train(optimizer, params, 0, 1)
    p = params.pop()
    refs = references(optimizer, p)
    assert len(refs) >= 4
    drop(optimizer, params)
    del optimizer.state[p], p
    if then == "after a step":
        train(optimizer, params, 2)
    elif then != "right away":
        optimizer.zero_grad()
        optimizer.step()
    assert_collected(refs)
    train(optimizer, params, 3)


@pytest.mark.parametrize("when", ["before the first step", "after it"])
@pytest.mark.parametrize("kind", METHODS)
def test_a_dropped_parameter_of_the_method_is_collected(kind, when):
    """From the model and the groups; the optimizer notices at its next step."""
    model = Model(F32)
    optimizer = method(
        model, [{"params": model.ordered()[:2]}, {"params": [model.head]}], KINDS[kind], lr=0.01
    )
    if when == "after it":
        train(optimizer, model.ordered(), 0, 1)
    refs = references(optimizer, model.head)
    optimizer.state.pop(model.head, None)
    del optimizer.param_groups[1], model.head
    params = [block.weight for block in model.blocks]
    train(optimizer, params, 2)
    assert_collected(refs)
    train(optimizer, params, 3)


@pytest.mark.parametrize(
    ("kind", "dtype", "options"), [*LIVES.values(), *((kind, F32, {}) for kind in METHODS)]
)
def test_gradients_are_collected_when_they_are_cleared(kind, dtype, options):
    optimizer, params = make(kind, dtype, **options)
    for step in range(2):
        set_grads(params, step)
        refs = {str(i): weakref.ref(p.grad) for i, p in enumerate(params)}
        optimizer.step()
        optimizer.zero_grad()
        assert_collected(refs)


@pytest.mark.parametrize("kind", ["torch", *KINDS])
def test_what_a_step_was_given_is_collected(kind):
    """A closure, its loss, and a scaler's two tensors."""
    optimizer, params = make(kind, fused=True)
    set_grads(params, 0)
    loss = torch.ones(())
    closure = partial(torch.neg, loss)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
    refs = {
        "closure": weakref.ref(closure),
        "loss": weakref.ref(loss),
        "scale": weakref.ref(optimizer.grad_scale),
        "found_inf": weakref.ref(optimizer.found_inf),
    }
    optimizer.step(closure)
    del closure, loss, optimizer.grad_scale, optimizer.found_inf
    assert_collected(refs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_dict_is_collected(kind):
    source, params = make(kind)
    train(source, params, 0)
    saved = copy.deepcopy(source.state_dict())
    refs = {f"{i} {key}": weakref.ref(t) for i, entry in saved["state"].items() for key, t in entry.items()}
    optimizer, params = make(kind)
    optimizer.load_state_dict(saved)
    del saved
    assert_collected(refs)
    train(optimizer, params, 1)


def renew(model: nn.Module, old: list[nn.Parameter]) -> None:
    """Put new parameters in the place of some."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if any(p is q for q in old):
                setattr(module, name, nn.Parameter(p.detach().clone()))


@pytest.mark.parametrize("change", ["replaced", "removed after a group was added"])
def test_parameters_of_the_past_are_collected(change: str) -> None:
    """Those that accelerate has replaced by shards, and those that the user has removed."""
    model = tiny.stack()
    blocks = list(model.blocks.parameters())
    opt = grass.GrassAdamW(blocks, lr=1e-2, model=model, config=tiny.config(probe_steps=0))
    if change == "replaced":
        renew(model, blocks)
        old = [weakref.ref(p) for p in blocks]
        opt.param_groups[0]["params"] = list(model.blocks.parameters())
    else:
        opt.add_param_group({"params": list(model.head.parameters())})
        renew(model, blocks[-2:])
        old = [weakref.ref(p) for p in blocks[-2:]]
        opt.param_groups[0]["params"] = blocks[:-2]
    del blocks
    tiny.train(model, opt, 0, 2)
    gc.collect()
    assert [ref() is None for ref in old] == [True] * len(old)


@pytest.mark.parametrize("kind", ["torch", "AdamW", "none"])
@pytest.mark.parametrize("how", ["replaced", "dropped", "cleared", "loaded over"])
def test_old_states_are_collected(how, kind):
    optimizer, params = make(kind)
    train(optimizer, params, 0, 1)
    refs = {
        f"{i} {key}": weakref.ref(t) for i, p in enumerate(params) for key, t in optimizer.state[p].items()
    }
    if how == "replaced":
        for p in params:
            optimizer.state[p] = {key: t.clone() for key, t in optimizer.state[p].items()}
    elif how == "dropped":
        for p in params:
            del optimizer.state[p]
    elif how == "cleared":
        optimizer.state.clear()
    else:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_collected(refs)
    train(optimizer, params, 2)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("kind", ["torch", *KINDS])
def test_an_optimizer_and_its_parameters_are_collected(kind, steps):
    optimizer, params = make(kind)
    train(optimizer, params, *range(steps))
    refs = {str(i): weakref.ref(p) for i, p in enumerate(params)}
    refs |= {"optimizer": weakref.ref(optimizer)}
    del optimizer, params
    assert_collected(refs)


# Inference mode


def in_inference_mode(make_tensor: Callable[[], Tensor]) -> Tensor:
    with torch.inference_mode():
        return make_tensor()


def first_steps(optimizer, params):
    """States are made in inference mode, and stepped on outside of it."""
    with torch.inference_mode():
        train(optimizer, params, 0, 1)
    train(optimizer, params, 2, 3)


def later_steps(optimizer, params):
    train(optimizer, params, 0)
    with torch.inference_mode():
        train(optimizer, params, 1, 2)
    train(optimizer, params, 3)


def inference_gradients(optimizer, params):
    train(optimizer, params, 0)
    for step in (1, 2):
        with torch.inference_mode():
            grads = [normal(*p.shape, seed=100 * (step + 1) + i).to(p.dtype) for i, p in enumerate(params)]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
    train(optimizer, params, 3)


def some_inference_gradients(optimizer, params):
    for step in range(3):
        set_grads(params, step)
        params[1].grad = in_inference_mode(params[1].grad.clone)
        optimizer.step()


def inference_data(optimizer, params):
    train(optimizer, params, 0)
    params[1].data = in_inference_mode(params[1].data.clone)
    train(optimizer, params, 1, 2)


def inference_moment(optimizer, params):
    train(optimizer, params, 0)
    state = optimizer.state[params[1]]
    state["exp_avg"] = in_inference_mode(state["exp_avg"].clone)
    train(optimizer, params, 1, 2)


def inference_counter(optimizer, params):
    train(optimizer, params, 0)
    state = optimizer.state[params[1]]
    state["step"] = in_inference_mode(state["step"].clone)
    train(optimizer, params, 1, 2)


def loaded_dict_of_inference_tensors(optimizer, params):
    train(optimizer, params, 0)
    with torch.inference_mode():
        saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    train(optimizer, params, 1, 2)


def loaded_in_inference_mode(optimizer, params):
    train(optimizer, params, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    with torch.inference_mode():
        optimizer.load_state_dict(saved)
    train(optimizer, params, 1, 2)


def inference_settings(optimizer, params):
    for group in optimizer.param_groups:
        group["lr"] = in_inference_mode(lambda: torch.tensor(0.01))
    train(optimizer, params, 0, 1, 2)


def saved_in_inference_mode(optimizer, params):
    train(optimizer, params, 0)
    with torch.inference_mode():
        torch.save(optimizer.state_dict(), io.BytesIO())
        copy.deepcopy(optimizer)
    train(optimizer, params, 1, 2)


def without_gradients(optimizer, params):
    with torch.no_grad():
        train(optimizer, params, 0, 1)
    train(optimizer, params, 2)


INFERENCE = [
    first_steps, later_steps, inference_gradients, some_inference_gradients, inference_data, inference_moment,
    inference_counter, loaded_dict_of_inference_tensors, loaded_in_inference_mode, inference_settings,
    saved_in_inference_mode, without_gradients,
]  # fmt: skip
EVERYWHERE = (
    first_steps, later_steps, inference_gradients, inference_data, loaded_dict_of_inference_tensors,
    loaded_in_inference_mode,
)  # fmt: skip
INFERENCE_CASES = [
    *((event, "AdamW", F32) for event in INFERENCE),
    *((event, "AdamW", dtype) for event in EVERYWHERE for dtype in (BF16, F64)),
    *((event, kind, F32) for event in EVERYWHERE for kind in ("none", "streamed")),
    (first_steps, "resident", F32),
]


def run(
    event: Callable, kind: str, dtype: torch.dtype, ordinary: bool
) -> tuple[Exception | None, list[Tensor]]:
    """The error of the last step taken, if it was refused, and the parameters."""
    optimizer, params = make(kind, dtype)
    before: list = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: before.__setitem__(slice(None), snapshot(opt)))
    with pytest.MonkeyPatch.context() as patch:
        if ordinary:
            patch.setattr(torch, "inference_mode", torch.no_grad)
        error = refusal(partial(event, optimizer, params))
    if error is not None and kind in ("AdamW", "none"):
        assert_unchanged(optimizer, before)
    found = [p.detach().clone() for p in params]
    del optimizer
    before.clear()
    if kind in METHODS:
        gc.collect()  # what ends with it must not fail
    return error, found


@pytest.mark.parametrize(
    ("event", "kind", "dtype"),
    INFERENCE_CASES,
    ids=[f"{event.__name__}-{kind}-{dtype}".replace("torch.", "") for event, kind, dtype in INFERENCE_CASES],
)
def test_inference_mode_works_where_it_does_for_torch(event, kind, dtype):
    """Elsewhere the step may be refused as torch refuses it, with nothing changed."""
    of_torch, _ = run(event, "torch", dtype, ordinary=False)
    _, expected = run(event, kind, dtype, ordinary=True)
    error, found = run(event, kind, dtype, ordinary=False)
    if error is None:
        assert all(torch.equal(p, q) for p, q in zip(found, expected, strict=True))
    else:
        assert of_torch is not None, f"torch takes it, and we raise {error!r}"
        assert isinstance(error, RuntimeError)
        assert "inference" in str(error).lower()


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (F32, {}),
        (F64, {}),
        (BF16, {}),
        (BF16, {"master_weights": True}),
        (BF16, {"stochastic_rounding": True}),
    ],
    ids=str,
)
def test_parameters_made_in_inference_mode_are_stepped_on_in_it(dtype, options):
    """All of it there, or the parameters alone: torch steps on them in inference mode only."""
    runs = []
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            params = [nn.Parameter(normal(4, 4, seed=i).to(dtype), requires_grad=False) for i in range(2)]
            optimizer = grass.AdamW(params, lr=0.01, **options)
            train(optimizer, params, 0, 1, 2)
            copied = copy.deepcopy(optimizer)
            own = [p for group in copied.param_groups for p in group["params"]]
            train(copied, own, 3)
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            train(optimizer, params, 3)
            runs.append([p.clone() for p in (*params, *own)])
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


def test_parameters_made_in_inference_mode_are_refused_outside_as_torch_does():
    """Or stepped on rightly."""
    outcomes = []
    for cls in (torch.optim.AdamW, grass.AdamW):
        with torch.inference_mode():
            params = [nn.Parameter(normal(4, seed=i), requires_grad=False) for i in range(2)]
            for i, p in enumerate(params):
                p.grad = normal(4, seed=10 + i)
        optimizer = cls(params, lr=0.01)
        before = [p.clone() for p in params]
        outcomes.append((refusal(optimizer.step), params, before))
    (of_torch, _, _), (error, params, before) = outcomes
    assert isinstance(of_torch, RuntimeError)
    if error is not None:
        assert isinstance(error, RuntimeError)
        assert "inference" in str(error).lower()
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


# Tensors swapped by torch's own utilities


@pytest.fixture
def swapping() -> Iterator[None]:
    """Modules swap their parameters when they are converted and loaded."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def clear(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = None


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("what", ["another", "each other"])
def test_swapped_parameters_are_stepped_on(what, dtype, steps):
    twins = Twins(dtype=dtype)
    twins.go(steps)
    clear([*twins.params, *twins.twins])

    def swap(optimizer, params):
        wide = params[0].dtype
        other = params[1] if what == "each other" else nn.Parameter(normal(4, 4, seed=50).to(dtype).to(wide))
        torch.utils.swap_tensors(params[0], other)

    twins.both(swap)
    twins.go(3)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_swapped_states_are_used(key):
    """Of the first parameter and of later ones."""
    twins = Twins()
    twins.go()

    def swap(optimizer, params, place):
        t = optimizer.state[params[place]][key]
        torch.utils.swap_tensors(t, torch.full_like(t, 3.0))

    for place in (1, 2, 0):
        twins.both(partial(swap, place=place))
        twins.go()
    twins.go()


def test_states_swapped_with_each_other_are_used():
    twins = Twins()
    twins.go(2)

    def swap(optimizer, params):
        one, other = (optimizer.state[p] for p in params[:2])
        torch.utils.swap_tensors(one["exp_avg"], other["exp_avg"])

    twins.both(swap)
    twins.go(2)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1e6}], ids=["plain", "clipped"])
def test_a_swap_is_possible_after_any_step(options, fused):
    """torch swaps only what has no weak reference and no other holder: a step must leave none behind."""
    twins = Twins(ours=options, fused=fused, amsgrad=True)
    for _ in range(2):
        twins.go()
        clear(twins.params)
        for p in twins.params:
            torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone()))
            for t in twins.ours.state[p].values():
                torch.utils.swap_tensors(t, t.clone())
    twins.go()


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("steps", [0, 2])
def test_a_module_is_converted_by_swapping(steps):
    """To bfloat16 and back: moments stay float32, in which torch's own would not go on."""
    twins = Twins()
    twins.go(steps)
    for dtype in (BF16, F32, BF16):
        clear(twins.params)
        ids = [id(p) for p in twins.params]
        twins.model.to(dtype)
        assert [id(p) for p in twins.model.ordered()] == ids
        assert all(p.dtype == dtype for p in twins.params)
        for p, q in zip(twins.params, twins.twins, strict=True):
            q.data = p.detach().float()
        twins.go(2)


@pytest.mark.usefixtures("swapping")
def test_a_module_converted_to_what_moments_cannot_follow_is_refused_as_torch_does():
    """Float32 moments of float64 parameters: by name, and nothing has changed."""
    twins = Twins()
    twins.go()
    clear([*twins.params, *twins.twins])
    twins.model.double()
    theirs = nn.ParameterList(twins.twins).double()
    assert [id(q) for q in theirs] == [id(q) for q in twins.twins]
    twins.set_grads()
    assert isinstance(refusal(twins.torchs.step), RuntimeError)
    before = snapshot(twins.ours)
    error = refusal(twins.ours.step)
    assert "exp_avg of parameter 0" in str(error)
    assert_unchanged(twins.ours, before)


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_module_is_loaded_by_swapping(dtype, assign):
    twins = Twins(dtype=dtype)
    twins.go(2)
    clear(twins.params)
    loaded = {name: normal(*p.shape, seed=60).to(dtype) for name, p in twins.model.named_parameters()}
    ids = [id(p) for p in twins.params]
    twins.model.load_state_dict(loaded, assign=assign)
    assert [id(p) for p in twins.model.ordered()] == ids
    for p, q in zip(twins.params, twins.twins, strict=True):
        q.data = p.detach().to(q.dtype).clone()
    twins.go(2)


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("convert", ["same dtype", "bfloat16", "loaded"])
@pytest.mark.parametrize(("kind", "phase"), [("none", "fresh"), *((kind, "trained") for kind in METHODS)])
def test_a_module_under_the_method_is_swapped_or_refused_as_torch_does(kind, phase, convert):
    """Refused as torch refuses to swap what others hold: then the module is as it was and training goes on."""
    twins = Twins(kind)
    twins.go(2 if phase == "trained" else 0)
    clear(twins.params)
    model, ids = twins.model, [id(p) for p in twins.params]
    before = [p.detach().clone() for p in twins.params]
    act = {
        "same dtype": lambda: model.to(F32),
        "bfloat16": lambda: model.to(BF16),
        "loaded": lambda: model.load_state_dict({name: p + 1 for name, p in model.state_dict().items()}),
    }[convert]
    error = refusal(act)
    if error is not None:
        assert isinstance(error, RuntimeError)
        assert "swap" in str(error).lower()
        assert all(p.dtype == F32 for p in twins.params)
    assert [id(p) for p in model.ordered()] == ids
    for p, q, value in zip(twins.params, twins.twins, before, strict=True):
        if error is not None and convert != "loaded":  # torch loads before it swaps
            assert torch.equal(p, value)
        q.data = p.detach().float().clone()
    twins.go(3)
    twins.compare_states()


@pytest.mark.parametrize("kind", METHODS)
def test_swapped_parameters_of_the_method_are_stepped_on_or_refused_as_torch_does(kind):
    twins = Twins(kind)
    twins.go(2)
    clear([*twins.params, *twins.twins])
    error = refusal(lambda: torch.utils.swap_tensors(twins.params[0], nn.Parameter(torch.ones(4, 4))))
    if error is None:
        torch.utils.swap_tensors(twins.twins[0], nn.Parameter(torch.ones(4, 4)))
    else:
        assert isinstance(error, RuntimeError)
        assert "swap" in str(error).lower()
    twins.go(3)
    twins.compare_states()


def test_a_flattened_vector_of_parameters_is_stepped_on():
    """`vector_to_parameters` makes them views of one vector, in the middle of training."""
    twins = Twins()
    twins.go(2)

    def flatten(optimizer, params):
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(params).detach() * 0.5, params)

    for _ in range(2):
        twins.both(flatten)
        twins.go(2)


def test_parametrized_and_pruned_modules_hand_over_their_parameters():
    """Utilities that replace a module's parameters keep the tensors that the optimizer has."""
    twins = []
    for kind in ("torch", "AdamW"):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        cls = torch.optim.AdamW if kind == "torch" else grass.AdamW
        optimizer = cls(layer.parameters(), lr=0.01)
        for step in range(4):
            if step == 2:
                prune.l1_unstructured(layer, "weight", amount=0.5)
            optimizer.zero_grad()
            layer(normal(5, 4, seed=step)).square().sum().backward()
            optimizer.step()
        twins.append([p.detach() for group in optimizer.param_groups for p in group["params"]])
    for p, q in zip(*twins, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)


def test_many_swaps_and_copies_leave_an_optimizer_that_steps():
    """In any order, some of them twice."""
    events = [
        lambda t: t.both(lambda o, p: torch.utils.swap_tensors(p[0], nn.Parameter(p[0].detach() + 0.5))),
        lambda t: t.both(lambda o, p: o.load_state_dict(copy.deepcopy(o.state_dict()))),
        lambda t: t.both(lambda o, p: o.load_state_dict(o.state_dict())),
        lambda t: t.both(
            lambda o, p: torch.utils.swap_tensors(o.state[p[1]]["exp_avg"], torch.ones_like(p[1].detach()))
        ),
    ]
    for order in itertools.islice(itertools.permutations(events), 0, None, 5):
        twins = Twins()
        twins.go()
        for event in order:
            clear([*twins.params, *twins.twins])
            event(twins)
            twins.go()
