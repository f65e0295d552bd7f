"""Exact weights whose remainders live in a store, while somebody else writes to the parameters.

Would catch: a mode of offloading in which a write from outside leaves other bits than without offloading; a write that
changes remainders; a state dict or a copy after a write that goes on with other bits.

Passes with ``TRITON_INTERPRET=1`` too, where steps go by plans.
"""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import grass
from grass_kernels import _triton
from grass_kernels.table import CHUNK
from tests.support import ragged, tiny
from tests.support.ragged import Ragged
from tests.support.trainings import FUSED, outcome, saved, train
from tests.support.trainings import MODES as RUNS

MODES = {**RUNS, "fused none": FUSED}
OTHERS = [mode for mode in MODES if mode != "none"]
STEPS = 8 if _triton.INTERPRETING else 11
WRITTEN = (0, 2, 5, 6)  # before these steps: the probe, a period, before a draw, before a switch


class Few(Ragged):
    """For the interpreter, which is slow: as few tensors as have a neighbour, one of them in two units."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.blocks = nn.ModuleList(nn.Module() for _ in range(2))
        for block in self.blocks:
            block.weight = nn.Parameter(torch.randn(9, 5))
            block.turned = nn.Parameter(torch.randn(4, 6).t())
        self.head = nn.Parameter(torch.randn(CHUNK + 100))


def start(mode: str) -> tuple[Ragged, grass.GrassAdamW]:
    torch.manual_seed(0)
    model = Few().to(torch.bfloat16) if _triton.INTERPRETING else ragged.ragged(torch.bfloat16)
    config = ragged.config(**MODES[mode], active_layers=1 if _triton.INTERPRETING else 2)
    return model, grass.GrassAdamW(model, lr=1e-2, config=config, pattern="blocks.*", master_weights=True)


def scale(model: Ragged, early: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.25)


def scale_the_head(model: Ragged, early: dict[str, Tensor]) -> None:
    with torch.no_grad():
        model.head.mul_(1.25)


def clamp(model: Ragged, early: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.5, 0.5)


def take_back(model: Ragged, early: dict[str, Tensor]) -> None:
    model.load_state_dict(early)


def remainders(model: Ragged, opt: grass.GrassAdamW) -> dict[str, Tensor]:
    """Of what has been updated, as a state dict has them."""
    state = opt.state_dict()["state"]
    kept = {name: state[i].get("remainder") for i, (name, _) in enumerate(model.named_parameters())}
    return {name: r.clone() for name, r in kept.items() if r is not None and r.any()}


def written(mode: str, write: Callable) -> tuple[Ragged, grass.GrassAdamW]:
    """A run in which somebody writes between its steps."""
    model, opt = start(mode)
    early = tiny.weights(model)
    for index in range(STEPS):
        if index in WRITTEN:
            write(model, early)
        train(model, opt, index, index + 1)
    return model, opt


WRITES = [scale, scale_the_head, clamp, take_back]
EXPECTED: dict[Callable, dict] = {}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("mode", OTHERS)
def test_a_write_leaves_the_same_bits_in_every_mode(mode: str, write: Callable) -> None:
    if write not in EXPECTED:
        EXPECTED[write] = outcome(*written("none", write))
    model, opt = written(mode, write)
    assert remainders(model, opt), "had all been zero, this would have shown nothing"
    tiny.assert_identical(outcome(model, opt), EXPECTED[write])


@pytest.mark.parametrize("mode", MODES)
def test_a_write_to_a_parameter_leaves_all_remainders(mode: str) -> None:
    """Its own too: nobody looks for writes, and a remainder is at most half a unit."""
    model, opt = start(mode)
    train(model, opt, 0, 3)
    before = remainders(model, opt)
    layer = opt.active_layers[-1]
    with torch.no_grad():
        model.blocks[layer].weight.fill_(0.5)
    assert {f"blocks.{layer}.weight", f"blocks.{layer}.turned", "head"} <= before.keys()
    for group in opt.param_groups:
        group["lr"] = 0.0
    train(model, opt, 3, 4)
    tiny.assert_identical(remainders(model, opt), before)


# -- a look after a write ------------------------------------------------------------------------------------------


def look(model: Ragged, opt: grass.GrassAdamW, mode: str) -> tuple[Ragged, grass.GrassAdamW]:
    opt.state_dict()
    return model, opt


def resume(model: Ragged, opt: grass.GrassAdamW, mode: str) -> tuple[Ragged, grass.GrassAdamW]:
    state = torch.load(io.BytesIO(saved(model, opt)), weights_only=True)
    model, opt = start(mode)
    model.load_state_dict(state["model"])
    opt.load_state_dict(state["optimizer"])
    return model, opt


def copied(model: Ragged, opt: grass.GrassAdamW, mode: str) -> tuple[Ragged, grass.GrassAdamW]:
    return copy.deepcopy((model, opt))


def pickled(model: Ragged, opt: grass.GrassAdamW, mode: str) -> tuple[Ragged, grass.GrassAdamW]:
    return pickle.loads(pickle.dumps((model, opt)))


WAYS = [look, copied] if _triton.INTERPRETING else [look, resume, copied, pickled]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_is_saved_or_copied_after_a_write_goes_on(mode: str, way: Callable) -> None:
    """Layers that are frozen by then included; and it goes on as if nobody had looked."""
    runs = []
    for looks in (False, True):
        model, opt = start(mode if looks else "none")
        train(model, opt, 0, 6)
        assert remainders(model, opt)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.25)
        if looks:
            model, opt = way(model, opt, mode)
        train(model, opt, 6, STEPS)
        runs.append(outcome(model, opt))
    tiny.assert_identical(*reversed(runs))
