"""Masked AdamW: what it computes. Triton's kernels in the interpreter, torch's path without it.

Would catch: an element beyond a tensor's end updated; eps under the root or before the correction; a bias
correction of the wrong step, the wrong power or in fp32; `1 - beta` that lost its digits; decay after the
update; a clip coefficient or a loss scale that reaches the norms, or is applied twice; bf16 truncated;
rounding in between; NaN swallowed; a step of a low-precision parameter computed in its own precision.
"""

import pytest
import torch
from torch import Tensor

from grass_kernels import layer_sq_norms, masked_adamw_, masked_adamw_bytes, reference
from grass_kernels.table import BLOCK, CHUNK
from tests.support.buffers import Buffers, interpreter_only, same_bits
from tests.support.kernel_problem import HYPER, Problem, assert_same
from tests.support.oracle import BF16, COMBINATIONS, F16, F32, State, exact, name, plain_torch, worst_ulps


def assert_as_exact_as_torch(problem: Problem, function=masked_adamw_, **options) -> None:
    """One update; every result at most twice as far from float64's as plain torch's is."""
    before, grads = problem.states(), [g.clone() for g in problem.grads]
    problem.update(function, **options)
    options = {k: float(v) if isinstance(v, Tensor) else v for k, v in options.items()}
    errors: dict[str, list[tuple[float, float]]] = {}
    for old, new, grad in zip(before, problem.states(), grads, strict=True):
        truth, plain = exact(old, grad, **options), plain_torch(old, grad, **options)
        for field in ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            if getattr(new, field) is not None:
                target, start = getattr(truth, field), getattr(old, field)
                pair = [worst_ulps(getattr(x, field), target, start) for x in (new, plain)]
                errors.setdefault(field, []).append((pair[0], pair[1]))
        assert new.step == truth.step
    for field, pairs in errors.items():
        ours, torchs = (max(column) for column in zip(*pairs, strict=True))
        assert ours <= 2 * torchs, f"{field}: {ours:.2f} ulps, torch {torchs:.2f}"
        assert torchs < 8, f"{field}: the yardstick is {torchs:.2f} ulps long"


@pytest.mark.parametrize("function", [masked_adamw_, reference.masked_adamw_], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtypes", COMBINATIONS, ids=name)
def test_against_float64(buffers: Buffers, dtypes, function):
    assert_as_exact_as_torch(Problem(buffers, dtypes), function, **HYPER)


@pytest.mark.parametrize(
    "options",
    [
        {"maximize": True},
        {"weight_decay": 0.0},
        {"betas": (0.0, 0.0)},
        {"betas": (0.3, 0.9)},
        {"betas": (0.95, 0.99999)},
        {"clip_coef": torch.tensor(0.37)},
        {"grad_scale": torch.tensor(3.0)},
        {"grad_scale": torch.tensor([1024.0]), "clip_coef": torch.tensor([0.1]), "maximize": True},
        {"lr": torch.tensor(0.02, dtype=torch.float64)},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, F32), (BF16, BF16, BF16)], ids=name)
def test_options_against_float64(buffers: Buffers, dtypes, options):
    assert_as_exact_as_torch(Problem(buffers, dtypes, sizes=[BLOCK + 300]), **{**HYPER, **options})


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, BF16)], ids=name)
def test_clipped_tensors_of_several_pieces(buffers: Buffers, dtypes):
    """Of more elements than torch's path updates at a time."""
    problem = Problem(buffers, dtypes, sizes=[2 * reference.PIECE + 5, 9])
    assert_as_exact_as_torch(problem, **HYPER, clip_coef=torch.tensor(0.37))


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (F16, F16, F32)], ids=name)
def test_amsgrad_against_float64(buffers: Buffers, dtypes):
    assert_as_exact_as_torch(Problem(buffers, dtypes, amsgrad=True), **HYPER)


def test_eps_stands_beside_the_corrected_root(buffers: Buffers):
    """With gradients of the size of eps its place decides the result."""
    problem = Problem(buffers, sizes=[3000], grad_size=1e-4, steps=[0.0])
    assert_as_exact_as_torch(problem, **{**HYPER, "eps": 1e-3})


@pytest.mark.parametrize("step", [0.0, 1.0, 9.0, 1e4, 1e6])
def test_bias_corrections_of_any_step(buffers: Buffers, step):
    """fp32 has lost 1 - 0.99999^1 by 1e-3, and exp(log) of it in fp32 loses as much."""
    problem = Problem(buffers, sizes=[500], steps=[step])
    problem.exp_avgs[0].zero_()
    problem.exp_avg_sqs[0].zero_()
    assert_as_exact_as_torch(problem, **{**HYPER, "betas": (0.99, 0.99999)})


def test_counters_of_neighbours_are_their_own(buffers: Buffers):
    """Equal tensors, different counters: every one has its own corrections, in every chunk."""
    problem = Problem(buffers, sizes=[CHUNK + 9] * 2, steps=[0.0, 41.0])
    assert_as_exact_as_torch(problem, **HYPER)
    assert [t.item() for t in problem.steps] == [1.0, 42.0]


@interpreter_only
@pytest.mark.parametrize("dtypes", COMBINATIONS, ids=name)
def test_same_bits_as_reference(buffers: Buffers, dtypes):
    options = {**HYPER, "layer_index": [0, 1, 2, 0, 1, 2, 3], "active": [True, True, False, True]}
    options |= {"grad_scale": torch.tensor(3.0), "clip_coef": torch.tensor(0.7), "maximize": True}
    problems = [Problem(buffers, dtypes, amsgrad=True) for _ in range(2)]
    norms = [torch.full((4,), torch.nan) for _ in range(2)]
    for function, problem, out in zip((masked_adamw_, reference.masked_adamw_), problems, norms, strict=True):
        problem.update(function, sq_norms=out, **options)
    assert_same(*problems)
    assert same_bits(*norms)


@interpreter_only
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.4, 0.5)])
def test_same_bits_as_reference_on_extreme_values(buffers: Buffers, betas):
    """Infinities, NaN, denormals and values whose squares overflow or vanish, in every tensor."""
    values = [0.0, -0.0, 1e-45, 1e-40, 1e-23, 1e-20, 1.0, 1e19, 1e20, 3e38, torch.inf, -torch.inf, torch.nan]
    count = len(values)
    problems = [Problem(buffers, sizes=[count**2], amsgrad=True, steps=[3.0]) for _ in range(2)]
    for p in problems:
        p.grads[0].copy_(torch.tensor(values).repeat(count))
        p.exp_avgs[0].copy_(torch.tensor(values).repeat_interleave(count))
        p.max_exp_avg_sqs[0].copy_(torch.tensor(values).abs().flip(0).repeat(count))
    for function, problem in zip((masked_adamw_, reference.masked_adamw_), problems, strict=True):
        problem.update(function, **{**HYPER, "betas": betas, "eps": 0.0})
    assert_same(*problems)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, F32)], ids=name)
def test_non_finite_gradients_stay_where_they_are(buffers: Buffers, dtypes, value):
    problem = Problem(buffers, dtypes, sizes=[BLOCK + 5, 9], amsgrad=True)
    problem.grads[0][[3, BLOCK + 4]] = value
    before, grad = problem.states()[0], problem.grads[0].clone()
    problem.update(**HYPER)
    after = problem.states()
    plain = plain_torch(before, grad, **HYPER)
    for field in ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        ours, torchs = getattr(after[0], field), getattr(plain, field)
        assert torch.equal(ours.isnan(), torchs.isnan()), field
        assert torch.equal(ours.isinf(), torchs.isinf()), field
        assert getattr(after[1], field).isfinite().all()


def test_many_steps_follow_torch(buffers: Buffers):
    """Twenty steps, a new gradient each: in fp32 no further from float64 than twice torch's AdamW."""
    problem = Problem(buffers, sizes=[700], steps=[0.0])
    for t in (problem.exp_avgs[0], problem.exp_avg_sqs[0]):
        t.zero_()
    truth = State(*(None if t is None else t.double() for t in problem.states()[0]))
    plain = torch.nn.Parameter(problem.params[0].clone())
    optimizer = torch.optim.AdamW([plain], foreach=False, **HYPER)
    for _ in range(20):
        problem.grads[0].copy_(torch.randn(700))
        plain.grad = problem.grads[0].clone()
        truth = exact(truth, problem.grads[0], **HYPER)
        problem.update(**HYPER)
        optimizer.step()
    ours, torchs = [(p.double() - truth.param).abs().max() for p in (problem.params[0], plain.detach())]
    assert ours <= 2 * torchs


def test_many_tensors_of_several_layers_and_dtypes(buffers: Buffers):
    """Combinations share the lists: each tensor is updated once, by its own kernel, into its own layer's norm."""
    parts = [Problem(buffers, dtypes, sizes=[1, 40, 300]) for dtypes in COMBINATIONS]
    columns = [
        [t for row in zip(*(getattr(p, field) for p in parts), strict=True) for t in row]
        for field in ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")
    ]
    alone = [Problem(buffers, dtypes, sizes=[1, 40, 300]) for dtypes in COMBINATIONS]
    layers = [i % 5 for i in range(len(columns[0]))]
    norms = torch.full((5,), torch.nan)
    masked_adamw_(*columns, layer_index=layers, sq_norms=norms, **HYPER)
    for together, separate in zip(parts, alone, strict=True):
        separate.update(**HYPER)
        assert_same(together, separate)
    assert same_bits(norms, layer_sq_norms(columns[1], layers, 5))


def test_bytes():
    assert masked_adamw_bytes(10, BF16) == 220
    assert masked_adamw_bytes(10, F32) == 280
    assert masked_adamw_bytes(10, BF16, state_dtype=BF16) == 140
    assert masked_adamw_bytes(10, BF16, grad_dtype=F32, amsgrad=True) == 320
