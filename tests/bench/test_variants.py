"""Failures these tests catch: torch timed at less or other work than ours, frozen layers that are updated, a
library's optimizer fed what it does not take, a failed import that ends the run.
"""

import sys
import types

import pytest
import torch

from bench.kernels.cases import BASE, BF16, F16, F32, MIXTURES, Case, Mixture
from bench.kernels.peers import PEERS, peer_variants
from bench.kernels.problem import Comparison, Problem
from bench.kernels.variants import (
    GRASS,
    GRASS_KERNELS,
    TORCH_FUSED,
    CannotDoError,
    own_variants,
    parameters,
    torch_takes,
    with_norms_and_clipping,
)

CPU = torch.device("cpu")
OWN = own_variants(CPU)


@pytest.mark.parametrize("variant", OWN, ids=lambda v: v.name)
def test_frozen_layers_stay_as_they_are(variant):
    case = Case(2000, 40, BASE, active_share=1 / 2)
    problem = Problem(case, CPU)
    built = variant.build(problem)
    problem.fill()
    before = [p.clone() for p in problem.params]
    built.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, problem.params, strict=True)]
    assert changed == [case.active[layer] for layer in case.layer_index]


@pytest.mark.parametrize("norms", [False, True])
def test_torch_clips_to_the_same_norm(norms):
    problem = Problem(Case(2000, 40, Mixture(F32, F32, F32), active_share=1 / 2, norms=norms, clip=True), CPU)
    params = parameters(problem, F32)
    problem.fill()
    seen = []
    step = with_norms_and_clipping(problem, params, lambda: seen.append(1))
    step()
    total = torch.stack([p.grad.norm() for p in params if p.grad is not None]).norm()
    assert float(total) == pytest.approx(problem.max_grad_norm, rel=1e-4)
    assert seen == [1]


def test_torch_takes_norms_in_one_list_operation(monkeypatch):
    problem = Problem(Case(2000, 40, BASE), CPU)
    params = parameters(problem, BF16)
    problem.fill()
    taken = []
    original = torch._foreach_norm
    monkeypatch.setattr(torch, "_foreach_norm", lambda *a, **k: taken.append(original(*a, **k)) or taken[-1])
    with_norms_and_clipping(problem, params, lambda: None)()
    assert [len(norms) for norms in taken] == [40]
    assert {norm.dtype for norm in taken[0]} == {F32}


def test_without_norms_and_clipping_torch_does_nothing_but_step():
    problem = Problem(Case(2000, 40, BASE, norms=False), CPU)
    step = lambda: None  # noqa: E731
    assert with_norms_and_clipping(problem, parameters(problem, BF16), step) is step


@pytest.mark.parametrize("rounding", ["nearest", "master"])
def test_other_variants_writes_do_not_change_what_ours_computes(rounding):
    problem = Problem(Case(2000, 40, Mixture(BF16, BF16, F32, rounding)), CPU)
    ours, other = GRASS.build(problem), TORCH_FUSED.build(problem)
    for _ in range(2):
        comparison = Comparison(problem, BF16, F32)
        ours.step()
        assert comparison.worst_ulps() < 8
        other.step()


def test_exact_weights_start_from_the_parameters_alone():
    optimizer = GRASS.build(Problem(Case(2000, 40, Mixture(BF16, BF16, F32, "master")), CPU)).step.__self__
    remainders = [state["remainder"] for state in optimizer.state.values()]
    assert len(remainders) == 40
    assert not any(bool(remainder.any()) for remainder in remainders)


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_ours_updates_the_shared_moments(mixture):
    problem = Problem(Case(2000, 40, mixture), CPU)
    for variant in (GRASS, GRASS_KERNELS):
        built = variant.build(problem)
        assert (built.shared_dtype, built.rounding) == (mixture.state, mixture.rounding)
        comparison = Comparison(problem, mixture.grad, mixture.state)
        before = [t.clone() for moments in problem.moments(mixture.state) for t in moments]
        built.step()
        after = [t for moments in problem.moments(mixture.state) for t in moments]
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert comparison.worst_ulps() < 8


def test_what_torch_takes_is_found_by_trying():
    assert torch_takes(CPU, Mixture(F32, F32, F32), fused=True)
    assert torch_takes(CPU, Mixture(F16, F16, F16), fused=True)
    assert not torch_takes(CPU, BASE, fused=True)


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_torch_does_each_mixture_or_its_parameters_dtype(mixture):
    built = TORCH_FUSED.build(Problem(Case(2000, 40, mixture), CPU))
    wanted = (mixture.grad, mixture.state)
    assert (built.grad_dtype, built.state) in (wanted, (mixture.param, mixture.param))
    assert built.rounding == "nearest"


def fake_library(monkeypatch, peer, optimizer):
    names = ("AdamW", "AdamW8bit", "AdamW32bit", "FlashAdamW")
    module = types.SimpleNamespace(**dict.fromkeys(names, optimizer))
    module.optim = module
    monkeypatch.setitem(sys.modules, peer.module.split(".")[0], module)
    monkeypatch.setitem(sys.modules, peer.module, module)


class FakeOptimizer(torch.optim.SGD):
    def __init__(self, params, lr, betas, eps, weight_decay, **options):
        super().__init__(params, lr=lr)
        self.options = options


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("rounding", ["nearest", "master", "stochastic"])
def test_a_peer_is_built_where_it_has_the_rounding(monkeypatch, peer, rounding):
    fake_library(monkeypatch, peer, FakeOptimizer)
    problem = Problem(Case(2000, 40, Mixture(BF16, BF16, F32, rounding)), CPU)
    if rounding not in peer.roundings:
        with pytest.raises(CannotDoError, match=rounding):
            peer.build(problem)
        return
    built = peer.build(problem)
    problem.fill()
    built.step()
    assert built.rounding == rounding
    assert built.shared_dtype is None


def test_a_peer_of_another_version_or_with_other_dtypes_is_a_gap(monkeypatch):
    for optimizer, mixture, reason in (
        (lambda params: None, BASE, "version"),
        (FakeOptimizer, Mixture(BF16, F32, F32), "gradients"),
    ):
        fake_library(monkeypatch, PEERS[0], optimizer)
        with pytest.raises(CannotDoError, match=reason):
            PEERS[0].build(Problem(Case(2000, 40, mixture), CPU))


def test_bytes_of_peers_by_hand(monkeypatch):
    large, small = Case(2_560_000, 10, BASE, norms=False), Case(2000, 10, BASE, norms=False)
    expected = {
        "optimi": (6 + 8, 6 + 8),
        "bitsandbytes_32bit": (6 + 16, 6 + 16),
        "bitsandbytes_8bit": (6 + 4.0625, 6 + 16),  # tensors of less than 4096 elements stay in fp32
        "torchao_8bit": (6 + 4.0625, 6 + 8),  # or in the parameter's dtype
        "flashoptim": (6 + 4.25, 6 + 4.25),
    }
    for peer in PEERS:
        fake_library(monkeypatch, peer, FakeOptimizer)
        found = tuple(peer.build(Problem(case, CPU)).num_bytes / case.numel for case in (large, small))
        assert found == pytest.approx(expected[peer.name]), peer.name


def test_a_library_that_is_not_installed_or_needs_a_device_is_named(monkeypatch):
    for found, device, count, reason in (
        (None, "cuda", 0, "not installed"),
        (object(), "cpu", 0, "needs a CUDA device"),
        (object(), "cuda", len(PEERS), None),
    ):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=found: found)
        variants, missing = peer_variants(torch.device(device))
        assert len(variants) == count
        assert [line.split(": ")[0] for line in missing] == ([] if count else [peer.name for peer in PEERS])
        assert all(reason in line for line in missing)
