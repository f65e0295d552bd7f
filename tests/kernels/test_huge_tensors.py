"""Elements beyond the 2^31st and the 2^32nd, without the memory for them.

A kernel knows a tensor by its addresses, its size and its chunks. So a small tensor is told to be the last two
chunks of a huge one: the addresses lie as far before it as the huge tensor would begin, and only those two
chunks are listed.

Would catch: an offset, a chunk's number, a partial sum's place or a random number's counter in 32 bits.
"""

import pytest
import torch

from grass_kernels import AdamWPlan, Hyperparameters, TensorLists, reference, rounding
from grass_kernels.inputs import split_lr
from grass_kernels.reference import Tensors
from grass_kernels.table import CHUNK, COLUMNS
from tests.support.buffers import bits, interpreter_only, same_bits

pytestmark = interpreter_only
LENGTH = CHUNK + 77


class ShiftedPlan(AdamWPlan):
    """The plan of one small tensor, as the end of a huge one: `shift` chunks lie before it."""

    def __init__(self, lists: TensorLists, shift: int) -> None:
        super().__init__(lists, 1, torch.device("cpu"))
        row = self.table.data[: len(COLUMNS)]
        sizes = {"param": lists.params[0], "exp_avg": lists.exp_avgs[0], "exp_avg_sq": lists.exp_avg_sqs[0]}
        if lists.remainders[0] is not None:
            sizes["remainder"] = lists.remainders[0]
        for name, t in sizes.items():
            row[COLUMNS.index(name)] -= shift * CHUNK * t.element_size()
        row[COLUMNS.index("numel")] += shift * CHUNK
        row[COLUMNS.index("first_partial")] -= shift  # the partial sums before are not there either
        (run,) = self.table.runs
        self.table.data[run.start : run.start + run.num_chunks] += shift


@pytest.mark.parametrize("first", [1 << 31, (1 << 32) + CHUNK, 1 << 34])
@pytest.mark.parametrize("rounding_of", ["nearest", "master", "stochastic"])
def test_the_end_of_a_huge_tensor_is_updated_as_any_other(first, rounding_of):
    torch.manual_seed(0)
    param, grad = torch.randn(LENGTH).bfloat16(), torch.randn(LENGTH).bfloat16()
    exp_avg, exp_avg_sq, step = torch.randn(LENGTH), torch.rand(LENGTH), torch.tensor(4.0)
    remainder = torch.zeros(LENGTH, dtype=torch.int16) if rounding_of == "master" else None
    seed = 9 if rounding_of == "stochastic" else None
    expected = Tensors(
        *(None if t is None else t.clone() for t in (param, grad, exp_avg, exp_avg_sq, None, remainder))
    )
    lists = TensorLists([param], [grad], [exp_avg], [exp_avg_sq], [None], [remainder], [step], [0], [seed])
    plan = ShiftedPlan(lists, first // CHUNK)
    sq_norms = torch.full((1,), torch.nan)
    hyperparameters = Hyperparameters(*split_lr(0.1, param.device), (0.9, 0.999), 1e-8, 0.1)
    plan.upload(lists, [hyperparameters], [grad.data_ptr() - first * grad.element_size()])
    plan.begin(norms=True)
    plan.run()
    plan.finish(sq_norms)

    c = reference.coefficients(5, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    random = None
    if seed is not None:
        random = rounding.random_16_bits(seed, 5, first, LENGTH, torch.device("cpu"))
    reference.adamw_(expected, c, torch.tensor(1.0), random)
    for ours, theirs in zip((param, exp_avg, exp_avg_sq), expected[:1] + expected[2:4], strict=True):
        assert same_bits(ours, theirs)
    if remainder is not None:
        assert torch.equal(remainder, expected.remainder)
    assert same_bits(sq_norms, reference.layer_sq_norms([grad], [0], 1))
    assert bits(param).unique().numel() > 1000  # not all the same by accident
