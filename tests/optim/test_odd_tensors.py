"""Tensors that no kernel can read as they stand: negative views, without memory, of other dtypes, made on demand.

Would catch: one odd gradient that changes where the others are read; address 0 handed to a kernel; an error that comes
when some parameters have been updated; an error that does not name the tensor.

Runs in both passes: with ``TRITON_INTERPRET=1`` steps go by plans, without it by the kernels' function.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

import grass
from grass_kernels import KernelArgumentError


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair() -> list[nn.Parameter]:
    params = [nn.Parameter(normal(5, seed=0)), nn.Parameter(normal(3, 4, seed=1))]
    for seed, p in enumerate(params):
        p.grad = normal(*p.shape, seed=10 + seed)
    return params


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("odd", [[0], [1], [2], [0, 1, 2, 3]])
def test_a_negative_gradient_beside_others(odd: list[int], clips: bool) -> None:
    """In the steps that are odd the second parameter's is one; the first is updated as ever."""
    ours, theirs = pair(), pair()
    optimizer = grass.AdamW(ours, lr=0.1, **({"max_grad_norm": 0.5} if clips else {}))
    reference = torch.optim.AdamW(theirs, lr=0.1, foreach=False)
    kept = []
    for step in range(4):
        for params in (ours, theirs):
            for seed, p in enumerate(params):
                p.grad = normal(*p.shape, seed=20 + 2 * step + seed)
                kept.append(p.grad)
        if step in odd:
            ours[1].grad = torch._neg_view(-ours[1].grad)
        optimizer.step()
        if clips:
            nn.utils.clip_grad_norm_(theirs, 0.5, foreach=False)
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


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
def test_what_has_no_memory_is_refused(what: str, first: bool) -> None:
    params = pair()[:1]
    optimizer = grass.AdamW(params, lr=0.1)
    if not first or "moments" in what:
        optimizer.step()
    if first and "moments" in what:
        optimizer = copy.deepcopy(optimizer)
        params = optimizer.param_groups[0]["params"]
        params[0].grad = normal(5, seed=10)
    q = nn.Parameter(normal(3, 4, seed=1))
    q.grad = normal(3, 4, seed=11)
    if first:
        optimizer.add_param_group({"params": [q]})
    before = q.detach().clone()
    NOWHERE[what](params[0], optimizer.state.get(params[0]))
    with pytest.raises(KernelArgumentError, match=r"parameter 0, a .* has no memory"):
        optimizer.step()
    assert torch.equal(q, before)
    assert q not in optimizer.state or float(optimizer.state[q]["step"]) == 0


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_fake_tensors_are_stepped_on() -> None:
    """As planners do: nothing is computed, and no address is taken."""
    with torch._subclasses.FakeTensorMode():
        params = [nn.Parameter(torch.zeros(4))]
        optimizer = grass.AdamW(params, lr=0.1)
        for _ in range(2):
            params[0].grad = torch.zeros(4)
            optimizer.step()
        assert optimizer.state[params[0]]["exp_avg"].shape == (4,)


def test_a_dtype_outside_the_table_is_refused_before_anything_changes() -> None:
    params = [nn.Parameter(normal(4, seed=0)), nn.Parameter(normal(4, seed=1).to(torch.float8_e4m3fn))]
    optimizer = grass.AdamW(params, lr=0.1)
    before = params[0].detach().clone()
    for p in params:
        p.grad = torch.ones_like(p, dtype=torch.float32).to(p.dtype)
    with pytest.raises(
        KernelArgumentError, match=r"parameter 1, .* torch\.float8_e4m3fn, which AdamW does not update"
    ):
        optimizer.step()
    assert torch.equal(params[0], before)
    assert not optimizer.state[params[0]]


def test_a_complex_gradient_that_is_a_conjugate_view() -> None:
    p, q = (nn.Parameter(torch.complex(normal(4, seed=0), normal(4, seed=1))) for _ in range(2))
    ours, theirs = grass.AdamW([p], lr=0.1), torch.optim.AdamW([q], lr=0.1, foreach=False)
    gradient = torch.complex(normal(4, seed=2), normal(4, seed=3))
    p.grad, q.grad = gradient.conj(), gradient.conj().resolve_conj()
    ours.step()
    theirs.step()
    torch.testing.assert_close(p, q)


def test_a_bad_setting_of_what_torch_updates_changes_nothing() -> None:
    params = [nn.Parameter(normal(4, seed=0)), nn.Parameter(normal(4, seed=1).double())]
    optimizer = grass.AdamW([{"params": [p]} for p in params], lr=0.1)
    before = params[0].detach().clone()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.param_groups[1]["weight_decay"] = "much"
    with pytest.raises(KernelArgumentError, match="weight_decay"):
        optimizer.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("betas", [None, (0.9,), (0.9, 0.99, 0.999)])
@pytest.mark.parametrize("first", [True, False])
def test_betas_that_are_not_two_are_refused(betas, first) -> None:
    params = pair()
    optimizer = grass.AdamW(params, lr=0.1)
    if not first:
        optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["betas"] = betas
    with pytest.raises(KernelArgumentError, match=r"betas are .*: give two numbers"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


class Twos(nn.Parameter):
    """Its gradient is made when somebody asks."""

    @property
    def grad(self) -> Tensor:
        return torch.full((3,), 2.0)


def test_a_gradient_made_on_demand() -> None:
    p, q = Twos(torch.ones(3)), nn.Parameter(torch.ones(3))
    ours, theirs = grass.AdamW([p], lr=0.1), torch.optim.AdamW([q], lr=0.1)
    q.grad = torch.full((3,), 2.0)
    for _ in range(5):
        ours.step()
        theirs.step()
    torch.testing.assert_close(p.data, q.data)


def test_parameters_made_in_inference_mode() -> None:
    """They have no version counter to advance."""
    with torch.inference_mode():
        p = nn.Parameter(torch.ones(4), requires_grad=False)
        p.grad = torch.ones(4)
        optimizer = grass.AdamW([p], lr=0.1)
        for _ in range(2):
            optimizer.step()
    q = nn.Parameter(torch.ones(4))
    q.grad, theirs = torch.ones(4), torch.optim.AdamW([q], lr=0.1)
    for _ in range(2):
        theirs.step()
    torch.testing.assert_close(p, q.detach())
