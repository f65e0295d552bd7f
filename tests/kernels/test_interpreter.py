"""Would catch: builtins of Triton that stay replaced after a launch, or are not replaced in the next one or after one
that failed.
"""

import pytest
import torch

from grass_kernels._triton import jit, launch, tl
from grass_kernels.sq_norm import tree_sum
from tests.support.buffers import interpreter_only

pytestmark = interpreter_only


@jit()
def _norm_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):  # noqa: N803
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.static_assert(SIZE > 1)
    tl.store(out_ptr, tree_sum(x * x, SIZE))


def norm(size: int) -> float:
    x, out = torch.full((size,), 2.0), torch.zeros(1)
    launch(_norm_kernel, 1, x.device, x_ptr=x, out_ptr=out, SIZE=size)
    return out.item()


def test_builtins_are_given_back_after_every_launch():
    before = {name: getattr(tl, name) for name in dir(tl)}
    for size in (2, 1, 4):
        if size > 1:
            assert norm(size) == 4 * size
        else:
            with pytest.raises(Exception, match="Assertion"):
                norm(size)
        assert tl.core.is_builtin(tl.load)
        changed = [name for name, member in before.items() if getattr(tl, name) is not member]
        assert not changed
