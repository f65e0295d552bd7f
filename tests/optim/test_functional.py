"""Steps inside transformations of `torch.func`, whose tensors have no addresses.

Would catch: a step that reads an address there, or writes a batched value into a tensor that is not; kernels that
get such a tensor instead of an error with its remedy.

Oracle: `torch.optim.AdamW`.
"""

import pytest
import torch
from torch import Tensor

import grass
from grass_kernels import KernelArgumentError

pytestmark = [  # torch's own, of its functional AdamW in these transformations
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

START = torch.arange(6.0).view(3, 2)
SETTINGS = {"lr": 0.1, "differentiable": True}


def after_steps(make: type[torch.optim.Optimizer], x: Tensor, **settings: object) -> Tensor:
    p = x.clone()
    optimizer = make([p], **settings)  # type: ignore[call-arg]
    for factor in (2.0, -1.0):
        p.grad = torch.ones_like(p) * factor  # not batched: torch's own step writes moments in place
        optimizer.step()
    return p


TRANSFORMATIONS = {
    "vmap": lambda f: torch.vmap(f)(START),
    "grad": lambda f: torch.func.grad(lambda x: f(x).square().sum())(START),
    "vmap of grad": lambda f: torch.vmap(torch.func.grad(lambda x: f(x).square().sum()))(START),
    "jvp": lambda f: torch.func.jvp(f, (START,), (torch.ones_like(START),))[1],
    "functionalize": lambda f: torch.func.functionalize(f)(START),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("settings", [{}, {"amsgrad": True, "maximize": True}])
def test_differentiable_steps_are_torchs(name: str, settings: dict) -> None:
    transform = TRANSFORMATIONS[name]
    expected = transform(lambda x: after_steps(torch.optim.AdamW, x, **SETTINGS, **settings))
    found = transform(lambda x: after_steps(grass.AdamW, x, **SETTINGS, **settings))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_step_of_the_kernels_in_vmap_is_refused_by_name() -> None:
    with pytest.raises(KernelArgumentError, match=r"parameter 0, of shape \(2,\).*differentiable=True"):
        torch.vmap(lambda x: after_steps(grass.AdamW, x))(START)
