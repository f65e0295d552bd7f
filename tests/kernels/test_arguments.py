"""What the kernels refuse, and that they refuse it before they change anything.

Would catch: a bad call that updates the first tensors and raises at the third; a message without the
position; a combination of dtypes accepted that no kernel computes; a device index read as a host value.
"""

import pytest
import torch

from grass_kernels import KernelArgumentError, is_supported, layer_sq_norms, masked_adamw_

from .conftest import same_bits
from .oracle import BF16, COMBINATIONS, F16, F32

HYPER = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
F64 = torch.float64


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
    "expanded": (replace("params", 1, torch.ones(1).expand(4)), r"params\[1\] is expanded"),
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
    "moment expanded": (replace("exp_avgs", 1, torch.zeros(1).expand(4)), r"exp_avgs\[1\] is expanded"),
    "step a number": (replace("steps", 1, 0.0), r"steps\[1\] is 0.0: give a tensor"),
    "seed a fraction": (put(rounding_seeds=[1, 1.5, 2]), r"rounding_seeds\[1\] is 1.5"),
    "layer a fraction": (put(layer_index=[0, 1.5, 1]), r"layer_index\[1\] is 1.5"),
    "remainder dtype": (put(remainders=[torch.zeros(4), None, None]), r"remainders\[0\] is float32 beside"),
    "two roundings": (put(remainders=[None] * 3, rounding_seeds=[1, 2, 3]), r"both given"),
    "lr": (put(lr=torch.ones(2)), r"lr is float32 of shape \(2,\)"),
    "lr dtype": (put(lr=torch.tensor(1)), r"lr is int64"),
    "scale dtype": (put(grad_scale=torch.tensor(1.0, dtype=F64)), r"grad_scale is float64: convert"),
    "scale number": (put(grad_scale=2.0), r"grad_scale is 2.0: give a tensor"),
    "clip shape": (put(clip_coef=torch.ones(2)), r"clip_coef is \(2,\) on cpu"),
    "clip device": (put(clip_coef=torch.ones(1, device=meta)), r"clip_coef is \(1,\) on meta"),
    "found complex": (put(found_inf=torch.tensor(1j)), r"found_inf is complex64"),
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


def test_a_good_call_is_good():
    masked_adamw_(**good())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([torch.ones(2, dtype=F64)], [0], 1), r"grads\[0\] is float64"),
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
