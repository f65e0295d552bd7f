"""Failures these tests catch: a run that continues differently after a stop anywhere (in the probe, in a
period, in a window, between a draw and its switch); anything of the method that the state forgets or that
`torch.load(weights_only=True)` refuses; float32 moments rounded through the parameter's dtype; copies and
pickles that share or lose state; states of other models or configurations accepted, or refused with a trace.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import grass
from tests.support import tiny
from tests.support.twins import Twins

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")

STEPS = 16  # 3 of the probe, then more than two windows of two periods of three


def saved(model: nn.Module, opt: grass.GrassAdamW) -> dict:
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


CASES = {
    "adaptive": {},
    "reset": {"moments": "reset"},
    "early draw": {"draw_ahead": 2},
    "late draw": {"draw_ahead": 0},
    "static": {"sampler": "static"},
    "shuffled": {"sampler": "shuffled"},
    "uniform": {"sampler": "uniform"},
    "weight_norm": {"sampler": "weight_norm"},
    "cyclic": {"sampler": "cyclic"},
    "none": {"always_active": "none"},
    "remeasured": {"sampler": "remeasured"},
    "one step": {"sample_interval": 1, "update_interval": 2},
}


@pytest.mark.parametrize(("case", "micro_batches"), [*((c, 1) for c in CASES), ("adaptive", 2)])
@pytest.mark.slow
def test_stopped_anywhere_a_run_continues_bit_by_bit(case: str, micro_batches: int) -> None:
    config = tiny.config(**CASES[case])
    whole = tiny.stack(layers=4)
    opt = grass.GrassAdamW(whole, lr=1e-2, config=config)
    checkpoints = {0: saved(whole, opt)}
    for index in range(STEPS):
        tiny.train(whole, opt, index, index + 1, micro_batches)
        checkpoints[index + 1] = saved(whole, opt)
    # everywhere for the method itself; for its variants in the probe, before, at and after a draw, in windows
    stops = range(STEPS + 1) if case in ("adaptive", "reset") else (0, 2, 4, 5, 6, 11)
    for stop in stops:
        checkpoint = checkpoints[stop]
        model = tiny.stack(seed=9, layers=4)
        resumed = grass.GrassAdamW(model, lr=1e-2, config=config)
        model.load_state_dict(checkpoint["model"])
        resumed.load_state_dict(checkpoint["optimizer"])
        assert resumed.step_count == stop
        tiny.train(model, resumed, stop, STEPS, micro_batches)
        tiny.assert_same_run(whole, opt, model, resumed)
        assert resumed.active_layers == opt.active_layers
        assert resumed.next_active_layers == opt.next_active_layers


def test_a_run_can_be_taken_back_to_an_earlier_state() -> None:
    model, twin = tiny.llama(), tiny.llama()
    opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config())
    tiny.train(model, opt, 0, 2)
    checkpoint = saved(model, opt)
    tiny.train(model, opt, 2, 13)
    later = saved(model, opt)
    for state, stop in ((checkpoint, 2), (later, 13), (checkpoint, 2)):
        model.load_state_dict(state["model"])
        opt.load_state_dict(copy.deepcopy(state["optimizer"]))  # as torch's, moments are taken, not copied
        other = grass.GrassAdamW(twin, lr=1e-2, config=tiny.config())
        twin.load_state_dict(state["model"])
        other.load_state_dict(copy.deepcopy(state["optimizer"]))
        tiny.assert_same_run(model, opt, twin, other)
        tiny.train(model, opt, stop, stop + 5)
        tiny.train(twin, other, stop, stop + 5)
        tiny.assert_same_run(model, opt, twin, other)


def test_the_state_is_torchs_layout_and_the_method_in_the_first_group() -> None:
    model = tiny.stack()
    opt = grass.GrassAdamW(model, config=tiny.config())
    tiny.train(model, opt, 0, 7)
    state = opt.state_dict()
    torchs = torch.optim.AdamW(tiny.stack().parameters()).state_dict()["param_groups"][0]
    assert set(state["param_groups"][0]) == set(torchs) | {"grass"}
    assert set(state) == {"state", "param_groups"}
    assert set(state["state"]) == set(range(len(list(model.parameters()))))
    for leaf in tiny.flat(state["param_groups"][0]["grass"]).values():
        assert type(leaf) in (int, float) or isinstance(leaf, torch.Tensor)
    assert "grass" not in opt.param_groups[0], "the optimizer's own groups are torch's"


def test_bfloat16_runs_resume_with_float32_moments() -> None:
    def start() -> tuple[nn.Module, grass.GrassAdamW]:
        model = tiny.stack().bfloat16()
        return model, grass.GrassAdamW(model, lr=1e-2, config=tiny.config())

    whole, opt = start()
    tiny.train(whole, opt, 0, 7)
    checkpoint = saved(whole, opt)
    tiny.train(whole, opt, 7, STEPS)
    model, resumed = start()
    model.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["optimizer"])
    tiny.train(model, resumed, 7, STEPS)
    tiny.assert_same_run(whole, opt, model, resumed)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("stop", [0, 2, 5, 8])
@pytest.mark.parametrize("kind", ["stack", "llama"])
def test_a_copy_continues_bit_by_bit_on_its_own(how: str, stop: int, kind: str) -> None:
    model = tiny.stack() if kind == "stack" else tiny.llama(layers=3)
    opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config())
    tiny.train(model, opt, 0, stop)
    both = copy.deepcopy((model, opt)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, opt)))
    twin, other = both
    before = tiny.weights(model)
    tiny.train(twin, other, stop, STEPS)
    tiny.assert_identical(tiny.weights(model), before)
    assert opt.step_count == stop
    tiny.train(model, opt, stop, STEPS)
    tiny.assert_same_run(model, opt, twin, other)
    other.release()
    assert all(p.requires_grad for p in twin.parameters())
    assert not all(p.requires_grad for p in model.parameters())


def test_a_copy_of_the_optimizer_alone_has_parameters_of_its_own() -> None:
    model = tiny.stack()
    opt = grass.GrassAdamW(model, config=tiny.config())
    tiny.train(model, opt, 0, 6)
    other = copy.deepcopy(opt)
    tiny.assert_identical(other.state_dict(), opt.state_dict())
    with pytest.raises(grass.ParameterError, match="knows no model"):
        other.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    tiny.train(model, opt, 6, 9)


def refuses(opt: grass.GrassAdamW, model: nn.Module, state: dict, match: str) -> None:
    own, weights = tiny.flat(opt.state_dict()), tiny.weights(model)
    on = [p.requires_grad for p in model.parameters()]
    groups = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups])
    with pytest.raises(grass.StateMismatchError, match=match):
        opt.load_state_dict(state)
    tiny.assert_identical(tiny.flat(opt.state_dict()), own)
    tiny.assert_identical(tiny.weights(model), weights)
    assert [p.requires_grad for p in model.parameters()] == on
    assert [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups] == groups


def test_states_of_others_are_refused_and_change_nothing() -> None:
    def trained(model: nn.Module, lr: float = 0.5, **options: object) -> grass.GrassAdamW:
        opt = grass.GrassAdamW(model, lr=lr, config=tiny.config(**options))
        tiny.train(model, opt, 0, 5)
        return opt

    model = tiny.stack()
    opt = trained(model, lr=1e-3)
    refuses(opt, model, trained(tiny.stack(layers=6)).state_dict(), "of another model")
    refuses(opt, model, trained(tiny.stack(width=6)).state_dict(), "shape|layer map")
    wide = trained(tiny.stack(width=6)).state_dict()
    del wide["param_groups"][0]["grass"]
    refuses(opt, model, wide, "has shape")
    refuses(opt, model, trained(tiny.stack(), ema=0.9).state_dict(), "ema: saved 0.9, now 0.5")
    refuses(opt, model, trained(tiny.stack(), seed=1).state_dict(), "different GrassConfig .*seed")
    frozen = tiny.stack()
    frozen.blocks[0].requires_grad_(False)
    refuses(opt, model, trained(frozen).state_dict(), "different layer map")
    old = opt.state_dict()
    old["param_groups"][0]["grass"] = {**old["param_groups"][0]["grass"], "format": 0}
    refuses(opt, model, old, "format 0")
    tiny.train(model, opt, 5, 8)


@pytest.mark.parametrize("steps", [0, 8])
def test_a_checkpoint_of_torchs_adamw_gives_its_moments_and_one_warning(steps: int) -> None:
    torchs_model = tiny.stack()
    torchs = torch.optim.AdamW(torchs_model.parameters(), lr=1e-3)
    tiny.train(torchs_model, torchs, 0, 4)
    model = tiny.stack(seed=1)
    opt = grass.GrassAdamW(model, lr=1e-3, config=tiny.config())
    tiny.train(model, opt, 0, steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.load_state_dict(torchs.state_dict())
    assert len(caught) == 1
    assert "the method starts at its beginning" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert (opt.phase, opt.step_count, opt.num_draws) == ("probe", 0, 0)
    assert opt.importance.tolist() == [0] * 5
    assert all(p.requires_grad for p in model.parameters())
    for p, q in zip(model.parameters(), torchs_model.parameters(), strict=True):
        assert torch.equal(opt.state[p]["exp_avg"], torchs.state[q]["exp_avg"])
        assert torch.equal(opt.state[p]["exp_avg_sq"], torchs.state[q]["exp_avg_sq"])
        assert opt.state[p]["step"] == 4
    # from here on it is a fresh method: the same sets as one that starts on these weights
    fresh_model = copy.deepcopy(model) if steps == 0 else None
    tiny.train(model, opt, 0, 6)
    assert opt.state[model.head.weight]["step"] == 7
    if fresh_model is not None:
        fresh = grass.GrassAdamW(fresh_model, lr=1e-3, config=tiny.config())
        tiny.train(fresh_model, fresh, 0, 3)
        assert fresh.active_layers


def test_the_moments_alone_can_be_taken_from_a_run_of_another_configuration() -> None:
    model = tiny.stack()
    opt = grass.GrassAdamW(model, config=tiny.config(temperature=0.5))
    tiny.train(model, opt, 0, 8)
    state = opt.state_dict()
    del state["param_groups"][0]["grass"]
    other = grass.GrassAdamW(tiny.stack(), config=tiny.config())
    with pytest.warns(UserWarning, match="starts at its beginning"):
        other.load_state_dict(state)
    assert other.phase == "probe"
    assert len(other.state) > 0


def test_a_state_loaded_is_not_shared() -> None:
    model, twin = tiny.stack(), tiny.stack()
    opt, other = (grass.GrassAdamW(m, lr=1e-2, config=tiny.config()) for m in (model, twin))
    tiny.train(model, opt, 0, 5)
    state = opt.state_dict()
    before = copy.deepcopy(tiny.flat(state["param_groups"][0]["grass"]))
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    tiny.train(twin, other, 5, 12)
    tiny.assert_identical(tiny.flat(state["param_groups"][0]["grass"]), before)
    assert opt.step_count == 5


@pytest.mark.parametrize("part", ["importance", "sampler", "draw_counts"])
def test_a_damaged_state_is_refused_whole(part: str) -> None:
    model = tiny.stack()
    saved = grass.GrassAdamW(model, config=tiny.config()).state_dict()
    del saved["param_groups"][0]["grass"][part]
    opt = grass.GrassAdamW(model, config=tiny.config())
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(grass.StateMismatchError, match=part):
        opt.load_state_dict(saved)
    with pytest.raises(grass.StateMismatchError, match="param_groups"):
        opt.load_state_dict({})
    assert opt.step_count == 0
    assert [p.requires_grad for p in model.parameters()] == before


@pytest.mark.parametrize("kind", ["AdamW", "none", "streamed"])
def test_loaded_in_inference_mode(kind: str) -> None:
    """States are made there that steps outside can write to."""
    twins = Twins(kind)
    twins.go(2)
    saved = copy.deepcopy(twins.ours.state_dict())
    with torch.inference_mode():
        twins.ours.load_state_dict(saved)
    twins.go(2)


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler": "uniform"},
        {"offload": "streamed", "buffer_mb": 0.2},
        {"offload": "resident", "fused_backward": True, "moments": "reset"},
    ],
    ids=["in place", "uniform", "streamed", "fused"],
)
def test_a_restart_is_a_new_optimizer(options: dict, steps: int) -> None:
    """Would catch a method at an old step, moments, norms or draws that are left, a store with old values."""
    model = tiny.stack()
    opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(**options))
    tiny.train(model, opt, 0, steps)
    tiny.loss_of(model, tiny.batch(steps)).backward()  # ends with an error, say
    opt.restart()
    assert all(p.grad is None for p in model.parameters())
    twin = tiny.stack()
    twin.load_state_dict(model.state_dict())
    other = grass.GrassAdamW(twin, lr=1e-2, config=tiny.config(**options))
    assert opt.step_count == 0
    assert opt.grad_norm is None
    tiny.train(model, opt, 0, 10)
    tiny.train(twin, other, 0, 10)
    tiny.assert_same_run(model, opt, twin, other)
