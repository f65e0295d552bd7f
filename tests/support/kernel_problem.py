"""Parameters of many sizes for the AdamW kernels, in guarded buffers."""

import torch
from torch import Tensor

from grass_kernels import masked_adamw_
from grass_kernels.table import BLOCK, CHUNK
from tests.support.buffers import Buffers, same_bits
from tests.support.oracle import F32, State

SIZES = [0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK + 77]
HYPER = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


class Problem:
    """Parameters of many sizes, with gradients, moments and counters of their own."""

    def __init__(
        self,
        buffers: Buffers,
        dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (F32, F32, F32),
        *,
        sizes: list[int] = SIZES,
        amsgrad: bool = False,
        grad_size: float = 1.0,
        steps: list[float] | None = None,
        shift: int = 0,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        param_dtype, grad_dtype, state_dtype = dtypes

        def place(dtype: torch.dtype, values: list[Tensor]) -> list[Tensor]:
            return [buffers.place(v, dtype, shift=shift) for v in values]

        self.params = place(param_dtype, [torch.randn(n) for n in sizes])
        self.grads = place(grad_dtype, [torch.randn(n) * grad_size for n in sizes])
        self.exp_avgs = place(state_dtype, [torch.randn(n) * grad_size for n in sizes])
        self.exp_avg_sqs = place(state_dtype, [torch.rand(n) * grad_size**2 for n in sizes])
        self.max_exp_avg_sqs = place(state_dtype, [torch.rand(n) * grad_size**2 for n in sizes])
        if not amsgrad:
            self.max_exp_avg_sqs = []
        steps = steps or [float(i) for i in range(len(sizes))]
        self.steps = [torch.tensor(t) for t in steps]

    def states(self) -> list[State]:
        maxima = self.max_exp_avg_sqs or [None] * len(self.params)
        columns = zip(self.params, self.exp_avgs, self.exp_avg_sqs, maxima, self.steps, strict=True)
        return [State(*(None if t is None else t.clone() for t in row)) for row in columns]

    def update(self, function=masked_adamw_, **options) -> None:
        if self.max_exp_avg_sqs:
            options["max_exp_avg_sqs"] = self.max_exp_avg_sqs
        function(self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps, **options)

    def changed(self, before: list[State]) -> list[bool]:
        return [
            any(a is not None and not same_bits(a, b) for a, b in zip(now, then, strict=True))
            for now, then in zip(self.states(), before, strict=True)
        ]


def assert_same(a: Problem, b: Problem) -> None:
    for one, other in zip(a.states(), b.states(), strict=True):
        for field, x, y in zip(State._fields, one, other, strict=True):
            assert (x is None and y is None) or same_bits(x, y), field
