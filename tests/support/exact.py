"""bfloat16 parameters with exact weights: their training, their copies, and comparison to the bit."""

import copy
import io
import pickle

import torch
from torch import Tensor, nn

import grass
from grass_kernels import _triton
from grass_kernels.rounding import join_fp32

BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
SHAPES = ((4, 5), (513,), ())
HYPER = {"lr": 1e-4, "weight_decay": 0.1}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(dtype: torch.dtype = BF16, first: int = 0) -> list[nn.Parameter]:
    """Values that bf16 holds, in any dtype."""
    values = [normal(*shape, seed=first + i).to(BF16) for i, shape in enumerate(SHAPES)]
    return [nn.Parameter(v.to(dtype)) for v in values]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    for i, p in enumerate(params):
        p.grad = normal(*p.shape, seed=1000 * (step + 1) + i).to(BF16).to(p.dtype)


def train(optimizer, params, steps) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def exact_weights(optimizer, p: Tensor) -> Tensor:
    return join_fp32(p.detach(), optimizer.state[p]["remainder"])


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_bits(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_as_fp32(actual: Tensor, expected: Tensor) -> None:
    """Equal where the kernels run; on the CPU torch's two ways to the same result differ by some ulps."""
    if _triton.INTERPRETING:
        assert_bits(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=1e-7)


def assert_same_state(one, its_params, other, others_params) -> None:
    for p, q in zip(its_params, others_params, strict=True):
        assert_bits(p.detach(), q.detach())
        assert one.state[p].keys() == other.state[q].keys()
        for key, value in other.state[q].items():
            assert one.state[p][key].dtype == value.dtype, key
            assert_bits(one.state[p][key], value)


# Ways to another optimizer with the same state


def reload(optimizer, params):
    copied = [nn.Parameter(p.detach().clone()) for p in params]
    fresh = grass.AdamW(copied, master_weights=True)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    return fresh, copied


def copy_deeply(optimizer, params):
    copied = copy.deepcopy(optimizer)
    return copied, [p for group in copied.param_groups for p in group["params"]]


def pickle_and_back(optimizer, params):
    restored = pickle.loads(pickle.dumps(optimizer))
    return restored, [p for group in restored.param_groups for p in group["params"]]
