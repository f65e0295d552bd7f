"""Plans: the same step again and again, on what moves between steps.

Would catch: a group updated with another's hyperparameters; gradients read where they were; a learning rate on
the device not read, read in the wrong precision, or only once; clipping by part of the norm, by a
group's limit that is another's, or of the norms themselves; a step skipped for a norm that is finite, or
not for one that is not; a plan's norms that differ from a call's.
"""

import math

import pytest
import torch

from grass_kernels import (
    AdamWPlan,
    Hyperparameters,
    TensorLists,
    _triton,
    layer_sq_norms,
    masked_adamw_,
    reference,
)
from grass_kernels.inputs import split_lr
from grass_kernels.table import CHUNK
from tests.support.buffers import Buffers, interpreter_only, same_bits
from tests.support.kernel_problem import Problem, assert_same
from tests.support.oracle import BF16, F32

pytestmark = interpreter_only
CPU = torch.device("cpu")
GROUPS = [
    {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1},
    {"lr": 1e-1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.0, "maximize": True},
]
SIZES = [5, CHUNK + 3, 300, 0, 2048]
GROUP_OF = [0, 1, 1, 0, 0]
LAYERS = [0, 2, 1, 0, 2]


def hyperparameters(group, lr=None, max_grad_norm=math.inf):
    rest = {"maximize": False, **{key: value for key, value in group.items() if key != "lr"}}
    return Hyperparameters(*(lr or split_lr(group["lr"], CPU)), **rest, max_grad_norm=max_grad_norm)


def lists_of(problem):
    nothing = [None] * len(problem.params)
    return TensorLists(
        params=problem.params, grads=problem.grads, exp_avgs=problem.exp_avgs, exp_avg_sqs=problem.exp_avg_sqs,
        max_exp_avg_sqs=problem.max_exp_avg_sqs or nothing, remainders=nothing, steps=problem.steps,
        layers=LAYERS, seeds=nothing,
    )  # fmt: skip


def plan_of(problem, groups=GROUP_OF):
    return AdamWPlan(lists_of(problem), 3, CPU, groups, len(GROUPS))


def update(plan, sq_norms=None, *, grad_scale=None, **scales):
    """One step after `upload`."""
    plan.begin(norms=sq_norms is not None, grad_scale=grad_scale, **scales)
    plan.run()
    plan.finish(sq_norms, grad_scale)


def expected_update(problem, groups=GROUPS, **options):
    """The same by one call a group."""
    for index, group in enumerate(groups):
        chosen = [i for i, of in enumerate(GROUP_OF) if of == index]
        columns = (problem.params, problem.grads, problem.exp_avgs, problem.exp_avg_sqs, problem.steps)
        masked_adamw_(*([column[i] for i in chosen] for column in columns), **{**group, **options})


def move_gradients(problem, seed):
    generator = torch.Generator().manual_seed(seed)
    problem.grads = [torch.randn(g.shape, generator=generator).to(g.dtype) for g in problem.grads]


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, F32)])
def test_groups_share_a_pass_and_gradients_may_move(buffers: Buffers, dtypes):
    ours, theirs = Problem(buffers, dtypes, sizes=SIZES), Problem(buffers, dtypes, sizes=SIZES)
    plan, norms = plan_of(ours), torch.full((3,), torch.nan)
    for step in range(4):
        for problem in (ours, theirs):
            move_gradients(problem, step)
        groups = [{**group, "lr": group["lr"] * 0.5**step} for group in GROUPS]
        plan.upload(lists_of(ours), [hyperparameters(group) for group in groups])
        update(plan, norms)
        expected_update(theirs, groups)
        assert_same(ours, theirs)
        assert same_bits(norms, layer_sq_norms(ours.grads, LAYERS, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learning_rate_is_read_where_it_is(buffers: Buffers, dtype):
    """CPU memory stands for a device's. 0.1 in double is not 0.1 in float."""
    ours, theirs = Problem(buffers, sizes=SIZES), Problem(buffers, sizes=SIZES)
    plan, rates = plan_of(ours), torch.tensor([0.0, 0.0], dtype=dtype)
    by_address = [
        hyperparameters(group, lr=(0.0, rates[i : i + 1].data_ptr(), dtype == torch.float64))
        for i, group in enumerate(GROUPS)
    ]
    plan.upload(lists_of(ours), by_address)
    for lr in (0.1, 0.0, 0.3):
        rates[0], rates[1] = lr, lr / 3
        update(plan)  # nothing is uploaded again
        expected_update(theirs, [{**group, "lr": rates[i].item()} for i, group in enumerate(GROUPS)])
        assert_same(ours, theirs)


@pytest.mark.parametrize("limit", [1e-3, 1e9])
@pytest.mark.parametrize("grad_scale", [None, torch.tensor(8.0), torch.tensor(3.0)])
def test_clipping_is_by_the_norm_of_all(buffers: Buffers, limit, grad_scale):
    ours, theirs = Problem(buffers, sizes=SIZES), Problem(buffers, sizes=SIZES)
    plan, norms = plan_of(ours), torch.full((3,), torch.nan)
    plan.upload(lists_of(ours), [hyperparameters(group, max_grad_norm=limit) for group in GROUPS])
    plan.measure(norms, grad_scale)
    measured = norms.clone()
    update(plan, clip_by=norms, grad_scale=grad_scale)
    assert same_bits(norms, measured)
    assert same_bits(norms, layer_sq_norms(ours.grads, LAYERS, 3, grad_scale=grad_scale))
    scale = 1.0 if grad_scale is None else grad_scale.item()
    total = math.sqrt(sum((g.double() / scale).square().sum().item() for g in ours.grads))
    coefficient, skip = reference.clip_coefficient(norms, limit)
    assert coefficient.item() == pytest.approx(min(1.0, limit / (total + 1e-6)), rel=1e-5)
    assert not skip
    # What it did is what the gradients multiplied beforehand would have done, but for their rounding.
    for g in theirs.grads:
        g.mul_(coefficient / scale)
    expected_update(theirs)
    for one, other in zip(ours.states(), theirs.states(), strict=True):
        torch.testing.assert_close(one.param, other.param, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(one.exp_avg, other.exp_avg, rtol=1e-6, atol=1e-7)
        assert one.step == other.step


@pytest.mark.parametrize("clip", [False, True])
def test_a_step_is_a_handful_of_launches(buffers: Buffers, monkeypatch, clip):
    """Whatever the number of tensors and groups: one pass a combination of dtypes."""
    kernels, launch = [], _triton.launch

    def counted(kernel, *args, **kwargs):
        kernels.append(kernel.__name__)
        launch(kernel, *args, **kwargs)

    monkeypatch.setattr(_triton, "launch", counted)
    problem, norms = Problem(buffers, sizes=SIZES), torch.empty(3)
    plan = plan_of(problem)
    plan.upload(lists_of(problem), [hyperparameters(group, max_grad_norm=1.0) for group in GROUPS])
    if clip:
        plan.measure(norms)
        update(plan, clip_by=norms)
    else:
        update(plan, norms)
    norm_pass, main_pass = ["_layer_sq_norms_kernel"], ["_prologue_kernel", "_masked_adamw_kernel"]
    finalisation = ["_sum_layers_kernel"]
    assert kernels == (norm_pass + finalisation + main_pass if clip else main_pass + finalisation)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_norm_that_is_not_finite_skips_the_step(buffers: Buffers, value):
    problem, never = Problem(buffers, sizes=SIZES), Problem(buffers, sizes=SIZES)
    plan, norms = plan_of(problem), torch.full((3,), torch.nan)
    before, good = problem.states(), problem.grads[2].clone()
    problem.grads[2][17] = value
    groups = [hyperparameters(group, max_grad_norm=1.0) for group in GROUPS]
    for _ in range(2):
        plan.upload(lists_of(problem), groups)
        plan.measure(norms)
        update(plan, clip_by=norms)
        assert not any(problem.changed(before))
        assert not norms[1].isfinite()
    problem.grads[2].copy_(good)
    for each in (problem, never):
        fresh = plan if each is problem else plan_of(never)
        fresh.upload(lists_of(each), groups)
        fresh.measure(norms)
        update(fresh, clip_by=norms)
    assert_same(problem, never)


def test_more_layers_than_are_added_up_at_a_time(buffers: Buffers, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(reference, "NORM_BLOCK", 8)
    for count in (1, 8, 23):
        params, grads, steps = torch.zeros(count, 2), torch.randn(count, 2), torch.zeros(count)
        moments = torch.zeros(2, count, 2)
        lists = TensorLists(
            list(params), list(grads), list(moments[0]), list(moments[1]), [None] * count, [None] * count,
            list(steps), list(range(count)), [None] * count,
        )  # fmt: skip
        plan, norms = AdamWPlan(lists, count, CPU), torch.full((count,), torch.nan)
        plan.upload(lists, [hyperparameters(GROUPS[0], max_grad_norm=0.5)])
        plan.measure(norms)
        update(plan, clip_by=norms)
        coefficient = reference.clip_coefficient(norms, 0.5)[0].item()
        assert coefficient == pytest.approx(0.5 / (grads.double().norm().item() + 1e-6), rel=1e-6)
        torch.testing.assert_close(moments[0], grads * (0.1 * coefficient), rtol=1e-6, atol=0)
        assert steps.eq(1).all()
        buffers.check()
