"""Parameters that the user freezes or unfreezes while the optimizer lives.

Would catch: a parameter that the user has frozen and a switch of layers trains again; one that was unfrozen and is
never drawn, or never measured; a draw of a layer that cannot train; a change that is told at every step, or not at all;
a model that is frozen at first and refused, or that stays frozen.
"""

import gc
import warnings

import pytest
import torch

import grass
from grass.sampling import SAMPLER_CLASSES
from tests.support import tiny

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")

MODES = {
    "in place": {},
    "streamed": {"offload": "streamed", "buffer_mb": 0.2},
    "fused": {"offload": "resident", "fused_backward": True},
}
TOLD = pytest.mark.filterwarnings("ignore:requires_grad of:UserWarning")


def start(frozen=(), **options):
    model = tiny.stack()
    for module in frozen:
        model.get_submodule(module).requires_grad_(False)
    return model, grass.GrassAdamW(model, lr=1e-2, config=tiny.config(**options))


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def is_unchanged(module, before):
    return all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


@TOLD
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("at", [0, 1, 5], ids=["new", "while probing", "while adapting"])
def test_an_embedding_that_is_frozen_stays_so(mode, at):
    model, optimizer = start(**mode)
    tiny.train(model, optimizer, 0, at)
    model.embed.requires_grad_(False)
    before, others = weights(model.embed), weights(model)
    tiny.train(model, optimizer, at, 20)
    assert is_unchanged(model.embed, before)
    assert not model.embed.weight.requires_grad
    assert not is_unchanged(model, others)
    optimizer.release()
    assert not model.embed.weight.requires_grad
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.startswith("embed"))


@TOLD
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_layer_that_is_frozen_is_not_drawn(mode):
    model, optimizer = start(**mode)
    model.blocks[2].requires_grad_(False)
    before = weights(model.blocks[2])
    tiny.train(model, optimizer, 0, 40)
    assert is_unchanged(model.blocks[2], before)
    assert optimizer.draw_counts[2] == 0
    assert optimizer.probabilities[2] == 0
    assert min(count for layer, count in enumerate(optimizer.draw_counts) if layer != 2) > 0


@TOLD
def test_an_active_layer_that_is_frozen_stops_at_once():
    model, optimizer = start()
    tiny.train(model, optimizer, 0, 5)
    layer = optimizer.active_layers[0]
    model.blocks[layer].requires_grad_(False)
    before = weights(model.blocks[layer])
    draws = optimizer.draw_counts[layer]
    tiny.train(model, optimizer, 5, 40)
    assert is_unchanged(model.blocks[layer], before)
    assert optimizer.draw_counts[layer] <= draws + 1  # drawn ahead, perhaps


@TOLD
def test_some_parameters_of_a_layer():
    model, optimizer = start()
    for block in model.blocks:
        block.norm.requires_grad_(False)
    before = [weights(block.norm) for block in model.blocks]
    tiny.train(model, optimizer, 0, 30)
    assert all(is_unchanged(block.norm, w) for block, w in zip(model.blocks, before, strict=True))
    assert min(optimizer.draw_counts) > 0


def test_a_layer_that_is_not_active_is_frozen_by_a_call():
    model, optimizer = start()
    tiny.train(model, optimizer, 0, 5)
    layer = next(
        i for i in range(5) if i not in optimizer.active_layers + (optimizer.next_active_layers or ())
    )
    before, draws = weights(model.blocks[layer]), optimizer.draw_counts[layer]
    optimizer.set_trainable(model.blocks[layer].parameters(), False)
    tiny.train(model, optimizer, 5, 40)
    assert is_unchanged(model.blocks[layer], before)
    assert optimizer.draw_counts[layer] == draws
    optimizer.set_trainable(model.blocks[layer].parameters(), True)
    tiny.train(model, optimizer, 40, 80)
    assert not is_unchanged(model.blocks[layer], before)
    with pytest.raises(grass.ParameterError, match="does not have"):
        optimizer.set_trainable([torch.nn.Parameter(torch.zeros(1))], False)


@TOLD
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("sampler", sorted(SAMPLER_CLASSES))
def test_a_layer_that_is_unfrozen_is_drawn(sampler, mode):
    model, optimizer = start(["blocks.1", "embed"], sampler=sampler, **mode)
    tiny.train(model, optimizer, 0, 10)
    assert optimizer.draw_counts[1] == 0
    layer, embedding = weights(model.blocks[1]), weights(model.embed)
    model.blocks[1].requires_grad_(True)
    model.embed.requires_grad_(True)
    tiny.train(model, optimizer, 10, 80)
    assert optimizer.draw_counts[1] > 0
    assert not is_unchanged(model.blocks[1], layer)
    assert not is_unchanged(model.embed, embedding)


@TOLD
@pytest.mark.parametrize("sampler", ["adaptive", "uniform"])
def test_all_layers_may_be_frozen_at_first(sampler):
    model, optimizer = start(["blocks"], sampler=sampler)
    before, head = weights(model.blocks), weights(model.head)
    tiny.train(model, optimizer, 0, 10)
    assert is_unchanged(model.blocks, before)
    assert not is_unchanged(model.head, head)
    assert optimizer.draw_counts == [0] * 5
    state = optimizer.state_dict()
    twin, other = start(["blocks"], sampler=sampler)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    for m, o in ((model, optimizer), (twin, other)):
        m.blocks.requires_grad_(True)
        tiny.train(m, o, 10, 60)
    assert min(optimizer.draw_counts) > 0
    assert not is_unchanged(model.blocks, before)
    tiny.assert_same_run(model, optimizer, twin, other)


@TOLD
def test_everything_may_be_frozen_at_first():
    model, optimizer = start(["blocks", "head", "embed"])
    optimizer.step()
    assert optimizer.step_count == 0
    model.requires_grad_(True)
    before = weights(model.blocks)
    tiny.train(model, optimizer, 0, 20)
    assert not is_unchanged(model.blocks, before)


@TOLD
def test_fewer_layers_than_active_ones_are_all_drawn():
    model, optimizer = start()
    for layer in (0, 1, 3, 4):
        model.blocks[layer].requires_grad_(False)
    tiny.train(model, optimizer, 0, 10)
    assert optimizer.active_layers == (2,)


def test_it_is_told_once():
    model, optimizer = start()
    tiny.train(model, optimizer, 0, 1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step, layer in enumerate((0, 1), 1):
            model.blocks[layer].requires_grad_(False)
            tiny.train(model, optimizer, step, step + 1)
    (message,) = {str(w.message) for w in told}
    assert len(told) == 1
    assert message.startswith("requires_grad of 6 parameters was set outside of the optimizer")


@TOLD
def test_another_optimizer_trains_what_the_user_wants():
    model, first = start(["head"])
    tiny.train(model, first, 0, 6)
    model.embed.requires_grad_(False)
    model.head.requires_grad_(True)
    second = grass.GrassAdamW(model, lr=1e-2, config=tiny.config())
    tiny.train(model, second, 0, 6)
    second.release()
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    assert not trainable.pop("embed.weight")
    assert all(trainable.values())


@pytest.mark.parametrize(("steps", "told"), [(0, False), (1, True), (4, True), (5, False)])
def test_a_run_that_was_all_probe_is_told(steps, told, caplog):
    """Not in silence: its weights are those it began with."""
    model, optimizer = start(probe_steps=4)
    before = weights(model)
    tiny.train(model, optimizer, 0, steps)
    assert is_unchanged(model, before) == (steps <= 4)
    optimizer.release()
    del optimizer
    gc.collect()
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [m.startswith("GrassAdamW has updated no weights") for m in messages] == [True] * told
    if told:
        assert f"all {steps} steps belonged to the probe, which takes 4" in messages[0]


class Quantized(torch.Tensor):
    """A weight whose elements are elsewhere, as libraries for quantization make them."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __repr__(self):
        return "Quantized()"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Quantized(args[0])
        raise NotImplementedError(str(function))


def test_quantized_weights_are_refused_at_construction_and_may_be_frozen(caplog):
    """Not after a probe of many steps."""
    model = tiny.stack()
    weight = model.blocks[1].up.weight
    model.blocks[1].up.weight = torch.nn.Parameter(Quantized(weight))
    with pytest.raises(
        grass.ParameterError, match=r"shape .* has no memory of its own, as quantized.* freeze them"
    ):
        grass.GrassAdamW(model, config=tiny.config())
    assert all(p.requires_grad for p in model.parameters())
    model.blocks[1].requires_grad_(False)
    optimizer = grass.GrassAdamW(model, config=tiny.config())
    assert optimizer.probabilities[1] == 0
    assert "1 of 5 layers have no trainable parameter and are not drawn: [1]" in caplog.text
