"""Errors of the kernels, raised before anything changes.

Would catch: a bad call that updates the first tensors and raises at the third; a message without the
position; a combination of dtypes accepted that no kernel computes; a device index read as a host value; Python's
own errors in place of ours; numbers, masks or lists that only one path takes; a word that counts as True; an
index that asks for its own size in memory; parameters or states that overlap themselves; a negative view read
or written without its sign; a write to address 0 through a wrapper, or to memory that was freed.
"""

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils import _pytree

from grass_kernels import KernelArgumentError, _triton, is_supported, layer_sq_norms, masked_adamw_
from grass_kernels.arguments import check_addressable, check_memory
from tests.support.buffers import same_bits
from tests.support.oracle import BF16, COMBINATIONS, F16, F32

HYPER = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
F64 = torch.float64


class Wrapper(torch.Tensor):
    """Keeps its elements elsewhere, and does not say where."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args = _pytree.tree_map(lambda t: t.inner if isinstance(t, Wrapper) else t, args)
        return function(*args, **(kwargs or {}))


def freed() -> torch.Tensor:
    """As a sharded parameter between its uses."""
    t = torch.ones(4)
    t.untyped_storage().resize_(0)
    return t


def on_meta(call):
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps"):
        call[name] = [t.to("meta") for t in call[name]]


def good() -> dict:
    return {
        "params": [torch.ones(4) for _ in range(3)],
        "grads": [torch.ones(4) for _ in range(3)],
        "exp_avgs": [torch.zeros(4) for _ in range(3)],
        "exp_avg_sqs": [torch.zeros(4) for _ in range(3)],
        "steps": [torch.tensor(0.0) for _ in range(3)],
        "layer_index": [0, 1, 1],
        **HYPER,
    }


def replace(name, position, value):
    return lambda call: call[name].__setitem__(position, value)


def put(**arguments):
    return lambda call: call.update(arguments)


meta = torch.device("meta")
BAD = {
    "shorter list": (put(exp_avgs=[torch.zeros(4)]), r"exp_avgs has 1 tensors for 3"),
    "shape": (replace("grads", 2, torch.ones(5)), r"grads\[2\] has shape \(5,\)"),
    "moment's shape": (replace("exp_avg_sqs", 1, torch.ones(2, 2)), r"exp_avg_sqs\[1\] has shape \(2, 2\)"),
    "float64": (replace("grads", 1, torch.ones(4, dtype=F64)), r"grads\[1\] is float64"),
    "mixed": (replace("grads", 2, torch.ones(4, dtype=BF16)), r"position 2 .* grads bfloat16"),
    "moment dtypes": (replace("exp_avgs", 0, torch.ones(4, dtype=BF16)), r"position 0 .* exp_avgs bfloat16"),
    "sparse": (replace("grads", 1, torch.ones(4).to_sparse()), r"grads\[1\] is sparse_coo.*SparseAdam"),
    "complex": (replace("grads", 0, torch.ones(4) * 1j), r"grads\[0\] is complex64.*view_as_real"),
    "device": (replace("exp_avgs", 1, torch.zeros(4, device=meta)), r"exp_avgs\[1\] is on meta"),
    "step device": (replace("steps", 1, torch.tensor(0.0, device=meta)), r"steps\[1\] is on meta"),
    "step dtype": (replace("steps", 1, torch.tensor(0)), r"steps\[1\] is int64"),
    "step shape": (replace("steps", 2, torch.zeros(1)), r"steps\[2\] is float32 of shape \(1,\)"),
    "expanded": (
        replace("params", 1, torch.ones(1).expand(4)),
        r"params\[1\] has strides \(0,\) .* expanded",
    ),
    "layer too high": (put(active=[True, True], layer_index=[0, 1, 2]), r"layer_index\[2\] is 2.*2 layers"),
    "layer negative": (put(layer_index=[0, -1, 1]), r"layer_index\[1\] is -1"),
    "few layers": (put(layer_index=[0, 1]), r"layer_index has 2 entries for 3"),
    "layers on device": (put(layer_index=torch.zeros(3, device=meta).int()), r"layer_index .* on meta"),
    "float layers": (put(layer_index=torch.zeros(3)), r"layer_index .* float32"),
    "two lengths": (put(active=[True] * 2, sq_norms=torch.zeros(3)), r"active has 2 entries, sq_norms 3"),
    "mask dtype": (put(active=torch.ones(2)), r"active is float32"),
    "mask shape": (put(active=torch.ones(2, 1, dtype=torch.bool)), r"active is bool of shape \(2, 1\)"),
    "mask device": (put(active=torch.ones(2, dtype=torch.bool, device=meta)), r"active is on meta"),
    "norms dtype": (put(sq_norms=torch.zeros(2, dtype=F64)), r"sq_norms is float64"),
    "norms gaps": (put(sq_norms=torch.zeros(4)[::2]), r"sq_norms has gaps"),
    "norms device": (put(sq_norms=torch.zeros(2, device=meta)), r"sq_norms .* on meta"),
    "beta1": (put(betas=(1.0, 0.9)), r"betas\[0\] is 1.0"),
    "beta2": (put(betas=(0.9, -0.1)), r"betas\[1\] is -0.1"),
    "three betas": (put(betas=(0.9, 0.9, 0.9)), r"betas has 3 entries"),
    "lr no number": (put(lr="x"), r"lr is 'x': give a number"),
    "lr nan": (put(lr=float("nan")), r"lr is nan: give a number"),
    "eps": (put(eps=-1.0), r"eps is -1.0"),
    "moment expanded": (
        replace("exp_avgs", 1, torch.zeros(1).expand(4)),
        r"exp_avgs\[1\] has strides \(0,\) .* expanded",
    ),
    "step a number": (replace("steps", 1, 0.0), r"steps\[1\] is 0.0: give a tensor"),
    "seed a fraction": (put(rounding_seeds=[1, 1.5, 2]), r"rounding_seeds\[1\] is 1.5"),
    "layer a fraction": (put(layer_index=[0, 1.5, 1]), r"layer_index\[1\] is 1.5"),
    "remainder dtype": (
        put(remainders=[torch.zeros(4), None, None]),
        r"remainders\[0\] is float32 for a float32",
    ),
    "two roundings": (put(remainders=[None] * 3, rounding_seeds=[1, 2, 3]), r"both given"),
    "lr": (put(lr=torch.ones(2)), r"lr is float32 of shape \(2,\)"),
    "lr dtype": (put(lr=torch.tensor(1)), r"lr is int64"),
    "scale dtype": (put(grad_scale=torch.tensor(1.0, dtype=F64)), r"grad_scale is float64: convert"),
    "scale number": (put(grad_scale=2.0), r"grad_scale is 2.0: give a tensor"),
    "clip shape": (put(clip_coef=torch.ones(2)), r"clip_coef is \(2,\) on cpu"),
    "clip device": (put(clip_coef=torch.ones(1, device=meta)), r"clip_coef is \(1,\) on meta"),
    "found complex": (put(found_inf=torch.tensor(1j)), r"found_inf is complex64: convert it to a real dtype"),
    "wrapped": (replace("params", 2, TwoTensor(torch.ones(4), torch.ones(4))), r"params\[2\] is a TwoTensor"),
    "wrapped gradient": (
        replace("grads", 0, TwoTensor(torch.ones(4), torch.ones(4))),
        r"grads\[0\] is a TwoTensor",
    ),
    "wrapped moment": (
        replace("exp_avgs", 1, Wrapper(torch.ones(4))),
        r"exp_avgs\[1\], a Wrapper .* no memory",
    ),
    "wrapped step": (replace("steps", 1, Wrapper(torch.tensor(0.0))), r"steps\[1\], a Wrapper .* no memory"),
    "wrapped norms": (put(sq_norms=Wrapper(torch.ones(2))), r"sq_norms, a Wrapper .* no memory"),
    "wrapped scale": (put(grad_scale=Wrapper(torch.ones(1))), r"grad_scale, a Wrapper .* no memory"),
    "wrapped lr": (put(lr=TwoTensor(torch.tensor(1.0), torch.tensor(1.0))), r"lr is a TwoTensor"),
    "freed": (replace("params", 1, freed()), r"params\[1\], a Tensor .* no memory"),
    "freed gradient": (replace("grads", 2, freed()), r"grads\[2\], a Tensor .* no memory"),
    "all on meta": (on_meta, r"params\[0\], a Tensor on meta, has no memory"),
    "negative step": (
        replace("steps", 1, torch._neg_view(torch.tensor(-1.0))),
        r"steps\[1\] is a negative view",
    ),
    "negative norms": (put(sq_norms=torch._neg_view(torch.ones(2))), r"sq_norms is a negative view"),
    "no gradient": (replace("grads", 1, None), r"grads\[1\] is None: give a tensor"),
    "norms a list": (put(sq_norms=[0.0]), r"sq_norms is \[0.0\]: give a float32 tensor"),
    "mask a scalar": (put(active=torch.tensor(True)), r"active is bool of shape \(\)"),
    "maximize a word": (put(maximize="no"), r"maximize is 'no': give True or False"),
    "mask a bool": (put(active=True), r"active is True: give a list of bools"),
    "mask of numbers": (put(active=[True, 1]), r"active\[1\] is 1: give bools"),
    "mask of words": (put(active=["no", "yes"]), r"active\[0\] is 'no': give bools"),
    "layer a word": (put(layer_index=["a", 1, 1]), r"layer_index\[0\] is 'a': give integers"),
    "layers a number": (put(layer_index=3), r"layer_index is 3: give a list of integers"),
    "complex layers": (put(layer_index=torch.zeros(3) * 1j), r"layer_index .* complex64"),
    "layer far too high": (
        put(layer_index=[0, 10**12, 1], active=[True] * 2),
        r"layer_index\[1\] is 10{12}, but",
    ),
    "layer None": (put(layer_index=[None, 1, 1]), r"layer_index\[0\] is None: give integers"),
    "no betas": (put(betas=None), r"betas is None: give two numbers"),
    "betas in words": (put(betas=("a", "b")), r"betas\[0\] is 'a': give a number"),
    "eps a tensor": (put(eps=torch.tensor(1e-8)), r"eps is tensor.*: give a number"),
    "decay a tensor": (put(weight_decay=torch.tensor(0.1)), r"weight_decay is tensor.*: give a number"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_and_changes_nothing(case):
    break_it, message = BAD[case]
    call = good()
    kept = {name: list(call[name]) for name in ("params", "exp_avgs", "exp_avg_sqs", "steps")}
    before = {name: [t.clone() for t in tensors] for name, tensors in kept.items()}
    break_it(call)
    with pytest.raises(KernelArgumentError, match=message):
        masked_adamw_(**call)
    for name, tensors in kept.items():
        assert all(same_bits(a, b) for a, b in zip(tensors, before[name], strict=True))


def test_a_good_call_updates_everything_it_is_given():
    """The first step from zero moments: as long as lr, whatever the gradient."""
    call = good()
    call["grads"][1].mul_(-8)
    masked_adamw_(**call)
    for column, values in {
        "params": (0.9, 1.1, 0.9),
        "exp_avgs": (0.1, -0.8, 0.1),
        "exp_avg_sqs": (0.001, 0.064, 0.001),
        "steps": (1.0, 1.0, 1.0),
    }.items():
        for t, value in zip(call[column], values, strict=True):
            torch.testing.assert_close(t, torch.full_like(t, value), rtol=1e-6, atol=0)


def test_numbers_of_any_kind_are_taken():
    calls = [good(), good()]
    calls[0].update(lr=0.5, betas=(0.5, 0.25), eps=0.5, weight_decay=0.25)
    calls[1].update(
        lr=np.float32(0.5), betas=[0.5, np.float64(0.25)], eps=np.float16(0.5), weight_decay=np.float32(0.25)
    )
    for call in calls:
        masked_adamw_(**call)
    for a, b in zip(calls[0]["params"], calls[1]["params"], strict=True):
        assert same_bits(a, b)
    norms = [layer_sq_norms([torch.ones(2)], [0], n) for n in (2, np.int64(2))]
    assert same_bits(*norms)


@pytest.mark.parametrize("mask", [np.array([True, False]), [np.bool_(True), np.bool_(False)]])
def test_a_mask_may_be_numpys(mask):
    call = {**good(), "active": mask}
    masked_adamw_(**call)
    assert [step.item() for step in call["steps"]] == [1, 0, 0]


@pytest.mark.parametrize("with_norms", [False, True])
def test_layers_need_no_parameters(with_norms):
    """The mask's length is the number of layers, not the highest index."""
    call = {**good(), "active": [False, True, True, True]}
    if with_norms:
        call["sq_norms"] = torch.full((4,), torch.nan)
    masked_adamw_(**call)
    assert [step.item() for step in call["steps"]] == [0, 1, 1]
    if with_norms:
        assert call["sq_norms"].tolist() == [0, 8, 0, 0]


def full(shape=(2, 2)) -> dict:
    """A call with every column, of values that differ."""
    generator = torch.Generator().manual_seed(0)
    columns = ("grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
    call = {name: [torch.rand(shape, generator=generator) + 0.5 for _ in range(2)] for name in columns}
    call["params"] = [torch.randn(shape, generator=generator).to(BF16) for _ in range(2)]
    call["remainders"] = [torch.full(shape, -77, dtype=torch.int16) for _ in range(2)]
    call["steps"] = [torch.tensor(3.0) for _ in range(2)]
    return {**call, **HYPER}


WRITTEN = ["params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "remainders"]


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("strides", [(1, 1), (0, 1), (2, 0), (1, 0), (3, 3)])
def test_elements_that_share_memory_are_refused(name, strides):
    call = full()
    call[name][1] = torch.ones(7, dtype=call[name][1].dtype).as_strided((2, 2), strides)
    before = {column: [t.clone() for t in call[column]] for column in (*WRITTEN, "steps")}
    with pytest.raises(KernelArgumentError, match=rf"{name}\[1\] has strides \({strides[0]}, {strides[1]}\)"):
        masked_adamw_(**call)
    for column, tensors in before.items():
        assert all(torch.equal(a, b) for a, b in zip(call[column], tensors, strict=True))


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("strides", [(2, 1), (1, 2), (5, 2), (2, 5), (1, 4)])
def test_gaps_between_elements_are_no_matter(name, strides):
    call, expected = full(), full()
    call[name][1] = torch.empty(8, dtype=call[name][1].dtype).as_strided((2, 2), strides).copy_(call[name][1])
    for arguments in (call, expected):
        masked_adamw_(**arguments)
    for column in WRITTEN:
        assert all(torch.equal(a, b) for a, b in zip(call[column], expected[column], strict=True))


def test_layers_that_mean_nothing_take_no_memory():
    """Neither norms nor a mask: the highest index is no number of layers."""
    call = {**good(), "layer_index": [0, 10**12, 1]}
    masked_adamw_(**call)
    expected = good()
    masked_adamw_(**expected)
    assert all(same_bits(a, b) for a, b in zip(call["params"], expected["params"], strict=True))


def negative_view(t: torch.Tensor) -> torch.Tensor:
    """Equal to `t`; what stands in memory is its negative."""
    return torch._neg_view(-t)


@pytest.mark.parametrize("order", ["contiguous", "transposed"])
@pytest.mark.parametrize("name", [*WRITTEN, "grads"])
def test_negative_views_are_what_they_say(name, order):
    """Their sign stands beside their elements, where an address does not lead."""
    call, expected = full(), full()
    call[name] = [negative_view(t if order == "contiguous" else t.T.contiguous().T) for t in call[name]]
    for arguments in (call, expected):
        masked_adamw_(**arguments)
    assert all(t.is_neg() for t in call[name])
    for column in WRITTEN:
        assert all(torch.equal(a, b) for a, b in zip(call[column], expected[column], strict=True)), column


@pytest.mark.parametrize("name", ["grad_scale", "clip_coef", "lr"])
def test_negative_scalars_are_what_they_say(name):
    call, expected = full(), full()
    call[name], expected[name] = negative_view(torch.tensor(0.25)), torch.tensor(0.25)
    for arguments in (call, expected):
        masked_adamw_(**arguments)
    for column in WRITTEN:
        assert all(torch.equal(a, b) for a, b in zip(call[column], expected[column], strict=True)), column


class Named(torch.Tensor):
    """A subclass that holds its elements itself."""


@pytest.mark.parametrize("kind", [torch.nn.Parameter, lambda t: t.as_subclass(Named)])
def test_subclasses_with_memory_of_their_own_are_taken(kind):
    call, expected = good(), good()
    call["params"] = [kind(p) for p in call["params"]]
    for arguments in (call, expected):
        masked_adamw_(**arguments)
    for a, b in zip(call["params"], expected["params"], strict=True):
        assert same_bits(a.as_subclass(torch.Tensor), b)


def test_a_compilers_tensors_are_taken():
    """Fake and functional ones have no memory yet; neither has an empty one."""
    with FakeTensorMode():
        check_addressable("fake", torch.ones(2))
    with FunctionalTensorMode():
        check_addressable("functional", FunctionalTensor.to_functional(torch.ones(2)))
    functional = torch.func.functionalize(lambda g: layer_sq_norms([g], [0], 1))
    if not _triton.INTERPRETING:
        assert functional(torch.ones(3)).tolist() == [3]
    check_memory({"empty": [torch.ones(0)], "functional": [torch._to_functional_tensor(torch.ones(2))]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([torch.ones(2, dtype=F64)], [0], 1), r"grads\[0\] is float64"),
        (([torch.ones(2)], [0], -1), r"num_layers is -1"),
        (([torch.ones(2)], [0], 1.0), r"num_layers is 1.0"),
        (([torch.ones(2)], [0], "1"), r"num_layers is '1'"),
        (([freed()], [0], 1), r"grads\[0\], a Tensor .* no memory"),
        (([Wrapper(torch.ones(2))], [0], 1), r"grads\[0\], a Wrapper .* no memory"),
        (([None], [0], 1), r"grads\[0\] is None"),
        ((None, [0], 1), r"grads is NoneType: give a list"),
        ((torch.ones(2), [0], 1), r"grads is Tensor: give a list"),
        (([torch.ones(2)], [1], 1), r"layer_index\[0\] is 1, but there are 1 layers"),
        (([torch.ones(2)], [0, 0], 1), r"layer_index has 2 entries for 1"),
        (([torch.ones(2), torch.ones(2, device=meta)], [0, 0], 1), r"grads\[1\] is on meta"),
        (([torch.ones(2), torch.ones(2).to_sparse()], [0, 0], 1), r"grads\[1\] is sparse_coo"),
    ],
)
def test_norms_refuse(arguments, message):
    with pytest.raises(KernelArgumentError, match=message):
        layer_sq_norms(*arguments)


def test_is_supported():
    every = [
        (p, g, s) for p in (F32, BF16, F16, F64) for g in (F32, BF16, F16, F64) for s in (F32, BF16, F16, F64)
    ]
    assert {c for c in every if is_supported(*c)} == set(COMBINATIONS)
    assert not is_supported(torch.complex64, torch.complex64, F32)
    assert not is_supported(torch.int32, torch.int32, torch.int32)
