"""Would catch: a mode of offloading, or fused backward, that trains otherwise than plain training by a bit: in weights,
moments, remainders, counters, norms, importance, draws or in what is frozen; bytes that are counted wrong, or moved
without need; device memory that is not what was asked for; a float64 parameter that is lost on the way.

Every case is trained plainly and in every mode, on parameters of all shapes, with buffers of about a chunk.
"""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grass
from tests.support import ragged, tiny
from tests.support.ragged import MEBIBYTE, Ragged

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")

STEPS = 11

STREAMED = {"offload": "streamed"}  # with the smallest buffers that there can be
RESIDENT = {"offload": "resident"}
FUSED = {"fused_backward": True}
MODES: dict[str, dict[str, Any]] = {
    "streamed": STREAMED,
    "resident": RESIDENT,
    "fused streamed": {**STREAMED, **FUSED},
    "fused resident": {**RESIDENT, **FUSED},
}
RINGS: dict[str, dict[str, Any]] = {
    "none at all": FUSED,
    "one buffer": {**STREAMED, "buffer_count": 1},
    "three buffers": {**STREAMED, "buffer_count": 3},
    "of a few chunks": {**STREAMED, "buffer_mb": 0.25},
    "of layers": {**STREAMED, "buffer_mb": 1, "buffer_count": 4},
    "fused, one buffer": {**STREAMED, **FUSED, "buffer_count": 1},
    "fused, three buffers": {**STREAMED, **FUSED, "buffer_count": 3},
}


def sometimes_missing(name: str, index: int) -> bool:
    """A weight in every third step, a whole layer in others, and all that is in no layer in one."""
    if index == 5:
        return name in ("table", "head")
    return (index % 3 == 0 and name.endswith("weight")) or (index % 2 == 0 and name.startswith("blocks.1."))


def by_dimensions(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups that differ in all they can; slots have parameters of both."""
    params = list(model.parameters())
    wide = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3, "maximize": True}
    return [
        {"params": [p for p in params if p.dim() < 2]},
        {"params": [p for p in params if p.dim() > 1], **wide},
    ]


def amsgrad_for_some(model: nn.Module) -> list[dict[str, Any]]:
    first, second = by_dimensions(model)
    return [first, {**second, "amsgrad": True}]


HALF = {"dtype": torch.bfloat16}
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": HALF,
    "float16": {"dtype": torch.float16},
    "exact weights": {**HALF, "options": {"master_weights": True}},
    "exact weights, bfloat16 moments, amsgrad": {
        **HALF,
        "options": {"master_weights": True, "state_dtype": torch.bfloat16, "amsgrad": True},
    },
    "stochastic rounding": {**HALF, "options": {"stochastic_rounding": True}},
    "bfloat16 moments": {"options": {"state_dtype": torch.bfloat16}},
    "amsgrad": {"options": {"amsgrad": True}},
    "maximize": {"options": {"maximize": True}},
    "clipping": {"options": {"max_grad_norm": 0.5}},
    "clipping exact weights": {**HALF, "options": {"max_grad_norm": 0.5, "master_weights": True}},
    "groups": {"groups": by_dimensions},
    "amsgrad for some": {"groups": amsgrad_for_some},
    "schedule": {"schedule": True},
    "reset": {"config": {"moments": "reset"}},
    "reset exact weights": {
        **HALF, "config": {"moments": "reset"}, "options": {"master_weights": True},
    },
    "late draw": {"config": {"draw_ahead": 0}},
    "early draw": {"config": {"draw_ahead": 2}},
    "every step": {"config": {"sample_interval": 1, "update_interval": 2}},
    "overlapping sets": {"config": {"active_layers": 3}},
    "nothing outside": {"config": {"always_active": "none"}},
    "patterns": {"config": {"always_active": ("head", "blocks.*.bias", "blocks.2.turned")}},
    "no probe": {"config": {"probe_steps": 0}},
    "uniform": {"config": {"sampler": "uniform"}},
    "accumulation": {"micro_batches": 3},
    "missing gradients": {"without": sometimes_missing},
    "missing gradients, reset": {"without": sometimes_missing, "config": {"moments": "reset"}},
    "missing gradients, groups": {"without": sometimes_missing, "groups": by_dimensions},
    "tensor rate": {"lr": torch.tensor(1e-2)},
    "float64": {"dtype": torch.float64},
}  # fmt: skip


def start(case: dict[str, Any], **mode: Any) -> tuple[Ragged, grass.GrassAdamW]:
    model = ragged.ragged(case.get("dtype", torch.float32))
    amsgrad = case.get("groups") is amsgrad_for_some
    smallest = ragged.smallest(model.head, **{"amsgrad": amsgrad, **case.get("options", {})})
    settings = ragged.config(**{"buffer_mb": smallest / MEBIBYTE, **case.get("config", {}), **mode})
    params = case["groups"](model) if "groups" in case else model
    lr = case.get("lr", 1e-2)
    extra = {"pattern": "blocks.*", "config": settings, **case.get("options", {})}
    return model, grass.GrassAdamW(params, lr=lr, model=model, **extra)


def assert_same_run(found: dict[str, Any], expected: dict[str, Any], mode: dict[str, Any]) -> None:
    """Bit by bit. Only the norm of all gradients is added up layer by layer where layers are updated so."""
    if mode.get("fused_backward"):
        for moment, other in zip(found["steps"], expected["steps"], strict=True):
            torch.testing.assert_close(moment["grad_norm"], other["grad_norm"], rtol=1e-6, atol=0)
            moment["grad_norm"] = other["grad_norm"]
    tiny.assert_identical(found, expected)


def steps(case: dict[str, Any], model: Ragged, opt: grass.GrassAdamW) -> Iterator[ragged.Moment]:
    schedule = None
    if case.get("schedule"):
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min(step, 12 - step) / 6)
    count, without = case.get("micro_batches", 1), case.get("without")
    for index in range(STEPS):
        yield from ragged.steps(model, opt, index, index + 1, count, without)
        if schedule is not None:
            schedule.step()


@functools.cache
def plain(name: str) -> dict[str, Any]:
    model, opt = start(CASES[name])
    return ragged.outcome(model, opt, list(steps(CASES[name], model, opt)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_every_mode_is_plain_training_to_the_bit(name: str, mode: str) -> None:
    case = CASES[name]
    if "max_grad_norm" in case.get("options", {}) and MODES[mode].get("fused_backward"):
        pytest.skip("fused backward cannot clip, and says so: test_offload_input.py")
    model, opt = start(case, **MODES[mode])
    found = ragged.outcome(model, opt, list(steps(case, model, opt)))
    assert_same_run(found, plain(name), MODES[mode])


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("name", ["float32", "exact weights", "missing gradients, groups"])
def test_every_ring_is_plain_training_to_the_bit(name: str, ring: str) -> None:
    model, opt = start(CASES[name], **RINGS[ring])
    found = ragged.outcome(model, opt, list(steps(CASES[name], model, opt)))
    assert_same_run(found, plain(name), RINGS[ring])


def test_the_cases_train() -> None:
    """Else all modes could be equal because nothing happens."""
    for name in CASES:
        before = dict(start(CASES[name])[0].named_parameters())
        after = plain(name)
        moved = {n for n, p in after["weights"].items() if not torch.equal(p, before[n])}
        layers = {n.split(".")[1] for n in moved if n.startswith("blocks")}
        assert len(layers) >= 3, name
        assert len({moment["active"] for moment in after["steps"]}) > 1, name
        assert all(n in moved for n in ("blocks.2.turned", "blocks.2.weight")), name


def test_small_units_really_cut_layers() -> None:
    model, opt = start({}, **STREAMED)
    list(steps({}, model, opt))
    units = [opt._offload.units(layer) for layer in opt.active_layers]
    assert all(len(members) > 1 for members in units)
    pieces = [piece for members in units for unit in members for piece in unit.pieces]
    assert len(pieces) > len({piece.param for piece in pieces}), "some parameter is in two units"


# -- gradients and losses of other kinds ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_lie_otherwise_than_their_parameters(mode: str) -> None:
    def turn(p: Tensor) -> None:
        p.grad = p.grad.t().contiguous().t()

    def run(**options: Any) -> dict[str, Any]:
        model = ragged.ragged()
        for block in model.blocks:  # before the optimizer's own hooks
            block.weight.register_post_accumulate_grad_hook(turn)
            block.turned.register_post_accumulate_grad_hook(turn)
        opt = grass.GrassAdamW(model, lr=1e-2, config=ragged.config(**options), pattern="blocks.*")
        return ragged.outcome(model, opt, list(ragged.steps(model, opt, 0, STEPS)))

    assert_same_run(run(**MODES[mode]), run(), MODES[mode])


@pytest.mark.parametrize("mode", MODES)
def test_float32_gradients_of_bfloat16_parameters(mode: str) -> None:
    def widen(p: Tensor) -> None:
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        grad = p.grad.float() + 1e-4 * noise
        p.grad = None
        p.grad_dtype = torch.float32
        p.grad = grad

    def run(**options: Any) -> dict[str, Any]:
        model = ragged.ragged(torch.bfloat16)
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(widen)
        opt = grass.GrassAdamW(model, lr=1e-2, config=ragged.config(**options), pattern="blocks.*")
        return ragged.outcome(model, opt, list(ragged.steps(model, opt, 0, STEPS)))

    assert_same_run(run(**MODES[mode]), run(), MODES[mode])


@pytest.mark.parametrize("mode", [mode for mode in MODES if "fused" not in mode])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("overflow", ["blocks.1.weight", "head"])
def test_a_scaler_with_an_overflow(mode: str, clip: float | None, overflow: str) -> None:
    def run(**options: Any) -> dict[str, Any]:
        model = ragged.ragged()
        opt = grass.GrassAdamW(
            model, lr=1e-2, config=ragged.config(active_layers=4, **options), pattern="blocks.*",
            max_grad_norm=clip,
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


@pytest.mark.parametrize("mode", MODES)
def test_float64_parameters_among_others_keep_their_states_beside_them(mode: str) -> None:
    def run(**options: Any) -> dict[str, Any]:
        model = ragged.ragged()
        for block in model.blocks:
            block.turned.data = block.turned.data.double()
        opt = grass.GrassAdamW(model, lr=1e-2, config=ragged.config(**options), pattern="blocks.*")
        return ragged.outcome(model, opt, list(ragged.steps(model, opt, 0, STEPS)))

    assert_same_run(run(**MODES[mode]), run(), MODES[mode])


@pytest.mark.parametrize("mode", MODES)
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
