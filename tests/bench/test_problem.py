"""Failures these tests catch: a wrong update that the error column does not see, be it at the end of a large
tensor, in the moments, in one of many tensors, or not finite; an error where there is none; a reference that is
not AdamW; a case of zeros that is not.
"""

import math

import pytest
import torch
from torch import nn

from bench.kernels.cases import BASE, BF16, F32, Case, Mixture
from bench.kernels.problem import (
    BETAS,
    COMPARED,
    EPS,
    LR,
    STEPS_BEFORE,
    WEIGHT_DECAY,
    Comparison,
    Problem,
    adamw,
    ulps,
)
from bench.kernels.variants import own_variants

CPU = torch.device("cpu")


def compared(case, step, state=F32):
    problem = Problem(case, CPU)
    comparison = Comparison(problem, case.mixture.grad, state)
    step(problem, comparison)
    return comparison.worst_ulps()


def exact_step(problem, comparison):
    """The float64 update itself, rounded to what is stored."""
    coefficient = comparison._clip_coef
    exp_avgs, exp_avg_sqs = problem.moments(F32)
    for i in problem.active_tensors:
        stored = [problem.params[i], exp_avgs[i], exp_avg_sqs[i]]
        grad = problem.grads(problem.case.mixture.grad)[i].double() * coefficient
        for tensor, exact in zip(stored, adamw([t.double() for t in stored], grad), strict=True):
            tensor.copy_(exact)


@pytest.mark.parametrize("steps_before", [0, STEPS_BEFORE])
def test_the_reference_is_adamw(steps_before):
    generator = torch.Generator().manual_seed(0)
    p, g, m = (torch.randn(50, dtype=torch.float64, generator=generator) for _ in range(3))
    v = torch.rand(50, dtype=torch.float64, generator=generator)
    if steps_before == 0:
        m, v = torch.zeros_like(m), torch.zeros_like(v)
    param = nn.Parameter(p.clone())
    param.grad = g.clone()
    optimizer = torch.optim.AdamW([param], lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    optimizer.state[param] = {
        "step": torch.tensor(float(steps_before)),
        "exp_avg": m.clone(),
        "exp_avg_sq": v.clone(),
    }
    optimizer.step()
    results = adamw([p, m, v] if steps_before else [p], g)
    expected = [param.detach(), optimizer.state[param]["exp_avg"], optimizer.state[param]["exp_avg_sq"]]
    for result, other in zip(results, expected, strict=False):
        torch.testing.assert_close(result, other, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
def test_ulps(dtype):
    one = torch.tensor([1.0], dtype=dtype)
    next_to_one = one + torch.finfo(dtype).eps
    assert ulps(next_to_one, one.double(), one.double()) == 1
    assert ulps(one, one.double(), one.double()) == 0
    assert ulps(next_to_one, one.double(), 4 * one.double()) == 1 / 4
    zero = torch.zeros(1, dtype=dtype)
    smallest = zero + torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    assert ulps(smallest, zero.double(), zero.double()) == 1
    assert ulps(torch.empty(0, dtype=dtype), torch.empty(0).double(), torch.empty(0).double()) == 0


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("share", [1.0, 1 / 16])
def test_the_best_that_can_be_stored_is_half_an_ulp(share, clip):
    error = compared(Case(40_000, 40, active_share=share, clip=clip), exact_step)
    assert 0.3 < error <= 0.5


def test_nothing_done_is_seen():
    assert compared(Case(4000, 20, Mixture(F32, F32, F32)), lambda problem, comparison: None) > 100


@pytest.mark.parametrize("what", ["params", "exp_avgs", "exp_avg_sqs"])
@pytest.mark.parametrize("place", [(0, 0), (-1, 0), (-1, -1)])
def test_one_wrong_element_is_seen(what, place):
    def step(problem, comparison):
        exact_step(problem, comparison)
        exp_avgs, exp_avg_sqs = problem.moments(F32)
        tensors = {"params": problem.params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}[what]
        tensors[place[0]][place[1]] += 1.0

    assert compared(Case(40_000, 40, BASE), step) > 10


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_has_no_number(value):
    def step(problem, comparison):
        exact_step(problem, comparison)
        problem.params[3][1] = value

    assert math.isnan(compared(Case(300, 4, BASE), step))


def test_large_tensors_are_compared_at_both_ends():
    case = Case(2 * COMPARED + 10, 1, Mixture(BF16, BF16, BF16))
    problem = Problem(case, CPU)
    comparison = Comparison(problem, BF16, None)
    half = COMPARED // 2
    assert list(comparison._places()) == [
        (0, slice(0, half)),
        (0, slice(2 * COMPARED + 10 - half, 2 * COMPARED + 10)),
    ]


def test_fill_restores_what_steps_have_changed():
    problem = Problem(Case(2000, 20, BASE), CPU)
    problem.grads(BF16)
    problem.moments(F32)
    problem.fill()
    tensors = [*problem.params, *problem.grads(BF16), *problem.moments(F32)[0], *problem.moments(F32)[1]]
    before = [t.clone() for t in tensors]
    for t in tensors:
        t.zero_()
    problem.fill()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert all(bool((a != 0).any()) for a in before)


@pytest.mark.parametrize("variant", own_variants(CPU), ids=lambda variant: variant.name)
@pytest.mark.parametrize("clip", [False, True])
def test_zeros_are_compared_as_all_else(variant, clip):
    """Catches gradients or moments that are not 0, an error of 0 by 0, and a wrong moment that is taken for 0."""
    problem = Problem(Case(2000, 20, Mixture(F32, F32, F32), clip=clip, zeros=True), CPU)
    built = variant.build(problem)
    errors = []
    for wrong in (0.0, 1e-30):
        comparison = Comparison(problem, built.grad_dtype, built.shared_dtype)
        zeros = [
            *problem.grads(built.grad_dtype),
            *(t for of in problem.moments(built.shared_dtype) for t in of),
        ]
        assert not any(bool(t.any()) for t in zeros)
        assert all(bool((p != 0).all()) for p in problem.params)
        before = [p.clone() for p in problem.params]
        built.step()
        assert not any(bool(t.any()) for t in zeros)
        assert not all(torch.equal(a, b) for a, b in zip(before, problem.params, strict=True))  # they decay
        problem.moments(built.shared_dtype)[1][0][0] = wrong
        errors.append(comparison.worst_ulps())
    assert 0 < errors[0] <= 1
    assert errors[1] > 100
