"""Errors of a step, raised before anything changes; and valid types of settings.

Would catch: a setting of a later group that is refused when the first has been updated, or taken at the second try; a
parameter or a gradient that no backend can serve and that is found in the middle of a step, or raises what nobody can
catch; address 0 handed to a kernel; an error that does not name the tensor; a learning rate that torch takes and we do
not, or that is read in another precision.

Runs in both passes: with ``TRITON_INTERPRET=1`` steps take the kernels, without it torch.
"""

import copy
import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import grass
from grass_kernels import KernelArgumentError
from tests.support.pair import BF16, F16, F32, Pair, normal
from tests.support.pairwise import pairwise

needs_grad_dtype = pytest.mark.skipif(
    not hasattr(Tensor, "grad_dtype"), reason="torch before 2.10: a gradient has its tensor's dtype"
)


def content(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters, moments and counters; a state that is all zeros is as good as none."""
    members = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state.get(p, {}) for p in members]
    values = [value for state in states for value in state.values() if value.any()]
    return [t.detach().clone() for t in (*members, *values)]


def assert_refused(optimizer: grass.AdamW, match: str) -> None:
    """Also when it is tried again."""
    before = content(optimizer)
    for _ in range(2):
        with pytest.raises(KernelArgumentError, match=match):
            optimizer.step()
        torch.testing.assert_close(content(optimizer), before, rtol=0, atol=0)


# Settings

BAD = {
    "lr nan": ({"lr": math.nan}, "lr is nan"),
    "lr text": ({"lr": "fast"}, "lr is 'fast'"),
    "first beta 1": ({"betas": (1.0, 0.9)}, r"betas\[0\] is 1.0"),
    "second beta 1": ({"betas": [0.9, 1.0]}, r"betas\[1\] is 1.0"),
    "negative eps": ({"eps": -1e-8}, "eps is -1e-08"),
    "decay nan": ({"weight_decay": math.nan}, "weight_decay is nan"),
}


@pytest.mark.parametrize(("case", "clips", "steps"), pairwise(product(BAD, (False, True), (0, 2))))
def test_a_bad_setting_of_the_second_group_is_refused_before_the_first_is_updated(case, clips, steps):
    settings, match = BAD[case]
    options = {"max_grad_norm": 1.0} if clips else {}
    params = [nn.Parameter(normal(5, seed=i)) for i in range(2)]
    others = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer, reference = (
        grass.AdamW([{"params": own[:1]}, {"params": own[1:], "lr": 0.02}], lr=0.01, **options)
        for own in (params, others)
    )

    def set_grads(step: int) -> None:
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            p.grad = normal(5, seed=10 * step + i + 5)
            q.grad = p.grad.clone()

    for step in range(steps):
        set_grads(step)
        optimizer.step()
        reference.step()
    set_grads(steps)
    group = optimizer.param_groups[1]
    good = {key: group[key] for key in settings}
    group.update(settings)
    assert_refused(optimizer, match)
    group.update(good)
    optimizer.step()
    reference.step()
    torch.testing.assert_close(content(optimizer), content(reference), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "of"), [(BF16, F32), (F16, BF16), (F32, BF16), (torch.float64, F32), (torch.float64, BF16)]
)
def test_a_learning_rate_in_a_tensor_of_any_dtype(dtype, of):
    """On the CPU, as schedules of others make it; what it holds is what counts, also if it is written in place."""
    pair = Pair(of)
    rates = [torch.tensor(value, dtype=dtype) for value in (0.02, 0.01)]
    for group, rate in zip(pair.ours.param_groups, rates, strict=True):
        group["lr"] = rate
    for factor in (1.0, 1.0, 0.3):
        for group, rate in zip(pair.torchs.param_groups, rates, strict=True):
            rate.mul_(factor)
            group["lr"] = float(rate)
        pair.go()


def test_betas_in_a_list_that_is_written_in_place():
    pair = Pair()
    pair.both(lambda optimizer, _: [group.update(betas=[0.9, 0.99]) for group in optimizer.param_groups])
    pair.go(2)

    def write(optimizer, params):
        optimizer.param_groups[0]["betas"][:] = [0.4, 0.8]
        optimizer.param_groups[1]["betas"][1] = 0.7

    pair.both(write)
    pair.go(2)


@pytest.mark.parametrize(("betas", "steps"), [(None, 0), ((0.9,), 1), ((0.9, 0.99, 0.999), 1)])
def test_betas_that_are_not_two_are_refused(betas, steps):
    pair = Pair()
    pair.go(steps)
    pair.set_grads()
    pair.ours.param_groups[1]["betas"] = betas
    assert_refused(pair.ours, r"betas are .*: give two numbers")


def test_a_bad_setting_of_what_torch_updates_changes_nothing():
    params = [nn.Parameter(normal(4, seed=0)), nn.Parameter(normal(4, seed=1).double())]
    optimizer = grass.AdamW([{"params": [p]} for p in params], lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.param_groups[1]["weight_decay"] = "much"
    assert_refused(optimizer, "weight_decay")


# Parameters and gradients


def beside_another(p: nn.Parameter) -> tuple[nn.Parameter, grass.AdamW]:
    """An optimizer whose first group can be updated."""
    first = nn.Parameter(normal(5, seed=1))
    first.grad = normal(5, seed=2)
    return first, grass.AdamW([{"params": [first]}, {"params": [p]}], lr=0.01)


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float64])
def test_an_expanded_parameter_is_refused_before_the_first_group_is_updated(dtype):
    p = nn.Parameter(torch.ones(1, dtype=dtype).expand(5))
    first, optimizer = beside_another(p)
    p.grad = torch.ones(5, dtype=dtype)
    assert_refused(optimizer, r"parameter 1, of shape \(5,\).*share memory.*clone\(\)")
    p.data = p.data.clone()
    optimizer.step()
    assert optimizer.state[first]["step"] == optimizer.state[p]["step"] == 1


@needs_grad_dtype
@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "third step"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128])
def test_a_float32_gradient_of_what_torch_updates_is_refused_before_the_first_group_is_updated(dtype, steps):
    p = nn.Parameter(torch.ones(5, dtype=dtype))
    p.grad_dtype = None
    first, optimizer = beside_another(p)
    for _ in range(steps):
        p.grad = torch.ones(5, dtype=dtype)
        optimizer.step()
    memory = torch.ones(5, dtype=dtype) if p.grad is None else p.grad  # or where the last one was
    p.grad = (torch.view_as_real(memory) if dtype.is_complex else memory).flatten().view(F32)[:5]
    match = rf"gradient of parameter 1, .*is torch.float32 and the parameter {dtype}: .*convert it"
    assert_refused(optimizer, match)
    p.grad = p.grad.to(dtype)
    optimizer.step()
    assert optimizer.state[first]["step"] == optimizer.state[p]["step"] == steps + 1


@pytest.mark.parametrize("which", ["parameter", "gradient"])
def test_what_keeps_its_elements_elsewhere_is_refused(which):
    """Its address is 0, to which a kernel would write: the process ended. Of this kind are a DTensor's shards."""
    plain = nn.Parameter(torch.ones(4))
    plain.grad = torch.ones(4)
    wrapped = TwoTensor(torch.ones(4), torch.ones(4))
    p = nn.Parameter(wrapped) if which == "parameter" else nn.Parameter(torch.ones(4))
    p.grad = TwoTensor(torch.ones(4), torch.ones(4))
    optimizer = grass.AdamW([{"params": [plain]}, {"params": [p]}], lr=0.1)
    with pytest.raises(KernelArgumentError, match=f"{which}.*TwoTensor.*to_local"):
        optimizer.step()
    assert torch.equal(plain, torch.ones(4))


def free(t: Tensor) -> None:
    t.untyped_storage().resize_(0)


NOWHERE = {
    "a gradient, freed": lambda p, state: free(p.grad),
    "a gradient of zeros that are not stored": lambda p, state: setattr(
        p, "grad", torch._efficientzerotensor(p.shape)
    ),
    "a parameter, freed": lambda p, state: free(p.data),
    "its moments, freed": lambda p, state: free(state["exp_avg"]),
}


@pytest.mark.parametrize("what", NOWHERE)
@pytest.mark.parametrize("first", [True, False])
def test_what_has_no_memory_is_refused(what, first):
    """In the first step, and when there is a plan; beside a parameter that could be updated."""
    p, q = (nn.Parameter(normal(5, seed=i)) for i in range(2))
    p.grad, q.grad = normal(5, seed=2), normal(5, seed=3)
    optimizer = grass.AdamW([p, q] if not first else [p], lr=0.1)
    if not first or "moments" in what:
        optimizer.step()
    if first:
        optimizer = copy.deepcopy(optimizer)
        (p,) = optimizer.param_groups[0]["params"]
        p.grad = normal(5, seed=2)
        optimizer.add_param_group({"params": [q]})
    before = q.detach().clone()
    count = float(optimizer.state[q]["step"]) if q in optimizer.state else 0
    NOWHERE[what](p, optimizer.state.get(p))
    with pytest.raises(KernelArgumentError, match=r"parameter 0, a .* has no memory"):
        optimizer.step()
    assert torch.equal(q, before)
    assert q not in optimizer.state or float(optimizer.state[q]["step"]) == count


def test_a_dtype_outside_the_table_is_refused_before_anything_changes():
    p = nn.Parameter(normal(4, seed=1).to(torch.float8_e4m3fn))
    first, optimizer = beside_another(p)
    p.grad = torch.ones(4).to(p.dtype)
    before = first.detach().clone()
    with pytest.raises(
        KernelArgumentError, match=r"parameter 1, .* torch\.float8_e4m3fn, which AdamW does not update"
    ):
        optimizer.step()
    assert torch.equal(first, before)
    assert not optimizer.state[first]
