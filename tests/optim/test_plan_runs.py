"""Runs of a plan, step after step.

Would catch: a long-lived plan that differs from a fresh call, a write that autograd does not see, a kernel that is
compiled again because a number, an address or a count has changed.

Runs in both passes: with ``TRITON_INTERPRET=1`` steps take the kernels, without it torch.
"""

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn

import grass
import grass_kernels
import grass_kernels.adamw
import grass_kernels.sq_norm
from grass_kernels import _triton
from tests.support.pair import (
    BF16,
    F16,
    F32,
    HYPER,
    MOMENTS,
    SHAPES,
    Pair,
    misaligned,
    normal,
)


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


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(F32, {}), (BF16, {"max_grad_norm": 1.0}), (F32, {"amsgrad": True}), (BF16, {"master_weights": True})],
)
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
    """The specialization of a kernel, by the rules of its compiler: of integers whether they are 1 or a multiple of 16
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
    """Many steps in which numbers, addresses and counts change: no kernel sees anything new to it."""
    seen: set[tuple] = set()
    names: list[str] = []

    def launch(kernel, programs, device, threads=None, max_registers=None, **arguments):
        names.append(kernel.__name__)
        seen.add((specialisation(kernel, arguments), threads, max_registers))

    monkeypatch.setattr(_triton, "launch", launch)
    for module in (grass_kernels, _triton, grass_kernels.sq_norm):
        monkeypatch.setattr(module, "runs_triton", lambda _: True)
    dtypes = (F32, BF16, F32, BF16)
    params = [nn.Parameter(normal(4 + i, seed=i).to(dtype)) for i, dtype in enumerate(dtypes)]
    optimizer = grass.AdamW([{"params": params[:2]}, {"params": params[2:]}], **options)
    generator = torch.Generator().manual_seed(0)
    first = 0
    for step in range(200):
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
    assert len(names) > 600
    assert len(seen) == first, "compiled again:\n" + "\n".join(sorted(map(str, seen)))
