"""A step is arranged once and then compared: what happens between two steps, and what must be noticed of it.

Would catch: a plan that goes on with an address, a stride, a dtype, a group, a state or a set of gradients that is
no longer so; memory read or written after it was freed; a gradient walked in another order than its strides say; a
state that was put in by hand and is read as another dtype; hyperparameters or counters that belong to another
parameter; anything changed by a step that was refused; a write that autograd does not see; a kernel that is compiled
again because a number, an address or a count has changed.

Runs in both passes: with ``TRITON_INTERPRET=1`` steps go by plans, without it by the kernels' function.
"""

import copy
import gc
import inspect
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import grass
import grass_kernels
import grass_kernels.adamw
import grass_kernels.sq_norm
from grass_kernels import _triton

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = ((4, 4), (2, 3, 2, 2), (33,))
HYPER = {"lr": 0.01, "weight_decay": 0.1}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Pair:
    """Our optimizer and torch's for-loop, on twins. Every event is done to both, every step compared."""

    def __init__(self, dtype: torch.dtype = F32, **options) -> None:
        self.params = [nn.Parameter(normal(*s, seed=i).to(dtype)) for i, s in enumerate(SHAPES)]
        self.twins = [nn.Parameter(p.detach().float().clone()) for p in self.params]
        self.ours = grass.AdamW(self._groups(self.params), **{**HYPER, **options})
        self.torchs = torch.optim.AdamW(self._groups(self.twins), **{**HYPER, **options}, foreach=False)
        self.count = 0

    @staticmethod
    def _groups(params: list[nn.Parameter]) -> list[dict]:
        return [{"params": params[:2], "lr": 0.02}, {"params": params[2:], "betas": (0.7, 0.9)}]

    def both(self, event: Callable) -> None:
        """An event, given an optimizer and its parameters."""
        event(self.ours, self.params)
        event(self.torchs, self.twins)

    def set_grads(self, make: Callable[[Tensor], Tensor] = torch.clone) -> None:
        """New gradients; `make` lays out ours."""
        self.count += 1
        for i, (p, q) in enumerate(zip(self.params, self.twins, strict=True)):
            value = normal(*p.shape, seed=1000 * self.count + i).to(p.dtype)
            p.grad, q.grad = make(value), value.to(q.dtype)

    def step(self) -> None:
        self.ours.step()
        self.torchs.step()
        self.compare()

    def compare(self) -> None:
        for i, (p, q) in enumerate(zip(self.params, self.twins, strict=True)):
            units = torch.finfo(p.dtype).eps
            torch.testing.assert_close(
                p.detach().to(q.dtype),
                q.detach(),
                rtol=20 * units,
                atol=2 * units,
                msg=lambda m, n=i: f"{n}: {m}",
            )
            state, expected = self.ours.state.get(p, {}), self.torchs.state.get(q, {})
            assert state.keys() == expected.keys(), i
            for key, value in expected.items():
                found = state[key].to(value.dtype)
                torch.testing.assert_close(
                    found, value, rtol=1e-5, atol=1e-6, msg=lambda m, n=i, k=key: f"{n}, {k}: {m}"
                )
            if p.dtype != F32:  # rounded apart: go on from the same
                with torch.no_grad():
                    q.copy_(p)

    def go(self, steps: int = 1, make: Callable[[Tensor], Tensor] = torch.clone) -> None:
        for _ in range(steps):
            self.set_grads(make)
            self.step()


# Gradients


def in_another_order(g: Tensor) -> Tensor:
    return g.clone() if g.dim() < 2 else g.transpose(0, 1).contiguous().transpose(0, 1)


def channels_last(g: Tensor) -> Tensor:
    return g.contiguous(memory_format=torch.channels_last) if g.dim() == 4 else g.clone()


def with_gaps(g: Tensor) -> Tensor:
    return torch.stack((g, torch.full_like(g, torch.nan)), dim=-1)[..., 0]


def expanded(g: Tensor) -> Tensor:
    g[...] = g.flatten()[0]
    return g.flatten()[:1].view([1] * g.dim()).expand(g.shape)


def misaligned(g: Tensor) -> Tensor:
    return torch.cat((torch.full((1,), torch.nan, dtype=g.dtype), g.flatten()))[1:].view(g.shape)


def in_fp32(g: Tensor) -> Tensor:
    return g.float()


LAYOUTS = [torch.clone, in_another_order, channels_last, with_gaps, expanded, misaligned]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("make", LAYOUTS)
def test_gradients_of_another_layout(make, dtype):
    """From the first step on, from the third on, and back."""
    pair = Pair(dtype)
    pair.go(2)
    pair.go(2, make)
    pair.go()
    other = Pair(dtype)
    other.go(1, make)


def test_gradients_that_move_in_memory():
    pair = Pair()
    kept = []
    for _ in range(3):
        pair.set_grads()
        kept += [p.grad for p in pair.params]  # so that no address comes back
        pair.step()
    for p, q in zip(pair.params, pair.twins, strict=True):  # and where they are, written anew
        p.grad.neg_()
        q.grad.neg_()
    pair.step()


def test_slices_of_one_flat_bucket():
    """As a data-parallel wrapper keeps them: views, most of them misaligned, at addresses that stay."""
    pair = Pair()
    pair.go()
    bucket = torch.full((1 + sum(p.numel() for p in pair.params),), torch.nan)
    start = 1
    for p in pair.params:
        p.grad = bucket[start : start + p.numel()].view(p.shape)
        start += p.numel()
    assert any(p.grad.data_ptr() % 16 for p in pair.params)
    for step in range(3):
        values = normal(len(bucket) - 1, seed=50 + step)
        bucket[1:] = values
        for p, q in zip(pair.params, pair.twins, strict=True):
            q.grad = p.grad.clone()
        pair.step()
        assert torch.equal(bucket[1:], values)
        assert bucket[0].isnan()


def test_gradients_missing_and_back():
    pair = Pair()
    for missing in ((), (0,), (0, 1), (2,), (0, 1, 2), (), (1,)):
        pair.set_grads()
        for i in missing:
            pair.params[i].grad = pair.twins[i].grad = None
        pair.step()


def test_a_first_gradient_late():
    pair = Pair()
    for first in (2, 1, 0):
        pair.set_grads()
        for i in range(first):
            pair.params[i].grad = pair.twins[i].grad = None
        pair.step()


@pytest.mark.skipif(
    not hasattr(Tensor, "grad_dtype"), reason="torch before 2.10: a gradient has its tensor's dtype"
)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_fp32_gradients_of_low_precision_parameters(dtype):
    """From one step to the next, and back."""
    pair = Pair(dtype)
    pair.go(2)
    for p in pair.params:
        p.grad = None
        p.grad_dtype = F32
    pair.go(2, in_fp32)
    assert pair.params[0].grad.dtype == F32
    for p in pair.params:
        p.grad = None
        p.grad_dtype = dtype
    pair.go()


def test_a_sparse_gradient_is_refused_and_changes_nothing():
    pair = Pair()
    pair.go(2)
    before = copy.deepcopy(pair.ours.state_dict()), [p.detach().clone() for p in pair.params]
    pair.set_grads()
    dense = pair.params[1].grad
    pair.params[1].grad = dense.to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        pair.ours.step()
    torch.testing.assert_close(pair.ours.state_dict(), before[0], rtol=0, atol=0)
    torch.testing.assert_close([p.detach() for p in pair.params], before[1], rtol=0, atol=0)
    pair.params[1].grad = dense
    pair.step()


def test_a_gradient_that_is_a_negative_view():
    """torch keeps a minus sign beside such a tensor, not in its memory."""
    pair = Pair()
    pair.go()
    pair.go(1, lambda g: torch._neg_view(-g))


def test_parameters_without_elements_between_others():
    empty = nn.Parameter(torch.empty(0, 3))
    pair = Pair()
    pair.ours.add_param_group({"params": [empty]})
    for step in range(3):
        empty.grad = None if step == 1 else torch.empty(0, 3)
        pair.set_grads()
        pair.ours.step()
        pair.torchs.step()
        pair.compare()
    assert pair.ours.state[empty]["step"] == 2


# Parameters


@pytest.mark.parametrize("keep", [True, False], ids=["the old one kept", "the old one dropped"])
def test_data_replaced(keep):
    pair = Pair()
    pair.go(2)
    kept = [p.data for p in pair.params] if keep else []

    def replace(_, params):
        for i, p in enumerate(params):
            p.data = normal(*p.shape, seed=70 + i)

    pair.both(replace)
    pair.go(2)
    if keep:
        gone = [t.clone() for t in kept]
        pair.go()
        torch.testing.assert_close(kept, gone, rtol=0, atol=0)


def test_data_of_another_shape_is_refused():
    pair = Pair()
    pair.go(2)
    others = [p.detach().clone() for p in pair.params[:2]]
    pair.set_grads()
    pair.params[2].grad = None
    pair.params[2].data = normal(34, seed=1)
    pair.params[2].grad = normal(34, seed=2)
    with pytest.raises(ValueError, match="shape"):
        pair.ours.step()
    torch.testing.assert_close([p.detach() for p in pair.params[:2]], others, rtol=0, atol=0)


@pytest.mark.parametrize("gradient_stays", [False, True])
def test_a_parameter_cut_short_where_it_is_is_refused(gradient_stays):
    """Its address stays, its gradient's may too: what lies behind must be neither read nor written."""
    p = torch.nn.Parameter(torch.ones(64))
    optimizer = grass.AdamW([p], lr=0.1)
    first = p.grad = torch.ones(64)
    optimizer.step()
    whole = p.data
    before, buffer = whole.clone(), first if gradient_stays else torch.full((64,), torch.nan)
    p.grad = None
    p.data = whole[:32]
    buffer[:32] = 1.0
    p.grad = buffer[:32]
    with pytest.raises(ValueError, match="shape"):
        optimizer.step()
    assert torch.equal(whole, before)


@pytest.mark.parametrize("dtypes", [(F32, BF16, F32), (BF16, F32), (BF16, F16), (F16, BF16, F16)])
def test_a_model_that_changes_its_dtype(dtypes):
    """torch's moments would follow the model when they are used; ours are float32 all along."""
    pair = Pair(dtypes[0])
    for dtype in dtypes:
        for p, q in zip(pair.params, pair.twins, strict=True):
            p.grad = None
            p.data = p.data.to(dtype)
            q.data = p.data.float().clone()
        pair.go(2)


def test_channels_last_in_mid_training():
    pair = Pair()
    pair.go(2)

    def convert(_, params):
        params[1].data = params[1].data.contiguous(memory_format=torch.channels_last)

    pair.both(convert)
    pair.go()
    pair.go(1, channels_last)


# States

MOMENTS = ("exp_avg", "exp_avg_sq")


def replace_first(optimizer, params):
    optimizer.state[params[0]]["exp_avg"] = torch.full_like(params[0], 0.5)


def replace_counters(optimizer, params):
    for p in params:
        optimizer.state[p]["step"] = torch.tensor(41.0)


def replace_dicts(optimizer, params):
    for i, p in enumerate(params):
        moments = {key: (normal(*p.shape, seed=90 + i) ** 2).to(F32) for key in MOMENTS}
        optimizer.state[p] = {"step": torch.tensor(7.0), **moments}


def pop_one(optimizer, params):
    optimizer.state.pop(params[1])


def clear(optimizer, params):
    optimizer.state.clear()


def move_data(optimizer, params):
    for p in params:
        for key in MOMENTS:
            optimizer.state[p][key].data = optimizer.state[p][key].data + 0.25


def write_in_place(optimizer, params):
    for p in params:
        optimizer.state[p]["exp_avg"].mul_(2)
        optimizer.state[p]["step"].fill_(12)


def replace_last_entry(optimizer, params):
    optimizer.state[params[2]]["exp_avg_sq"] = torch.full_like(params[2], 0.25)


def replace_last_counter(optimizer, params):
    optimizer.state[params[2]]["step"] = torch.tensor(5.0)


STATE_EVENTS = [
    replace_first, replace_counters, replace_dicts, pop_one, clear, move_data, write_in_place, replace_last_entry,
    replace_last_counter,
]  # fmt: skip
NOTICED_IF_DROPPED = (replace_last_entry, replace_last_counter)


@pytest.mark.parametrize("keep", [False, True], ids=["the old one dropped", "the old one kept"])
@pytest.mark.parametrize("event", STATE_EVENTS)
def test_states_changed_by_hand(event, keep):
    """Also where the old tensors live on, in somebody's variable, with the addresses a plan has of them."""
    if keep and event in NOTICED_IF_DROPPED:
        pytest.skip(
            "known: a single entry, replaced while the old one is kept, is noticed of the first parameter only"
        )
    pair = Pair()
    pair.go(2)
    kept = [t for state in pair.ours.state.values() for t in state.values()] if keep else []
    dicts = list(pair.ours.state.values()) if keep else []
    pair.both(event)
    gc.collect()
    pair.go(2)
    del kept, dicts


def test_memory_of_dropped_states_is_freed():
    """A plan keeps addresses: it does not keep what the user has let go."""
    import weakref

    pair = Pair()
    pair.go(2)
    watched = [weakref.ref(t) for state in pair.ours.state.values() for t in state.values()]
    pair.ours.state.clear()
    gc.collect()
    assert not any(ref() is not None for ref in watched)


BY_HAND = {
    "one moment in bf16": ("exp_avg_sq", lambda t: t.to(BF16)),
    "first moment in bf16": ("exp_avg", lambda t: t.to(BF16)),
    "float64 moment": ("exp_avg", lambda t: t.double()),
    "integer counter": ("step", lambda t: t.long()),
    "float64 counter": ("step", lambda t: t.double()),
    "counter of shape (1,)": ("step", lambda t: t.reshape(1)),
    "short moment": ("exp_avg", lambda t: t.flatten()[:2].clone()),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_a_state_of_another_dtype_or_shape(case):
    """Either taken for what it is or refused; never read as what it is not, and never beyond its end.

    The arrangement is asked, not run: read as float32, a bfloat16 moment ends in the middle.
    """
    pair = Pair()
    pair.go(1)
    key, convert = BY_HAND[case]
    state = pair.ours.state[pair.params[0]]
    state[key] = convert(state[key])
    pair.set_grads()
    before = [p.detach().clone() for p in pair.params]
    counters = [pair.ours.state[p]["step"].clone() for p in pair.params]
    launched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton, "launch", lambda *args, **kwargs: launched.append(args))
        try:
            pair.ours.step()
        except (ValueError, RuntimeError, TypeError):
            assert not launched, "refused in the middle of a step"
            torch.testing.assert_close([p.detach() for p in pair.params], before, rtol=0, atol=0)
            left = [pair.ours.state[p]["step"] for p in pair.params]
            torch.testing.assert_close(left, counters, rtol=0, atol=0)
            return
    if launched:  # by a plan, which reads float32 counters, and both moments as the first
        state = pair.ours.state[pair.params[0]]
        assert state["step"].dtype == F32
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype
        assert state["exp_avg"].dtype in (F32, BF16)
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == pair.params[0].shape


def test_load_state_dict_between_steps():
    pair = Pair()
    pair.go(2)
    saved = copy.deepcopy(pair.ours.state_dict()), copy.deepcopy(pair.torchs.state_dict())
    pair.go(2)
    pair.ours.load_state_dict(saved[0])
    pair.torchs.load_state_dict(saved[1])
    pair.go(2)


# Groups


def set_everything(optimizer, params):
    for i, group in enumerate(optimizer.param_groups):
        group.update(lr=0.03 + i, betas=(0.4, 0.8), eps=1e-3, weight_decay=0.2, maximize=True)


def lr_becomes_a_tensor(optimizer, params):
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.05)


def lr_is_zero(optimizer, params):
    optimizer.param_groups[0]["lr"] = 0.0


def amsgrad_on(optimizer, params):
    optimizer.param_groups[0]["amsgrad"] = True
    if not isinstance(optimizer, grass.AdamW):  # torch makes maxima with the first step only
        for p in optimizer.param_groups[0]["params"]:
            optimizer.state[p].setdefault("max_exp_avg_sq", torch.zeros_like(p))


def amsgrad_off(optimizer, params):
    optimizer.param_groups[0]["amsgrad"] = False


def add_group(optimizer, params):
    params.append(nn.Parameter(normal(7, seed=33)))
    optimizer.add_param_group({"params": params[-1:], "lr": 0.5})


def append_to_list(optimizer, params):
    params.append(nn.Parameter(normal(2, 2, seed=34)))
    optimizer.param_groups[0]["params"].append(params[-1])


def remove_from_list(optimizer, params):
    del params[1]
    del optimizer.state[optimizer.param_groups[0]["params"].pop()]


def reverse_list(optimizer, params):
    optimizer.param_groups[0]["params"].reverse()


def move_to_next_group(optimizer, params):
    """The last of one group becomes the first of the next: in the order of all, nothing has moved."""
    optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())


def swap_groups(optimizer, params):
    optimizer.param_groups.reverse()


def new_object_same_memory(optimizer, params):
    """Another Parameter of the same memory: it has no state yet."""
    old = params[0]
    place = next(i for i, p in enumerate(optimizer.param_groups[0]["params"]) if p is old)
    params[0] = nn.Parameter(old.data)
    optimizer.param_groups[0]["params"][place] = params[0]


GROUP_EVENTS = [
    set_everything, lr_becomes_a_tensor, lr_is_zero, amsgrad_on, amsgrad_off, add_group, append_to_list,
    remove_from_list, reverse_list, move_to_next_group, swap_groups, new_object_same_memory,
]  # fmt: skip


@pytest.mark.parametrize("event", GROUP_EVENTS)
def test_groups_changed(event):
    pair = Pair(amsgrad=event is amsgrad_off)
    pair.go(2)
    pair.both(event)
    pair.go(2)


def test_a_tensor_lr_written_in_place():
    pair = Pair()
    pair.both(lr_becomes_a_tensor)
    pair.go(2)
    pair.both(lambda optimizer, _: [group["lr"].mul_(3) for group in optimizer.param_groups])
    pair.go(2)


# All of them in any order


def no_gradient_of_the_second(optimizer, params):
    params[1].grad = None


def replace_one_parameters_data(optimizer, params):
    params[0].data = params[0].data + 0.5


EVENTS = [
    replace_dicts, pop_one, clear, move_data, write_in_place, set_everything, lr_becomes_a_tensor, lr_is_zero,
    add_group, append_to_list, reverse_list, replace_one_parameters_data,
]  # fmt: skip
ACTS = st.tuples(
    st.sampled_from(range(len(EVENTS))),
    st.sampled_from(range(len(LAYOUTS))),
    st.sampled_from([(), (0,), (1, 2)]),
)


@settings(
    max_examples=5 if _triton.INTERPRETING else 150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)  # fmt: skip
@given(acts=st.lists(ACTS, min_size=2, max_size=5))
def test_any_sequence_of_events(acts):
    pair = Pair()
    pair.go()
    for event, layout, missing in acts:
        function = EVENTS[event]
        everyone = {p for group in pair.ours.param_groups for p in group["params"]}
        stepped = all(pair.ours.state.get(p) for p in everyone)
        if function in (pop_one, move_data, write_in_place) and not stepped:
            continue
        pair.both(function)
        pair.set_grads(LAYOUTS[layout])
        for i in missing:
            pair.params[i].grad = pair.twins[i].grad = None
        pair.step()


def test_several_thousand_tiny_tensors():
    count = 60 if _triton.INTERPRETING else 4000  # the interpreter takes 30 ms for each
    dtypes = (F32, BF16, F16)
    params = [nn.Parameter(normal(1 + i % 5, seed=i).to(dtypes[i % 3])) for i in range(count)]
    before = [p.detach().float().clone() for p in params]
    optimizer = grass.AdamW(params, **HYPER)
    for _ in range(2):
        for i, p in enumerate(params):
            p.grad = normal(*p.shape, seed=count + i).to(p.dtype)
        optimizer.step()
    norms = torch.stack([torch.linalg.vector_norm(p.grad.float()) for p in params])
    torch.testing.assert_close(optimizer.layer_grad_norms, norms, rtol=1e-6, atol=0)
    twins = [nn.Parameter(p) for p in before]
    reference = torch.optim.AdamW(twins, **HYPER, foreach=False)
    for _ in range(2):
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.float()
        reference.step()
        for p, q in zip(params, twins, strict=True):
            q.data = q.data.to(p.dtype).float()
    for p, q in zip(params, twins, strict=True):
        units = torch.finfo(p.dtype).eps
        torch.testing.assert_close(
            p.detach().float(), q.detach(), rtol=1.01 * units + 2e-6, atol=units * 1e-2
        )


@pytest.mark.parametrize("option", ["stochastic_rounding", "master_weights", "max_grad_norm"])
def test_a_long_lived_plan_is_a_fresh_call(option):
    """Steps of one optimizer against the functional form, which arranges every call anew: equal bits."""
    limit = 0.5
    params = [nn.Parameter(normal(*s, seed=i).to(BF16)) for i, s in enumerate(SHAPES)]
    optimizer = grass.AdamW(params, **HYPER, **{option: limit if option == "max_grad_norm" else True})
    own = [p.detach().clone() for p in params]
    moments = [[torch.zeros(p.shape) for p in own] for _ in MOMENTS]
    steps = [torch.tensor(0.0) for _ in own]
    options: dict = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    if option == "master_weights":
        options["remainders"] = [torch.zeros(p.shape, dtype=torch.int16) for p in own]
    if option == "stochastic_rounding":
        options["rounding_seeds"] = range(len(own))
    for step in range(4):
        grads = [normal(*p.shape, seed=100 * step + i).to(BF16) for i, p in enumerate(own)]
        for p, g in zip(params, grads, strict=True):
            p.grad = misaligned(g) if step % 2 else g.clone()
        optimizer.param_groups[0]["lr"] = lr = 0.01 * (step + 1)
        optimizer.step()
        if option == "max_grad_norm":
            norms = grass_kernels.layer_sq_norms(grads, list(range(len(grads))), len(grads))
            coefficient, skip = grass_kernels.reference.clip_coefficient(norms, limit)
            assert not skip
            options["clip_coef"] = coefficient.float()
        grass_kernels.masked_adamw_(own, grads, *moments, steps, lr=lr, **options)
        for i, p in enumerate(params):
            assert torch.equal(p.detach(), own[i]), (step, i)
            assert torch.equal(optimizer.state[p]["exp_avg"], moments[0][i]), (step, i)
            assert torch.equal(optimizer.state[p]["exp_avg_sq"], moments[1][i]), (step, i)


# What autograd is told


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"amsgrad": True}, {"master_weights": True}])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_versions_advance_with_every_step(dtype, options):
    params = [nn.Parameter(normal(*s, seed=i).to(dtype)) for i, s in enumerate(SHAPES)]
    optimizer = grass.AdamW(params, **HYPER, **options)
    by_hand = None
    for step in range(4):
        for p in params:
            p.grad = torch.ones_like(p)
        written = [*params, *(t for state in optimizer.state.values() for t in state.values())]
        before = [t._version for t in written]
        grads = [p.grad._version for p in params]
        optimizer.step()
        assert all(t._version > version for t, version in zip(written, before, strict=True)), step
        assert [p.grad._version for p in params] == grads
        if step == 1:  # tensors that are not of the optimizer's making
            by_hand = optimizer.state[params[0]]
            by_hand["exp_avg"] = by_hand["exp_avg"].clone()
        if step == 2:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("after", [0, 2], ids=["the first step", "a later step"])
def test_backward_through_what_a_step_has_changed_raises(after):
    pair = Pair()
    pair.go(after)
    loss = (pair.params[0] ** 2).sum()
    pair.go()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    x = torch.ones(4, 4, requires_grad=True)
    through_a_moment = (x * pair.ours.state[pair.params[0]]["exp_avg"]).sum()
    pair.go()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        through_a_moment.backward()


# What is compiled


def specialisation(kernel, arguments: dict) -> tuple:
    """What a kernel is compiled for, as its compiler's rules are: of integers whether they are 1 or a multiple of 16
    (unless excluded) and whether 32 bits hold them; of pointers their type and whether 16 bytes divide them."""
    excluded = {p.name for p in kernel.params if p.do_not_specialize}
    constants = {p.name for p in kernel.params if p.is_constexpr}
    assert set(arguments) == set(inspect.signature(kernel.fn).parameters)
    key: list = [kernel.__name__]
    for name, value in arguments.items():
        if name in constants or value is None:
            key.append((name, str(value)))
        elif isinstance(value, Tensor):
            key.append((name, value.dtype, value.data_ptr() % 16 == 0))
        else:
            assert type(value) is int, f"{name} is {value!r}"
            wide = not -(1 << 31) <= value < 1 << 31
            key.append((name, wide) if name in excluded else (name, wide, value == 1, value % 16 == 0))
    return tuple(key)


@pytest.mark.skipif(not _triton.INSTALLED, reason="needs Triton's decorators")
@pytest.mark.skipif(_triton.INTERPRETING, reason="an interpreted kernel does not say what it excludes")
@pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 1.0}, {"master_weights": True}, {"stochastic_rounding": True}, {"amsgrad": True}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_nothing_is_compiled_after_the_first_step(options, monkeypatch):
    """A thousand steps in which numbers, addresses and counts change: no kernel sees anything new to it."""
    seen: set[tuple] = set()
    names: list[str] = []

    def launch(kernel, programs, device, threads=None, max_registers=None, **arguments):
        names.append(kernel.__name__)
        seen.add((specialisation(kernel, arguments), threads, max_registers))

    monkeypatch.setattr(_triton, "launch", launch)
    for module in (grass_kernels, grass_kernels.adamw, grass_kernels.sq_norm):
        monkeypatch.setattr(module, "runs_triton", lambda _: True)
    dtypes = (F32, BF16, F32, BF16)
    params = [nn.Parameter(normal(4 + i, seed=i).to(dtype)) for i, dtype in enumerate(dtypes)]
    optimizer = grass.AdamW([{"params": params[:2]}, {"params": params[2:]}], **options)
    generator = torch.Generator().manual_seed(0)
    first = 0
    for step in range(1000):
        draw = torch.randint(0, 1 << 30, (8,), generator=generator).tolist()
        for i, (p, d) in enumerate(zip(params, draw, strict=False)):
            shift = d % 5 if step else 0
            p.grad = torch.zeros(shift + p.numel(), dtype=p.dtype)[shift:]
            optimizer.state[p].get("step", torch.tensor(0.0)).fill_(d % 100_000)
            if step and i and d % 7 == 0:
                p.grad = None  # fewer tensors, chunks and layers with chunks
        one, other = optimizer.param_groups
        one["lr"] = (0.0, 1.0, 1e-3, 16, draw[4] / 1e9)[step % 5]
        other["lr"] = torch.tensor(draw[5] / 1e9, dtype=torch.float64 if step % 2 else F32)
        one["betas"] = (0.0, 0.0) if step % 11 == 0 else (draw[6] / 2e9, 0.999)
        other.update(eps=draw[7] / 1e12, weight_decay=step % 3, maximize=step % 2 == 0)
        optimizer.step()
        if step == 0:
            first = len(seen)
            assert {"_prologue_kernel", "_masked_adamw_kernel"} <= set(names)
    assert len(names) > 3000
    assert len(seen) == first, "compiled again:\n" + "\n".join(sorted(map(str, seen)))
