"""A small stack trained with fused backward, and what tests of it do again and again."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

import grass
from tests.support import ragged, tiny

FUSED: dict[str, Any] = {"fused_backward": True}
MODES = {
    "none": {},
    "streamed": {"offload": "streamed", "buffer_mb": 0.2},
    "resident": {"offload": "resident"},
}
STEPS = 11


def stack(**options: Any) -> tuple[nn.Module, grass.GrassAdamW]:
    """Past the probe, so that every backward updates."""
    model = tiny.stack()
    opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(probe_steps=1, **{**FUSED, **options}))
    tiny.train(model, opt, 0, 1)
    assert opt.phase == "adapt"
    return model, opt


def backward(model: nn.Module, index: int) -> None:
    tiny.loss_of(model, tiny.batch(index)).backward()


def watch(model: nn.Module, look: Callable[[Tensor], None]) -> None:
    """Call a function when a gradient is complete, also of what is frozen now."""
    for p in model.parameters():
        on = p.requires_grad
        p.requires_grad_(True).register_post_accumulate_grad_hook(look)
        p.requires_grad_(on)


def compare(model: nn.Module, opt: grass.GrassAdamW, twin: nn.Module, other: grass.GrassAdamW) -> None:
    tiny.assert_identical(ragged.outcome(model, opt, []), ragged.outcome(twin, other, []))


class BackwardFailedError(RuntimeError):
    pass


def failing(model: nn.Module, index: int, layer: int) -> None:
    """A backward that ends with an error where a block's output gets its gradient."""

    def fail(grad: Tensor) -> None:
        raise BackwardFailedError

    def arm(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(fail)

    handle = model.blocks[layer].register_forward_hook(arm)
    loss = tiny.loss_of(model, tiny.batch(index))
    handle.remove()
    with pytest.raises(BackwardFailedError):
        loss.backward()


def torn(offload: str = "none", **options: Any) -> tuple[nn.Module, grass.GrassAdamW]:
    """The head and two layers updated, the third not, nor the embedding."""
    model, opt = stack(**{"active_layers": 3, "seed": 0, "sample_interval": 6, **MODES[offload], **options})
    tiny.train(model, opt, 1, 3)
    failing(model, 3, min(opt.active_layers))
    return model, opt
