"""The kernels as torch operators, under `torch.compile` and with fake tensors.

Would catch: an operator that a compiler may reorder or drop because it declares no mutation; a graph break at
a call of the kernels; an argument lost between a call and its operator; an eager call that pays for the
dispatcher; a fake implementation that touches memory, or allocates other than what a launch does; an
optimizer whose step cannot stand in a compiled function; version counters that stand still under a compiler.
"""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import grass
import grass_kernels
from grass_kernels import AdamWPlan, TensorLists, layer_sq_norms, masked_adamw_
from tests.support.buffers import same_bits
from tests.support.oracle import BF16, F32

HYPER = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def lists(dtype=F32, *, amsgrad=False, remainders=False, seeds=False):
    torch.manual_seed(0)
    shapes = [(40,), (3, 7), ()]
    given = {
        "params": [torch.randn(s).to(dtype) for s in shapes],
        "grads": [torch.randn(s).to(dtype) for s in shapes],
        "exp_avgs": [torch.randn(s) for s in shapes],
        "exp_avg_sqs": [torch.rand(s) for s in shapes],
        "steps": [torch.tensor(float(i)) for i in range(3)],
    }
    if amsgrad:
        given["max_exp_avg_sqs"] = [torch.rand(s) for s in shapes]
    if remainders:
        given["remainders"] = [torch.zeros(s, dtype=torch.int16) for s in shapes]
        given["remainders"][1] = None
    if seeds:
        given["rounding_seeds"] = [3, 4, 5]
    return given


def flat(given: dict) -> list[Tensor]:
    return [t for column in given.values() for t in column if isinstance(t, Tensor)]


OPTIONS = {
    "plain": ({}, {"lr": 0.1}),
    "all": (
        {"amsgrad": True},
        {
            "lr": torch.tensor(0.1), "layer_index": [0, 1, 1], "active": [False, True], "maximize": True,
            "grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(0.0), "clip_coef": torch.tensor(0.5),
        },
    ),
    "mask": ({}, {"lr": 0.1, "layer_index": torch.tensor([0, 1, 1]), "active": torch.tensor([True, False])}),
    "remainders": ({"dtype": BF16, "remainders": True}, {"lr": 0.1}),
    "seeds": ({"dtype": BF16, "seeds": True}, {"lr": 0.1}),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_a_compiled_call_is_the_eager_one_without_a_graph_break(case):
    how, options = OPTIONS[case]
    compiled_lists, eager_lists = lists(**how), lists(**how)
    norms = [torch.full((2,), torch.nan) for _ in range(2)] if "layer_index" in options else [None, None]

    def call(given, sq_norms):
        masked_adamw_(**given, sq_norms=sq_norms, **options, **HYPER)
        return [p * 2 for p in given["params"]]  # must see what the call has written

    doubled = torch.compile(call, backend="aot_eager", fullgraph=True)(compiled_lists, norms[0])
    expected = call(eager_lists, norms[1])
    for a, b in zip(flat(compiled_lists) + doubled, flat(eager_lists) + expected, strict=True):
        assert same_bits(a, b) if a.dtype != torch.int16 else torch.equal(a, b)
    if norms[0] is not None:
        assert same_bits(norms[0], norms[1])


def test_norms_in_a_compiled_function():
    grads = lists()["grads"]
    call = torch.compile(
        lambda gs: layer_sq_norms(gs, [0, 1, 1], 3, grad_scale=torch.tensor(2.0)).sqrt(),
        backend="aot_eager", fullgraph=True,
    )  # fmt: skip
    expected = layer_sq_norms(grads, [0, 1, 1], 3, grad_scale=torch.tensor(2.0)).sqrt()
    assert same_bits(call(grads), expected)


def test_a_write_under_a_compiler_counts():
    given = lists()
    before = [t._version for t in flat(given)]
    torch.compile(lambda: masked_adamw_(**given, lr=0.1, **HYPER), backend="aot_eager")()
    written = {id(t) for name, column in given.items() if name != "grads" for t in column}
    assert all(
        (t._version > version) == (id(t) in written) for t, version in zip(flat(given), before, strict=True)
    )


@pytest.mark.parametrize("case", OPTIONS)
def test_declared_mutation_and_fake_implementations_are_right(case):
    how, options = OPTIONS[case]
    sq_norms = torch.zeros(2) if "layer_index" in options else None
    every = {
        "layer_index": None, "active": None, "max_exp_avg_sqs": None, "remainders": None, "rounding_seeds": None,
        "maximize": False, "grad_scale": None, "found_inf": None, "clip_coef": None, **options, **HYPER,
    }  # fmt: skip
    given = lists(**how)
    columns = [given.pop(name) for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")]
    packed = grass_kernels.operators.pack({**every, **given, "sq_norms": sq_norms})
    # aot_dispatch tests want a differentiable result
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.grass_kernels.masked_adamw_, tuple(columns), packed, test_utils=utils)
    torch.library.opcheck(
        torch.ops.grass_kernels.layer_sq_norms, (columns[1], [0, 0, 1], 2), test_utils=utils
    )


def test_an_eager_call_bypasses_the_dispatcher():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watch():
        masked_adamw_(**lists(), lr=0.1, **HYPER)
        layer_sq_norms(lists()["grads"], [0, 0, 0], 1)
        torch.ops.grass_kernels.layer_sq_norms(lists()["grads"], [0, 0, 0], 1)
    assert seen.count("grass_kernels::layer_sq_norms") == 1  # the last: the watch sees operators
    assert "grass_kernels::masked_adamw_" not in seen


def test_fake_tensors_are_taken():
    with FakeTensorMode():
        columns = [[torch.empty(1 << 40) for _ in range(3)] for _ in range(4)]
        steps = [torch.empty(()) for _ in range(3)]
        masked_adamw_(*columns, steps, lr=0.1, **HYPER)
        norms = layer_sq_norms(columns[1], [0, 1, 1], 2)
    assert isinstance(norms, FakeTensor)
    assert norms.shape == (2,)
    assert norms.dtype == F32


@pytest.mark.parametrize("count", [1, 300])
def test_fake_tensors_learn_what_a_launch_allocates(count):
    """Rows and chunks, inputs, coefficients and partial sums: as a plan has them, a thousandth of the moments."""
    numel, layers = (1 << 22) // count + 5, 7
    tensors = [torch.empty(numel) for _ in range(count)]
    lists = TensorLists(
        *[tensors] * 4,
        *[[None] * count] * 2,
        [torch.zeros(()) for _ in range(count)],
        [0] * count,
        [None] * count,
    )
    plan = AdamWPlan(lists, layers, torch.device("cpu"))
    held = [plan.table.data, plan._inputs.data, plan._coefficients, plan._partials]
    told = grass_kernels.operators.workspace(tensors, layers, 1)
    assert [(t.dtype, t.numel()) for t in told] == [(t.dtype, t.numel()) for t in held]
    if count == 1:
        assert sum(t.nbytes for t in held) < 0.001 * 2 * tensors[0].nbytes


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("fused_by_inductor", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_optimizer_steps_in_a_compiled_function(fused_by_inductor):
    """A graph break, and the same numbers."""
    backend = "inductor" if fused_by_inductor else "aot_eager"
    models = [torch.nn.Linear(4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [grass.AdamW(m.parameters(), lr=0.1, max_grad_norm=0.5) for m in models]

    def train(model, optimizer, x):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    compiled = torch.compile(train, backend=backend)
    for step in range(3):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        compiled(models[0], optimizers[0], x)
        train(models[1], optimizers[1], x)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert optimizers[0].state[models[0].weight]["step"] == 3
