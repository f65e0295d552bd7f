"""Runs of a small model in every mode of offloading, and what is left of them."""

import functools
import io
from typing import Any

import torch

import grass
from tests.support import ragged
from tests.support.ragged import Ragged

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


def assert_in_store(opt: grass.GrassAdamW) -> None:
    """Every state of a kernel's parameter is in the slab of its bucket, where the pipeline looks for it."""
    store = opt._offload.store
    for p, state in opt.state.items():
        slab = store.slab(store.bucket_of(p))
        for kind, section in slab.sections.items():
            if kind in state and p.numel():
                begin = section.data_ptr() + slab.starts[p] * section.itemsize
                assert state[kind].data_ptr() == begin, kind
                assert state[kind].stride() == p.stride()
