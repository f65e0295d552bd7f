"""Would catch: a mode of offloading, or fused backward, that trains otherwise than plain training by a bit: in weights,
moments, remainders, counters, norms, importance, draws or in what is frozen; bytes that are counted wrong, or moved
without need; device memory that is not what was asked for; a float64 parameter that is lost on the way; one of four
kinds of states that is not written back; a step that forgets the scale or the overflow that a GradScaler tells it.

Every case is trained plainly and in a mode, on parameters of all shapes, with buffers of about a chunk. Every two
values that may be combined meet in one of the cases.
"""

import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import grass
from tests.support import ragged, tiny
from tests.support.pairwise import pairwise
from tests.support.ragged import MEBIBYTE, Ragged

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")

STEPS = 9  # three periods
HALF = torch.bfloat16

STREAMED = {"offload": "streamed"}  # with the smallest buffers that there can be
RESIDENT = {"offload": "resident"}
FUSED = {"fused_backward": True}
MODES: dict[str, dict[str, Any]] = {
    "streamed": STREAMED,
    "resident": RESIDENT,
    "fused": FUSED,
    "fused streamed": {**STREAMED, **FUSED},
    "fused resident": {**RESIDENT, **FUSED},
}
RINGS: dict[str, dict[str, Any]] = {
    "no ring": {},
    "three buffers": {},
    "one buffer": {"buffer_count": 1},
    "two buffers": {"buffer_count": 2},
    "buffers of layers": {"buffer_mb": 1, "buffer_count": 4},
}


def sometimes_missing(name: str, index: int) -> bool:
    """A weight in every third step, a whole layer in others, and all that is in no layer in one."""
    if index == 5:
        return name in ("table", "head")
    return (index % 3 == 0 and name.endswith("weight")) or (index % 2 == 0 and name.startswith("blocks.1."))


def in_another_order(model: Ragged) -> None:
    def turn(p: Tensor) -> None:
        p.grad = p.grad.t().contiguous().t()

    for block in model.blocks:
        block.weight.register_post_accumulate_grad_hook(turn)
        block.turned.register_post_accumulate_grad_hook(turn)


def in_float32(model: Ragged) -> None:
    def widen(p: Tensor) -> None:
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        grad = p.grad.float() + 1e-4 * noise
        p.grad = None
        p.grad_dtype = torch.float32
        p.grad = grad

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(widen)


def some_in_float64(model: Ragged) -> None:
    for block in model.blocks:
        block.turned.data = block.turned.data.double()


def by_dimensions(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups that differ in all they can; buckets have parameters of both."""
    params = list(model.parameters())
    wide = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3, "maximize": True}
    return [
        {"params": [p for p in params if p.dim() < 2]},
        {"params": [p for p in params if p.dim() > 1], **wide},
    ]


def amsgrad_for_some(model: nn.Module) -> list[dict[str, Any]]:
    first, second = by_dimensions(model)
    return [first, {**second, "amsgrad": True}]


class Case(NamedTuple):
    """Keys of the dictionaries below."""

    mode: str
    ring: str
    weights: str
    settings: str
    gradients: str
    rate: str
    moments: str
    draws: str
    active: str
    outside: str
    start: str


WEIGHTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": HALF},
    "float16": {"dtype": torch.float16},
    "exact": {"dtype": HALF, "options": {"master_weights": True}},
    "stochastic": {"dtype": HALF, "options": {"stochastic_rounding": True}},
    "some float64": {"prepare": some_in_float64},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16 moments": {"options": {"state_dtype": HALF}},
    "amsgrad": {"options": {"amsgrad": True}},
    "clipping": {"options": {"max_grad_norm": 0.5}},
    "groups": {"groups": by_dimensions},
    "amsgrad for some": {"groups": amsgrad_for_some},
}
GRADIENTS: dict[str, dict[str, Any]] = {
    "all": {},
    "missing": {"without": sometimes_missing},
    "accumulated": {"micro_batches": 3},
    "turned": {"hook": in_another_order},
    "float32": {"hook": in_float32},
}
RATES: dict[str, dict[str, Any]] = {
    "number": {},
    "tensor": {"lr": torch.tensor(1e-2)},
    "schedule": {"schedule": True},
}
METHOD: list[dict[str, dict[str, Any]]] = [  # the last columns of a case
    {"keep": {}, "reset": {"moments": "reset"}},
    {
        "one ahead": {}, "late": {"draw_ahead": 0}, "early": {"draw_ahead": 2},
        "every step": {"sample_interval": 1, "update_interval": 2},
    },
    {"two": {}, "three": {"active_layers": 3}},
    {
        "outside": {}, "nothing": {"always_active": "none"},
        "patterns": {"always_active": ("head", "blocks.*.bias", "blocks.2.turned")},
    },
    {"probe": {}, "none": {"probe_steps": 0}, "uniform": {"sampler": "uniform"},
     "remeasured": {"sampler": "remeasured"}},
]  # fmt: skip


def is_possible(case: Case) -> bool:
    clips_late = case.settings == "clipping" and "fused" in case.mode  # refused: test_offload_input.py
    widens = case.gradients == "float32" and WEIGHTS[case.weights].get("dtype") is None
    ringless = ("streamed" in case.mode) == (case.ring == "no ring")
    return not (clips_late or widens or ringless)


COLUMNS = [list(choices) for choices in (MODES, RINGS, WEIGHTS, SETTINGS, GRADIENTS, RATES, *METHOD)]


def draw_cases() -> list[Case]:
    rng = random.Random(0)
    drawn = [Case(*map(rng.choice, COLUMNS)) for _ in range(2500)]  # of half a million; they have all pairs
    return pairwise(filter(is_possible, drawn))


CASES = draw_cases()


def options_of(case: Case, group: str) -> dict[str, Any]:
    """Options of an optimizer, from all that a case consists of."""
    parts = [WEIGHTS[case.weights], SETTINGS[case.settings], GRADIENTS[case.gradients], RATES[case.rate]]
    found: dict[str, Any] = {}
    for part in parts:
        found |= part.get(group, {})
    return found


def train(case: Case, **mode: Any) -> dict[str, Any]:
    model, moments = ragged.ragged(WEIGHTS[case.weights].get("dtype", torch.float32)), []
    WEIGHTS[case.weights].get("prepare", lambda _: None)(model)
    GRADIENTS[case.gradients].get("hook", lambda _: None)(model)  # before the optimizer's own hooks
    opt = make(case, model, **mode)
    schedule = None
    if case.rate == "schedule":
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min(step, 12 - step) / 6)
    kind = GRADIENTS[case.gradients]
    for index in range(STEPS):
        moments += ragged.steps(
            model, opt, index, index + 1, kind.get("micro_batches", 1), kind.get("without")
        )
        if schedule is not None:
            schedule.step()
    return ragged.outcome(model, opt, moments)


def make(case: Case, model: Ragged, **mode: Any) -> grass.GrassAdamW:
    options, groups = options_of(case, "options"), SETTINGS[case.settings].get("groups")
    smallest = ragged.smallest(model.head, **{"amsgrad": groups is amsgrad_for_some, **options})
    settings: dict[str, Any] = {"buffer_mb": smallest / MEBIBYTE}
    for choices, choice in zip(METHOD, case[-len(METHOD) :], strict=True):
        settings |= choices[choice]
    return grass.GrassAdamW(
        groups(model) if groups else model,
        lr=RATES[case.rate].get("lr", 1e-2),
        model=model,
        pattern="blocks.*",
        config=ragged.config(**{**settings, **mode}),
        **options,
    )


def assert_same_run(found: dict[str, Any], expected: dict[str, Any], mode: dict[str, Any]) -> None:
    """Bit by bit. Only the norm of all gradients is added up layer by layer where layers are updated so."""
    if mode.get("fused_backward"):
        for moment, other in zip(found["steps"], expected["steps"], strict=True):
            torch.testing.assert_close(moment["grad_norm"], other["grad_norm"], rtol=1e-6, atol=0)
            moment["grad_norm"] = other["grad_norm"]
    tiny.assert_identical(found, expected)


def assert_trains(case: Case, run: dict[str, Any]) -> None:
    """Else all modes could be equal because nothing happens."""
    fresh = ragged.ragged(WEIGHTS[case.weights].get("dtype", torch.float32))
    WEIGHTS[case.weights].get("prepare", lambda _: None)(fresh)
    moved = {n for n, p in fresh.named_parameters() if not torch.equal(p, run["weights"][n])}
    layers = {n.split(".")[1] for n in moved if n.startswith("blocks")}
    assert len(layers) >= 2
    assert {n.split(".")[2] for n in moved if n.startswith("blocks")} >= {"bias", "weight", "turned", "scale"}
    assert len({moment["active"] for moment in run["steps"]}) > (case.active == "two")


@pytest.mark.parametrize("case", CASES, ids="; ".join)
def test_every_mode_is_plain_training_to_the_bit(case: Case) -> None:
    expected, mode = train(case), {**MODES[case.mode], **RINGS[case.ring]}
    assert_trains(case, expected)
    assert_same_run(train(case, **mode), expected, mode)


def test_every_two_values_meet() -> None:
    pairs = sum(len(a) * len(b) for i, a in enumerate(COLUMNS) for b in COLUMNS[:i])
    impossible = 2 + 3 * 4 + 3 + 2  # rings and modes; clipping while fused; wide gradients of wide weights
    found = {((i, case[i]), (j, case[j])) for case in CASES for i in range(len(case)) for j in range(i)}
    assert len(found) == pairs - impossible


@pytest.mark.parametrize("mode", ["streamed", "resident"])
def test_states_of_all_kinds_at_once(mode: str) -> None:
    """Two moments in bfloat16, a maximum and a remainder. In the cases above they meet in pairs only."""
    kinds = {"state_dtype": HALF, "amsgrad": True, "master_weights": True}

    def run(**options: Any) -> dict[str, Any]:
        model = ragged.ragged(HALF)
        settings = ragged.config(**{"buffer_mb": ragged.smallest(model.head, **kinds) / MEBIBYTE, **options})
        opt = grass.GrassAdamW(model, lr=1e-2, config=settings, pattern="blocks.*", **kinds)
        return ragged.outcome(model, opt, list(ragged.steps(model, opt, 0, STEPS)))

    assert_same_run(run(**MODES[mode]), run(), MODES[mode])


@pytest.mark.parametrize("mode", ["streamed", "fused resident"])
def test_a_model_in_float64_keeps_its_states_beside_it(mode: str) -> None:
    def run(**options: Any) -> dict[str, Any]:
        model = ragged.ragged(torch.float64)
        opt = grass.GrassAdamW(model, lr=1e-2, config=ragged.config(**options), pattern="blocks.*")
        return ragged.outcome(model, opt, list(ragged.steps(model, opt, 0, STEPS)))

    assert_same_run(run(**MODES[mode]), run(), MODES[mode])


def test_small_units_really_cut_layers() -> None:
    model = ragged.ragged()
    opt = grass.GrassAdamW(model, lr=1e-2, config=ragged.config(**STREAMED), pattern="blocks.*")
    list(ragged.steps(model, opt, 0, STEPS))
    units = [opt._offload.units(layer) for layer in opt.active_layers]
    assert all(len(members) > 1 for members in units)
    parts = [part for members in units for unit in members for part in unit.parts]
    assert len(parts) > len({part.param for part in parts}), "some parameter is in two units"


# -- losses of other kinds ------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize(
    ("mode", "clip", "overflow"),
    [
        ("streamed", None, "blocks.1.weight"),
        ("streamed", 0.5, "head"),
        ("resident", None, "head"),
        ("resident", 0.5, "blocks.1.weight"),
    ],
)
def test_a_scaler_with_an_overflow(mode: str, clip: float | None, overflow: str, fused: bool | None) -> None:
    """With ``fused=True`` the step itself unscales and skips, else the scaler does."""

    def run(**options: Any) -> dict[str, Any]:
        model = ragged.ragged()
        opt = grass.GrassAdamW(
            model, lr=1e-2, config=ragged.config(active_layers=4, **options), pattern="blocks.*",
            max_grad_norm=clip, fused=fused,
        )  # fmt: skip
        amp = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        moments = []
        for index in range(STEPS):
            loss = model(index)
            if index in (4, 5):
                loss = loss + dict(model.named_parameters())[overflow].sum() * float("inf")
            amp.scale(loss).backward()
            amp.step(opt)
            amp.update()
            moments.append(
                ragged.Moment(opt.grad_norm, opt.layer_grad_norms, opt.active_layers, None, opt.importance)
            )
            opt.zero_grad()
        assert amp.get_scale() == 256
        assert opt.state[model.head]["step"] == STEPS - 3, "less the probe and two steps that were skipped"
        found = ragged.outcome(model, opt, moments)
        for moment in found["steps"]:  # inf is equal to itself, NaN is not
            moment.update(
                {k: torch.nan_to_num(moment[k], nan=-1.0) for k in ("grad_norm", "layer_grad_norms")}
            )
        return found

    assert_same_run(run(**MODES[mode]), run(), MODES[mode])


@pytest.mark.parametrize("mode", ["streamed", "fused resident"])
def test_a_transformer_with_a_closure(mode: str) -> None:
    def run(**options: Any) -> dict[str, Any]:
        model = tiny.llama(layers=4, tied=True)
        opt = grass.GrassAdamW(model, lr=1e-2, config=ragged.config(**options))
        moments = []
        for index in range(STEPS):

            def closure(index: int = index) -> Tensor:
                opt.zero_grad(set_to_none=index % 2 == 0)
                loss = tiny.loss_of(model, tiny.batch(index))
                loss.backward()
                return loss

            opt.step(closure)
            norms = opt.grad_norm, opt.layer_grad_norms
            moments.append(ragged.Moment(*norms, opt.active_layers, opt.next_active_layers, opt.importance))
        return ragged.outcome(model, opt, moments)

    assert_same_run(run(**MODES[mode]), run(), MODES[mode])
