"""Failures these tests catch: blocks compiled one by one that are compiled again for every new set of active
layers; a compiled run that trains otherwise than the plain one; layers that are not found behind the wrapper.
"""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import grass
from tests.support import tiny

# the compiler itself looks at the gradients of activations
pytestmark = [
    pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_blocks_compiled_one_by_one_need_a_few_graphs_for_all_sets(how: str) -> None:
    counter = CompileCounter()
    model, plain = tiny.stack(), tiny.stack()
    for index, block in enumerate(model.blocks):
        if how == "wrapped":
            model.blocks[index] = torch.compile(block, backend=counter)
        else:
            block.compile(backend=counter)
    opt, plain_opt = (grass.GrassAdamW(m, lr=1e-2, config=tiny.config()) for m in (model, plain))
    assert opt.layers.names == plain_opt.layers.names
    tiny.train(model, opt, 0, 12)
    graphs, sets = counter.frame_count, {opt.active_layers}
    for index in range(12, 33):
        tiny.train(model, opt, index, index + 1)
        sets.add(opt.active_layers)
    tiny.train(plain, plain_opt, 0, 33)
    assert len(sets) >= 3
    # its weights require grad or not, its input requires grad or not
    assert counter.frame_count <= 4
    assert counter.frame_count - graphs <= 1
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert opt.draw_counts == plain_opt.draw_counts


def test_a_model_compiled_whole_trains_and_is_warned_of() -> None:
    model, plain = tiny.stack(layers=3), tiny.stack(layers=3)
    compiled: nn.Module = torch.compile(model, backend="eager")
    config = tiny.config(sampler="cyclic", active_layers=1)
    with pytest.warns(UserWarning, match="compile its blocks one by one"):
        opt = grass.GrassAdamW(compiled, lr=1e-2, config=config)
    plain_opt = grass.GrassAdamW(plain, lr=1e-2, config=config)
    tiny.train(compiled, opt, 0, 9)
    tiny.train(plain, plain_opt, 0, 9)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
