"""Updates unit by unit, on states that are not where the table says: by kernels in the interpreter, by torch without.

Would catch: a state read or written at its home while it is away, or with another kind's shift; a chunk of a tensor
taken for another, or drawn with another's random numbers; counters that advance once a unit; coefficients of another
step or group; norms that depend on how tensors are cut; a skipped step that moves something; a method whose modes
differ when kernels do the work.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grass
import grass_kernels
from grass.offload.store import Slab
from grass.offload.units import Unit, cut
from grass_kernels import (
    AdamWPlan,
    Hyperparameters,
    Part,
    TensorLists,
    TorchPlan,
    _triton,
    layer_sq_norms,
    layout,
    masked_adamw_,
)
from grass_kernels.inputs import split_lr
from grass_kernels.table import CHUNK
from tests.support import tiny
from tests.support.buffers import interpreter_only, same_bits
from tests.support.oracle import BF16, F32

plain_only = pytest.mark.skipif(
    _triton.INTERPRETING, reason="torch's path: CPU tensors take the kernels here"
)
CPU = torch.device("cpu")
SIZES = [5, CHUNK + 300, 0, 130]
LAYERS = [0, 1, 1, 0]
GROUP_OF = [0, 1, 0, 0]
GROUPS: list[dict[str, Any]] = [
    {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "maximize": False},
    {"lr": 1e-1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.0, "maximize": True},
]
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "amsgrad": {"amsgrad": True},
    "exact": {"param": BF16, "master": True},
    "stochastic": {"param": BF16, "stochastic": True},
    "all of bfloat16": {"param": BF16, "state": BF16, "master": True, "amsgrad": True},
}


class Slabbed:
    """Parameters whose states are in a slab, and their gradients."""

    def __init__(
        self, param: torch.dtype = F32, state: torch.dtype = F32, amsgrad: bool = False, master: bool = False,
        stochastic: bool = False,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        self.params = [torch.randn(n, generator=generator).to(param) for n in SIZES]
        self.grads = [torch.randn(n, generator=generator).to(param) for n in SIZES]
        self.steps = [torch.tensor(float(t)) for t in (0, 3, 7, 100)]
        kinds = {"exp_avg": state, "exp_avg_sq": state}
        kinds |= {"max_exp_avg_sq": state} if amsgrad else {}
        kinds |= {"remainder": torch.int16} if master else {}
        self.slab = Slab(self.params, kinds, pinned=False)
        self.states: dict[str, list[Any]] = {}
        for kind, dtype in kinds.items():
            self.states[kind] = [self.slab.view(p, kind) for p in self.params]
            for view in self.states[kind]:
                values = torch.rand(view.shape, generator=generator)
                view.copy_(values * 1000 if dtype == torch.int16 else values)
        self.seeds = [40 + i if stochastic else None for i in range(len(SIZES))]

    def lists(self) -> TensorLists:
        nothing = [None] * len(SIZES)
        return TensorLists(
            params=self.params, grads=self.grads, exp_avgs=self.states["exp_avg"],
            exp_avg_sqs=self.states["exp_avg_sq"], max_exp_avg_sqs=self.states.get("max_exp_avg_sq", nothing),
            remainders=self.states.get("remainder", nothing), steps=self.steps, layers=LAYERS, seeds=self.seeds,
        )  # fmt: skip

    def units(self, capacity: int | None) -> list[Unit]:
        return cut(0, self.slab, capacity)

    def as_parts(self, units: Sequence[Unit]) -> list[grass_kernels.Unit]:
        """The units as plans take them."""
        places = {p: i for i, p in enumerate(self.params)}
        return [
            grass_kernels.Unit(
                [
                    Part(places[p.param], p.first_chunk, p.num_chunks, p.start - unit.start)
                    for p in unit.parts
                ],
                unit.host,
            )
            for unit in units
        ]

    def visits(self, units: Sequence[Unit]) -> Iterator[tuple[int, Unit, dict[str, Tensor]]]:
        """Each unit's states in a buffer, while there is no trace of them at home."""
        for number, unit in enumerate(units):
            views = unit.views(torch.full((2**20,), 0xFF, dtype=torch.uint8))
            for kind, home in unit.host.items():
                views[kind].copy_(home)
                home.view(torch.uint8).fill_(0xFF)  # NaN
            yield number, unit, views
            for kind, home in unit.host.items():
                home.copy_(views[kind])

    def snapshot(self) -> list[Tensor]:
        states = [t for column in self.states.values() for t in column]
        return [t.clone() for t in (*self.params, *states, *self.steps)]


def assert_same(a: Slabbed, b: Slabbed) -> None:
    for x, y in zip(a.snapshot(), b.snapshot(), strict=True):
        assert same_bits(x, y)


def least(problem: Slabbed) -> int:
    sections = problem.slab.sections.values()
    return CHUNK * sum(t.itemsize for t in sections) + 256 * len(sections)


def change_gradients(problem: Slabbed, step: int) -> None:
    for i, g in enumerate(problem.grads):
        g.copy_(torch.randn(g.shape, generator=torch.Generator().manual_seed(100 * step + i)))


def hyperparameters(limit: float) -> list[Hyperparameters]:
    return [
        Hyperparameters(*split_lr(g["lr"], CPU), *(g[k] for k in ("betas", "eps", "weight_decay", "maximize")), limit)
        for g in GROUPS
    ]  # fmt: skip


@interpreter_only
@pytest.mark.parametrize(("case", "clip"), [*((case, False) for case in CASES), ("exact", True)])
def test_a_plan_in_units_is_the_plan_in_one(case: str, clip: bool) -> None:
    ours, theirs = Slabbed(**CASES[case]), Slabbed(**CASES[case])
    units = ours.units(least(ours))
    assert len(units) > 1
    whole = AdamWPlan(theirs.lists(), 2, CPU, GROUP_OF, 2)
    plan = AdamWPlan(ours.lists(), 2, CPU, GROUP_OF, 2, units=ours.as_parts(units))
    norms, expected = torch.full((2,), torch.nan), torch.full((2,), torch.nan)
    for step in range(2):
        for problem, one in ((ours, plan), (theirs, whole)):
            change_gradients(problem, step)
            limit = 0.5 if clip else math.inf
            one.upload(problem.lists(), hyperparameters(limit))
        if clip:
            plan.measure(norms)
            whole.measure(expected)
        plan.begin(norms=not clip, clip_by=norms if clip else None)
        for number, _, views in ours.visits(units):
            plan.run(number, views)
        plan.finish(None if clip else norms)
        whole.begin(norms=not clip, clip_by=expected if clip else None)
        whole.run()
        whole.finish(None if clip else expected)
        assert same_bits(norms, expected)
        assert_same(ours, theirs)


@interpreter_only
def test_a_skipped_plan_moves_nothing() -> None:
    problem = Slabbed()
    units = problem.units(least(problem))
    plan = AdamWPlan(problem.lists(), 2, CPU, GROUP_OF, 2, units=problem.as_parts(units))
    plan.upload(problem.lists(), hyperparameters(math.inf))
    before = problem.snapshot()
    plan.begin(found_inf=torch.tensor(1.0))
    for number, _, views in problem.visits(units):
        plan.run(number, views)
    assert all(same_bits(x, y) for x, y in zip(before, problem.snapshot(), strict=True))


# -- torch's path --------------------------------------------------------------------------------------------------


def run_torch_plan(problem: Slabbed, units: Sequence[Unit], **scales: Any) -> None:
    plan = TorchPlan(problem.lists(), 2, CPU, GROUP_OF, problem.as_parts(units))
    plan.upload(problem.lists(), hyperparameters(math.inf))
    plan.begin(**scales)
    for number, _, views in problem.visits(units):
        plan.run(number, views)
    plan.finish()


def run_function(problem: Slabbed, **scales: Any) -> None:
    lists = problem.lists()
    for index, group in enumerate(GROUPS):
        chosen = [i for i, of in enumerate(GROUP_OF) if of == index]
        columns = (lists.params, lists.grads, lists.exp_avgs, lists.exp_avg_sqs, lists.steps)
        optional = {
            "max_exp_avg_sqs": lists.max_exp_avg_sqs, "remainders": lists.remainders, "rounding_seeds": lists.seeds,
        }  # fmt: skip
        more = {key: [column[i] for i in chosen] for key, column in optional.items()}
        more = {key: column for key, column in more.items() if column[0] is not None}
        masked_adamw_(*([column[i] for i in chosen] for column in columns), **more, **group, **scales)


@plain_only
@pytest.mark.parametrize(
    "scales", [{}, {"grad_scale": torch.tensor(8.0), "clip_coef": torch.tensor(0.3)}], ids=len
)
@pytest.mark.parametrize("case", CASES)
def test_torchs_path_in_units_is_the_function_in_one(case: str, scales: dict[str, Tensor]) -> None:
    for chunks in (1, 2, None):
        ours, theirs = Slabbed(**CASES[case]), Slabbed(**CASES[case])
        units = ours.units(None if chunks is None else chunks * least(ours))
        for step in range(3):
            for problem in (ours, theirs):
                change_gradients(problem, step)
            run_torch_plan(ours, units, **scales)
            run_function(theirs, **scales)
            assert_same(ours, theirs)


@plain_only
def test_a_skipped_step_on_torchs_path_moves_nothing() -> None:
    problem = Slabbed()
    before = problem.snapshot()
    run_torch_plan(problem, problem.units(least(problem)), found_inf=torch.tensor(1.0))
    assert all(same_bits(x, y) for x, y in zip(before, problem.snapshot(), strict=True))
    run_torch_plan(problem, problem.units(least(problem)), found_inf=torch.tensor(0.0))
    assert [float(t) for t in problem.steps] == [1, 4, 8, 101]


@plain_only
def test_parameters_that_are_transposed_are_walked_as_they_lie() -> None:
    torch.manual_seed(0)
    values, grad = torch.randn(150, 120), torch.randn(150, 120)
    p, q = values.t().clone(memory_format=torch.preserve_format), values.t().clone()
    assert p.stride() == q.stride()
    kinds = {"exp_avg": F32, "exp_avg_sq": F32}
    slab = Slab([p], kinds, pinned=False)
    units = cut(0, slab, CHUNK * 8 + 512)
    assert len(units) == 2
    places = [slab.view(p, kind) for kind in kinds]
    parts = [
        grass_kernels.Unit([Part(0, u.parts[0].first_chunk, u.parts[0].num_chunks)], u.host) for u in units
    ]
    steps = [torch.tensor(0.0)]
    nothing: list[None] = [None]
    moments = [torch.zeros_like(q), torch.zeros_like(q)]
    counter = torch.tensor(0.0)
    for g in (grad.t(), grad.t().contiguous()):  # as the parameter lies, and otherwise
        lists = TensorLists([p], [g], [places[0]], [places[1]], nothing, nothing, steps, [0], nothing)
        lists = lists.in_layout(layout.Layout(lists.params))
        plan = TorchPlan(lists, 1, CPU, [0], parts)
        plan.upload(lists, hyperparameters(math.inf)[:1])
        plan.begin()
        for number, unit in enumerate(units):
            plan.run(number, unit.host)
        masked_adamw_([q], [g], [moments[0]], [moments[1]], [counter], **GROUPS[0])
    assert same_bits(p, q)
    assert same_bits(places[0], moments[0])


# -- the method -----------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(5))
        self.weight = nn.Parameter(torch.randn(CHUNK + 40))


class Model(nn.Module):
    """Layers of two units each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Parameter(torch.randn(300))

    def forward(self, index: int) -> Tensor:
        total = torch.zeros(())
        for place, p in enumerate(self.parameters()):
            if p.requires_grad:
                r = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * index + place))
                total = total + (0.5 * p * p + p * r.to(p)).sum()
        return total


def trained(dtype: torch.dtype, options: dict[str, Any], **mode: Any) -> dict[str, Any]:
    model = Model().to(dtype)
    settings = {"active_layers": 1, "probe_steps": 1, "sample_interval": 2, "update_interval": 2, **mode}
    config = grass.GrassConfig(
        buffer_mb=0.157 if options.get("master_weights") else 0.126, seed=1, **settings
    )
    opt = grass.GrassAdamW(model, lr=1e-2, config=config, pattern="blocks.*", **options)
    norms = []
    for index in range(5):
        model(index).backward()
        opt.step()
        opt.zero_grad()
        norms += [opt.layer_grad_norms, opt.grad_norm, opt.importance]
    state = opt.state_dict()
    state["param_groups"][0]["grass"].pop("torn", None)
    if mode.get("offload") == "streamed":
        assert len(opt._offload.units(opt.active_layers[0])) == 2
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {"weights": weights, "state": state, "norms": norms, "draws": opt.draw_counts}


@interpreter_only
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "options", "modes"),
    [
        (F32, {}, [{"offload": "streamed"}]),
        (BF16, {"master_weights": True}, [{"offload": "resident", "fused_backward": True}]),
        (BF16, {"stochastic_rounding": True}, [{"offload": "streamed", "fused_backward": True}]),
        (F32, {"max_grad_norm": 0.5}, [{"offload": "streamed", "buffer_count": 1}]),
    ],
    ids=["float32", "exact", "stochastic", "clipping"],
)
def test_every_mode_is_plain_training_to_the_bit_on_kernels(
    dtype: torch.dtype, options: dict[str, Any], modes: list[dict[str, Any]]
) -> None:
    plain = trained(dtype, options)
    for mode in modes:
        tiny.assert_identical(trained(dtype, options, **mode), plain)


@interpreter_only
def test_the_norms_are_one_calls() -> None:
    """Of all gradients at once, whatever units and hooks made of them."""
    model = Model()
    settings = {"active_layers": 2, "probe_steps": 0, "offload": "streamed", "fused_backward": True}
    config = grass.GrassConfig(buffer_mb=0.126, **settings)
    opt = grass.GrassAdamW(model, lr=1e-2, config=config, pattern="blocks.*")
    members = [*((i, p) for i, block in enumerate(model.blocks) for p in block.parameters()), (3, model.head)]
    layers, params = zip(*((i, p) for i, p in members if p.requires_grad), strict=True)
    expected = layer_sq_norms(list(torch.autograd.grad(model(0), params)), layers, 4).sqrt()
    model(0).backward()
    opt.step()
    assert same_bits(opt.layer_grad_norms, expected[:3])
