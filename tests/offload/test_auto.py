"""The choice of ``offload="auto"``, the default.

Would catch: states of all layers on a GPU with host memory for them; a store for a model that cannot use one; a
choice that is made in silence, or that changes what is trained; a model that is moved to a GPU after construction.
"""

import logging

import pytest
import torch

import grass
from grass.offload.store import Bucket
from grass.optim import grass_adamw, offload_manager
from grass.optim.offload_manager import choose_offload
from tests.support import tiny

pytestmark = pytest.mark.plain_only(reason="not about kernels")

DTYPES = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}


class ParamOn(torch.Tensor):
    """Stands in for a parameter of a device that is not here."""

    device = None

    @staticmethod
    def __new__(cls, device):
        param = torch.Tensor._make_subclass(cls, torch.empty(2**20, device="meta"))
        param.device = torch.device(device)
        return param


@pytest.fixture
def memory(monkeypatch):
    """Sets the available host memory."""

    def available(num_bytes):
        monkeypatch.setattr(offload_manager, "available_bytes", lambda: num_bytes)

    return available


@pytest.mark.parametrize(
    ("devices", "takes_kernels", "available", "mode", "told"),
    [
        (["cpu", "cpu"], True, 2**40, "none", None),
        (["cuda:0", "cuda:0"], True, 2**40, "resident", "resident, up to 0.0 GiB"),
        (["cuda:0", "cuda:0"], True, None, "resident", "resident"),
        (["cuda:0", "cuda:0"], True, 2**24, "resident", "resident"),
        (["cuda:0", "cuda:0"], True, 2**24 - 1, "none", "they stay on the GPU"),
        (["cuda:0", "cuda:0"], False, 2**40, "none", "the kernels do not support"),
        (["cuda:0", "cuda:1"], True, 2**40, "none", None),
        ([], True, 2**40, "none", None),
    ],
)
def test_a_store_for_a_model_on_one_gpu_that_fits_into_host_memory(
    memory, caplog, devices, takes_kernels, available, mode, told
):
    memory(available)
    caplog.set_level(logging.INFO)
    assert choose_offload([Bucket([ParamOn(d)], dict(DTYPES)) for d in devices], takes_kernels) == mode
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (told is not None)
    assert told is None or told in messages[0]


def test_it_is_the_default_and_in_place_on_a_cpu():
    assert grass.GrassConfig().offload == "auto"
    model = tiny.stack()
    optimizer = grass.GrassAdamW(model, config=tiny.config(offload="auto"))
    tiny.train(model, optimizer, 0, 6)
    assert optimizer.transfer_stats.store_bytes == 0
    assert "offload='auto'" in repr(optimizer)


def trained(monkeypatch, chosen, **options):
    """A run in which the choices are these, one after the other."""
    choices = iter(chosen)
    last = chosen[-1]
    monkeypatch.setattr(grass_adamw, "choose_offload", lambda *arguments: next(choices, last))
    model = tiny.stack()
    optimizer = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(offload="auto", **options))
    tiny.train(model, optimizer, 0, 12)
    return model, optimizer


@pytest.mark.parametrize("options", [{}, {"fused_backward": True}], ids=["", "fused"])
@pytest.mark.parametrize(
    "chosen", [["none"], ["resident"], ["none", "resident"]], ids=["none", "at once", "moved"]
)
def test_what_is_chosen_trains_the_same(monkeypatch, chosen, options):
    """Moved: on the CPU at construction, and on a GPU when layers are first drawn."""
    model, optimizer = trained(monkeypatch, chosen, **options)
    twin = tiny.stack()
    other = grass.GrassAdamW(twin, lr=1e-2, config=tiny.config(**options))
    tiny.train(twin, other, 0, 12)
    tiny.assert_identical(tiny.weights(model), tiny.weights(twin))
    assert (optimizer.transfer_stats.store_bytes > 0) == (chosen[-1] == "resident")


def test_states_that_exist_are_not_moved_by_a_later_choice(monkeypatch):
    """Only a model without states, before its first draw, may change its mind."""
    choices = []
    monkeypatch.setattr(grass_adamw, "choose_offload", lambda *arguments: choices.append(1) or "none")
    model = tiny.stack()
    optimizer = grass.GrassAdamW(model, config=tiny.config(offload="auto"))
    tiny.train(model, optimizer, 0, 12)
    assert len(choices) == 2  # at construction, and at the first draw


def test_a_state_dict_does_not_depend_on_the_choice(monkeypatch):
    _, saved = trained(monkeypatch, ["resident"])
    model = tiny.stack()
    optimizer = grass.GrassAdamW(model, config=tiny.config(offload="streamed", buffer_mb=0.2))
    optimizer.load_state_dict(saved.state_dict())
    tiny.assert_identical(tiny.flat(optimizer.state_dict()["state"]), tiny.flat(saved.state_dict()["state"]))
