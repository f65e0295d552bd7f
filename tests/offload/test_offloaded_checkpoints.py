"""Would catch: a run that continues otherwise after it was saved in one mode of offloading and resumed in another;
states saved as they were before they last came home; states that leave the store when they are loaded, copied, moved
by accelerate or replaced by hand, or that pass through the parameters' device on the way; what was fetched before a
write and used after it; parameters added to an optimizer that is offloaded already.
"""

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import grass
from tests.support import ragged, tiny
from tests.support.ragged import Ragged
from tests.support.trainings import (
    EXACT,
    MODES,
    OFFLOADED,
    STEPS,
    assert_in_store,
    outcome,
    resumed,
    saved,
    start,
    train,
    whole,
)

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")

# -- saved in one mode, resumed in another -------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["none", "resident", "fused streamed"])
@pytest.mark.parametrize("second", ["none", "streamed", "fused resident"])
def test_a_run_saved_in_one_mode_continues_in_another(first: str, second: str) -> None:
    for stop in (0, 2, 3, 7):  # in the probe, in a period, between a draw and its switch, at a switch
        model, opt = start(first)
        train(model, opt, 0, stop)
        model, opt = resumed(saved(model, opt), second)
        assert opt.step_count == stop
        train(model, opt, stop, STEPS)
        tiny.assert_identical(outcome(model, opt), whole())


@pytest.mark.parametrize("options", [EXACT, {"amsgrad": True}, {"state_dtype": torch.bfloat16}], ids=str)
def test_a_run_goes_through_all_modes(options: dict[str, Any]) -> None:
    model, opt = start("resident", **options)
    modes = [
        "streamed",
        "none",
        "fused resident",
        "resident",
        "fused streamed",
        "none",
        "resident",
        "streamed",
    ]
    for stop, mode in enumerate(modes):
        train(model, opt, stop, stop + 1)
        model, opt = resumed(saved(model, opt), mode, **options)
    train(model, opt, len(modes), STEPS)
    tiny.assert_identical(outcome(model, opt), whole(**options))


@pytest.mark.parametrize("mode", MODES)
def test_to_look_at_the_state_changes_nothing(mode: str) -> None:
    model, opt = start(mode)
    for index in range(STEPS):
        model(index).backward()
        opt.state_dict()  # inside a step that has not ended
        opt.step()
        opt.state_dict()
        opt.zero_grad()
        assert opt.transfer_stats.ring_bytes >= 0
    tiny.assert_identical(outcome(model, opt), whole())


@pytest.mark.parametrize("mode", OFFLOADED)
def test_a_state_in_the_middle_is_that_of_now(mode: str) -> None:
    plain, reference = start("none")
    model, opt = start(mode)
    for index in range(STEPS):
        train(plain, reference, index, index + 1)
        train(model, opt, index, index + 1)
        tiny.assert_identical(ragged.state_of(opt), ragged.state_of(reference))
        for p, q in zip(
            model.parameters(), plain.parameters(), strict=True
        ):  # what was drained stays readable
            tiny.assert_identical(opt.state.get(p, {}), reference.state.get(q, {}))


@pytest.mark.parametrize("mode", MODES)
def test_a_run_taken_back_is_a_run_resumed(mode: str) -> None:
    model, opt = start(mode)
    train(model, opt, 0, 3)
    early = saved(model, opt)
    train(model, opt, 3, 8)
    for _ in range(2):
        state = torch.load(io.BytesIO(early), weights_only=True)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
        train(model, opt, 3, STEPS)
        tiny.assert_identical(outcome(model, opt), whole())


@pytest.mark.parametrize("mode", OFFLOADED)
def test_a_state_of_its_own_can_be_loaded_back(mode: str) -> None:
    """Its tensors are the store's own memory, which loading writes to."""
    model, opt = start(mode)
    for stop in (2, 4, 6):
        train(model, opt, stop - 2, stop)
        opt.load_state_dict(opt.state_dict())
        assert_in_store(opt)
    train(model, opt, 6, STEPS)
    tiny.assert_identical(outcome(model, opt), whole())


@pytest.mark.parametrize("mode", OFFLOADED)
def test_a_file_is_not_larger_than_the_states(mode: str) -> None:
    model, opt = start(mode)
    train(model, opt, 0, 8)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    assert len(file.getvalue()) < opt.transfer_stats.store_bytes + 100_000


# -- loaded into the store -------------------------------------------------------------------------------------------


class Made(TorchDispatchMode):
    """Elements of the tensors that get memory of their own meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not any(alias.alias_info for alias in func._schema.returns):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("mode", OFFLOADED)
def test_loading_fills_the_store_and_makes_no_other_states(mode: str) -> None:
    model, opt = start("none", **EXACT)
    train(model, opt, 0, 6)
    state = copy.deepcopy(opt.state_dict())
    twin, other = start(mode, **EXACT)
    twin.load_state_dict(model.state_dict())
    with Made() as made:
        other.load_state_dict(state)
    assert made.largest < 1000, "states passed through memory beside the store"
    assert_in_store(other)
    train(model, opt, 6, STEPS)
    train(twin, other, 6, STEPS)
    assert_in_store(other)
    tiny.assert_identical(outcome(twin, other), outcome(model, opt))


def test_loading_copies_what_it_is_given() -> None:
    model, opt = start("streamed")
    train(model, opt, 0, 6)
    state = copy.deepcopy(opt.state_dict())
    before = copy.deepcopy(tiny.flat(state))
    twin, other = start("streamed")
    other.load_state_dict(state)
    train(twin, other, 6, 8)
    tiny.assert_identical(tiny.flat(state), before)


@pytest.mark.parametrize("mode", OFFLOADED)
def test_a_checkpoint_of_torchs_adamw_goes_into_the_store(mode: str) -> None:
    def run(mode: str) -> tuple[Ragged, grass.GrassAdamW]:
        torchs_model = ragged.ragged()
        torchs = torch.optim.AdamW(torchs_model.parameters(), lr=1e-2)
        for index in range(2):
            torchs_model(index).backward()
            torchs.step()
            torchs.zero_grad()
        model, opt = start(mode)
        with pytest.warns(UserWarning, match="starts at its beginning"):
            opt.load_state_dict(torchs.state_dict())
        return model, opt

    (model, opt), (plain, reference) = run(mode), run("none")
    assert_in_store(opt)
    assert opt.transfer_stats.store_bytes == opt._offload.store.max_bytes
    train(model, opt, 0, STEPS)
    train(plain, reference, 0, STEPS)
    tiny.assert_identical(outcome(model, opt), outcome(plain, reference))


# -- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "options"), [("deepcopy", EXACT), ("pickle", {})], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("mode", OFFLOADED)
def test_a_copy_continues_bit_by_bit_in_a_store_of_its_own(
    mode: str, how: str, options: dict[str, Any]
) -> None:
    for stop in (0, 3, 7):
        model, opt = start(mode, **options)
        train(model, opt, 0, stop)
        both = copy.deepcopy((model, opt)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, opt)))
        twin, other = both
        state, weights = copy.deepcopy(tiny.flat(ragged.state_of(opt))), tiny.weights(model)
        train(twin, other, stop, STEPS)
        tiny.assert_identical(tiny.flat(ragged.state_of(opt)), state)
        tiny.assert_identical(tiny.weights(model), weights)
        train(model, opt, stop, STEPS)
        tiny.assert_identical(outcome(twin, other), outcome(model, opt))
        tiny.assert_identical(outcome(twin, other), whole(**options))
        assert_in_store(opt)
        own = {t.untyped_storage().data_ptr() for s in opt.state.values() for t in s.values() if t.dim()}
        copied = {t.untyped_storage().data_ptr() for s in other.state.values() for t in s.values() if t.dim()}
        assert not own & copied


# -- accelerate ------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.mark.parametrize("stop", [0, 2, 5])
@pytest.mark.parametrize("mode", OFFLOADED)
def test_preparing_by_accelerate_leaves_states_in_the_store(
    accelerator: Accelerator, mode: str, stop: int
) -> None:
    model, opt = start(mode)
    train(model, opt, 0, stop)
    places = {p: s["exp_avg"].data_ptr() for p, s in opt.state.items()}
    prepared, wrapped = accelerator.prepare(model, opt)  # reads, moves and reloads the state
    assert wrapped.optimizer is opt
    assert {p: s["exp_avg"].data_ptr() for p, s in opt.state.items()} == places
    assert_in_store(opt)
    for index in range(stop, STEPS):
        accelerator.backward(prepared(index))
        wrapped.step()
        wrapped.zero_grad()
    assert_in_store(opt)
    tiny.assert_identical(outcome(model, opt), whole())
