"""A plan is built once and then compared: what happens to parameters, gradients and groups between two steps.

Would catch: a plan that goes on with an address, a stride, a dtype, a group or a set of gradients that is no longer so;
memory read or written after it was freed; a gradient walked in another order than its strides say; one odd gradient
that changes where the others are read; hyperparameters or counters that belong to another parameter; anything changed
by a step that was refused. What happens to states: test_replaced_states.py.

Runs in both passes: with ``TRITON_INTERPRET=1`` steps take the kernels, without it torch.
"""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import grass
import grass_kernels
from grass.errors import GrassError
from grass.optim import step_plan
from grass_kernels import KernelArgumentError, _triton
from tests.support.pair import BF16, F16, F32, MOMENTS, Pair, misaligned, normal

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


def in_fp32(g: Tensor) -> Tensor:
    return g.float()


LAYOUTS = [torch.clone, in_another_order, channels_last, with_gaps, expanded, misaligned]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients_of_another_layout(dtype):
    """In the middle, and back."""
    pair = Pair(dtype)
    pair.go(2)
    for make in LAYOUTS[1:]:
        pair.go(2, make)
    pair.go()


@pytest.mark.parametrize("make", LAYOUTS[1:])
def test_first_gradients_of_another_layout(make):
    Pair(BF16 if make is misaligned else F32).go(1, make)


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


@pytest.mark.skipif(
    not hasattr(Tensor, "grad_dtype"), reason="torch before 2.10: a gradient has its tensor's dtype"
)
@pytest.mark.parametrize("options", [{}, {"master_weights": True}], ids=["plain", "exact"])
@pytest.mark.parametrize("first", [F32, BF16])
def test_a_gradient_of_another_dtype_where_the_last_was(first, options):
    """Behind the end of a bfloat16 one is what a float32 one would have had: it must not be read."""
    p = nn.Parameter(torch.ones(64, dtype=BF16))
    p.grad_dtype = None
    optimizer = grass.AdamW([p], lr=0.01, betas=(0.0, 0.9), **options)
    memory = torch.empty(64)
    for step, dtype in enumerate((first, BF16 if first == F32 else F32, first), start=1):
        memory.fill_(torch.nan)
        grad = memory.view(dtype)[:64]
        grad.fill_(-step)
        p.grad = None
        p.grad = grad
        optimizer.step()
        assert torch.equal(optimizer.state[p]["exp_avg"], torch.full((64,), -float(step)))
        assert optimizer.grad_norm == 8 * step


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


@pytest.mark.parametrize(("odd", "clips"), [([0], False), ([1], True), ([0, 2], True), ([0, 1, 2, 3], False)])
def test_a_negative_gradient_beside_others(odd, clips):
    """torch keeps a minus sign beside such a tensor, not in its memory. In the odd steps the second one has it."""
    pair = Pair(ours={"max_grad_norm": 0.5} if clips else {})
    kept = []
    for step in range(4):
        pair.set_grads()
        kept += [p.grad for p in pair.params]  # so that no address comes back
        if step in odd:
            pair.params[1].grad = torch._neg_view(-pair.params[1].grad)
        pair.ours.step()
        if clips:
            nn.utils.clip_grad_norm_(pair.twins, 0.5, foreach=False)
        pair.torchs.step()
        pair.compare()


class Twos(nn.Parameter):
    """Its gradient is made when somebody asks."""

    @property
    def grad(self) -> Tensor:
        return torch.full((3,), 2.0)


def test_a_gradient_made_on_demand():
    p, q = Twos(torch.ones(3)), nn.Parameter(torch.ones(3))
    ours, theirs = grass.AdamW([p], lr=0.1), torch.optim.AdamW([q], lr=0.1)
    q.grad = torch.full((3,), 2.0)
    for _ in range(5):
        ours.step()
        theirs.step()
    torch.testing.assert_close(p.data, q.data)


def test_a_complex_gradient_that_is_a_conjugate_view():
    p, q = (nn.Parameter(torch.complex(normal(4, seed=0), normal(4, seed=1))) for _ in range(2))
    ours, theirs = grass.AdamW([p], lr=0.1), torch.optim.AdamW([q], lr=0.1, foreach=False)
    gradient = torch.complex(normal(4, seed=2), normal(4, seed=3))
    p.grad, q.grad = gradient.conj(), gradient.conj().resolve_conj()
    ours.step()
    theirs.step()
    torch.testing.assert_close(p, q)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_fake_tensors_are_stepped_on():
    """As planners do: nothing is computed, and no address is taken."""
    with torch._subclasses.FakeTensorMode():
        params = [nn.Parameter(torch.zeros(4))]
        optimizer = grass.AdamW(params, lr=0.1)
        for _ in range(2):
            params[0].grad = torch.zeros(4)
            optimizer.step()
        assert optimizer.state[params[0]]["exp_avg"].shape == (4,)


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


def test_another_dtype_where_the_data_is():
    """Of the same size, at the same address."""
    pair = Pair(BF16)
    pair.go(2)
    for p, q in zip(pair.params, pair.twins, strict=True):
        p.grad = None
        p.data = p.data.fill_(0.75).view(F16)
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


# Any sequence, states included


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


def replace_one_parameters_data(optimizer, params):
    params[0].data = params[0].data + 0.5


def test_a_gradient_of_another_dtype_of_the_same_size():
    """Its bits would be read as those of the dtype before."""
    p = nn.Parameter(torch.zeros(8, dtype=BF16))
    p.grad = torch.ones_like(p)
    optimizer = grass.AdamW([p], lr=0.01)
    optimizer.step()
    before = p.detach().clone()
    p.grad, p.grad_dtype = None, None  # any dtype
    p.grad = torch.ones(8, dtype=F16)
    with pytest.raises(grass_kernels.KernelArgumentError, match="float16"):
        optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.state[p]["step"] == 1


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
    max_examples=5 if _triton.INTERPRETING else 60, deadline=None, derandomize=True, database=None,
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


def test_a_parameter_of_another_shape_in_the_same_memory_is_refused() -> None:
    """Its moments have the shape it had: torch refuses the step, and names no parameter."""
    p = nn.Parameter(torch.ones(2, 3))
    optimizer = grass.AdamW([p], lr=0.1)
    p.grad = torch.ones(2, 3)
    optimizer.step()
    before = p.detach().clone()
    p.grad = None
    p.data = p.data.view(3, 2)
    p.grad = torch.ones(3, 2)
    with pytest.raises(KernelArgumentError, match="exp_avg of parameter 0"):
        optimizer.step()
    assert torch.equal(p.detach().view(2, 3), before)


def test_a_residency_that_does_not_know_a_parameter_is_no_silent_step():
    """Its parameters would not be updated, without a word."""

    class Forgetful(step_plan.InPlace):
        def parts(self, unit, indices):
            return grass_kernels.Unit.whole(list(indices)[:-1])

    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = grass.AdamW(params)
    for p in params:
        p.grad = torch.ones(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grass.optim.adamw.InPlace", Forgetful)
        with pytest.raises(GrassError, match="does not know 1 parameters"):
            opt.step()
