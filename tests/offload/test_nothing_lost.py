"""Would catch: states of a parameter that was given data of another size, written past their place; entries that hold
remainders alone and cannot be copied, pickled or loaded; a load that fails and leaves an optimizer without states; a
pipeline that ends while copies still read the store and write its buffers; a layer that is begun anew and sends all
others home.
"""

import copy
import functools
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import grass
from bench.offload.order import conflicts
from bench.offload.recording import RecordingEngine
from grass.offload.streams import H2D, HOST
from grass.optim.offload_manager import OffloadManager
from grass_kernels import KernelArgumentError
from tests.support import ragged, tiny
from tests.support.trainings import EXACT, MODES, OFFLOADED, STEPS, outcome, start, train

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")

# -- data of another size --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [2, 40])
def test_data_of_another_size_is_refused_and_nothing_changes(mode: str, rows: int) -> None:
    """A place that was laid out for fewer elements was written past its end: heap corruption, when resident."""
    torch.manual_seed(0)
    model = tiny.stack(width=64)
    opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(**MODES[mode]))
    tiny.train(model, opt, 0, 5)
    opt.state_dict()  # brings resident states home
    grown = model.head.weight
    kept = grown.data
    before = {key: value.clone() for key, value in opt.state[grown].items()}
    weights = tiny.weights(model)
    grown.data = kept.repeat(rows, 1)
    model.head.out_features *= rows
    with pytest.raises(KernelArgumentError, match=r"drop the parameter's state to start it anew"):
        tiny.train(model, opt, 5, 6)
    model.zero_grad()
    grown.data = kept
    opt.state_dict()
    tiny.assert_identical({key: value.clone() for key, value in opt.state[grown].items()}, before)
    if not opt.config.fused_backward:  # there layers are updated one by one
        tiny.assert_identical(tiny.weights(model), weights)


def test_a_state_dropped_for_other_data_begins_anew() -> None:
    def trained(mode: str) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = tiny.stack(width=64)
        opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(**MODES[mode]))
        tiny.train(model, opt, 0, 5)
        grown = model.head.weight
        grown.data = grown.data.repeat(2, 1)
        del opt.state[grown]
        tiny.train(model, opt, 5, 9)
        return tiny.weights(model), opt.state_dict()["state"]

    for mode in OFFLOADED:
        tiny.assert_identical(trained(mode), trained("none"))


# -- entries without a counter ---------------------------------------------------------------------


def reset(mode: str, seed: int = 0) -> tuple[Any, grass.GrassAdamW]:
    torch.manual_seed(seed)
    model = tiny.stack().bfloat16()
    config = tiny.config(**MODES[mode], moments="reset", sample_interval=2)
    return model, grass.GrassAdamW(model, lr=1e-3, config=config, master_weights=True)


@pytest.mark.parametrize("second", ["none", "streamed", "fused resident"])
@pytest.mark.parametrize("first", ["none", "resident", "fused streamed"])
def test_reset_exact_weights_are_resumed_in_any_mode(first: str, second: str) -> None:
    """A layer that left keeps its remainder alone, and torch asked it for its counter."""
    model, opt = reset(first)
    tiny.train(model, opt, 0, 9)
    assert any(set(entry) == {"remainder"} for entry in opt.state.values())
    state, weights = copy.deepcopy(opt.state_dict()), tiny.weights(model)
    other, resumed = reset(second, seed=3)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for pair in ((model, opt), (other, resumed)):
        tiny.train(*pair, 9, 15)
    tiny.assert_identical(tiny.weights(model), tiny.weights(other))
    tiny.assert_identical(opt.state_dict()["state"], resumed.state_dict()["state"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_reset_exact_weights_are_copied(mode: str, way: Callable[[Any], Any]) -> None:
    model, opt = reset(mode)
    tiny.train(model, opt, 0, 9)
    other, copied = way((model, opt))
    for pair in ((model, opt), (other, copied)):
        tiny.train(*pair, 9, 15)
    tiny.assert_identical(tiny.weights(model), tiny.weights(other))


# -- loads that fail -------------------------------------------------------------------------------


def damaged(state: dict[str, Any], value: Any) -> dict[str, Any]:
    state = copy.deepcopy(state)
    key = next(key for key, entry in state["state"].items() if float(entry["step"]) > 0)
    if value is None:
        del state["state"][key]["exp_avg"]
    else:
        state["state"][key]["exp_avg"] = value(state["state"][key]["exp_avg"])
    return state


DAMAGES: dict[str, Callable[[Tensor], Any] | None] = {
    "missing": None,
    "numpy": lambda t: t.numpy(),
    "integers": lambda t: t.long(),
    "complex": lambda t: t.to(torch.complex64),
    "without values": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
}


@pytest.mark.parametrize("mode", ["none", "streamed", "resident"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_dict_is_refused_and_nothing_is_lost(mode: str, damage: str) -> None:
    model, opt = start(mode)
    train(model, opt, 0, 7)
    with pytest.raises(grass.StateMismatchError):
        opt.load_state_dict(damaged(opt.state_dict(), DAMAGES[damage]))
    train(model, opt, 7, STEPS)
    twin = start(mode)
    train(*twin, 0, STEPS)
    tiny.assert_identical(outcome(model, opt), outcome(*twin))


def test_a_state_dict_that_the_ring_cannot_hold_is_refused_and_nothing_is_lost() -> None:
    """amsgrad comes with the file: a third section, for which a chunk has no room in the buffers."""

    def make(**options: Any) -> tuple[Any, grass.GrassAdamW]:
        model = ragged.ragged(seed=0)
        config = ragged.config(offload="streamed", buffer_mb=options.pop("buffer_mb", 0.25))
        return model, grass.GrassAdamW(model, lr=1e-2, config=config, pattern="blocks.*", **options)

    wide = make(amsgrad=True)
    train(*wide, 0, 7)
    model, opt = make(buffer_mb=0.13)
    train(model, opt, 0, 7)
    with pytest.raises(grass.ConfigError, match="buffer_mb"):
        opt.load_state_dict(wide[1].state_dict())
    assert not opt.param_groups[0]["amsgrad"]
    train(model, opt, 7, STEPS)
    twin = make(buffer_mb=0.13)
    train(*twin, 0, STEPS)
    tiny.assert_identical(outcome(model, opt), outcome(*twin))


# -- ends ------------------------------------------------------------------------------------------


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[RecordingEngine]:
    made: list[RecordingEngine] = []

    def record(device: torch.device) -> RecordingEngine:
        made.append(RecordingEngine())
        return made[-1]

    monkeypatch.setattr(
        OffloadManager, "__init__", functools.partialmethod(OffloadManager.__init__, engine=record)
    )
    return made


def assert_ended(engine: RecordingEngine) -> None:
    """The host has waited for all fetches, and then freed what they read and wrote."""
    last = engine.log.entries[-1]
    assert last.queue == HOST
    fetches = [entry for entry in engine.log.entries if entry.queue == H2D]
    assert fetches
    assert all(last.follows(fetch) for fetch in fetches)
    assert {name for fetch in fetches for name in fetch.operation.writes} <= set(last.operation.writes)
    assert conflicts(engine.log) == []


@pytest.mark.parametrize("mode", ["streamed", "resident"])
def test_an_optimizer_that_goes_waits_for_its_copies(mode: str, engines: list[RecordingEngine]) -> None:
    model = tiny.stack()
    opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(offload=mode, buffer_mb=0.2))
    tiny.train(model, opt, 0, 6)
    gc.disable()
    try:
        del opt
        assert_ended(engines[0])
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", ["streamed", "resident"])
def test_a_store_that_is_left_is_waited_for(mode: str, engines: list[RecordingEngine]) -> None:
    model = tiny.stack()
    rest = [p for name, p in model.named_parameters() if not name.startswith("embed")]
    config = tiny.config(offload=mode, buffer_mb=0.2)
    opt = grass.GrassAdamW(rest, model=model, lr=1e-2, config=config)
    tiny.train(model, opt, 0, 6)
    opt.add_param_group({"params": list(model.embed.parameters())})
    assert_ended(engines[0])
    tiny.train(model, opt, 6, 8)
    assert len(engines) == 2


# -- layers begun anew -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["streamed", "resident"])
def test_a_layer_begun_anew_moves_no_other(mode: str) -> None:
    def moved(moments: str) -> list[int]:
        model = tiny.stack()
        config = tiny.config(
            offload=mode, buffer_mb=0.2, moments=moments, sampler="cyclic", sample_interval=2
        )
        opt = grass.GrassAdamW(model, lr=1e-2, config=config)
        figures = []
        for step in range(24):
            tiny.train(model, opt, step, step + 1)
            figures.append(opt.transfer_stats.h2d_bytes)
        return figures

    assert moved("reset") == moved("keep")


def test_exact_weights_of_all_modes_are_those_of_none() -> None:
    runs = {}
    for mode in MODES:
        model, opt = start(mode, **EXACT)
        train(model, opt, 0, STEPS)
        runs[mode] = outcome(model, opt)
    for mode in OFFLOADED:
        tiny.assert_identical(runs[mode], runs["none"])
