"""Masked AdamW: what it leaves alone, and what it tells the rest of the program.

Would catch: a frozen layer's weight, moment or counter that changes; a counter advanced once a chunk, or by
a call that found an infinity; norms of frozen layers that are not zero, or left over; norms that differ from
`layer_sq_norms`; writes outside a tensor at any alignment; a result that differs from run to run; a write
that autograd does not see; strides ignored; moments that move to another storage; host tables built on a
default device.
"""

import pytest
import torch

from grass_kernels import _triton, arguments, layer_sq_norms, masked_adamw_
from grass_kernels.table import BLOCK, CHUNK
from tests.support.buffers import Buffers, interpreter_only, same_bits
from tests.support.kernel_problem import HYPER, SIZES, Problem, assert_same
from tests.support.oracle import BF16, F16, F32, name

LAYERS = [0, 1, 2, 0, 1, 2, 1]
MASKS = [[True, True, True], [False, False, False], [True, False, False], [False, True, True]]


def mask_on_the_device(active, device):
    """`arguments.split_mask`, if CPU memory were a device's."""
    return None, None if active is None else torch.as_tensor(active)


@pytest.fixture(params=["list", "tensor", "device"])
def mask_kind(request, monkeypatch):
    """The ways a mask arrives. `device`: the kernel reads it, as it does a mask on a GPU."""
    if request.param == "device":
        if not _triton.INTERPRETING:
            pytest.skip("only the kernels read a mask on the device: run with TRITON_INTERPRET=1")
        monkeypatch.setattr(arguments, "split_mask", mask_on_the_device)
    return (lambda mask: torch.tensor(mask)) if request.param == "tensor" else (lambda mask: mask)


@pytest.mark.parametrize("active", MASKS)
def test_frozen_layers_keep_every_bit(buffers: Buffers, active, mask_kind):
    problem, everything = Problem(buffers, amsgrad=True), Problem(buffers, amsgrad=True)
    before = problem.states()
    norms, all_norms = torch.full((3,), torch.nan), torch.full((3,), torch.nan)
    problem.update(layer_index=LAYERS, active=mask_kind(active), sq_norms=norms, **HYPER)
    everything.update(layer_index=torch.tensor(LAYERS), sq_norms=all_norms, **HYPER)
    after, updated = problem.states(), everything.states()
    for i, layer in enumerate(LAYERS):
        expected = updated[i] if active[layer] else before[i]
        assert all(same_bits(a, b) for a, b in zip(after[i], expected, strict=True)), i
    assert same_bits(norms, torch.where(torch.tensor(active), all_norms, 0.0))


@pytest.mark.parametrize("found", [torch.tensor(1.0), torch.tensor([2.0]), torch.tensor(True)])
def test_an_infinity_found_changes_nothing_but_norms(buffers: Buffers, found, mask_kind):
    problem = Problem(buffers, (BF16, BF16, F32), amsgrad=True)
    problem.grads[3][5] = torch.inf
    before, norms = problem.states(), torch.full((3,), torch.nan)
    active = [True, True, False]
    problem.update(layer_index=LAYERS, active=mask_kind(active), sq_norms=norms, found_inf=found, **HYPER)
    assert not any(problem.changed(before))
    expected = layer_sq_norms(problem.grads, LAYERS, 3)
    assert expected[0] == torch.inf
    assert same_bits(norms, torch.where(torch.tensor(active), expected, 0.0))


def test_no_infinity_found_is_an_ordinary_step(buffers: Buffers):
    one, other = Problem(buffers), Problem(buffers)
    one.update(found_inf=torch.tensor(0.0), **HYPER)
    other.update(**HYPER)
    assert_same(one, other)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, F32), (F16, F32, F32)], ids=name)
def test_norms_have_the_bits_of_layer_sq_norms(buffers: Buffers, dtypes, shift):
    problem = Problem(buffers, dtypes, shift=shift)
    norms, scale = torch.full((3,), torch.nan), torch.tensor(7.0)
    expected = layer_sq_norms(problem.grads, LAYERS, 3, grad_scale=scale)
    options = {"grad_scale": scale, "clip_coef": torch.tensor(0.1), "maximize": True}
    problem.update(layer_index=LAYERS, sq_norms=norms, **options, **HYPER)
    assert same_bits(norms, expected)


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, F32)], ids=name)
def test_alignment_does_not_show(buffers: Buffers, dtypes):
    aligned, shifted = Problem(buffers, dtypes), Problem(buffers, dtypes, shift=1)
    norms = [torch.full((1,), torch.nan) for _ in range(2)]
    aligned.update(sq_norms=norms[0], **HYPER)
    shifted.update(sq_norms=norms[1], **HYPER)
    assert_same(aligned, shifted)
    assert same_bits(*norms)


@interpreter_only
@pytest.mark.parametrize("column", ["params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"])
def test_only_full_blocks_of_aligned_tensors_take_wide_accesses(buffers: Buffers, hinted_addresses, column):
    problem = Problem(buffers, sizes=[3 * BLOCK + 5, 2 * BLOCK, BLOCK - 1], amsgrad=True)
    tensors = getattr(problem, column)
    tensors[1] = buffers.place(tensors[1].clone(), F32, shift=1)
    problem.update(sq_norms=torch.zeros(1), **HYPER)
    lists = (problem.params, problem.grads, problem.exp_avgs, problem.exp_avg_sqs, problem.max_exp_avg_sqs)
    wide = {t[0].data_ptr() + block * BLOCK * 4 for t in lists for block in range(3)}
    assert set(hinted_addresses) == wide


def test_same_bits_on_every_run(buffers: Buffers):
    problems = [Problem(buffers, (BF16, BF16, F32)) for _ in range(2)]
    norms = [torch.full((3,), torch.nan) for _ in range(2)]
    for problem, out in zip(problems, norms, strict=True):
        problem.update(layer_index=LAYERS, sq_norms=out, **HYPER)
    assert_same(*problems)
    assert same_bits(*norms)


def test_counters_advance_once_whatever_the_number_of_chunks(buffers: Buffers):
    sizes = [0, 1, 3 * CHUNK + 1]
    problem = Problem(buffers, sizes=sizes, steps=[4.0, 0.0, 7.0])
    problem.update(**HYPER)
    assert [t.item() for t in problem.steps] == [5.0, 1.0, 8.0]


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, F32), (BF16, BF16, BF16)], ids=name)
def test_gradients_are_only_read(buffers: Buffers, dtypes):
    problem = Problem(buffers, dtypes)
    before = [g.clone() for g in problem.grads]
    problem.update(grad_scale=torch.tensor(2.0), clip_coef=torch.tensor(0.5), maximize=True, **HYPER)
    assert all(same_bits(a, b) for a, b in zip(problem.grads, before, strict=True))


def test_backward_through_an_updated_parameter_raises():
    """Else it would silently use the weight of the next step."""
    w = torch.nn.Parameter(torch.randn(8))
    loss = (w * w).sum()
    state = [torch.zeros(8)], [torch.zeros(8)], [torch.tensor(0.0)]
    norms = torch.zeros(1)
    versions = [t._version for t in (state[0][0], state[1][0], state[2][0], norms)]
    masked_adamw_([w], [torch.ones(8)], *state, sq_norms=norms, **HYPER)
    for t, version in zip((state[0][0], state[1][0], state[2][0], norms), versions, strict=True):
        assert t._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


STRIDES = {
    "contiguous": (60, 12, 4, 1),
    "channels_last": (60, 1, 20, 5),
    "transposed": (1, 6, 30, 90),
    "gaps": (130, 26, 8, 2),
}


@pytest.mark.parametrize("of_state", STRIDES)
@pytest.mark.parametrize("of_grad", STRIDES)
@pytest.mark.parametrize("of_param", STRIDES)
def test_strides(buffers: Buffers, of_param, of_grad, of_state):
    shape = (6, 5, 3, 4)
    values = [torch.randn(shape), torch.randn(shape), torch.randn(shape), torch.rand(shape)]
    plain = [[v.clone()] for v in values] + [[torch.tensor(2.0)]]
    used = [of_param, of_grad, of_state, of_state]
    strided = [
        [buffers.place(v, F32, strides=STRIDES[kind])] for v, kind in zip(values, used, strict=True)
    ] + [[torch.tensor(2.0)]]
    places = [column[0].data_ptr() for column in strided]
    masked_adamw_(*plain, **HYPER)
    masked_adamw_(*strided, **HYPER)
    for expected, column, place in zip(plain, strided, places, strict=True):
        assert same_bits(column[0], expected[0])
        assert column[0].data_ptr() == place
    assert [column[0].stride() for column in strided[:4]] == [STRIDES[kind] for kind in used]


def test_scalars_single_elements_and_expanded_gradients():
    odd = torch.as_strided(torch.randn(40), (1, 5, 1), (7, 1, 100))  # strides of single elements mean nothing
    params = [torch.tensor(1.5), odd, torch.randn(4, 3)]
    grads = [torch.tensor(0.5), torch.randn(1, 5, 1), torch.randn(4, 1).expand(4, 3)]
    states = [[torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]]
    steps = [torch.tensor(0.0) for _ in params]
    copies = [
        [t.clone(memory_format=torch.contiguous_format) for t in column]
        for column in (params, grads, *states)
    ]
    masked_adamw_(params, grads, *states, steps, **HYPER)
    masked_adamw_(*copies, [torch.tensor(0.0) for _ in params], **HYPER)
    for column, expected in zip((params, grads, *states), copies, strict=True):
        assert all(same_bits(a, b) for a, b in zip(column, expected, strict=True))


def test_a_frozen_parameter_with_gaps_is_not_even_copied(buffers: Buffers):
    param = buffers.place(torch.randn(4, 4), F32, strides=(16, 2))
    version = param._version
    others = torch.randn(4, 4), torch.zeros(4, 4), torch.zeros(4, 4), torch.tensor(0.0)
    masked_adamw_([param], *([t] for t in others), active=[False], **HYPER)
    assert param._version == version


@interpreter_only
@pytest.mark.parametrize("active", MASKS)
def test_gaps_and_a_mask_on_the_device(buffers: Buffers, active, monkeypatch):
    """The copy that stands in for a parameter with gaps brings frozen values back unchanged."""
    monkeypatch.setattr(arguments, "split_mask", mask_on_the_device)
    params = [buffers.place(torch.randn(4, 4), F32, strides=(16, 2)) for _ in range(3)]
    before = [p.clone() for p in params]
    rest = [[torch.randn(4, 4) for _ in range(3)], *[[torch.zeros(4, 4) for _ in range(3)] for _ in range(2)]]
    masked_adamw_(params, *rest, list(torch.zeros(3)), layer_index=[0, 1, 2], active=active, **HYPER)
    assert [not same_bits(a, b) for a, b in zip(params, before, strict=True)] == active


def test_empty_lists():
    norms = torch.full((2,), torch.nan)
    masked_adamw_([], [], [], [], [], sq_norms=norms, **HYPER)
    assert norms.tolist() == [0.0, 0.0]


def test_all_frozen_still_writes_norms(buffers: Buffers):
    problem, norms = Problem(buffers, sizes=[BLOCK]), torch.full((2,), torch.nan)
    problem.update(layer_index=[1], active=[True, False], sq_norms=norms, **HYPER)
    assert norms.tolist() == [0.0, 0.0]
    assert len(SIZES) == len(LAYERS)


def test_another_default_device_is_none_of_our_business(buffers: Buffers):
    with_default, without = Problem(buffers, (BF16, BF16, F32)), Problem(buffers, (BF16, BF16, F32))
    norms = [torch.full((3,), torch.nan) for _ in range(2)]
    clip = torch.tensor(0.5)
    with torch.device("meta"):
        with_default.update(layer_index=LAYERS, sq_norms=norms[0], clip_coef=clip, **HYPER)
    without.update(layer_index=LAYERS, sq_norms=norms[1], clip_coef=clip, **HYPER)
    assert_same(with_default, without)
    assert same_bits(*norms)
