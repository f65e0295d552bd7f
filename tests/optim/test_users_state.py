"""Entries of users in the state of an optimizer, beside ours: per parameter, and under keys that are no parameters.

Would catch: a step, a save, a load or a copy that fails on it, reads it as ours, moves it, converts it other than torch
does or drops it, in any mode of the method, in its probe and when moments are reset; a result that differs for it.

Oracle: `torch.optim.AdamW`. Runs in both passes: with ``TRITON_INTERPRET=1`` steps go by plans.
"""

import collections
import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grass
from grass_kernels import _triton
from tests.support import tiny
from tests.support.twins import BF16, F32, KEYS, KINDS, Twins, close, refusal


def extras(p: Tensor) -> dict[Any, Any]:
    """Of every kind; none has a name of torch's or ours."""
    return {
        "number": 0.5,
        "integer": 3,
        "flag": True,
        "scalar": torch.tensor(0.5),
        "mean": p.detach().clone() + 1,
        "other shape": torch.ones(2, 3),
        "flat": torch.ones(p.numel()),
        "empty": torch.empty(0),
        "integers": torch.arange(5),
        "flags": torch.ones(p.shape, dtype=torch.bool),
        "low precision": torch.ones(4, dtype=BF16),
        "complex": torch.ones(2, dtype=torch.complex64),
        "parameter": nn.Parameter(torch.ones(2)),
        "expanded": torch.ones(1).expand(p.shape),
        "meta": torch.ones(2, device="meta"),
        "sparse": torch.eye(2).to_sparse(),
        "text": "text",
        "none": None,
        "nested": {"tensor": torch.ones(2), "step": 1, "exp_avg": "nothing"},
        "list": [1, torch.ones(2)],
        0: 1,
        ("a", 1): 2,
    }


NAMES = list(extras(torch.ones(1)))


def assert_same(found: Any, expected: Any, name: Any) -> None:
    """Of one type; tensors of one dtype and equal."""
    assert type(found) is type(expected), name
    if isinstance(expected, dict):
        assert list(found) == list(expected), name
        for key, value in expected.items():
            assert_same(found[key], value, (name, key))
    elif isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, name)
    elif isinstance(expected, Tensor):
        assert (found.dtype, found.shape, found.device) == (
            expected.dtype,
            expected.shape,
            expected.device,
        ), name
        if expected.device.type == "cpu":
            assert torch.equal(found.to_dense(), expected.to_dense()), name
    else:
        assert found == expected, name


def add_extras(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> dict[Tensor, dict[Any, Any]]:
    given = {p: extras(p) for p in params}
    for p, own in given.items():
        optimizer.state[p].update(own)
    return given


def assert_kept(optimizer: torch.optim.Optimizer, given: dict[Tensor, dict[Any, Any]]) -> None:
    """The objects themselves, as they were."""
    for p, own in given.items():
        for name, value in own.items():
            assert optimizer.state[p][name] is value, name
        for name, value in extras(p).items():
            if name != "mean":  # which depends on the parameter
                assert_same(own[name], value, name)


# A key of the user's beside ours


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_a_step_ignores_a_users_key(name):
    twins = Twins()
    twins.go()
    for optimizer, params in ((twins.ours, twins.params), (twins.torchs, twins.twins)):
        for p in params:
            optimizer.state[p][name] = extras(p)[name]
    twins.go(2)
    assert all(name in twins.ours.state[p] for p in twins.params)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_ignores_users_keys(kind, dtype):
    twins = Twins(kind, dtype, ours={"master_weights": dtype == BF16}, amsgrad=True)
    twins.go()
    given = add_extras(twins.ours, twins.params)
    twins.go(2)
    twins.compare_states()
    assert_kept(twins.ours, given)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_before_the_first_step(kind):
    """Where torch, which takes an entry that is not empty for a complete one, fails."""
    twins = Twins(kind)
    given = add_extras(twins.ours, twins.params)
    twins.go(2)
    twins.compare_states()
    assert_kept(twins.ours, given)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_come_change_and_go(kind):
    """As a running mean does, kept by a hook on the step."""
    twins = Twins(kind)

    def average(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = optimizer.state[p]
                mean = state.get("mean", p.detach())
                state["mean"] = 0.9 * mean + 0.1 * p.detach()
                state["count"] = state.get("count", 0) + 1

    twins.both(lambda optimizer, params: optimizer.register_step_post_hook(average))
    twins.go(4)
    for p, q in zip(twins.params, twins.twins, strict=True):
        ours, theirs = twins.ours.state[p], twins.torchs.state[q]
        close(ours["mean"], theirs["mean"], "mean", rtol=1e-5, atol=1e-6)
        assert ours["count"] == theirs["count"] == 4

    def drop(optimizer, params):
        for p in params:
            del optimizer.state[p]["mean"]

    twins.both(drop)
    twins.go(2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "make", [collections.OrderedDict, lambda entry: collections.defaultdict(list, entry)]
)
def test_a_dict_of_another_type(make, kind):
    twins = Twins(kind)
    twins.go()
    twins.settle()

    def replace(optimizer, params):
        optimizer.state[params[1]] = make(optimizer.state[params[1]])

    twins.both(replace)
    twins.go(2)
    twins.compare_states()


@pytest.mark.parametrize("kind", KINDS)
def test_what_becomes_of_users_keys_when_the_model_changes_its_dtype(kind):
    twins = Twins(kind)
    twins.go()
    given = add_extras(twins.ours, twins.params)
    for p, q in zip(twins.params, twins.twins, strict=True):
        p.grad = None
        p.data = p.data.to(BF16)
        q.data = p.data.float()
    twins.go()
    assert_kept(twins.ours, given)


# Saved, loaded, copied


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_has_users_keys(kind):
    twins = Twins(kind)
    twins.go()
    given = add_extras(twins.ours, twins.params)
    saved = twins.ours.state_dict()["state"]
    for index, own in enumerate(given.values()):
        for name, value in own.items():
            assert saved[index][name] is value, name
        assert set(saved[index]) == {*twins.ours.state[twins.params[index]]}
    assert_kept(twins.ours, given)


NOT_LOADED = ("text", "nested", "meta", "complex")


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_users_keys_are_loaded_as_torch_loads_them(kind, dtype):
    """Tensors in the parameter's dtype. Left out is what torch itself cannot load, or makes another text of."""
    twins = Twins(kind, dtype)
    twins.go()
    oracle = torch.optim.AdamW([nn.Parameter(p.detach().clone()) for p in twins.params])
    for p, q in zip(twins.params, oracle.param_groups[0]["params"], strict=True):
        own = {name: value for name, value in extras(p).items() if name not in NOT_LOADED}
        own["nested"] = {"tensor": torch.ones(2), "value": 1}
        twins.ours.state[p].update(own)
        oracle.state[q] = {"step": torch.tensor(1.0), **copy.deepcopy(own)}
    twins.ours.load_state_dict(copy.deepcopy(twins.ours.state_dict()))
    oracle.load_state_dict(copy.deepcopy(oracle.state_dict()))
    for p, q in zip(twins.params, oracle.param_groups[0]["params"], strict=True):
        for name, value in oracle.state[q].items():
            if name not in KEYS:
                assert_same(twins.ours.state[p][name], value, name)
    twins.go(2)
    twins.compare_states()


UNUSED = {
    "a number": 0.5,
    "a tensor": torch.tensor([7.0]),
    "of the shape of a step": torch.tensor(0.5),
}


@pytest.mark.parametrize("value", UNUSED)
@pytest.mark.parametrize("key", ["remainder", "max_exp_avg_sq"])
@pytest.mark.parametrize("kind", KINDS)
def test_our_names_are_the_users_where_we_do_not_use_them(kind, key, value):
    """Without master_weights and amsgrad: kept by steps, by saving and by loading."""
    twins = Twins(kind)
    twins.go()
    for optimizer, params in ((twins.ours, twins.params), (twins.torchs, twins.twins)):
        for p in params:
            optimizer.state[p][key] = copy.deepcopy(UNUSED[value])
    twins.go()
    for optimizer in (twins.ours, twins.torchs):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twins.go(2)
    for p in twins.params:
        assert_same(twins.ours.state[p][key], UNUSED[value], key)


def reload(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    return optimizer


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_copies_have_users_keys_of_their_own(way, kind):
    twins = Twins(kind)
    twins.go()
    given = add_extras(twins.ours, twins.params)
    for p in twins.params:
        p.grad = None
    twins.ours.state["epoch"] = 3
    copied = WAYS[way](twins.ours)
    assert copied.state["epoch"] == 3
    members = [p for group in copied.param_groups for p in group["params"]]
    for p, own in zip(members, given.values(), strict=True):
        for name, value in own.items():
            found = copied.state[p][name]
            assert_same(found, value, name)
            assert not isinstance(value, Tensor) or found is not value, name
    assert_kept(twins.ours, given)
    for i, p in enumerate(members):
        p.grad = torch.full_like(p, 0.5 + i)
        twins.params[i].grad = p.grad.clone()
    copied.step()
    twins.ours.step()
    for p, q in zip(members, twins.params, strict=True):
        assert torch.equal(p, q)


# Keys that are no parameters


def others() -> dict[Any, Any]:
    return {
        "epoch": 3,
        "best": torch.tensor(0.25),
        "log": [1, 2],
        "settings": {"name": "value", "tensor": torch.ones(2)},
        "like a parameter's": {"step": torch.tensor(7.0), "exp_avg": torch.ones(3)},
        "empty": {},
        "none": None,
        7: "seven",
        ("pair", 1): 1.5,
    }


@pytest.mark.parametrize("when", ["before the first step", "after it"])
@pytest.mark.parametrize("name", list(others()), ids=str)
def test_a_step_ignores_a_key_that_is_no_parameter(name, when):
    twins = Twins()
    if when == "after it":
        twins.go()
    value = others()[name]
    twins.both(lambda optimizer, params: optimizer.state.update({name: value}))
    twins.go(2)
    assert twins.ours.state[name] is value
    assert_same(value, others()[name], name)


@pytest.mark.parametrize("when", ["before the first step", "after it"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_ignores_keys_that_are_no_parameters(kind, when):
    twins = Twins(kind)
    if when == "after it":
        twins.go()
    given = others()
    twins.both(lambda optimizer, params: optimizer.state.update(given))
    twins.go(2)
    twins.compare_states()
    assert all(twins.ours.state[name] is value for name, value in given.items())


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_that_a_user_counts(kind):
    twins = Twins(kind)
    for epoch in range(4):
        twins.both(lambda optimizer, params, epoch=epoch: optimizer.state.update(epoch=epoch))
        twins.go()
    assert twins.ours.state["epoch"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_are_no_parameters_are_saved_and_loaded_as_torch_does(kind):
    twins = Twins(kind)
    twins.go()
    twins.both(lambda optimizer, params: optimizer.state.update(others()))
    ours, theirs = twins.ours.state_dict()["state"], twins.torchs.state_dict()["state"]
    assert list(ours) == list(theirs)
    for name in others():
        assert ours[name] is twins.ours.state[name], name
    twins.both(lambda optimizer, params: reload(optimizer))
    for name, value in others().items():
        assert_same(twins.torchs.state[name], value, name)
        assert_same(twins.ours.state[name], value, name)
    twins.go(2)
    twins.compare_states()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.5, {"mean": torch.ones(2)}, {"step": torch.tensor(3.0)}], ids=str)
def test_a_tensor_of_the_users_as_a_key(value, kind):
    """torch steps and copies; its state_dict, which has a number for every tensor, fails."""
    twins = Twins(kind)
    key = torch.ones(3)
    twins.both(lambda optimizer, params: optimizer.state.update({key: value}))
    twins.go(2)
    assert twins.ours.state[key] is value
    copied = copy.deepcopy(twins.ours)
    assert len(copied.state) == len(twins.ours.state)
    with pytest.raises(KeyError):
        twins.torchs.state_dict()
    with pytest.raises(KeyError):
        twins.ours.state_dict()
    del twins.ours.state[key], twins.torchs.state[key]
    twins.go()
    twins.compare_states()


def test_a_scaler_and_a_user_share_an_optimizer():
    """Attributes and state of the user's while a step reads scale and overflow itself."""
    twins = Twins(fused=True)
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in range(2)]
    for step in range(3):
        twins.both(lambda optimizer, params, step=step: optimizer.state.update(epoch=step))
        twins.set_grads(64.0)
        for scaler, optimizer in zip(scalers, (twins.ours, twins.torchs), strict=True):
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
        twins.compare()


# The method

MODES = {
    "none": {"offload": "none"},
    "resident": {"offload": "resident"},
    "streamed": {"offload": "streamed", "buffer_mb": 0.25},
    "fused streamed": {"offload": "streamed", "buffer_mb": 0.25, "fused_backward": True},
}


@pytest.mark.parametrize("moments", ["keep", "reset"])
@pytest.mark.parametrize("mode", MODES)
def test_a_run_of_the_method_ignores_and_keeps_users_keys(mode, moments):
    """From the probe on, while layers come and go."""
    stop = 6 if _triton.INTERPRETING else 14
    runs = []
    for with_keys in (False, True):
        model = tiny.stack(layers=3)
        config = tiny.config(
            active_layers=1,
            probe_steps=2,
            sample_interval=2,
            update_interval=2,
            moments=moments,
            **MODES[mode],
        )
        opt = grass.GrassAdamW(model, lr=1e-2, config=config, pattern="blocks.*")
        given = {}
        if with_keys:
            given = add_extras(opt, list(model.parameters()))
            opt.state["epoch"] = 3
        for step in range(stop):
            tiny.train(model, opt, step, step + 1)
            assert_kept(opt, given)
        if with_keys:
            assert opt.state["epoch"] == 3
            saved = opt.state_dict()["state"]
            assert saved["epoch"] == 3
            assert all(saved[i]["number"] == 0.5 for i in range(len(given)))
        runs.append(tiny.weights(model))
    tiny.assert_identical(*runs)


@pytest.mark.parametrize("steps", [1, 5], ids=["in the probe", "after it"])
def test_the_method_resumes_with_users_keys(steps):
    def start():
        model = tiny.stack(layers=3)
        config = tiny.config(active_layers=1, probe_steps=2, sample_interval=2, update_interval=2)
        return model, grass.GrassAdamW(model, lr=1e-2, config=config, pattern="blocks.*")

    model, opt = start()
    for p in model.parameters():
        opt.state[p]["mean"] = p.detach().clone()
    opt.state["epoch"] = 3
    tiny.train(model, opt, 0, steps)
    weights, saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    tiny.train(model, opt, steps, 8)
    again, resumed = start()
    again.load_state_dict(weights)
    resumed.load_state_dict(saved)
    assert resumed.state["epoch"] == 3
    for p, q in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(resumed.state[p]["mean"], opt.state[q]["mean"])
    tiny.train(again, resumed, steps, 8)
    tiny.assert_identical(tiny.weights(again), tiny.weights(model))


def test_the_refusal_of_a_state_of_ours_names_it_beside_users_keys():
    twins = Twins()
    twins.go()
    add_extras(twins.ours, twins.params)
    twins.ours.state[twins.params[1]]["exp_avg"] = torch.ones(3)
    twins.set_grads()
    error = refusal(twins.ours.step)
    assert error is not None
    assert "exp_avg" in str(error)
    assert "parameter 1" in str(error)
