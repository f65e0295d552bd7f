"""Failures these tests catch: a method that is not AdamW in its limits (all layers active; each layer by
itself, stepped only when it was active), a step counter that is global or dropped when a layer leaves, a
frozen layer whose weights, moments or counter change by one bit, a probe that updates or keeps state, runs
of one seed that differ, gradients that stay on frozen layers, a method that only works with one kind of model.
"""

import pytest
import torch
from torch import nn

import grass
from grass.sampling import SAMPLER_CLASSES
from tests.support import tiny

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")

LR, DECAY = 1e-2, 0.1


def grass_adamw(model: nn.Module, lr: float = LR, weight_decay: float = DECAY, **options) -> grass.GrassAdamW:
    return grass.GrassAdamW(model, lr=lr, weight_decay=weight_decay, config=tiny.config(**options))


def test_all_layers_active_and_no_probe_is_adamw() -> None:
    model, same, reference = tiny.llama(), tiny.llama(), tiny.llama()
    opt = grass_adamw(model, active_layers=5, probe_steps=0)
    plain = grass.AdamW(same.parameters(), lr=LR, weight_decay=DECAY)
    torchs = torch.optim.AdamW(reference.parameters(), lr=LR, weight_decay=DECAY)
    for m, o in ((model, opt), (same, plain), (reference, torchs)):
        tiny.train(m, o, 0, 12)
    tiny.assert_identical(dict(model.named_parameters()), dict(same.named_parameters()))
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=LR * 1e-3)  # a thousandth of one update
    own, theirs = opt.state_dict(), torchs.state_dict()
    assert own["state"].keys() == theirs["state"].keys()
    for key, state in theirs["state"].items():
        assert own["state"][key].keys() == state.keys()
        assert own["state"][key]["step"] == state["step"] == 12
        torch.testing.assert_close(own["state"][key]["exp_avg"], state["exp_avg"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("moments", ["keep", "reset"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_each_parameter_is_its_own_adamw_stepped_when_its_layer_was_active(
    moments: str, amsgrad: bool
) -> None:
    model = tiny.stack()
    config = tiny.config(moments=moments)
    opt = grass.GrassAdamW(model, lr=LR, weight_decay=DECAY, amsgrad=amsgrad, config=config)
    owner = tiny.layer_names(model, opt)
    twins = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}

    def fresh(name: str) -> torch.optim.AdamW:
        return torch.optim.AdamW([twins[name]], lr=LR, weight_decay=DECAY, amsgrad=amsgrad)

    alone = {name: fresh(name) for name in twins}
    stepped = dict.fromkeys(range(5), 0)

    def before_step(index: int) -> None:
        if index < 3:
            return
        for name, p in model.named_parameters():
            layer = owner[name]
            active = layer == -1 or layer in opt.active_layers
            assert (p.grad is not None) == active, name
            if active:
                twins[name].grad = p.grad.clone()
                alone[name].step()
        for layer in opt.active_layers:
            stepped[layer] += 1

    for index in range(30):
        was = opt.active_layers
        tiny.train(model, opt, index, index + 1, before_step=before_step)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, twins[name], rtol=1e-5, atol=1e-6)
            if moments == "reset" and owner[name] in was and owner[name] not in opt.active_layers:
                alone[name] = fresh(name)
    assert min(stepped.values()) > 0, "every layer has had its turn"
    assert max(stepped.values()) < 27, "and no layer all turns"
    for name, p in model.named_parameters():
        steps = float(opt.state[p]["step"]) if opt.state.get(p) else 0
        assert steps == (alone[name].state[twins[name]]["step"] if alone[name].state else 0)
        if moments == "keep":
            assert steps == stepped.get(owner[name], 27)


def test_a_frozen_layer_does_not_change_by_one_bit() -> None:
    model = tiny.llama()
    opt = grass_adamw(model)
    owner = tiny.layer_names(model, opt)
    frozen_and_seen = 0
    for index in range(24):
        before, active, probing = tiny.weights(model), opt.active_layers, opt.phase == "probe"
        states = {
            name: {key: value.clone() for key, value in opt.state.get(p, {}).items()}
            for name, p in model.named_parameters()
        }
        tiny.train(model, opt, index, index + 1)
        for name, p in model.named_parameters():
            frozen = probing or owner[name] not in (*active, -1)
            assert torch.equal(p, before[name]) == frozen, name
            if frozen and states[name]:
                frozen_and_seen += not probing
                for key, value in states[name].items():
                    assert torch.equal(opt.state[p][key], value), (name, key)
    assert frozen_and_seen > 50


def test_frozen_layers_neither_require_nor_keep_gradients() -> None:
    model = tiny.llama()
    opt = grass_adamw(model)
    owner = tiny.layer_names(model, opt)
    for index in range(20):
        tiny.loss_of(model, tiny.batch(index)).backward()
        opt.step()  # no zero_grad before the look: freezing itself must drop gradients
        for name, p in model.named_parameters():
            trains = opt.phase == "probe" or owner[name] in (*opt.active_layers, -1)
            assert p.requires_grad == trains, (index, name)
            if not trains:
                assert p.grad is None, (index, name)
        opt.zero_grad()


def test_a_gradient_put_on_a_frozen_layer_is_dropped_and_not_used() -> None:
    model = tiny.stack()
    opt = grass_adamw(model, probe_steps=0)
    frozen = next(layer for layer in range(5) if layer not in opt.active_layers)
    weight = model.blocks[frozen].up.weight
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)  # zeros would still decay the weights
    tiny.train(model, opt, 0, 1, before_step=lambda _: setattr(weight, "grad", torch.zeros_like(weight)))
    assert torch.equal(weight, before)
    assert weight.grad is None
    assert not opt.state.get(weight)


def test_the_probe_updates_nothing_and_keeps_no_state() -> None:
    model = tiny.llama()
    opt = grass_adamw(model, probe_steps=5)
    before = tiny.weights(model)
    for index in range(4):
        assert (opt.phase, opt.active_layers, opt.next_active_layers) == ("probe", (), None)
        tiny.train(model, opt, index, index + 1)
        assert len(opt.state) == 0
        assert opt.importance.tolist() == [0] * 5
        assert opt.probabilities.tolist() == pytest.approx([0.2] * 5)
    tiny.train(model, opt, 4, 5)
    tiny.assert_identical(tiny.weights(model), before)
    assert opt.phase == "adapt"
    assert len(opt.active_layers) == 2
    assert opt.importance.min() > 0


def test_two_runs_of_a_seed_are_equal_bit_by_bit_and_two_seeds_are_not() -> None:
    runs = []
    for seed in (0, 0, 1):
        model = tiny.llama()
        opt = grass_adamw(model, seed=seed)
        torch.manual_seed(len(runs))  # the global generator must not matter
        tiny.train(model, opt, 0, 20)
        runs.append((model, opt))
    tiny.assert_same_run(*runs[0], *runs[1])
    assert runs[0][1].draw_counts != runs[2][1].draw_counts


@pytest.mark.parametrize("sampler", sorted(SAMPLER_CLASSES))
def test_every_sampler_trains_the_sets_it_draws(sampler: str) -> None:
    model = tiny.stack()
    opt = grass_adamw(model, sampler=sampler)
    first = 3 if SAMPLER_CLASSES[sampler].probes else 0
    assert (opt.phase == "probe") == (first > 0)
    if sampler == "weight_norm":
        wanted = [
            torch.cat([p.detach().flatten() for p in block.parameters()]).square().mean().sqrt()
            for block in model.blocks
        ]
        torch.testing.assert_close(opt.importance, torch.stack(wanted))
    owner = tiny.layer_names(model, opt)
    for index in range(15):
        before, active = tiny.weights(model), opt.active_layers
        tiny.train(model, opt, index, index + 1)
        changed = {owner[name] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == (set() if index < first else {-1, *active})


def test_moments_are_made_at_the_draw_and_dropped_by_reset() -> None:
    for moments in ("keep", "reset"):
        model = tiny.stack()
        opt = grass_adamw(model, moments=moments, sampler="cyclic")
        tiny.train(model, opt, 0, 1)
        assert opt.active_layers == (0, 1)
        assert opt.next_active_layers is None
        assert not opt.state.get(model.blocks[2].up.weight)
        tiny.train(model, opt, 1, 2)
        assert opt.next_active_layers == (2, 3)
        assert opt.state[model.blocks[2].up.weight]["step"] == 0
        assert opt.state[model.blocks[2].up.weight]["exp_avg"].abs().sum() == 0
        tiny.train(model, opt, 2, 3)
        assert opt.active_layers == (2, 3)
        assert bool(opt.state.get(model.blocks[0].up.weight)) == (moments == "keep")
        assert opt.state[model.head.weight]["step"] == 3, "what is in no layer never leaves"


def test_reset_keeps_a_layer_that_stays() -> None:
    model = tiny.stack(layers=3)
    opt = grass_adamw(model, moments="reset", sampler="cyclic")  # (0, 1), (0, 2), (1, 2)
    tiny.train(model, opt, 0, 6)
    assert opt.active_layers == (1, 2)
    assert opt.state[model.blocks[2].up.weight]["step"] == 3
    assert not opt.state.get(model.blocks[0].up.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_encoder_decoder_and_tied_models(tied: bool) -> None:
    model = tiny.llama(tied=True) if tied else tiny.t5()
    opt = grass_adamw(model, probe_steps=1)
    assert len(opt.layers) == 5
    before = tiny.weights(model)
    tiny.train(model, opt, 0, 1)
    assert opt.importance.min() > 0
    opt = grass_adamw(model, sampler="cyclic")  # every layer has its turn
    tiny.train(model, opt, 1, 10)
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name
    shared = model.get_input_embeddings().weight
    assert opt.state[shared]["step"] == 9


def test_bfloat16_weights_have_float32_moments_and_train() -> None:
    model = tiny.stack().bfloat16()
    opt = grass_adamw(model)
    tiny.train(model, opt, 0, 15)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert {state["exp_avg"].dtype for state in opt.state.values()} == {torch.float32}
    assert opt.importance.min() > 0


def test_autocast_changes_nothing_about_the_order_of_things() -> None:
    model = tiny.llama()
    opt = grass_adamw(model)
    for index in range(12):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = tiny.loss_of(model, tiny.batch(index))
        loss.backward()
        opt.step()
        opt.zero_grad()
    assert opt.step_count == 12
    assert opt.importance.min() > 0
    assert opt.nonfinite_norms == 0


def test_float64_weights_take_torchs_path_with_their_norms() -> None:
    model, low = tiny.stack().double(), tiny.stack()
    opt, low_opt = grass_adamw(model), grass_adamw(low)
    tiny.train(model, opt, 0, 12)
    tiny.train(low, low_opt, 0, 12)
    assert {state["exp_avg"].dtype for state in opt.state.values()} == {torch.float64}
    assert opt.active_layers == low_opt.active_layers
    torch.testing.assert_close(opt.importance, low_opt.importance, rtol=1e-3, atol=1e-6)
