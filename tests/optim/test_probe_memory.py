"""Failures these tests catch: a probe that holds gradients (all, those of two layers, a copy too many), also where
layers lack gradients, or that holds more on accumulation; frozen layers that get gradients or moments; a step that
needs more memory than its moments.

Memory is followed by live storages: a dispatch mode sees each storage an operation makes, and a weak
reference tells when it dies.
"""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import grass
import grass_kernels
from grass.optim.probe import Probe
from tests.support import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter"),
]

BIG = 4096  # ids of the vocabulary: the embedding is larger than all layers together


@pytest.fixture(autouse=True)
def _norms_without_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reads a gradient and writes a few numbers; what stands for it on a CPU squares copies."""
    monkeypatch.setattr(grass_kernels, "NormPlan", PlanWithoutCopies)


class PlanWithoutCopies:
    """Stands for `grass_kernels.NormPlan`, for one layer."""

    def __init__(self, *arguments: Any) -> None: ...

    def is_valid(self, grads: list[Tensor]) -> bool:
        return True

    def run(self, grads: list[Tensor]) -> Tensor:
        return torch.stack([torch.linalg.vector_norm(grad).square() for grad in grads]).sum(0, keepdim=True)


class LiveStorages(TorchDispatchMode):
    """Bytes of the storages made under it and still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[weakref.ref, int]] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_iter((args, kwargs)):
            self._note(value, new=False)
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            self._note(value, new=True)
        return result

    def _note(self, value: Any, new: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self.known and self.known[key][0]() is not None:
            return
        size = storage.nbytes() if new else 0  # what was there before is not counted

        def died(ref: weakref.ref, key: int = key, size: int = size) -> None:
            self.live -= size
            if key in self.known and self.known[key][0] is ref:
                del self.known[key]

        self.known[key] = (weakref.ref(storage, died), size)
        self.live += size
        self.peak = max(self.peak, self.live)


def model_of(tied: bool, layers: int = 24) -> nn.Module:
    return tiny.llama(tied=tied, layers=layers, vocab_size=BIG, hidden_size=32, intermediate_size=256)


def size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def backward_peak(model: nn.Module, micro_batches: int = 1, after: Callable[[], Any] | None = None) -> int:
    """Peak of what forward and backward add to the weights, in bytes."""
    with LiveStorages() as memory:
        for micro in range(micro_batches):
            tiny.loss_of(model, tiny.batch(micro, size=1, length=4)).backward()
        if after is not None:
            after()
    return memory.peak


def activations(model: nn.Module) -> int:
    """Peak of what a forward pass saves for the gradients of all weights."""
    with LiveStorages() as memory:
        tiny.loss_of(model, tiny.batch(0, size=1, length=4))
    return memory.peak


def largest(model: nn.Module, count: int) -> int:
    sizes = sorted((p.numel() * p.element_size() for p in model.parameters()), reverse=True)
    return sum(sizes[:count])


def allowed(model: nn.Module, tied: bool) -> int:
    """The two largest gradients; autograd itself holds three of a tied embedding: one a use, and their sum."""
    gradients = 3 * size([model.get_input_embeddings().weight]) if tied else largest(model, 2)
    return gradients + activations(model)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_a_probe_adds_no_more_than_the_two_largest_gradients(tied: bool, micro_batches: int) -> None:
    model = model_of(tied)
    limit = allowed(model, tied)
    assert size(model.parameters()) > limit, "all gradients together must not fit"
    opt = grass.GrassAdamW(model, config=tiny.config())
    assert backward_peak(model, micro_batches, opt.step) < limit
    assert opt.step_count == 1
    assert backward_peak(model, micro_batches, opt.step) < limit


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("incomplete", [False, True])
def test_a_probe_of_equal_layers_adds_the_gradients_of_one(
    micro_batches: int, checkpointing: bool, incomplete: bool
) -> None:
    """Small vocabulary: here the gradients of two layers would show."""
    model = tiny.llama(layers=8, vocab_size=32, hidden_size=32, intermediate_size=512)
    if incomplete:  # as experts that saw no token; measured when the first gradient of the next layer arrives
        for layer in model.model.layers:
            layer.unused = nn.Parameter(torch.zeros(4))
    one_layer = activations(model) / 8
    limit = size(model.model.layers[0].parameters()) + activations(model) + incomplete * largest(model, 1)
    if checkpointing:
        tiny.checkpoint_activations(model, reentrant=False)
        # Inputs of layers, and the activations of one, which backward makes again.
        limit -= 6 * one_layer
    assert size(model.model.layers[0].parameters()) * 8 > limit
    opt = grass.GrassAdamW(model, config=tiny.config())
    assert backward_peak(model, micro_batches, opt.step) < limit


@pytest.mark.parametrize("tied", [False, True])
def test_a_hook_that_keeps_gradients_breaks_the_limit(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement itself can fail."""

    def keep(self: Probe, param: Tensor, slot: int) -> None:
        self._fired[param] = 1

    model = model_of(tied)
    limit = allowed(model, tied)
    monkeypatch.setattr(Probe, "_on_grad", keep)
    opt = grass.GrassAdamW(model, config=tiny.config())
    assert backward_peak(model) > limit
    assert opt.phase == "probe"


def test_the_measurement_is_torchs_own_backward() -> None:
    """Without an optimizer the peak is all gradients, give or take activations."""
    model = model_of(False)
    peak = backward_peak(model)
    assert (
        size(model.parameters()) <= peak <= size(model.parameters()) + largest(model, 2) + activations(model)
    )


def test_frozen_layers_take_no_gradient_memory() -> None:
    model = model_of(False)
    opt = grass.GrassAdamW(model, config=tiny.config(active_layers=1, probe_steps=0, always_active="none"))
    backward_peak(model, after=lambda: (opt.step(), opt.zero_grad()))
    peak = backward_peak(model)
    layer = size(model.model.layers[0].parameters())
    assert peak <= layer + largest_in(model.model.layers[0]) + activations(model)


def largest_in(module: nn.Module) -> int:
    return max(p.numel() * p.element_size() for p in module.parameters())


def test_moments_are_those_of_drawn_layers_only() -> None:
    model = tiny.stack(layers=8)
    opt = grass.GrassAdamW(model, config=tiny.config(active_layers=2, sampler="cyclic", probe_steps=0))
    drawn: set[int] = set()
    owner = tiny.layer_names(model, opt)
    for index in range(5):
        drawn.update(opt.active_layers)
        tiny.train(model, opt, index, index + 1)
        drawn.update(opt.next_active_layers or ())
        with_state = {owner[name] for name, p in model.named_parameters() if opt.state.get(p)}
        assert with_state == {-1, *drawn}
