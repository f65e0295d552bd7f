"""Would catch: states that were written by hand and not noticed; parameters, dtypes, layouts or settings that change
after construction and lead to other weights than without offloading, or to parameters left out without a word.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import grass
from grass_kernels import KernelArgumentError
from tests.support import ragged, tiny
from tests.support.trainings import (
    MODES,
    OFFLOADED,
    STEPS,
    assert_in_store,
    outcome,
    start,
    train,
)

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")


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
    replace_moment, replace_moment_otherwise_laid, replace_entry, drop_entry, drop_all, drop_moment, set_counter
]  # fmt: skip


@pytest.mark.parametrize("by_hand", HANDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", OFFLOADED)
def test_states_replaced_by_hand_are_noticed(
    mode: str, by_hand: Callable[[grass.GrassAdamW, Tensor], None]
) -> None:
    """After `state_dict`, which waits for copies; by replacing them, as writes in place are not detected."""

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
            assert_in_store(opt)
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
