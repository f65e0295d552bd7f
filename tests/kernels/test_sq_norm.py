"""Squared norms by layer, of Triton's kernels in the interpreter and of torch's path without it.

Would catch: a tail block read past its end; a chunk or a tensor counted twice or not at all; sums whose
bits depend on alignment, on run or on which function computes them; a norm that hides an infinity; a
full-size fp32 copy of a low-precision gradient; gradients with gaps read as if they had none; a plan that reads
gradients where they were before, is built again although nothing has changed, or is used for other gradients.
"""

import pytest
import torch
from torch.linalg import vector_norm
from torch.utils._python_dispatch import TorchDispatchMode

from grass_kernels import NormPlan, _triton, layer_sq_norms, layer_sq_norms_bytes, reference, sq_norm
from grass_kernels.table import BLOCK, CHUNK
from tests.support.buffers import Buffers, interpreter_only, same_bits
from tests.support.oracle import BF16, F16, F32

SIZES = [0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3 * BLOCK + 5]
LAYERS = [3, 0, 1, 1, 0, 2, 0, 2, 5, 2]
NUM_LAYERS = 6  # layer 3 has an empty tensor only, layer 4 none


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_against_float64(buffers: Buffers, dtype, shift):
    grads = [buffers.place(torch.randn(n), dtype, shift=shift) for n in SIZES]
    norms = layer_sq_norms(grads, LAYERS, NUM_LAYERS)
    exact = torch.zeros(NUM_LAYERS, dtype=torch.float64)
    plain = torch.zeros(NUM_LAYERS)
    for g, layer in zip(grads, LAYERS, strict=True):
        exact[layer] += g.double().square().sum()
        plain[layer] += g.float().square().sum() if _triton.INTERPRETING else vector_norm(g.float()).square()
    assert norms.dtype == torch.float32
    assert norms[3] == norms[4] == 0
    used = exact > 0
    error, allowed = [((x.double() - exact) / exact)[used].abs().max() for x in (norms, plain)]
    # A sum may come out exact by luck: half a unit in the last place is always allowed.
    assert error <= max(2 * allowed, 2**-24)


@interpreter_only
@pytest.mark.parametrize("grad_scale", [None, 3.0])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_same_bits_as_reference(buffers: Buffers, dtype, grad_scale):
    grads = [buffers.place(torch.randn(n) * 100, dtype, shift=i % 3) for i, n in enumerate(SIZES)]
    scale = None if grad_scale is None else torch.tensor(grad_scale)
    ours = layer_sq_norms(grads, LAYERS, NUM_LAYERS, grad_scale=scale)
    assert same_bits(ours, reference.layer_sq_norms(grads, LAYERS, NUM_LAYERS, grad_scale=scale))


def test_same_bits_on_every_run_and_at_every_alignment(buffers: Buffers):
    values = [torch.randn(n) for n in SIZES]
    results = []
    for shift in (0, 0, 1, 3):
        grads = [buffers.place(v, F32, shift=shift) for v in values]
        results.append(layer_sq_norms(grads, LAYERS, NUM_LAYERS))
    assert all(same_bits(results[0], other) for other in results[1:])


def test_a_layer_does_not_depend_on_its_company():
    grads = [torch.randn(n) for n in SIZES]
    together = layer_sq_norms(grads, LAYERS, NUM_LAYERS)
    for layer in range(NUM_LAYERS):
        own = [g for g, index in zip(grads, LAYERS, strict=True) if index == layer]
        alone = layer_sq_norms([*own, torch.randn(5)], [0] * len(own) + [1], 2)
        assert same_bits(together[layer : layer + 1], alone[:1])


def test_mixed_dtypes_add_up():
    grads = [torch.full((3000,), 2.0, dtype=dtype) for dtype in (F32, BF16, F16, F32)]
    assert layer_sq_norms(grads, [0, 0, 0, 1], 2).tolist() == [36000.0, 12000.0]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("position", [0, BLOCK + 3])
def test_non_finite_gradients_show(value, position):
    grads = [torch.ones(BLOCK + 4), torch.ones(4)]
    grads[0][position] = value
    norms = layer_sq_norms(grads, [0, 1], 2)
    assert not norms[0].isfinite()
    assert norms[0].isnan() == (value != value)
    assert norms[1] == 4


def test_grad_scale_divides():
    grads = [torch.full((100,), 8.0)]
    assert layer_sq_norms(grads, [0], 1, grad_scale=torch.tensor([4.0])).item() == 400.0


def test_strides(buffers: Buffers):
    values = torch.randn(6, 5, 4, 3)
    expected = layer_sq_norms([values], [0], 1)
    turned = values.permute(3, 2, 1, 0)
    transposed = buffers.place(turned, F32, strides=turned.stride())
    gaps = buffers.place(values, F32, strides=(200, 40, 8, 2))
    expanded = torch.randn(7, 1).expand(7, 9)
    norms = layer_sq_norms([transposed, gaps, expanded], [0, 1, 2], 3)
    assert norms[0] == expected
    assert norms[1] == expected
    assert norms[2] == pytest.approx(expanded.double().square().sum().item(), rel=1e-6)


def test_no_gradients():
    assert layer_sq_norms([], [], 3).tolist() == [0.0, 0.0, 0.0]


def test_gradients_are_only_read():
    grads = [torch.randn(5000).bfloat16()]
    before, version = grads[0].clone(), grads[0]._version
    layer_sq_norms(grads, [0], 1, grad_scale=torch.tensor(2.0))
    assert same_bits(grads[0], before)
    assert grads[0]._version == version


@pytest.mark.skipif(_triton.INTERPRETING, reason="about torch's path: run without TRITON_INTERPRET")
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_no_full_size_copy_of_a_low_precision_gradient(dtype):
    """torch's norm copies its inputs to fp32: the largest is small, and the sum is of all of them."""
    inputs: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._foreach_norm.Scalar:
                inputs.extend(t.numel() for t in args[0])
            return func(*args, **(kwargs or {}))

    grads = [torch.randn(n).to(dtype) for n in (300_001, 5, 70_000)]
    with Watch():
        norms = layer_sq_norms(grads, [1, 1, 0], 2)
    assert sum(inputs) == 370_006
    assert max(inputs) <= 1 << 17
    squares = [g.double().square().sum().item() for g in grads]
    assert norms.tolist() == pytest.approx([squares[2], squares[0] + squares[1]], rel=1e-5)


def test_a_plan_measures_gradients_that_move(monkeypatch):
    """Other addresses, alignments and strides: the same bits, and no table is built again."""
    plan = NormPlan([torch.zeros(n) for n in SIZES], LAYERS, NUM_LAYERS)
    values, results, held = [torch.randn(n) for n in SIZES], [], []
    expected = layer_sq_norms(values, LAYERS, NUM_LAYERS)
    monkeypatch.setattr(sq_norm, "build_table", None)
    for step in range(4):
        spaced = [torch.zeros(2 * n + step)[step:][:: 2 if step == 3 else 1][:n] for n in SIZES]
        grads = [place.copy_(value) for place, value in zip(spaced, values, strict=True)]
        assert plan.is_valid(grads)
        results.append(plan.run(grads))
        torch._foreach_zero_(grads)
        held.append(grads)  # so that no address comes back
    plan.run(held[0])
    assert all(same_bits(result, expected) for result in results), "a later run wrote into an earlier result"


def test_a_plan_divides_by_the_scale():
    grads, scale = [torch.randn(n) for n in SIZES], torch.tensor(2.0)
    scaled = NormPlan(grads, LAYERS, NUM_LAYERS).run(grads, grad_scale=scale)
    assert same_bits(scaled, layer_sq_norms(grads, LAYERS, NUM_LAYERS) / 4)


def test_a_plan_is_valid_for_gradients_of_its_dtypes_and_sizes_only():
    def valid(*grads):
        return NormPlan([torch.ones(4), torch.ones(6)], [0, 0], 1).is_valid(grads)

    assert valid(torch.zeros(4), torch.zeros(3, 2))
    assert not valid(torch.zeros(4), torch.zeros(7))
    assert not valid(torch.zeros(4), torch.zeros(6).bfloat16())
    assert not valid(torch.zeros(4))
    assert not valid(torch.zeros(4), torch.zeros(6, device="meta"))


def test_bytes():
    assert layer_sq_norms_bytes(1000, BF16) == 2000
    assert layer_sq_norms_bytes(1000, F32) == 4000
