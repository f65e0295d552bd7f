"""Bytes: what the kernels read and write, against the formulas beside them.

Would catch: a tensor read or written twice, or not at all; a gradient written; a second pass over gradients
for their norms; a frozen layer's weights or moments touched; moments read though the step is called off;
tables and coefficients that cost what the tensors cost; a formula that promises fewer bytes than are moved;
an access outside every tensor; an atomic.
"""

from contextlib import AbstractContextManager
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from grass_kernels import (
    AdamWPlan,
    TensorLists,
    arguments,
    layer_sq_norms,
    layer_sq_norms_bytes,
    masked_adamw_,
    masked_adamw_bytes,
)
from grass_kernels._triton import jit, launch, tl
from grass_kernels.inputs import Hyperparameters
from grass_kernels.table import BLOCK, CHUNK
from tests.support.aot import MIXTURES
from tests.support.buffers import Buffers, interpreter_only
from tests.support.oracle import BF16, F32, name
from tests.support.pairwise import pairwise
from tests.support.traffic import Traffic, count_traffic

pytestmark = interpreter_only

SIZES = [1, 7, BLOCK - 1, BLOCK, BLOCK + 3]
MASTER = ((BF16, BF16, F32), "master")
HYPER = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def mixture_name(mixture: tuple[tuple[torch.dtype, ...], str]) -> str:
    return f"{name(mixture[0])}-{mixture[1]}"


class Tensors:
    """Arguments of a call: lists of tensors by name, `grads` only read, all others read and written."""

    def __init__(
        self,
        buffers: Buffers,
        mixture: tuple[tuple[torch.dtype, torch.dtype, torch.dtype], str],
        sizes: list[int],
        *,
        amsgrad: bool = False,
        shift: int = 0,
    ) -> None:
        self.dtypes, self.rounding = mixture
        param, grad, moments = self.dtypes
        self.sizes, self.aligned = sizes, shift == 0
        columns = {"params": param, "grads": grad, "exp_avgs": moments, "exp_avg_sqs": moments}
        columns |= {"max_exp_avg_sqs": moments} if amsgrad else {}
        self.columns = {
            column: [buffers.place(torch.rand(n), dtype, shift=shift) for n in sizes]
            for column, dtype in columns.items()
        }
        if self.rounding == "master":
            zeros = [torch.zeros(shift + n, dtype=torch.int16) for n in sizes]
            self.columns["remainders"] = [t[shift:] for t in zeros]
        self.seeds = range(len(sizes)) if self.rounding == "stochastic" else None
        self.steps = [torch.tensor(3.0) for _ in sizes]
        self.updated = [column for column in self.columns if column != "grads"]

    def count(self) -> AbstractContextManager[Traffic]:
        return count_traffic(**self.columns, steps=self.steps)

    def update(self, sq_norms: Tensor | None = None, **options) -> Traffic:
        options = {**HYPER, "sq_norms": sq_norms, "rounding_seeds": self.seeds, **options}
        with self.count() as traffic:
            masked_adamw_(**self.columns, steps=self.steps, **options)
        return traffic

    def bytes(self) -> int:
        """The formula."""
        param, grad, moments = self.dtypes
        amsgrad = "max_exp_avg_sqs" in self.columns
        return masked_adamw_bytes(
            sum(self.sizes),
            param,
            grad_dtype=grad,
            state_dtype=moments,
            amsgrad=amsgrad,
            remainders=self.rounding == "master",
        )

    def bytes_read_again(self, numel: int) -> int:
        """Of the gradient of a parameter of that size, for the norm: what full aligned blocks have not covered."""
        return (numel % BLOCK if self.aligned else numel) * self.dtypes[1].itemsize


def assert_every_byte(counts: list[np.ndarray], times: int) -> None:
    assert all((count == times).all() for count in counts)


def check_an_update(tensors: Tensors, norms: bool) -> None:
    traffic = tensors.update(torch.empty(1) if norms else None)
    for column in (*tensors.updated, "steps"):
        assert_every_byte(traffic.reads(column), 1)
        assert_every_byte(traffic.writes(column), 1)
    assert_every_byte(traffic.writes("grads"), 0)
    again = [tensors.bytes_read_again(n) if norms else 0 for n in tensors.sizes]
    for count, twice in zip(traffic.reads("grads"), again, strict=True):
        assert (count[: len(count) - twice] == 1).all()
        assert (count[len(count) - twice :] == 2).all()
    assert traffic.bytes_of(*tensors.columns) == tensors.bytes() + sum(again)


CASES = pairwise(
    (*dtypes, rounding, *options)
    for (dtypes, rounding), *options in product(MIXTURES, (0, 1), (False, True), (False, True))
)


@pytest.mark.parametrize(
    ("param", "grad", "moments", "rounding", "shift", "amsgrad", "norms"), CASES, ids=str
)
def test_an_update_touches_every_byte_once(
    buffers: Buffers, param, grad, moments, rounding, shift, amsgrad, norms
):
    mixture = ((param, grad, moments), rounding)
    check_an_update(Tensors(buffers, mixture, SIZES, amsgrad=amsgrad, shift=shift), norms)


@pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "misaligned"])
def test_an_update_of_many_chunks_touches_every_byte_once(buffers: Buffers, shift, norms):
    check_an_update(Tensors(buffers, MASTER, [CHUNK, CHUNK + 77], shift=shift), norms)


@pytest.mark.parametrize("mixture", MIXTURES, ids=mixture_name)
def test_full_aligned_blocks_cost_what_the_formula_says(buffers: Buffers, mixture):
    """Norms included."""
    tensors = Tensors(buffers, mixture, [BLOCK, 2 * BLOCK])
    traffic = tensors.update(torch.empty(1))
    assert traffic.bytes_of(*tensors.columns) == tensors.bytes()


@pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
@pytest.mark.parametrize("on_device", [False, True], ids=["host mask", "device mask"])
def test_frozen_layers_cost_nothing(buffers: Buffers, monkeypatch, on_device, norms):
    if on_device:  # `arguments.split_mask`, if CPU memory were a device's
        monkeypatch.setattr(arguments, "split_mask", lambda active, device: (None, torch.as_tensor(active)))
    tensors = Tensors(buffers, MASTER, [*SIZES, CHUNK + 77], amsgrad=True)
    layers = [i % 2 for i in range(len(tensors.sizes))]
    traffic = tensors.update(torch.empty(2) if norms else None, layer_index=layers, active=[False, True])
    for column in tensors.columns:
        for layer, read, written in zip(layers, traffic.reads(column), traffic.writes(column), strict=True):
            assert read.any() == (layer == 1)
            assert written.any() == (layer == 1 and column != "grads")
    # A mask on the device is read in the prologue, which has loaded the counter by then.
    for layer, read, written in zip(layers, traffic.reads("steps"), traffic.writes("steps"), strict=True):
        assert read.any() == (layer == 1 or on_device)
        assert written.any() == (layer == 1)


@pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "misaligned"])
def test_a_step_called_off_reads_gradients_at_most(buffers: Buffers, shift, norms):
    tensors = Tensors(buffers, MASTER, [*SIZES, CHUNK + 77], amsgrad=True, shift=shift)
    traffic = tensors.update(torch.empty(1) if norms else None, found_inf=torch.tensor(1.0))
    assert traffic.bytes_of(*tensors.updated) == 0
    assert traffic.bytes_written("steps") == 0
    assert traffic.bytes_written("grads") == 0
    assert_every_byte(traffic.reads("grads"), int(norms))


@pytest.mark.parametrize("max_grad_norm", [1.0, 1e9], ids=["clipped", "small"])
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "misaligned"])
def test_clipping_by_the_norm_reads_gradients_once_more(buffers: Buffers, shift, max_grad_norm):
    tensors = Tensors(buffers, MASTER, [*SIZES, CHUNK + 77], shift=shift)
    nothing = [None] * len(tensors.sizes)
    given = {"max_exp_avg_sqs": nothing, **tensors.columns, "steps": tensors.steps, "seeds": nothing}
    lists = TensorLists(**given, layers=[0] * len(nothing))
    hyper = Hyperparameters(**HYPER, lr_address=0, lr_is_double=False, max_grad_norm=max_grad_norm)
    sq_norms = torch.empty(1)
    with tensors.count() as traffic:
        plan = AdamWPlan(lists, 1, torch.device("cpu"))
        plan.upload(lists, [hyper])
        plan.measure(sq_norms)
        plan.begin(clip_by=sq_norms)
        plan.run()
    for column in tensors.updated:
        assert_every_byte(traffic.reads(column), 1)
        assert_every_byte(traffic.writes(column), 1)
    assert_every_byte(traffic.reads("grads"), 2)
    numel = sum(tensors.sizes)
    assert traffic.bytes_of(*tensors.columns) == tensors.bytes() + layer_sq_norms_bytes(numel, BF16)


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", arguments.DTYPES, ids=lambda d: name((d,)))
def test_norms_read_every_gradient_once(buffers: Buffers, dtype, shift):
    sizes = [*SIZES, CHUNK + 77]
    grads = [buffers.place(torch.randn(n), dtype, shift=shift) for n in sizes]
    with count_traffic(grads=grads) as traffic:
        layer_sq_norms(grads, [i % 3 for i in range(len(sizes))], 3, grad_scale=torch.tensor(2.0))
    assert_every_byte(traffic.reads("grads"), 1)
    assert traffic.bytes_of("grads") == layer_sq_norms_bytes(sum(sizes), dtype)


def test_tables_coefficients_and_partial_sums_are_small_change(buffers: Buffers):
    """Of the update of a matrix of 256 x 512, and of its norm alone."""
    tensors = Tensors(buffers, MASTER, [256 * 512])
    options = {
        "grad_scale": torch.tensor(1.0),
        "clip_coef": torch.tensor(1.0),
        "found_inf": torch.tensor(0.0),
    }
    traffic = tensors.update(torch.empty(1), **options)
    assert {"table", "inputs", "coefficients", "partials"} <= traffic.arguments.keys()
    assert 0 < sum(traffic.arguments.values()) < 0.01 * tensors.bytes()
    grads = tensors.columns["grads"]
    with count_traffic(grads=grads) as traffic:
        layer_sq_norms(grads, [0], 1)
    assert {"table", "inputs", "partials"} <= traffic.arguments.keys()
    assert 0 < sum(traffic.arguments.values()) < 0.01 * traffic.bytes_of("grads")


# The counter itself.


@jit()
def _sum_kernel(x_ptr, out_ptr, length, reach, BLOCK: tl.constexpr):  # noqa: N803
    index = tl.arange(0, BLOCK)
    once = tl.load(x_ptr + index, mask=index < length, other=0.0)
    again = tl.load(x_ptr + index, mask=index < 3, other=0.0)
    tl.store(out_ptr + reach, tl.sum(once + again, axis=0))


def sum_kernel(x: Tensor, out: Tensor, reach: int = 0) -> None:
    launch(_sum_kernel, 1, x.device, x_ptr=x, out_ptr=out, length=x.numel(), reach=reach, BLOCK=8)


def test_the_counter_counts_accesses_not_bytes():
    x, out = torch.ones(5), torch.zeros(1)
    with count_traffic(x=[x]) as traffic:
        sum_kernel(x, out)
    assert traffic.reads("x")[0].tolist() == [2] * 12 + [1] * 8
    assert traffic.bytes_of() == 32
    assert traffic.arguments == {"x": 0, "out": 4}
    assert out.item() == 8.0
    with count_traffic(x=[x]) as traffic:
        pass
    assert traffic.bytes_of("x") == 0


def test_the_counter_reports_memory_of_no_tensor():
    buffer = torch.zeros(8)
    with (
        pytest.raises(AssertionError, match="writes of memory that belongs to no tensor"),
        count_traffic(),
    ):
        sum_kernel(torch.ones(5), buffer[:1], reach=2)
    assert buffer[2] == 8.0


@jit()
def _atomic_kernel(out_ptr):
    tl.atomic_add(out_ptr, 1.0)


def test_the_counter_reports_atomics():
    with pytest.raises(Exception, match="an atomic"), count_traffic():
        launch(_atomic_kernel, 1, torch.device("cpu"), out_ptr=torch.zeros(1))
