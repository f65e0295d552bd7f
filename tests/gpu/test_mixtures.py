"""Every mixture on the device against the specification: `grass_kernels.reference` on CPU copies, and float64.

Would catch: a conversion, a division or a root that a GPU rounds otherwise than the interpreter; multiply-adds
fused by the device's compiler; denormals flushed; a coefficient whose power or logarithm differs; a vector
access at a misaligned address; a tail that is written past its end; norms whose bits follow the block layout; a
mask or a skip that is read wrongly on the device; 32-bit offsets in tensors that need 64.
"""

import pytest
import torch

from grass_kernels import layer_sq_norms, masked_adamw_, reference, rounding, runs_triton
from grass_kernels.table import BLOCK, CHUNK
from tests.support.device_problem import HYPER, MIXTURES, Mixture, Problem, same_bits
from tests.support.oracle import BF16, F32, State, exact, name, plain_torch, worst_ulps

LAYERS = {"layer_index": [0, 1, 2, 0, 1, 2, 3]}
GIB = 1 << 30


def run_beside_reference(device: torch.device, options: dict, *arguments, **keywords) -> None:
    """One update on the device and one by the reference on the CPU: the same bits, norms included."""
    ours, theirs = (Problem(*arguments, device=where, **keywords) for where in (device, "cpu"))
    norms = [torch.full((4,), torch.nan, device=where) for where in (device, "cpu")]
    on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    ours.update(masked_adamw_, sq_norms=norms[0], **{**HYPER, **LAYERS, **on_device})
    theirs.update(reference.masked_adamw_, sq_norms=norms[1], **{**HYPER, **LAYERS, **options})
    ours.assert_same(theirs)
    assert same_bits(*norms)


def test_the_kernels_are_what_runs(device: torch.device) -> None:
    assert runs_triton(device)


@pytest.mark.parametrize(("amsgrad", "shift"), [(False, 0), (True, 1)], ids=["aligned", "amsgrad-misaligned"])
@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_same_bits_as_the_reference(
    device: torch.device, mixture: Mixture, amsgrad: bool, shift: int
) -> None:
    options = {"grad_scale": torch.tensor(3.0), "clip_coef": torch.tensor(0.7), "maximize": True}
    run_beside_reference(device, options, mixture, amsgrad=amsgrad, shift=shift)


@pytest.mark.parametrize("mask", ["host", "device"])
@pytest.mark.parametrize("mixture", [MIXTURES[0], MIXTURES[2], MIXTURES[-1]], ids=str)
def test_same_bits_with_a_mask(device: torch.device, mixture: Mixture, mask: str) -> None:
    active = [True, False, True, True]
    run_beside_reference(
        device, {"active": torch.tensor(active) if mask == "device" else active}, mixture, amsgrad=True
    )


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_same_bits_where_a_step_may_be_skipped(device: torch.device, found_inf: float) -> None:
    run_beside_reference(device, {"found_inf": torch.tensor(found_inf)}, MIXTURES[2])


@pytest.mark.parametrize(
    "options",
    [
        {"betas": (0.0, 0.0)},
        {"betas": (0.3, 0.5)},
        {"betas": (0.95, 0.99999), "weight_decay": 0.0},
        {"lr": torch.tensor(0.02)},
        {"lr": torch.tensor(0.02, dtype=torch.float64)},
    ],
    ids=lambda options: "-".join(options),
)
def test_same_bits_with_other_hyperparameters(device: torch.device, options: dict) -> None:
    run_beside_reference(device, options, MIXTURES[0])


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0)])
def test_same_bits_on_extreme_values(device: torch.device, betas: tuple[float, float]) -> None:
    """Infinities, NaN, denormals and values whose squares overflow or vanish, in every tensor."""
    values = [0.0, -0.0, 1e-45, 1e-40, 1e-23, 1e-20, 1.0, 1e19, 1e20, 3e38, torch.inf, -torch.inf, torch.nan]
    extreme, count = torch.tensor(values), len(values)
    problems = [Problem(MIXTURES[0], where, amsgrad=True, sizes=[count**2]) for where in (device, "cpu")]
    for p in problems:
        p.grads[0].copy_(extreme.repeat(count))
        p.exp_avgs[0].copy_(extreme.repeat_interleave(count))
        p.max_exp_avg_sqs[0].copy_(extreme.abs().flip(0).repeat(count))
    for function, p in zip((masked_adamw_, reference.masked_adamw_), problems, strict=True):
        p.update(function, **{**HYPER, "betas": betas, "eps": 0.0})
    problems[0].assert_same(problems[1])


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_against_float64(device: torch.device, mixture: Mixture) -> None:
    """No result further from float64's than twice what plain torch is; by chance, than the next neighbour."""
    problem = Problem(mixture, device, sizes=[BLOCK + 300])
    remainder = problem.remainders[0].cpu() if problem.remainders else None
    columns = ("params", "exp_avgs", "exp_avg_sqs", "steps", "grads")
    param, exp_avg, exp_avg_sq, step, grad = (getattr(problem, c)[0].cpu().clone() for c in columns)
    if remainder is not None:
        param = rounding.join_fp32(param, remainder)
    before = State(param, exp_avg, exp_avg_sq, None, step)
    problem.update(masked_adamw_, **HYPER)
    after = [getattr(problem, c)[0].cpu() for c in columns[:3]]
    if remainder is not None:
        after[0] = rounding.join_fp32(after[0], problem.remainders[0].cpu())
    truth, plain = exact(before, grad, **HYPER), plain_torch(before, grad, **HYPER)
    for field, result, target, yardstick, start in zip(
        State._fields, after, truth[:3], plain[:3], before[:3], strict=False
    ):
        ours, torchs = (worst_ulps(x, target, start) for x in (result, yardstick))
        by_chance = field == "param" and mixture.rounding == "stochastic"
        assert ours <= (1.01 if by_chance else 2 * torchs), f"{field}: {ours:.2f} ulps, torch {torchs:.2f}"
    assert problem.steps[0].item() == truth.step


@pytest.mark.parametrize("dtypes", [(F32,), (BF16,)], ids=name)
def test_norms_have_the_same_bits_in_every_pass(device: torch.device, dtypes: tuple[torch.dtype]) -> None:
    problem = Problem(Mixture(dtypes[0], dtypes[0], F32), device, shift=1, sizes=[3 * CHUNK + 5, 1, BLOCK])
    layers, norms = [0, 1, 0], torch.full((2,), torch.nan, device=device)
    alone = layer_sq_norms(problem.grads, layers, 2)
    expected = reference.layer_sq_norms([g.cpu() for g in problem.grads], layers, 2)
    problem.update(masked_adamw_, layer_index=layers, sq_norms=norms, **HYPER)
    assert same_bits(alone, expected)
    assert same_bits(norms, expected)


def test_a_tensor_that_needs_offsets_of_64_bits(cuda: torch.device) -> None:
    """2^31 + 4096 elements, compared at both ends, around 2^31, and where byte offsets pass 2^31 and 2^32."""
    free, _ = torch.cuda.mem_get_info(cuda)
    if free < 40 * GIB:
        pytest.skip(f"needs 40 GiB of free device memory, there are {free / GIB:.0f}")
    numel, width = (1 << 31) + 4096, 4096
    generator = torch.Generator(cuda).manual_seed(0)
    param, grad = (torch.empty(numel, dtype=BF16, device=cuda) for _ in range(2))
    exp_avg, exp_avg_sq = (torch.empty(numel, dtype=F32, device=cuda) for _ in range(2))
    for t in (param, grad, exp_avg):
        t.normal_(generator=generator)
    exp_avg_sq.uniform_(0.5, 1.5, generator=generator)
    step = torch.zeros((), device=cuda)
    starts = [0, *((1 << power) - width // 2 for power in (29, 30, 31)), numel - width]
    tensors = (param, grad, exp_avg, exp_avg_sq)
    slices = [[t[s : s + width].cpu().clone() for t in tensors] for s in starts]
    sq_norm = sum(float(piece.double().square().sum()) for piece in grad.split(1 << 28))
    norms = torch.full((1,), torch.nan, device=cuda)
    masked_adamw_([param], [grad], [exp_avg], [exp_avg_sq], [step], sq_norms=norms, **HYPER)
    for start, copies in zip(starts, slices, strict=True):
        reference.masked_adamw_(*([t] for t in copies), [torch.zeros(())], **HYPER)
        for t, expected in zip(tensors, copies, strict=True):
            assert same_bits(t[start : start + width], expected), start
    assert norms.item() == pytest.approx(sq_norm, rel=1e-5)
    assert step.item() == 1
