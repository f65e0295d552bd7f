"""Failures these tests catch: bad input that is accepted, answered without a remedy, or leaves a trace on
the model; parameters that the user froze and the method unfreezes; always-active patterns that are ignored;
two optimizers that fight over a model; `requires_grad` or hooks left behind by a release or by garbage
collection; parameters added later that the method does not know; closures, schedules of the learning rate and
adapters that do not work.
"""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

import grass
from tests.support import tiny

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def hook_count(model: nn.Module) -> int:
    on_params = sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
    return on_params + sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


NORMS = {f"blocks.{i}.norm.{name}" for i in range(5) for name in ("weight", "bias")}


def all_frozen() -> nn.Module:
    return tiny.stack().requires_grad_(False)


BAD: list[tuple[str, Callable[[], nn.Module], Callable[[nn.Module], object], type, str]] = [
    ("no parameters", nn.Module, grass.GrassAdamW, grass.ParameterError, "no parameters"),
    ("no model", tiny.stack, lambda m: grass.GrassAdamW(m.parameters()), grass.ParameterError, "model=model"),
    ("empty list", tiny.stack, lambda m: grass.GrassAdamW([], model=m), grass.ParameterError, "no parameters"),
    (
        "all frozen, and too many layers", all_frozen,
        lambda m: grass.GrassAdamW(m, config=tiny.config(active_layers=6)),
        grass.ConfigError, "pass active_layers between 1 and 5",
    ),
    ("two models", tiny.stack, lambda m: grass.GrassAdamW(m, model=tiny.stack()), grass.ParameterError, "give one"),
    (
        "too many layers", tiny.stack, lambda m: grass.GrassAdamW(m, config=tiny.config(active_layers=6)),
        grass.ConfigError, "pass active_layers between 1 and 5",
    ),
    (
        "floor too high", tiny.stack, lambda m: grass.GrassAdamW(m, config=tiny.config(min_probability=0.3)),
        grass.ConfigError, "pass at most 0.2",
    ),
    (
        "no layers", lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh()), grass.GrassAdamW,
        grass.LayerDiscoveryError, "pattern",
    ),
    (
        "foreign parameters", tiny.stack,
        lambda m: grass.GrassAdamW([*m.parameters(), nn.Parameter(torch.zeros(3, 7))], model=m),
        grass.ParameterError, "1 of the parameters do not belong to the model, the first of shape (3, 7)",
    ),
    (
        "pattern of nothing", tiny.stack, lambda m: grass.GrassAdamW(m, config=tiny.config(always_active="lm*")),
        grass.ConfigError, "'lm*' matches no parameter; names look like",
    ),
    (
        "every layer always active", tiny.stack,
        lambda m: grass.GrassAdamW(m, config=tiny.config(always_active="blocks*")),
        grass.ConfigError, "0 layers",
    ),
    ("negative rate", tiny.stack, lambda m: grass.GrassAdamW(m, lr=-1.0), ValueError, "Invalid learning rate"),
    ("differentiable", tiny.stack, lambda m: grass.GrassAdamW(m, differentiable=True), grass.ConfigError, "host"),
    ("capturable", tiny.stack, lambda m: grass.GrassAdamW(m, capturable=True), grass.ConfigError, "host"),
    (
        "data parallel", lambda: nn.DataParallel(tiny.stack()), grass.GrassAdamW,
        grass.ConfigError, "fully_shard",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=[case[0] for case in BAD])
def test_bad_input_gets_a_clear_error_and_changes_nothing(case: tuple) -> None:
    _, make, construct, error, remedy = case
    model = make()
    before, weights, hooks = flags(model), tiny.weights(model), hook_count(model)
    with pytest.raises(error) as raised:
        construct(model)
    assert remedy in str(raised.value)
    assert flags(model) == before
    assert hook_count(model) == hooks
    tiny.assert_identical(tiny.weights(model), weights)


def test_bad_input_does_not_end_an_older_optimizer() -> None:
    model = tiny.stack()
    opt = grass.GrassAdamW(model, config=tiny.config(probe_steps=1))
    tiny.train(model, opt, 0, 3)
    before = flags(model)
    with pytest.raises(grass.ConfigError):
        grass.GrassAdamW(model, config=tiny.config(active_layers=6))
    assert flags(model) == before
    tiny.train(model, opt, 3, 6)


def test_parameters_frozen_by_the_user_are_never_unfrozen() -> None:
    model = tiny.stack()
    model.blocks[1].requires_grad_(False)  # a whole layer: it cannot be drawn
    model.blocks[3].up.requires_grad_(False)  # a part of one
    model.embed.requires_grad_(False)
    users = [name for name, on in flags(model).items() if not on]
    before = tiny.weights(model)
    opt = grass.GrassAdamW(model, config=tiny.config(active_layers=4))
    for index in range(10):
        tiny.train(model, opt, index, index + 1)
        assert not any(flags(model)[name] for name in users)
    assert opt.active_layers == (0, 2, 3, 4)
    assert opt.probabilities[1] == 0
    tiny.assert_identical({n: tiny.weights(model)[n] for n in users}, {n: before[n] for n in users})
    assert not torch.equal(model.blocks[3].down.weight, before["blocks.3.down.weight"])
    opt.release()
    assert [name for name, on in flags(model).items() if not on] == users


def test_importance_counts_only_what_can_have_a_gradient() -> None:
    model = tiny.stack()
    model.blocks[3].up.requires_grad_(False)
    opt = grass.GrassAdamW(model, config=tiny.config(probe_steps=1))
    tiny.loss_of(model, tiny.batch(0)).backward()
    opt.step()
    twin = tiny.stack()
    tiny.loss_of(twin, tiny.batch(0)).backward()
    trained = [p for name, p in twin.blocks[3].named_parameters() if not name.startswith("up")]
    rms = torch.cat([p.grad.flatten() for p in trained]).square().mean().sqrt()
    torch.testing.assert_close(opt.importance[3], rms)


@pytest.mark.parametrize(
    ("always", "extra"),
    [
        ("none", set()),
        ("head*", {"head.weight"}),
        (["embed", "*.norm.*"], {"embed.weight", *NORMS}),
    ],
    ids=["none", "one pattern", "several patterns"],  # a set has no order to name a test by
)  # fmt: skip
def test_always_active_says_what_trains_besides_the_drawn_layers(always: object, extra: set[str]) -> None:
    model = tiny.stack()
    opt = grass.GrassAdamW(model, config=tiny.config(always_active=always))
    owner = tiny.layer_names(model, opt)
    names = set(owner)
    for index in range(12):
        probing, active, before = opt.phase == "probe", opt.active_layers, tiny.weights(model)
        wanted = extra | {n for n in names if owner[n] >= 0 and (probing or owner[n] in active)}
        assert {name for name, on in flags(model).items() if on} == wanted
        tiny.train(model, opt, index, index + 1)
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == (set() if probing else wanted)


def test_a_newer_optimizer_takes_the_model_over() -> None:
    model = tiny.stack()
    model.head.requires_grad_(False)
    older = grass.GrassAdamW(model, config=tiny.config())
    tiny.train(model, older, 0, 5)
    newer = grass.GrassAdamW(model, config=tiny.config(seed=5))
    assert newer.phase == "probe"
    assert sum(flags(model).values()) == len(flags(model)) - 1, "all but what the user froze"
    with pytest.raises(grass.GrassError, match="newer one"):
        older.step()
    before = flags(model)
    older.release()
    older.zero_grad()
    del older
    gc.collect()
    assert flags(model) == before
    tiny.train(model, newer, 5, 10)
    # as if the older one had never been, but for the weights it trained
    twin = tiny.stack()
    twin.head.requires_grad_(False)
    alone = grass.GrassAdamW(twin, config=tiny.config(seed=5))
    first = tiny.stack()
    first.head.requires_grad_(False)
    tiny.train(first, grass.GrassAdamW(first, config=tiny.config()), 0, 5)
    twin.load_state_dict(first.state_dict())
    tiny.train(twin, alone, 5, 10)
    tiny.assert_same_run(model, newer, twin, alone)


def test_an_optimizer_that_has_ended_stays_off_the_model() -> None:
    model = tiny.stack()
    older = grass.GrassAdamW(model, config=tiny.config(probe_steps=9))
    saved = older.state_dict()
    newer = grass.GrassAdamW(model, config=tiny.config(sampler="uniform"))
    before, hooks = flags(model), hook_count(model)
    older.load_state_dict(saved)
    assert flags(model) == before
    assert hook_count(model) == hooks, "a probe of the older one would eat the newer one's gradients"
    with pytest.raises(grass.GrassError):
        older.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    tiny.train(model, newer, 0, 2)
    assert newer.step_count == 2


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_release_gives_everything_back(steps: int) -> None:
    model = tiny.llama()
    model.lm_head.requires_grad_(False)
    before, hooks = flags(model), hook_count(model)
    opt = grass.GrassAdamW(model, config=tiny.config())
    assert hook_count(model) > hooks
    tiny.train(model, opt, 0, steps)
    opt.release()
    assert flags(model) == before
    assert hook_count(model) == hooks
    with pytest.raises(grass.GrassError, match="released"):
        opt.step()
    opt.release()  # twice is once
    tiny.loss_of(model, tiny.batch(0)).backward()
    assert all((p.grad is not None) == before[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("steps", [0, 7])
@pytest.mark.parametrize("scheduled", [False, True])
def test_garbage_collection_gives_everything_back(steps: int, scheduled: bool) -> None:
    model = tiny.llama()
    before, hooks = flags(model), hook_count(model)
    opt = grass.GrassAdamW(model, config=tiny.config())
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 1.0) if scheduled else None
    tiny.train(model, opt, 0, steps)
    ref = weakref.ref(opt)
    del opt, schedule
    gc.collect()
    assert ref() is None, "hooks or the lease keep the optimizer alive"
    assert flags(model) == before
    assert hook_count(model) == hooks


def test_an_optimizer_does_not_keep_its_model_alive_by_hooks() -> None:
    model = tiny.stack()
    opt = grass.GrassAdamW(model, config=tiny.config())
    ref = weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None
    opt.release()


def test_groups_keep_their_own_settings() -> None:
    model = tiny.stack()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": decayed, "weight_decay": 0.5},
        {"params": others, "weight_decay": 0.0, "lr": 0.0},
    ]
    opt = grass.GrassAdamW(groups, lr=1e-2, model=model, config=tiny.config(probe_steps=0))
    before = tiny.weights(model)
    tiny.train(model, opt, 0, 1)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, on in flags(model).items() if on}
    assert changed == {name for name in trained if before[name].dim() > 1}


def test_parameters_added_later_join_the_method() -> None:
    def parts(model: nn.Module) -> tuple[list, list]:
        late = [*model.blocks[4].parameters(), model.head.weight]
        return [p for p in model.parameters() if not any(p is q for q in late)], late

    model, twin = tiny.stack(), tiny.stack()
    early, late = parts(model)
    opt = grass.GrassAdamW(early, lr=1e-2, model=model, config=tiny.config(probe_steps=4))
    with pytest.raises(grass.ParameterError, match="belong"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": late, "weight_decay": 0.0})
    together = grass.GrassAdamW(
        [{"params": parts(twin)[0]}, {"params": parts(twin)[1], "weight_decay": 0.0}],
        lr=1e-2, model=twin, config=tiny.config(probe_steps=4),
    )  # fmt: skip
    for m, o in ((model, opt), (twin, together)):
        tiny.train(m, o, 0, 16)
    tiny.assert_identical(dict(model.named_parameters()), dict(twin.named_parameters()))
    assert opt.draw_counts == together.draw_counts
    assert opt.draw_counts[4] > 0
    opt.release()
    assert all(flags(model).values())


def test_parameters_added_while_training_are_frozen_or_trained_as_drawn() -> None:
    model = tiny.stack()
    late = list(model.blocks[0].parameters())
    early = [p for p in model.parameters() if not any(p is q for q in late)]
    opt = grass.GrassAdamW(early, model=model, config=tiny.config(probe_steps=1))
    tiny.train(model, opt, 0, 2)
    active = opt.active_layers
    assert 0 not in active
    opt.add_param_group({"params": late})
    assert opt.active_layers == active
    assert not any(p.requires_grad for p in late)
    tiny.train(model, opt, 2, 12)


def test_a_group_that_cannot_be_added_changes_nothing() -> None:
    model = tiny.stack()
    late = list(model.blocks[0].parameters())
    early = [p for p in model.parameters() if not any(p is q for q in late)]
    opt = grass.GrassAdamW(early, model=model, config=tiny.config(min_probability=0.25))  # full with four
    before, state = flags(model), opt.state_dict()
    with pytest.raises(grass.ConfigError, match=r"at most 0\.2"):
        opt.add_param_group({"params": late})
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": early[:1]})
    assert flags(model) == before
    tiny.assert_identical(opt.state_dict(), state)
    tiny.train(model, opt, 0, 8)


def test_closures() -> None:
    model, twin = tiny.stack(), tiny.stack()
    opt, plain = (grass.GrassAdamW(m, config=tiny.config()) for m in (model, twin))
    for index in range(12):

        def closure(index: int = index) -> torch.Tensor:
            opt.zero_grad()
            loss = tiny.loss_of(model, tiny.batch(index))
            loss.backward()
            return loss

        assert isinstance(opt.step(closure), torch.Tensor)
    opt.zero_grad()
    tiny.train(twin, plain, 0, 12)
    tiny.assert_same_run(model, opt, twin, plain)


def test_a_learning_rate_schedule_that_starts_at_zero() -> None:
    """Warm-up's first rate is 0: not to be taken for a checkpoint library's step with zero gradients."""
    for probe_steps in (0, 2):
        model = tiny.stack()
        opt = grass.GrassAdamW(model, lr=1.0, config=tiny.config(probe_steps=probe_steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min(1.0, step / 10) * 1e-3)
        for index in range(8):
            before = tiny.weights(model)
            tiny.train(model, opt, index, index + 1)
            schedule.step()
            assert opt.step_count == index + 1
            moved = not torch.equal(model.head.weight, before["head.weight"])
            assert moved == (index >= max(1, probe_steps))


def test_a_tensor_learning_rate() -> None:
    model, twin = tiny.stack(), tiny.stack()
    opt = grass.GrassAdamW(model, lr=torch.tensor(1e-3), config=tiny.config())
    plain = grass.GrassAdamW(twin, lr=float(torch.tensor(1e-3)), config=tiny.config())
    tiny.train(model, opt, 0, 8)
    tiny.train(twin, plain, 0, 8)
    tiny.assert_identical(dict(model.named_parameters()), dict(twin.named_parameters()))


# peft asks transformers for a property under its old name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_low_rank_adapters() -> None:
    import peft

    model = tiny.llama()
    names = ["q_proj", "up_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, task_type="CAUSAL_LM"))
    adapters = {name for name, on in flags(model).items() if on}
    before = tiny.weights(model)
    opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config())
    assert len(opt.layers) == 5
    tiny.train(model, opt, 0, 15)
    assert len(opt.active_layers) == 2
    for name, p in model.named_parameters():
        assert p.requires_grad <= (name in adapters)
        assert name in adapters or torch.equal(p, before[name])
    trained = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert trained
    opt.release()
    assert {name for name, on in flags(model).items() if on} == adapters


def test_a_model_compiled_whole_gets_a_warning() -> None:
    model = tiny.stack()
    with pytest.warns(UserWarning, match="compile its blocks one by one"):
        grass.GrassAdamW(torch.compile(model, backend="eager"), config=tiny.config()).release()


def test_what_can_be_read() -> None:
    model = tiny.stack()
    config = tiny.config()
    opt = grass.GrassAdamW(model, config=config)
    assert opt.config is config
    assert opt.layers.names == tuple(f"blocks.{i}" for i in range(5))
    tiny.train(model, opt, 0, 9)
    assert opt.importance.dtype == opt.probabilities.dtype == torch.float32
    assert opt.probabilities.sum().item() == pytest.approx(1)
    torch.testing.assert_close(opt.probabilities, opt.importance / opt.importance.sum())
    opt.importance.zero_(), opt.probabilities.zero_(), opt.draw_counts.clear()
    assert opt.importance.min() > 0, "what is read is a copy"
    assert opt.probabilities.min() > 0
    assert len(opt.draw_counts) == 5
    assert sum(opt.draw_counts) == 2 * 2, "9 steps are a probe of 3 and two periods of 3"


def test_repr_shows_options_layers_and_configuration() -> None:
    opt = grass.GrassAdamW(tiny.stack(), lr=0.25, master_weights=True, config=tiny.config(active_layers=3))
    text = repr(opt)
    assert "lr: 0.25" in text
    assert "master_weights: True" in text
    assert "max_grad_norm" not in text  # the default
    assert "LayerMap(5 layers: blocks.0, ..., blocks.4; " in text
    assert "active_layers=3" in text
    assert "\n    max_grad_norm: 2.0\n" in repr(grass.AdamW(tiny.stack().parameters(), max_grad_norm=2.0))
