"""Failures these tests catch: bytes that flatter us or torch, an axis of the benchmark that is no longer run, the
telling cases at the end of a run that has no time for it, tensors that do not add up to their case.
"""

import pytest
import torch

from bench.kernels.cases import BASE, BF16, F32, MIXTURES, SIZES, Case, Mixture, make_cases, size_name
from bench.kernels.problem import Problem
from bench.kernels.variants import TORCH_FOREACH, TORCH_FUSED, our_bytes

# By hand: p read and written, g read, m and v read and written, remainders read and written.
BYTES = {
    "bf16-bf16-fp32": 2 + 2 + 2 + 4 * 4,
    "fp32-fp32-fp32": 4 + 4 + 4 + 4 * 4,
    "bf16-bf16-bf16": 2 + 2 + 2 + 4 * 2,
    "bf16-bf16-fp32-master": 2 + 2 + 2 + 4 * 4 + 2 + 2,
    "bf16-bf16-fp32-stochastic": 2 + 2 + 2 + 4 * 4,
    "bf16-fp32-fp32": 2 + 4 + 2 + 4 * 4,
    "fp16-fp16-fp32": 2 + 2 + 2 + 4 * 4,
    "fp32-fp32-bf16": 4 + 4 + 4 + 4 * 2,
    "bf16-fp32-bf16": 2 + 4 + 2 + 4 * 2,
    "fp16-fp32-fp32": 2 + 4 + 2 + 4 * 4,
    "fp16-fp16-bf16": 2 + 2 + 2 + 4 * 2,
    "fp16-fp32-bf16": 2 + 4 + 2 + 4 * 2,
}


def test_every_mixture_has_its_bytes():
    assert {str(mixture): mixture.update_bytes for mixture in MIXTURES} == BYTES


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_ours_has_norms_for_nothing_and_clips_for_one_more_read(mixture, norms, clip):
    case = Case(3000, 20, mixture, norms=norms, clip=clip)
    extra = mixture.grad.itemsize if clip else 0
    assert our_bytes(case) == 3000 * (BYTES[str(mixture)] + extra)


@pytest.mark.parametrize(
    ("norms", "clip", "passes"), [(False, False, 0), (True, False, 1), (False, True, 3), (True, True, 3)]
)
@pytest.mark.parametrize("variant", [TORCH_FUSED, TORCH_FOREACH], ids=lambda v: v.name)
def test_torch_reads_gradients_for_norms_and_rewrites_them_to_clip(variant, norms, clip, passes):
    case = Case(3000, 20, Mixture(F32, F32, F32), norms=norms, clip=clip)
    built = variant.build(Problem(case, torch.device("cpu")))
    assert built.num_bytes == 3000 * (28 + 4 * passes)


def test_torch_in_another_dtype_counts_its_own_bytes():
    built = TORCH_FUSED.build(Problem(Case(3000, 20, BASE, norms=False), torch.device("cpu")))
    assert (built.num_bytes, built.grad_dtype, built.state) == (3000 * 14, BF16, BF16)


@pytest.mark.parametrize("share", [1.0, 1 / 2, 1 / 16])
@pytest.mark.parametrize(("numel", "tensors"), [(100_000, 300), (1_000_003, 16), (5000, 5000), (10**9, 300)])
def test_tensors_add_up_and_layers_cover_them(numel, tensors, share):
    case = Case(numel, tensors, active_share=share)
    sizes = case.tensor_sizes
    assert (sum(sizes), len(sizes)) == (numel, tensors)
    assert min(sizes) >= 1
    assert case.layer_index == sorted(case.layer_index)
    assert set(case.layer_index) == set(range(16))
    assert sum(case.active) == round(16 * share)
    assert case.active_numel == sum(
        size for size, layer in zip(sizes, case.layer_index, strict=True) if case.active[layer]
    )
    assert sizes[0] % 256 == 0 or numel // tensors < 256


def test_all_axes_are_run():
    cases = make_cases(SIZES)
    assert {case.numel for case in cases} == set(SIZES)
    assert {case.mixture for case in cases} == set(MIXTURES)
    assert {case.tensors for case in cases} >= {1, 300, 5000}
    assert {case.active_share for case in cases} == {1, 1 / 2, 1 / 16}
    assert {(case.norms, case.clip) for case in cases} == {
        (n, c) for n in (True, False) for c in (True, False)
    }
    assert [case for case in cases if case.zeros] == [Case(10**9, zeros=True)]
    for size in SIZES:
        assert {case.mixture for case in cases if case.numel == size and case.is_default} == set(MIXTURES)


def test_ids_are_unique():
    cases = make_cases([*SIZES, 1_234_567, 1_234_568])
    assert len({str(case) for case in cases}) == len(cases)
    assert str(Case(10**9)) == "1e9/300t/bf16-bf16-fp32/active1:1/norms"
    assert str(Case(10**9, zeros=True)) == "1e9/300t/bf16-bf16-fp32/active1:1/norms/zeros"
    assert [size_name(n) for n in (10**9, 2_500_000, 1_234_567, 300)] == ["1e9", "25e5", "1234567", "300"]


def test_the_telling_cases_come_first():
    cases = make_cases(SIZES)
    assert cases[0] == Case(10**9)
    base = [i for i, case in enumerate(cases) if case.is_default and case.mixture == BASE]
    others = [i for i, case in enumerate(cases) if case.numel != 10**9 and case.mixture != BASE]
    assert max(base) < min(others)


def test_small_sizes_have_no_more_tensors_than_parameters():
    assert {case.tensors for case in make_cases([10])} == {1, 10}


@pytest.mark.parametrize(
    ("arguments"), [{"tensors": 0}, {"tensors": 11}, {"tensors": 4, "active_share": 1 / 2}]
)
def test_impossible_cases_are_refused(arguments):
    with pytest.raises(ValueError, match=r"cannot hold|less than one layer"):
        Case(10, **arguments)
