"""Would catch: a run that continues otherwise after it was saved in one mode of offloading and resumed in another;
states saved as they were before they last came home; states that leave the store when they are loaded, copied, moved
by accelerate or replaced by hand, or that pass through the parameters' device on the way; what was fetched before a
write and used after it; parameters added to an optimizer that is offloaded already.
"""

import copy
import functools
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ragged
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from ragged import Ragged
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import grass
from grass_kernels import KernelArgumentError

STEPS = 11
STREAMED, RESIDENT = {"offload": "streamed", "buffer_mb": 0.25}, {"offload": "resident"}
FUSED = {"fused_backward": True}
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "streamed": STREAMED,
    "resident": RESIDENT,
    "fused streamed": {**STREAMED, **FUSED},
    "fused resident": {**RESIDENT, **FUSED},
}
OFFLOADED = [mode for mode in MODES if mode != "none"]
EXACT = {"dtype": torch.bfloat16, "master_weights": True}


def start(
    mode: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Ragged, grass.GrassAdamW]:
    model = ragged.ragged(dtype, seed=seed)
    config = ragged.config(**MODES[mode])
    return model, grass.GrassAdamW(model, lr=1e-2, config=config, pattern="blocks.*", **options)


def train(model: Ragged, opt: grass.GrassAdamW, first: int, last: int) -> None:
    for _ in ragged.steps(model, opt, first, last):
        pass


def saved(model: Ragged, opt: grass.GrassAdamW) -> bytes:
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, file)
    return file.getvalue()


def resumed(checkpoint: bytes, mode: str, **options: Any) -> tuple[Ragged, grass.GrassAdamW]:
    state = torch.load(io.BytesIO(checkpoint), weights_only=True)
    model, opt = start(mode, seed=9, **options)
    model.load_state_dict(state["model"])
    opt.load_state_dict(state["optimizer"])
    return model, opt


def outcome(model: Ragged, opt: grass.GrassAdamW) -> dict[str, Any]:
    return ragged.outcome(model, opt, [])


@functools.cache
def whole(dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    """An uninterrupted run without offloading."""
    model, opt = start("none", dtype=dtype, **options)
    train(model, opt, 0, STEPS)
    return outcome(model, opt)


def assert_at_home(opt: grass.GrassAdamW) -> None:
    """Every state of a kernel's parameter is in the slab of its slot, where the pipeline looks for it."""
    store = opt._offloading.store
    for p, state in opt.state.items():
        slab = store.slab(store.slot_of(p))
        for kind, section in slab.sections.items():
            if kind in state and p.numel():
                begin = section.data_ptr() + slab.starts[p] * section.itemsize
                assert state[kind].data_ptr() == begin, kind
                assert state[kind].stride() == p.stride()


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
        assert_at_home(opt)
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
    assert_at_home(other)
    train(model, opt, 6, STEPS)
    train(twin, other, 6, STEPS)
    assert_at_home(other)
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
    assert_at_home(opt)
    assert opt.transfer_stats.store_bytes == opt._offloading.store.most_bytes
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
        assert_at_home(opt)
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
    assert_at_home(opt)
    for index in range(stop, STEPS):
        accelerator.backward(prepared(index))
        wrapped.step()
        wrapped.zero_grad()
    assert_at_home(opt)
    tiny.assert_identical(outcome(model, opt), whole())


# -- states written by hand ------------------------------------------------------------------------------------------


def halve(opt: grass.GrassAdamW, p: Tensor) -> None:
    opt.state[p]["exp_avg"].mul_(0.5)


def replace_moment(opt: grass.GrassAdamW, p: Tensor) -> None:
    opt.state[p]["exp_avg"] = opt.state[p]["exp_avg"] * 0.5


def replace_moment_otherwise_laid(opt: grass.GrassAdamW, p: Tensor) -> None:
    opt.state[p]["exp_avg_sq"] = (opt.state[p]["exp_avg_sq"] * 0.5).t().contiguous().t()


def replace_entry(opt: grass.GrassAdamW, p: Tensor) -> None:
    opt.state[p] = {key: value * 0.5 if key != "step" else value + 3 for key, value in opt.state[p].items()}


def drop_entry(opt: grass.GrassAdamW, p: Tensor) -> None:
    del opt.state[p]


def drop_all(opt: grass.GrassAdamW, p: Tensor) -> None:
    opt.state.clear()


def drop_moment(opt: grass.GrassAdamW, p: Tensor) -> None:
    del opt.state[p]["exp_avg_sq"]


def set_counter(opt: grass.GrassAdamW, p: Tensor) -> None:
    opt.state[p]["step"].fill_(100)


HANDS: list[Callable[[grass.GrassAdamW, Tensor], None]] = [
    halve, replace_moment, replace_moment_otherwise_laid, replace_entry, drop_entry, drop_all, drop_moment, set_counter
]  # fmt: skip


@pytest.mark.parametrize("by_hand", HANDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", OFFLOADED)
def test_states_written_by_hand_are_noticed(
    mode: str, by_hand: Callable[[grass.GrassAdamW, Tensor], None]
) -> None:
    """Of resident states those that are replaced, after `state_dict`, which brings them home."""
    if by_hand is halve and "resident" in mode:
        pytest.skip("a resident state is on the device, and what is written to its home is not looked for")

    def run(mode: str) -> dict[str, Any]:
        model, opt = start(mode)
        for index in range(STEPS):
            train(model, opt, index, index + 1)
            if index in (2, 3, 6):
                opt.state_dict()
                by_hand(opt, model.blocks[opt.active_layers[-1]].weight)
        return outcome(model, opt)

    tiny.assert_identical(run(mode), run("none"))


# -- parameters added later -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 3, 4])
@pytest.mark.parametrize("mode", OFFLOADED)
def test_parameters_added_later_find_a_place(mode: str, stop: int) -> None:
    def run(mode: str) -> dict[str, Any]:
        model = ragged.ragged()
        late = [model.blocks[2].weight, *model.blocks[3].parameters(), model.head]
        early = [p for p in model.parameters() if not any(p is q for q in late)]
        opt = grass.GrassAdamW(
            early, lr=1e-2, model=model, config=ragged.config(**MODES[mode]), pattern="blocks.*"
        )
        train(model, opt, 0, stop)
        opt.add_param_group({"params": late, "weight_decay": 0.0, "lr": 1e-3})
        train(model, opt, stop, STEPS)
        assert opt.draw_counts[3] > 0
        if mode != "none":
            assert_at_home(opt)
        return outcome(model, opt)

    tiny.assert_identical(run(mode), run("none"))


@pytest.mark.parametrize("mode", OFFLOADED)
def test_what_has_moved_is_counted_from_construction_on(mode: str) -> None:
    model = ragged.ragged()
    opt = grass.GrassAdamW(
        list(model.blocks.parameters()), model=model, config=ragged.config(**MODES[mode]), pattern="blocks.*"
    )
    train(model, opt, 0, 5)
    before = opt.transfer_stats
    opt.add_param_group({"params": [model.head]})
    after = opt.transfer_stats
    assert 0 < before.h2d_bytes <= after.h2d_bytes
    assert 0 < before.d2h_bytes <= after.d2h_bytes


# -- what changes after construction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 4])
@pytest.mark.parametrize("mode", ["streamed", "resident"])
def test_a_checkpoint_brings_amsgrad_with_it(mode: str, stop: int) -> None:
    """torch takes the groups' settings from the checkpoint: there is a moment more than at construction."""
    model, opt = start("none", amsgrad=True)
    train(model, opt, 0, 5)
    state = copy.deepcopy(opt.state_dict())

    def run(mode: str) -> dict[str, Any]:
        twin, other = start(mode)
        train(twin, other, 0, stop)
        twin.load_state_dict(model.state_dict())
        other.load_state_dict(copy.deepcopy(state))
        assert other.param_groups[0]["amsgrad"]
        train(twin, other, 5, STEPS)
        return outcome(twin, other)

    tiny.assert_identical(run(mode), run("none"))


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("mode", ["streamed", "resident"])
def test_amsgrad_switched_in_the_middle(mode: str, on: bool) -> None:
    def run(mode: str) -> dict[str, Any]:
        model, opt = start(mode, amsgrad=not on)
        train(model, opt, 0, 5)
        opt.param_groups[0]["amsgrad"] = on
        train(model, opt, 5, STEPS)
        return outcome(model, opt)

    tiny.assert_identical(run(mode), run("none"))


@pytest.mark.parametrize("mode", OFFLOADED)
def test_a_parameter_that_is_laid_out_anew(mode: str) -> None:
    """Its states follow, in the same memory."""

    def run(mode: str) -> dict[str, Any]:
        model, opt = start(mode)
        for index in range(STEPS):
            if index in (3, 6):
                for block in model.blocks:
                    block.turned.data = block.turned.data.t().contiguous().t()
                    block.weight.data = block.weight.data.clone(memory_format=torch.contiguous_format)
            if index == 5:
                for block in model.blocks:
                    block.weight.data = block.weight.data.t().contiguous().t()
                    block.turned.data = block.turned.data.contiguous()
            train(model, opt, index, index + 1)
        return outcome(model, opt)

    tiny.assert_identical(run(mode), run("none"))


CASTS = [
    (torch.float32, torch.bfloat16, 0, False),
    (torch.float32, torch.bfloat16, 5, False),
    (torch.float32, torch.bfloat16, 5, True),
    (torch.bfloat16, torch.float32, 5, True),
    (torch.float64, torch.float32, 0, False),
    (torch.float32, torch.float64, 0, False),
]


@pytest.mark.parametrize(("before", "after", "stop", "master"), CASTS, ids=str)
@pytest.mark.parametrize("mode", ["streamed", "resident"])
def test_a_model_cast_after_its_optimizer_was_made(
    mode: str, before: torch.dtype, after: torch.dtype, stop: int, master: bool
) -> None:
    """As without offloading, or refused; never a parameter that is left out without a word."""

    def run(mode: str) -> dict[str, Any]:
        model, opt = start(mode, dtype=before, master_weights=master)
        train(model, opt, 0, stop)
        model.to(after)
        train(model, opt, stop, STEPS)
        return outcome(model, opt)

    try:
        found = run(mode)
    except (grass.GrassError, KernelArgumentError):
        return
    tiny.assert_identical(found, run("none"))


def test_a_released_optimizer_can_still_be_saved() -> None:
    for mode in OFFLOADED:
        model, opt = start(mode)
        train(model, opt, 0, 6)
        opt.release()
        plain, reference = start("none")
        train(plain, reference, 0, 6)
        reference.release()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tiny.assert_identical(ragged.state_of(opt), ragged.state_of(reference))
