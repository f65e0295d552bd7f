"""Settings of groups: each that torch's AdamW reads is read or refused, and a number may be of any type torch takes.

Would catch: a setting that is not read, such as ``decoupled_weight_decay``, in any mode, dtype or combination with
other options; one that is read once and not when it changes, in place too; a number that torch takes and we refuse or
round; a refusal that comes when another group has been updated, or does not name the setting; a user's own key in a
group that is compared, copied or refused.

Oracle: `torch.optim.AdamW`. Runs in both passes: with ``TRITON_INTERPRET=1`` steps go by plans.
"""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import grass
from tests.support import tiny
from tests.support.twins import BF16, F32, F64, KINDS, Twins, assert_unchanged, refusal, snapshot

numpy = pytest.importorskip("numpy")
DTYPES = [F32, BF16, F64]


def set_in_second(key: str, value: Any) -> Callable:
    """An event: the second group has a setting, of which each optimizer has a copy."""

    def event(optimizer, params):
        optimizer.param_groups[1][key] = copy.deepcopy(value)

    return event


def set_in_all(key: str, value: Any) -> Callable:
    def event(optimizer, params):
        for group in optimizer.param_groups:
            group[key] = copy.deepcopy(value)

    return event


# Numbers


def numbers(value: float) -> dict[str, Any]:
    """A number in all types that torch's AdamW takes it in."""
    return {
        "float": value,
        "float32 tensor": torch.tensor(value),
        "float64 tensor": torch.tensor(value, dtype=F64),
        "float32 scalar": numpy.float32(value),
        "float64 scalar": numpy.float64(value),
    }


INTEGERS = {
    "int": 1,
    "int64 tensor": torch.tensor(1),
    "int64 scalar": numpy.int64(1),
}
NUMBERS = {
    "lr": {
        **numbers(0.03), **INTEGERS, "tensor of shape (1,)": torch.tensor([0.03]), "zero": 0,
        "parameter": nn.Parameter(torch.tensor(0.03)),
    },
    "eps": {**numbers(1e-3), **INTEGERS, "zero": 0},
    "weight_decay": {**numbers(0.25), **INTEGERS, "zero": 0},
    "betas": {
        "tuple": (0.8, 0.95),
        "list": [0.8, 0.95],
        "float64 scalars": (numpy.float64(0.8), numpy.float64(0.95)),
        "float32 tensors": (torch.tensor(0.8), torch.tensor(0.95)),
        "float64 tensors": (torch.tensor(0.8, dtype=F64), torch.tensor(0.95, dtype=F64)),
        "tensors of shape (1,)": (torch.tensor([0.8]), torch.tensor([0.95])),
        "list of tensors": [torch.tensor(0.8), torch.tensor(0.95)],
    },
}  # fmt: skip
LATER = {  # what torch's constructor refuses and its steps take
    "betas": {
        "float32 scalars": (numpy.float32(0.8), numpy.float32(0.95)),
        "array": numpy.array([0.8, 0.95]),
        "integers": (0, 0),
        "a tensor and a number": (torch.tensor(0.8), 0.95),
        "a number and a tensor": (0.8, torch.tensor(0.95)),
        "one tensor": torch.tensor([0.8, 0.95]),
    },
    "lr": {"array of no dimension": numpy.array(0.03), "negative": -0.01},
    "weight_decay": {"negative": -0.1, "tensor of shape (1,)": torch.tensor([0.25])},
    "eps": {"tensor of shape (1,)": torch.tensor([1e-3])},
}
CASES = [(key, name) for key, values in NUMBERS.items() for name in values]
MAY_BE_REFUSED = ("array of no dimension", "negative", "array", "one tensor", "tensor of shape (1,)")


@pytest.mark.parametrize(("key", "name"), CASES)
def test_a_number_of_any_type_in_the_constructor(key, name):
    twins = Twins(grouped=False, **{key: copy.deepcopy(NUMBERS[key][name])})
    twins.go(3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_of_any_type_between_steps(key, dtype):
    """In one group."""
    twins = Twins(dtype=dtype)
    twins.go()
    for name, value in (NUMBERS[key] | LATER.get(key, {})).items():
        before = twins.torchs.param_groups[1][key]
        twins.both(set_in_second(key, value))
        twins.set_grads()
        if not twins.steps_or_refuses(key):
            assert name in MAY_BE_REFUSED, "torch takes it"
            twins.both(set_in_second(key, before))
            twins.step()


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "AdamW"])
def test_a_number_of_any_type_under_the_method(kind, key):
    """In all groups."""
    twins = Twins(kind)
    for value in NUMBERS[key].values():
        twins.both(set_in_all(key, value))
        twins.go()
    twins.go()
    twins.compare_states()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", ["lr", "eps", "weight_decay", "betas"])
def test_a_tensor_written_in_place_is_read_anew(key, dtype):
    """No step may take the number of an earlier one."""
    twins = Twins(dtype=dtype)
    value = {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.1, "betas": 0.5}[key]

    def begin(optimizer, params):
        for group in optimizer.param_groups:
            group[key] = (torch.tensor(value), torch.tensor(value)) if key == "betas" else torch.tensor(value)

    def write(optimizer, params):
        for i, group in enumerate(optimizer.param_groups):
            tensors = group[key] if key == "betas" else [group[key]]
            for t in tensors:
                t.mul_(1.25 - 0.5 * i)

    twins.both(begin)
    twins.go()
    for _ in range(2):
        twins.both(write)
        twins.go()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_one_tensor_for_several_groups_and_settings(dtype):
    twins = Twins(dtype=dtype)

    def share(optimizer, params):
        shared = torch.tensor(0.125)
        for group in optimizer.param_groups:
            group.update(lr=shared, eps=shared, weight_decay=shared)

    twins.both(share)
    twins.go(2)
    twins.both(lambda optimizer, params: optimizer.param_groups[0]["eps"].fill_(0.01))
    twins.go(2)


SCHEDULES = {
    "tensor factors": lambda o: lr_scheduler.LambdaLR(o, lambda i: torch.tensor(1 / (1 + i))),
    "float64 tensor factors": lambda o: lr_scheduler.LambdaLR(
        o, lambda i: torch.tensor(1 / (1 + i), dtype=F64)
    ),
    "numpy factors": lambda o: lr_scheduler.MultiplicativeLR(o, lambda i: numpy.float32(0.7)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=2, cycle_momentum=True),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("kind", ["AdamW", "streamed"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_give_numbers_of_any_type(name, kind, tensor_lr):
    twins = Twins(kind, grouped=False, lr=torch.tensor(0.01) if tensor_lr else 0.01)
    if tensor_lr:  # each has its own
        twins.torchs.param_groups[0]["lr"] = torch.tensor(0.01)
    schedules = []
    twins.both(lambda optimizer, params: schedules.append(SCHEDULES[name](optimizer)))
    for _ in range(4):
        twins.go()
        for schedule in schedules:
            schedule.step()


# Weight decay that is part of the gradient, as in Adam


def coupled(kind: str, dtype: torch.dtype, how: str, **options: Any) -> Twins | None:
    """Twins whose second group has coupled weight decay; None if ours refuses it by name when it is made."""

    class Coupled(Twins):
        @staticmethod
        def groups(params):
            first, second = Twins.groups(params)
            return [first, {**second, "decoupled_weight_decay": False}]

    error = None
    if how == "by a group":
        made = []
        error = refusal(lambda: made.append(Coupled(kind, dtype, **options)))
        twins = made[0] if made else None
    else:
        twins = Twins(kind, dtype, **options)
        twins.go()
        twins.both(set_in_second("decoupled_weight_decay", False))
    if error is not None:
        assert "decoupled_weight_decay" in str(error)
        return None
    return twins


def step_coupled(twins: Twins | None, steps: int = 3) -> None:
    """Each step equals torch's, or all are refused by name with nothing changed."""
    for _ in range(0 if twins is None else steps):
        twins.set_grads()
        if not twins.steps_or_refuses("decoupled_weight_decay"):
            return


COUPLED = [
    *(("AdamW", dtype, how) for dtype in DTYPES for how in ("by a group", "between steps")),
    *((kind, F32, how) for kind in KINDS if kind != "AdamW" for how in ("by a group", "between steps")),
]


@pytest.mark.parametrize(("kind", "dtype", "how"), COUPLED)
def test_coupled_weight_decay_is_read_or_refused(kind, dtype, how):
    step_coupled(coupled(kind, dtype, how))


OPTIONS = {
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "no decay": {"weight_decay": 0.0},
    "tensor lr": {"lr": torch.tensor(0.01)},
    "tensor betas": {"betas": (torch.tensor(0.8), torch.tensor(0.9))},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_coupled_weight_decay_beside_other_settings(name):
    step_coupled(coupled("AdamW", F32, "by a group", **copy.deepcopy(OPTIONS[name])))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_coupled_weight_decay_beside_clipping(dtype):
    """Clipped is the gradient alone, as by `clip_grad_norm_` before the step."""
    twins = coupled("AdamW", dtype, "by a group", ours={"max_grad_norm": 0.5})
    for _ in range(0 if twins is None else 3):
        twins.set_grads()
        error = refusal(twins.ours.step)
        if error is not None:
            assert "decoupled_weight_decay" in str(error)
            return
        nn.utils.clip_grad_norm_(twins.twins, 0.5)
        twins.torchs.step()
        twins.compare()


def test_coupled_weight_decay_of_exact_weights():
    twins = coupled("AdamW", BF16, "by a group", ours={"master_weights": True})
    exact = [q.detach().clone() for q in ([] if twins is None else twins.twins)]
    for _ in range(0 if twins is None else 3):
        twins.set_grads()
        error = refusal(twins.ours.step)
        if error is not None:
            assert "decoupled_weight_decay" in str(error)
            return
        with torch.no_grad():
            for q, value in zip(twins.twins, exact, strict=True):
                q.copy_(value)
        twins.torchs.step()
        exact = [q.detach().clone() for q in twins.twins]
        for p, value in zip(twins.params, exact, strict=True):
            bits = p.detach().view(torch.int16).to(torch.int64) << 16
            found = (bits + twins.ours.state[p]["remainder"]).to(torch.int32).view(F32)
            torch.testing.assert_close(found, value, rtol=2e-6, atol=1e-7)


def test_coupled_weight_decay_beside_a_scaler():
    twins = coupled("AdamW", F32, "by a group", fused=True)
    if twins is None:
        return
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in range(2)]
    for _ in range(3):
        twins.set_grads(64.0)
        for scaler, optimizer in zip(scalers, (twins.ours, twins.torchs), strict=True):
            scaler.scale(torch.ones(()))
            error = refusal(lambda s=scaler, o=optimizer: s.step(o))
            if error is not None:
                assert optimizer is twins.ours
                assert "decoupled_weight_decay" in str(error)
                return
            scaler.update()
        twins.compare()


@pytest.mark.parametrize("kind", KINDS)
def test_coupled_weight_decay_comes_and_goes(kind):
    twins = Twins(kind)
    for value in (False, True, False, True):
        twins.both(set_in_second("decoupled_weight_decay", value))
        twins.set_grads()
        if not twins.steps_or_refuses("decoupled_weight_decay"):
            assert not value
            twins.both(set_in_second("decoupled_weight_decay", True))
            twins.step()


@pytest.mark.parametrize("offload", ["none", "streamed"])
@pytest.mark.parametrize("key", ["decoupled_weight_decay", "weight_decay", "eps"])
def test_settings_are_read_or_refused_inside_backward(key, offload):
    """With fused backward a refusal comes before any layer is updated."""
    value = {"decoupled_weight_decay": False, "weight_decay": torch.tensor(0.25), "eps": torch.tensor(1e-3)}[
        key
    ]
    model, twin = tiny.stack(layers=2), tiny.stack(layers=2)
    config = tiny.config(active_layers=2, probe_steps=0, offload=offload, fused_backward=True)
    ours = grass.GrassAdamW(model, lr=0.01, config=config, pattern="blocks.*")
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.01, foreach=False)
    for step in range(3):
        before = tiny.weights(model)
        for optimizer in (ours, theirs):
            optimizer.param_groups[0][key] = value if step else optimizer.defaults[key]
        error = refusal(lambda i=step: tiny.train(model, ours, i, i + 1))
        if error is not None:
            assert key == "decoupled_weight_decay", f"torch takes it, and we raise {error!r}"
            assert key in str(error)
            tiny.assert_identical(tiny.weights(model), before)
            return
        tiny.train(twin, theirs, step, step + 1)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_coupled_weight_decay_of_a_group_added_later():
    twins = Twins()
    twins.go()

    def add(optimizer, params):
        params.append(nn.Parameter(torch.ones(3)))
        optimizer.add_param_group(
            {"params": params[-1:], "decoupled_weight_decay": False, "weight_decay": 0.5}
        )

    error = refusal(lambda: add(twins.ours, twins.params))
    if error is not None:
        assert "decoupled_weight_decay" in str(error)
        assert len(twins.ours.param_groups) == 2
        return
    add(twins.torchs, twins.twins)
    step_coupled(twins)


@pytest.mark.parametrize("way", ["deepcopy", "load_state_dict"])
def test_a_copy_has_the_decay_that_torchs_has(way):
    """torch decouples it whenever a state is set."""
    twins = Twins()
    twins.go()
    twins.both(set_in_second("decoupled_weight_decay", False))
    groups = []
    for optimizer in (twins.ours, twins.torchs):
        if way == "deepcopy":
            optimizer = copy.deepcopy(optimizer)
        else:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        groups.append([group["decoupled_weight_decay"] for group in optimizer.param_groups])
    assert groups[0] == groups[1]


# Every setting, changed for one group

CHANGED = {
    "lr": [0.5, 0.0, 1e-9],
    "betas": [(0.5, 0.6), (0.0, 0.0), (0.0, 0.999), (0.999, 0.9)],
    "eps": [1.0, 0.0],
    "weight_decay": [0.0, 2.0],
    "maximize": [True],
    "foreach": [True, False],
    "fused": [True, False],
    "capturable": [True],
    "differentiable": [True],
    "decoupled_weight_decay": [False],
}


@pytest.mark.parametrize("kind", ["AdamW", "streamed"])
@pytest.mark.parametrize("key", CHANGED)
def test_a_setting_that_changes_is_read_or_refused(key, kind):
    """In both groups in turn, and back."""
    twins = Twins(kind)
    twins.go()
    for value in CHANGED[key]:
        for index in (1, 0):
            before = twins.ours.param_groups[index][key]
            twins.both(lambda optimizer, params, i=index, v=value: optimizer.param_groups[i].update({key: v}))
            twins.set_grads()
            twins.steps_or_refuses(key)
            twins.both(
                lambda optimizer, params, i=index, v=before: optimizer.param_groups[i].update({key: v})
            )
            twins.step()


@pytest.mark.parametrize("dtype", [BF16, F64])
def test_a_setting_that_changes_is_read_or_refused_for_every_dtype(dtype):
    twins = Twins(dtype=dtype)
    twins.go()
    for key, values in CHANGED.items():
        if key == "capturable" or (key == "differentiable" and dtype == BF16):
            continue  # which is torch's to refuse; whose moments are of the parameter's dtype
        for value in values:
            before = twins.ours.param_groups[1][key]
            twins.both(set_in_second(key, value))
            twins.set_grads()
            twins.steps_or_refuses(key)
            twins.both(set_in_second(key, before))
            twins.step()


FLAGS = ("amsgrad", "maximize", "foreach", "fused", "differentiable", "decoupled_weight_decay")
TRUTHS = {
    "one": 1, "zero": 0, "scalar": numpy.bool_(True), "tensor": torch.tensor(True), "text": "yes", "None": None,
}  # fmt: skip


@pytest.mark.parametrize("key", FLAGS)
def test_a_flag_that_is_no_bool_is_read_or_refused(key):
    """torch's for-loop asks for its truth."""
    for value in TRUTHS.values():
        twins = Twins(amsgrad=True)
        twins.go()
        before = twins.torchs.param_groups[1][key]
        twins.both(set_in_second(key, value))
        twins.set_grads()
        twins.steps_or_refuses(key)
        twins.both(set_in_second(key, before))
        twins.step()


ODD_NUMBERS = {
    "text": "0.1",
    "None": None,
    "nan": float("nan"),
    "two elements": torch.tensor([0.1, 0.2]),
    "complex": 0.1 + 0j,
}


@pytest.mark.parametrize("name", ODD_NUMBERS)
@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_what_is_no_number_is_refused_by_name_before_anything_changes(key, name, dtype):
    twins = Twins(dtype=dtype)
    twins.go()
    value = ODD_NUMBERS[name]
    twins.ours.param_groups[1][key] = (value, 0.9) if key == "betas" else value
    twins.set_grads()
    before = snapshot(twins.ours)
    error = refusal(twins.ours.step)
    assert key in str(error)
    assert_unchanged(twins.ours, before)
    twins.ours.param_groups[1][key] = twins.torchs.param_groups[1][key]
    twins.step()


# A user's own keys


class Unequal:
    """As arrays and data frames are: it has no truth, and compares with nothing."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("compared")

    def __bool__(self) -> bool:
        raise RuntimeError("asked for its truth")

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: object) -> "Unequal":
        return self


OWN = {
    "name": "decoder",
    "lr_scale": 0.5,
    "tensor": torch.ones(3),
    "like the parameters": [torch.ones(2), torch.ones(2)],
    "array": numpy.ones(3),
    "function": len,
    "none": None,
    "nested": {"params": [1], "lr": 7.0},
    "momentum": 0.3,
    "initial_lr": 0.9,
    "unequal": Unequal(),
    3: 4,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["when it is made", "between steps"])
def test_a_users_keys_in_a_group_are_ignored_and_kept(how, kind):
    class Own(Twins):
        @staticmethod
        def groups(params):
            first, second = Twins.groups(params)
            return [first, {**second, **OWN}]

    twins = Own(kind) if how == "when it is made" else Twins(kind)
    twins.go(2)
    twins.both(lambda optimizer, params: optimizer.param_groups[1].update(OWN))
    twins.go()
    for group in (twins.ours.param_groups[1], twins.ours.state_dict()["param_groups"][1]):
        assert all(group[key] is value for key, value in OWN.items())
    twins.both(lambda optimizer, params: optimizer.param_groups[0].update({"tensor": torch.zeros(2)}))
    twins.go()
    twins.both(lambda optimizer, params: [optimizer.param_groups[1].pop(key) for key in OWN])
    twins.go()
    twins.compare_states()


@pytest.mark.parametrize("kind", KINDS)
def test_a_users_keys_in_a_group_are_loaded(kind):
    twins = Twins(kind)
    twins.go()
    kept = {key: OWN[key] for key in ("name", "lr_scale", "tensor", "none", "nested", 3)}
    twins.both(lambda optimizer, params: optimizer.param_groups[1].update(kept))
    for optimizer in (twins.ours, twins.torchs):
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        optimizer.load_state_dict(torch.load(file, weights_only=True))
    ours, theirs = twins.ours.param_groups[1], twins.torchs.param_groups[1]
    for key in kept:
        one, other = ours[key], theirs[key]
        assert torch.equal(one, other) if isinstance(other, Tensor) else one == other, key
    twins.go(2)


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_of_an_optimizer_are_those_of_new_groups_only(kind):
    """Written after the groups were made, they change no step, as in torch."""
    twins = Twins(kind)
    twins.go()
    twins.both(lambda optimizer, params: optimizer.defaults.update(lr=1.0, weight_decay=9.0, maximize=True))
    twins.go(2)
    assert set(twins.ours.defaults) == set(twins.torchs.defaults)


@pytest.mark.parametrize("cls", [grass.AdamW, torch.optim.AdamW])
def test_settings_are_kept_as_they_were_given(cls):
    """A tensor, for whoever writes to it."""
    lr, decay = torch.tensor(0.01), torch.tensor(0.1)
    p = nn.Parameter(torch.ones(3))
    optimizer = cls([p], lr=lr, weight_decay=decay, eps=numpy.float32(1e-3))
    p.grad = torch.ones(3)
    optimizer.step()
    (group,) = optimizer.param_groups
    assert group["lr"] is lr
    assert group["weight_decay"] is decay
    assert type(group["eps"]) is numpy.float32


def test_a_number_after_a_tensor_that_was_written_to():
    """The tensor holds by then what the number is: no reason to keep what it held before."""
    (p,), (q,) = ([nn.Parameter(torch.ones(3))] for _ in range(2))
    lr = torch.tensor(0.1)
    ours, theirs = grass.AdamW([p], lr=lr), torch.optim.AdamW([q], lr=0.1)
    for step in range(2):
        for optimizer, param in ((ours, p), (theirs, q)):
            if step == 1:
                lr.fill_(0.5)
                optimizer.param_groups[0]["lr"] = 0.5
            param.grad = torch.ones(3)
            optimizer.step()
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("setting", ["lr", "betas"])
def test_tensors_that_torch_refuses_with_foreach_are_refused_before_any_update(setting: str) -> None:
    """A group of float64, which torch updates, behind one that kernels do."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=F64))]
    optimizer = grass.AdamW([{"params": params[:1]}, {"params": params[1:], "foreach": True}], lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = snapshot(optimizer)
    value = torch.tensor(0.1) if setting == "lr" else (torch.tensor(0.9), torch.tensor(0.99))
    optimizer.param_groups[1][setting] = value
    with pytest.raises(RuntimeError, match=setting):
        optimizer.step()
    assert_unchanged(optimizer, before)
