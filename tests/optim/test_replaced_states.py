"""Tensors of a state that are replaced, moved, resized or restrided by hand between two steps.

Would catch: a step that goes on with a tensor that is no longer in the state, while somebody still holds it: of the
first parameter or a later one, a moment, a maximum, a counter or a remainder; a tensor read by the strides, the address
or the dtype that it had; one that no kernel can read and that is refused when others have been updated, or without its
name; in a store: a value that never reaches the store; memory of states that a plan keeps alive.

Oracle: `torch.optim.AdamW`. Runs in both passes: with ``TRITON_INTERPRET=1`` steps take the kernels.
"""

import collections
import copy
import gc
import itertools
import subprocess
import sys
import weakref
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import grass
from tests.support import tiny
from tests.support.buffers import interpreter_only
from tests.support.pairwise import pairwise
from tests.support.twins import BF16, F16, F32, F64, KINDS, MAXIMA, Twins, in_turn, normal, refusal, spread

MOMENTS = ("exp_avg", "exp_avg_sq", MAXIMA)
PLACES = range(3)
host_only = pytest.mark.plain_only(reason="no kernel takes part, and the other pass is slow")


def on_the_host(cases: list[tuple]) -> list:
    """Cases of which those with a store are of the plain pass alone."""
    return [case if case[1] == "AdamW" else pytest.param(*case, marks=host_only) for case in cases]


def values(t: Tensor, seed: int = 7) -> Tensor:
    """Positive, as squares are; of the shape and dtype of `t`."""
    return (normal(*t.shape, seed=seed).abs() + 0.1).to(t.dtype)


def held(twins: Twins) -> list:
    """Everything that a step may have kept the address or the identity of."""
    state = twins.ours.state
    tensors = [t for entry in state.values() for t in entry.values()]
    return [state, list(state.values()), tensors, [t.untyped_storage() for t in tensors]]


# Ways to replace a moment by other values that torch goes on with


def new_tensor(state, key):
    state[key] = values(state[key])


def new_data(state, key):
    state[key].data = values(state[key])


def other_order(state, key):
    """Without gaps, in another order than the parameter's."""
    t = values(state[key])
    state[key] = t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
    assert t.dim() == 1 or state[key].stride() != t.stride()


def with_gaps(state, key):
    t = values(state[key])
    state[key] = torch.full((*t.shape, 2), torch.nan)[..., 0].copy_(t)


def view_of_a_buffer(state, key):
    """At an address that is no multiple of 16."""
    t = values(state[key])
    buffer = torch.full((t.numel() + 2,), torch.nan)
    state[key] = buffer[1:-1].view(t.shape).copy_(t)
    assert state[key].data_ptr() % 16


def transposed_in_place(state, key):
    """The same tensor at the same address: only its strides have changed."""
    state[key].t_()


def transposed_data(state, key):
    state[key].data = state[key].data.t()


def other_storage(state, key):
    state[key].set_(values(state[key]))


def swapped_tensors(state, key):
    other = values(state[key])
    torch.utils.swap_tensors(state[key], other)
    return other


def a_parameter(state, key):
    state[key] = nn.Parameter(values(state[key]))


def updated(state, key):
    state.update({key: values(state[key])})


def taken_out_and_put_back(state, key):
    """At the end of the dict, another tensor."""
    state[key] = values(state.pop(key))


CHANGES = [
    new_tensor, new_data, other_order, with_gaps, view_of_a_buffer, transposed_in_place, transposed_data, other_storage,
    swapped_tensors, a_parameter, updated, taken_out_and_put_back,
]  # fmt: skip
NEEDS_A_MATRIX = (transposed_in_place, transposed_data)
WITHOUT_REFERENCES = (swapped_tensors,)  # torch swaps only what nobody else holds


@pytest.mark.parametrize("change", CHANGES)
def test_a_replaced_moment_is_used(change):
    """Of the first parameter, a later one and one of another group."""
    twins = Twins(amsgrad=True)
    twins.go()
    kept = [] if change in WITHOUT_REFERENCES else held(twins)
    for key, place in (("exp_avg", 1), ("exp_avg_sq", 0), (MAXIMA, 1), ("exp_avg_sq", 2)):
        if change in NEEDS_A_MATRIX and place == 2:
            continue
        for optimizer, params in ((twins.ours, twins.params), (twins.torchs, twins.twins)):
            kept.append(change(optimizer.state[params[place]], key))
        twins.go()
    twins.go()


@pytest.mark.parametrize(("kind", "key", "dtype"), pairwise(product(KINDS, MOMENTS, (F32, BF16))))
def test_a_replaced_moment_is_used_in_every_mode(kind, key, dtype):
    """Also while a store's newer values of the others are on the device."""
    twins = Twins(kind, dtype, amsgrad=True)
    twins.go()
    kept = held(twins)
    for places in ((1,), (0, 2)):
        for optimizer, params in ((twins.ours, twins.params), (twins.torchs, twins.twins)):
            for place in places:
                new_tensor(optimizer.state[params[place]], key)
        twins.go(2)
    twins.compare_states()
    del kept


@pytest.mark.parametrize(
    ("change", "kind"), in_turn([new_data, other_order, transposed_in_place, other_storage, other_order])
)
def test_a_moved_moment_is_used_in_every_mode(kind, change):
    twins = Twins(kind)
    twins.go()
    twins.settle()
    kept = held(twins)
    twins.both(lambda optimizer, params: change(optimizer.state[params[1]], "exp_avg"))
    twins.go(2)
    twins.compare_states()
    del kept


REALLOCATED = """
import torch
from tests.support.twins import Twins, normal

def longer_storage(t):
    t.untyped_storage().resize_(1 << 22)

def there_and_back(t):
    shape = t.shape
    t.resize_(1 << 20)
    t.resize_(shape).copy_(torch.full(shape, 0.5))

for change in (longer_storage, there_and_back):
    twins = Twins()
    twins.go()
    for key in ("exp_avg", "step"):
        twins.both(lambda optimizer, params: change(optimizer.state[params[1]][key]))
        twins.go()
    twins.go()
print("done")
"""


@interpreter_only
@pytest.mark.slow
def test_memory_that_was_reallocated_is_not_written():
    """In a process of its own: a step that writes to memory that was freed may end it."""
    ended = subprocess.run(
        [sys.executable, "-c", REALLOCATED], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert ended.stdout == "done\n", ended.stderr


@pytest.mark.parametrize("write", ["in place", "through data", "through a view"])
def test_values_written_into_a_moment_are_used(write):
    twins = Twins()
    twins.go()

    def event(optimizer, params):
        for p in params:
            t = optimizer.state[p]["exp_avg"]
            if write == "in place":
                t.copy_(values(t))
            elif write == "through data":
                t.data.copy_(values(t))
            else:
                t.detach().view(-1)[:] = values(t).view(-1)

    twins.both(event)
    twins.go(2)


# Counters

COUNTERS = {
    "new": lambda step: torch.tensor(41.0),
    "view of all counters": lambda step: torch.full((5,), 41.0)[2],
    "one that torch makes": lambda step: step + 30,
}


@pytest.mark.parametrize(("make", "kind"), spread(COUNTERS))
def test_a_replaced_counter_is_used(make, kind):
    twins = Twins(kind)
    twins.go()
    twins.settle()
    kept = held(twins)
    for places in ((1,), (0, 2)):
        for optimizer, params in ((twins.ours, twins.params), (twins.torchs, twins.twins)):
            for place in places:
                state = optimizer.state[params[place]]
                state["step"] = COUNTERS[make](state["step"])
        twins.go()
    twins.go()
    twins.compare_states()
    del kept


@pytest.mark.parametrize("change", [new_data, other_storage, swapped_tensors])
def test_a_moved_counter_is_used(change):
    twins = Twins()
    twins.go()
    kept = [] if change in WITHOUT_REFERENCES else held(twins)
    for place in (1, 0):
        for optimizer, params in ((twins.ours, twins.params), (twins.torchs, twins.twins)):
            kept.append(change(optimizer.state[params[place]], "step"))
        twins.go()


# Remainders


@pytest.mark.parametrize(("how", "kind"), spread(["new tensor", "new data", "taken out", "other order"]))
def test_a_replaced_remainder_is_used(how, kind):
    """Zeros: the exact value is then the parameter's own, from which torch goes on in float32."""
    place = 1
    twins = Twins(kind, BF16, ours={"master_weights": True})
    twins.go()
    twins.settle()
    kept = held(twins)
    state, p = twins.ours.state[twins.params[place]], twins.params[place]
    assert state["remainder"].any()
    zeros = torch.zeros_like(state["remainder"])
    if how == "new tensor":
        state["remainder"] = zeros
    elif how == "new data":
        state["remainder"].data = zeros
    elif how == "other order":
        state["remainder"] = zeros.t()
    else:
        del state["remainder"]
    twins.twins[place].data = p.detach().float()
    twins.set_grads()
    twins.ours.step()
    twins.torchs.step()
    twins.settle()
    bits = p.detach().view(torch.int16).to(torch.int64) << 16
    exact = (bits + twins.ours.state[p]["remainder"]).to(torch.int32).view(F32)
    torch.testing.assert_close(exact, twins.twins[place].detach(), rtol=2e-6, atol=1e-7)
    del kept


# Whole states


def swap_states(optimizer, params):
    one, other = params[:2]
    optimizer.state[one], optimizer.state[other] = optimizer.state[other], optimizer.state[one]


def swap_moments(optimizer, params):
    """The tensors of two parameters, in dicts that stay."""
    one, other = (optimizer.state[p] for p in params[:2])
    for key in ("exp_avg", "exp_avg_sq"):
        one[key], other[key] = other[key], one[key]


def swap_one_moment(optimizer, params):
    one, other = (optimizer.state[p] for p in params[:2])
    one["exp_avg"], other["exp_avg"] = other["exp_avg"], one["exp_avg"]


def swap_counters(optimizer, params):
    one, other = (optimizer.state[p] for p in (params[0], params[2]))
    one["step"], other["step"] = torch.tensor(9.0), one["step"]


def swap_data_of_moments(optimizer, params):
    one, other = (optimizer.state[p]["exp_avg"] for p in params[:2])
    one.data, other.data = other.data, one.data


def new_dict(optimizer, params):
    """Of the same tensors."""
    optimizer.state[params[2]] = dict(optimizer.state[params[2]])


def new_dict_of_copies(optimizer, params):
    optimizer.state[params[2]] = {key: t.clone() + 1 for key, t in optimizer.state[params[2]].items()}


def cleared(optimizer, params):
    optimizer.state.clear()


def popped_first(optimizer, params):
    optimizer.state.pop(params[0])


def popped_last(optimizer, params):
    del optimizer.state[params[2]]


def emptied_entry(optimizer, params):
    optimizer.state[params[1]].clear()


def empty_dict(optimizer, params):
    optimizer.state[params[1]] = {}


def another_state(optimizer, params):
    optimizer.state = collections.defaultdict(dict)


def another_state_of_the_same(optimizer, params):
    optimizer.state = collections.defaultdict(dict, optimizer.state)


def another_state_of_copies(optimizer, params):
    entries = {p: {key: t.clone() + 1 for key, t in optimizer.state[p].items()} for p in reversed(params)}
    optimizer.state = collections.defaultdict(dict, entries)


def another_order(optimizer, params):
    """The same entries, in other places of the dict."""
    for p in list(optimizer.state)[:2]:
        optimizer.state[p] = optimizer.state.pop(p)


WHOLE = [
    swap_states, swap_moments, swap_one_moment, swap_counters, swap_data_of_moments, new_dict, new_dict_of_copies,
    cleared, popped_first, popped_last, emptied_entry, empty_dict, another_state, another_state_of_the_same,
    another_state_of_copies, another_order,
]  # fmt: skip


@pytest.mark.parametrize(("event", "kind"), spread(WHOLE))
def test_replaced_states_are_used(event, kind):
    """The old ones live on, in somebody's variable."""
    twins = Twins(kind)
    twins.go()
    twins.settle()
    kept = held(twins)
    twins.both(event)
    twins.go(2)
    twins.compare_states()
    del kept


FUSED = [{"offload": "none"}, {"offload": "resident"}, {"offload": "streamed", "buffer_mb": 0.25}]


def run_with_replaced_states(**mode) -> dict[str, Tensor]:
    """The weights of a run of the method whose states of some parameters are replaced before two steps."""
    model = tiny.stack(layers=2)
    config = tiny.config(active_layers=2, probe_steps=0, sample_interval=3, update_interval=3, **mode)
    opt = grass.GrassAdamW(model, lr=1e-2, config=config, pattern="blocks.*")
    kept = []
    for step in range(5):
        if step in (2, 3):
            opt.state_dict()  # waits for copies
            for p in list(model.parameters())[step::3]:
                kept.append(opt.state[p]["exp_avg"])
                new_tensor(opt.state[p], "exp_avg")
        tiny.train(model, opt, step, step + 1)
    return tiny.weights(model)


@pytest.mark.parametrize("mode", FUSED, ids=lambda mode: mode["offload"])
def test_replaced_states_are_used_inside_backward(mode):
    """With fused backward, which updates a layer with its last gradient."""
    found = run_with_replaced_states(**mode, fused_backward=True)
    tiny.assert_identical(found, run_with_replaced_states(offload="none"))


@pytest.mark.parametrize("kind", KINDS)
def test_states_that_are_replaced_before_every_step(kind):
    """The old ones are dropped: no step may find what an earlier one has found at a reused address."""
    twins = Twins(kind)
    twins.go()
    for place in itertools.islice(itertools.cycle(PLACES), 6):
        twins.both(lambda optimizer, params, i=place: new_tensor(optimizer.state[params[i]], "exp_avg"))
        twins.go()
    twins.compare_states()


@pytest.mark.parametrize("kind", KINDS)
def test_states_replaced_together_with_parameters_and_gradients(kind):
    twins = Twins(kind)
    twins.go()
    kept = held(twins), [p.data for p in twins.params]

    def replace(optimizer, params):
        new_tensor(optimizer.state[params[2]], "exp_avg_sq")
        params[1].data = normal(*params[1].shape, seed=70)

    twins.both(replace)
    twins.go(2)
    twins.compare_states()
    del kept


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_a_parameter_without_a_gradient_is_used_when_it_has_one(kind):
    twins = Twins(kind)
    twins.go()
    kept = held(twins)
    twins.both(lambda optimizer, params: new_tensor(optimizer.state[params[1]], "exp_avg"))
    twins.set_grads()
    twins.params[1].grad = twins.twins[1].grad = None
    twins.step()
    twins.go(2)
    twins.compare_states()
    del kept


# What no kernel can read: used as torch would use its values, or refused by name before anything has changed

ODD = {
    "bfloat16": lambda t: t.to(BF16),
    "float16": lambda t: t.to(F16),
    "float64": lambda t: t.to(F64),
    "integers": lambda t: t.to(torch.int32),
    "complex": lambda t: t.to(torch.complex64),
    "another shape": lambda t: t.flatten()[:2].clone(),
    "flat": lambda t: t.flatten().clone()[None],
    "expanded": lambda t: t.new_full((1,), 0.5).expand(t.shape),
    "negative view": lambda t: torch._neg_view(-t),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "a number": lambda t: 0.5,
    "None": lambda t: None,
    "a list": lambda t: t.tolist(),
}


@pytest.mark.parametrize(("odd", "kind"), on_the_host(spread(ODD)))
def test_an_odd_moment_is_used_or_refused_by_name(odd, kind):
    place, key = 2, "exp_avg_sq"
    twins = Twins(kind)
    twins.go(2)
    twins.settle()
    kept = held(twins)
    state = twins.ours.state[twins.params[place]]
    good = state[key]
    state[key] = ODD[odd](good)
    if odd == "expanded":
        twins.torchs.state[twins.twins[place]][key].fill_(0.5)
    if odd in ("bfloat16", "float16", "float64", "integers") and isinstance(state[key], Tensor):
        twins.torchs.state[twins.twins[place]][key].copy_(state[key])
    twins.set_grads()
    if not twins.steps_or_refuses(key):
        state[key] = good
        if odd in ("bfloat16", "float16", "integers", "expanded"):
            twins.torchs.state[twins.twins[place]][key].copy_(good)
        twins.step()
    del kept


CUT = {
    "resized": lambda t: t.resize_(2),
    "data of another shape": lambda t: setattr(t, "data", t.data.flatten()[:3]),
    "data of another dtype": lambda t: setattr(t, "data", t.data.double()),
}


@pytest.mark.parametrize("cut", CUT)
def test_a_moment_cut_short_where_it_is_is_refused_by_name(cut):
    """The tensor stays in the state, its memory or its shape does not suffice: nothing behind it is written."""
    place, key = 2, "exp_avg"
    twins = Twins()
    twins.go()
    kept = held(twins)
    state = twins.ours.state[twins.params[place]]
    good, copied = state[key], state[key].clone()
    CUT[cut](good)
    twins.set_grads()
    if not twins.steps_or_refuses(key):
        state[key] = copied
        twins.step()
    del kept


ODD_COUNTERS = {
    "float64": lambda t: t.double(),
    "integer": lambda t: t.long(),
    "of shape (1,)": lambda t: t.reshape(1),
    "a number": lambda t: float(t),
    "an int": lambda t: int(t),
    "of two elements": lambda t: t.repeat(2),
    "None": lambda t: None,
    "meta": lambda t: t.to("meta"),
    "negative view": lambda t: torch._neg_view(-t),
}


@pytest.mark.parametrize(("odd", "kind"), on_the_host(spread(ODD_COUNTERS)))
def test_an_odd_counter_is_used_or_refused_by_name(odd, kind):
    place = 2
    twins = Twins(kind)
    twins.go()
    kept = held(twins)
    state = twins.ours.state[twins.params[place]]
    good = state["step"]
    state["step"] = ODD_COUNTERS[odd](good)
    twins.set_grads()
    if not twins.steps_or_refuses("step"):
        state["step"] = good
        twins.step()
    del kept


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64])
def test_a_counter_of_another_dtype_where_the_last_was(dtype):
    """Its bits are no float32: an allocator gives small tensors the same memory again."""
    memory = torch.zeros(1, dtype=torch.float64)
    twins = Twins()
    twins.go()
    states = [twins.ours.state[twins.params[1]], twins.torchs.state[twins.twins[1]]]
    for state in states:
        count = state["step"].item()
        state["step"] = memory.clone().view(torch.float32)[0].fill_(count)
    twins.go()
    for state in states:
        count, place = state["step"].item(), state["step"]
        whole = torch.empty(0, dtype=dtype).set_(place.untyped_storage())[:1]
        state["step"] = whole.fill_(count)[0]
        assert state["step"].data_ptr() == place.data_ptr()
    twins.go(2)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_a_moment_of_another_dtype_of_the_same_size_where_the_last_was(key):
    """float16 beside bfloat16: refused as when it comes before the first plan."""
    p = torch.nn.Parameter(torch.ones(4, dtype=BF16))
    optimizer = grass.AdamW([p], state_dtype=BF16)
    p.grad = torch.ones_like(p)
    optimizer.step()
    state, before = optimizer.state[p], p.detach().clone()
    state[key] = state[key].view(torch.float16)
    error = refusal(optimizer.step)
    assert f"{key} of parameter 0 is torch.float16" in str(error)
    assert torch.equal(p, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_moment_that_requires_grad_is_used_and_saved(kind):
    twins = Twins(kind)
    twins.go()
    twins.settle()
    for optimizer, params in ((twins.ours, twins.params), (twins.torchs, twins.twins)):
        state = optimizer.state[params[0]]
        state["exp_avg"] = torch.nn.Parameter(state["exp_avg"] + 1)
    twins.go()
    saved = twins.ours.state_dict()
    twins.go()
    assert all(torch.isfinite(entry["exp_avg"]).all() for entry in saved["state"].values())


ODD_REMAINDERS = {
    "float32": lambda t: t.float(),
    "int32": lambda t: t.int(),
    "another shape": lambda t: t.flatten()[:2].clone(),
    "expanded": lambda t: t.new_zeros(1).expand(t.shape),
    "a number": lambda t: 0,
}


@pytest.mark.parametrize(("odd", "kind"), on_the_host(spread(ODD_REMAINDERS)))
def test_an_odd_remainder_is_refused_by_name(odd, kind):
    place = 2
    twins = Twins(kind, BF16, ours={"master_weights": True})
    twins.go(2)
    twins.settle()
    kept = held(twins)
    state = twins.ours.state[twins.params[place]]
    state["remainder"] = ODD_REMAINDERS[odd](state["remainder"])
    twins.set_grads()
    if twins.steps_or_refuses("remainder"):
        assert twins.ours.state[twins.params[place]]["remainder"].dtype == torch.int16
    del kept


@pytest.mark.parametrize("kind", KINDS)
def test_replaced_states_are_saved(kind):
    """A replaced state is in the state dict, before the next step too, and a resumed run goes on with it."""
    twins = Twins(kind)
    twins.go()
    kept = held(twins)
    twins.both(lambda optimizer, params: new_tensor(optimizer.state[params[2]], "exp_avg"))
    saved = copy.deepcopy(twins.ours.state_dict())
    expected = values(twins.torchs.state[twins.twins[2]]["exp_avg"])
    assert torch.equal(saved["state"][2]["exp_avg"], expected)
    twins.ours.load_state_dict(saved)
    twins.go(2)
    twins.compare_states()
    del kept


def test_states_loaded_between_steps_are_used():
    twins = Twins()
    twins.go()
    saved = {id(opt): copy.deepcopy(opt.state_dict()) for opt in (twins.ours, twins.torchs)}
    twins.go(2)
    twins.both(lambda optimizer, params: optimizer.load_state_dict(saved[id(optimizer)]))
    twins.go(2)


def test_memory_of_dropped_states_is_freed():
    """A plan has addresses: it does not keep what its user has let go."""
    twins = Twins()
    twins.go(2)
    watched = [weakref.ref(t) for state in twins.ours.state.values() for t in state.values()]
    twins.ours.state.clear()
    gc.collect()
    assert not any(ref() is not None for ref in watched)
