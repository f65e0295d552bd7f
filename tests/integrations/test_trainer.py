"""Failures these tests catch: a Trainer run in which the method does not get its gradients (accumulation,
checkpointing, clipping), its groups (decay for weights only) or its learning rates; a run that is resumed
otherwise than it would have gone on; a factory that cannot be used twice, or takes a stopped optimizer's
frozen layers for the user's; clipping that is asked for, cannot be, and is not told of; settings of
`TrainingArguments` that are ignored, or that win over explicit ones; a trainer class that GRASS has no way into.
"""

import dataclasses
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import grass
from grass.integrations.transformers import (
    GrassCallback,
    _place,
    decay_groups,
    make_optimizer,
    trainer_optimizer,
)
from tests.support import tiny

STEPS = 14
LR, DECAY = 1e-2, 0.1

# Trainer pins memory whether there is an accelerator or not
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


class Ids(Dataset):
    """Enough rows for every step, the same at every look."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = tiny.batch(index, size=1)[0]
        return {"input_ids": ids, "labels": ids}


class Watch(TrainerCallback):
    """Actions of the method, step by step."""

    def __init__(self) -> None:
        self.active: list[tuple[int, ...]] = []
        self.rates: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        opt = kwargs["optimizer"]
        self.active.append(getattr(opt, "optimizer", opt).active_layers)
        self.rates.append(opt.param_groups[0]["lr"])


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": LR,
        "weight_decay": DECAY,
        "warmup_steps": 3,
        "save_steps": 7,
        "save_strategy": "steps",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 5,
        "dataloader_pin_memory": False,
        "seed": 1,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def trainer(folder: Path, model: nn.Module | None = None, how: str = "factory", **options: Any) -> Trainer:
    model = tiny.llama(layers=4) if model is None else model
    config = tiny.config()
    extra: dict[str, Any]
    if how == "factory":
        given = trainer_optimizer(lr=LR, weight_decay=DECAY, config=config)
        extra = {"optimizer_cls_and_kwargs": given}
    elif how == "class":
        given = (grass.GrassAdamW, {"model": model, "lr": LR, "weight_decay": DECAY, "config": config})
        extra = {"optimizer_cls_and_kwargs": given}
    else:
        opt = grass.GrassAdamW(model, lr=LR, weight_decay=DECAY, config=config)
        extra = {"optimizers": (opt, None)}
    return Trainer(model, arguments(folder, **options), train_dataset=Ids(), callbacks=[Watch()], **extra)


def method_of(run: Trainer) -> grass.GrassAdamW:
    return getattr(run.optimizer, "optimizer", run.optimizer)


def watch_of(run: Trainer) -> Watch:
    return next(callback for callback in run.callback_handler.callbacks if isinstance(callback, Watch))


def checkpointed(reentrant: bool) -> dict[str, Any]:
    """Trainer's settings, under the name that its version gives them."""
    new = any(field.name == "activation_checkpointing" for field in dataclasses.fields(TrainingArguments))
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": reentrant}}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "nonreentrant", "reentrant"])
@pytest.mark.parametrize("how", ["factory", "given"])
def test_seven_steps_a_stop_and_seven_steps_are_fourteen(
    tmp_path: Path, checkpointing: bool | None, how: str
) -> None:
    options = {} if checkpointing is None else checkpointed(checkpointing)
    whole = trainer(tmp_path / "whole", how=how, **options)
    whole.train()
    again = trainer(tmp_path / "again", how=how, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-7"))
    assert whole.state.global_step == again.state.global_step == STEPS
    assert method_of(whole).step_count == method_of(again).step_count == STEPS
    tiny.assert_same_run(whole.model, method_of(whole), again.model, method_of(again))
    watched, resumed = watch_of(whole), watch_of(again)
    assert watched.active[7:] == resumed.active
    assert watched.active[:3] == [(), (), ()]
    assert all(len(layers) == 2 for layers in watched.active[3:])
    assert watched.rates[7:] == resumed.rates
    assert watched.rates[0] == 0, "warm-up begins at 0, also for a method that counts its own steps"


def test_the_factory_keeps_trainers_decay_groups(tmp_path: Path) -> None:
    model = tiny.llama(layers=4)
    run = trainer(tmp_path, model)
    run.create_optimizer()
    own = Trainer(tiny.llama(layers=4), arguments(tmp_path)).create_optimizer()
    opt = run.optimizer
    assert isinstance(opt, grass.GrassAdamW)
    assert [len(g["params"]) for g in opt.param_groups] == [len(g["params"]) for g in own.param_groups]
    assert [g["weight_decay"] for g in opt.param_groups] == [g["weight_decay"] for g in own.param_groups]
    names = {id(p): name for name, p in model.named_parameters()}
    bare = {names[id(p)] for p in opt.param_groups[1]["params"]}
    assert bare == {name for name in names.values() if "norm" in name}


def test_a_run_of_trainer_is_the_plain_loop(tmp_path: Path) -> None:
    """The same batches, rates and clipping by hand, without Trainer."""
    steps = 9
    run = trainer(
        tmp_path, max_steps=steps, max_grad_norm=0.5, gradient_accumulation_steps=1, save_strategy="no"
    )
    seen: list[torch.Tensor] = []
    inner = run.compute_loss

    def compute_loss(model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        seen.append(inputs["input_ids"].clone())
        return inner(model, inputs, *args, **kwargs)

    run.compute_loss = compute_loss
    run.train()
    model = tiny.llama(layers=4)
    model.train()
    (factory, options) = trainer_optimizer(lr=LR, weight_decay=DECAY, config=tiny.config())
    opt = factory()(model, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda step: step / 3 if step < 3 else max(0.0, (steps - step) / (steps - 3))
    )
    for ids in seen:
        model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        opt.step()
        schedule.step()
        opt.zero_grad()
    assert opt.draw_counts == method_of(run).draw_counts
    torch.testing.assert_close(opt.importance, method_of(run).importance, rtol=1e-5, atol=0)
    for p, q in zip(model.parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_class_itself_can_be_given_once(tmp_path: Path) -> None:
    run = trainer(tmp_path, how="class", max_steps=5, save_strategy="no")
    run.train()
    opt = method_of(run)
    assert isinstance(opt, grass.GrassAdamW)
    assert opt.step_count == 5
    assert len(opt.param_groups) == 1


def test_the_factory_leaves_what_the_user_froze(tmp_path: Path) -> None:
    model = tiny.llama(layers=4)
    model.lm_head.requires_grad_(False)
    before = model.lm_head.weight.clone()
    run = trainer(tmp_path, model, max_steps=6, save_strategy="no")
    run.train()
    assert not model.lm_head.weight.requires_grad
    assert torch.equal(model.lm_head.weight, before)


def test_a_second_trainer_on_a_trained_model_gets_all_its_layers(tmp_path: Path) -> None:
    model = tiny.llama(layers=4)
    first = trainer(tmp_path, model, max_steps=5, save_strategy="no")
    first.train()
    assert sum(p.requires_grad for p in model.parameters()) < len(list(model.parameters()))
    second = trainer(tmp_path, model, max_steps=5, save_strategy="no")
    second.train()
    opt = method_of(second)
    assert sum(len(group["params"]) for group in opt.param_groups) == len(list(model.parameters()))
    assert opt.importance.min() > 0


def test_mixed_precision(tmp_path: Path) -> None:
    run = trainer(tmp_path, bf16=True, max_steps=6, save_strategy="no")
    run.train()
    opt = method_of(run)
    assert opt.step_count == 6
    assert opt.importance.isfinite().all()
    assert opt.importance.min() > 0


def test_a_frozen_embedding_under_trainers_checkpointing(tmp_path: Path) -> None:
    model = tiny.llama(layers=4)
    config = tiny.config(always_active="none")
    given = trainer_optimizer(lr=LR, config=config)
    args = arguments(tmp_path, max_steps=8, save_strategy="no", **checkpointed(True))
    before = tiny.weights(model)
    run = Trainer(model, args, train_dataset=Ids(), callbacks=[Watch()], optimizer_cls_and_kwargs=given)
    run.train()
    opt = method_of(run)
    assert opt.importance.min() > 0, "reentrant checkpointing has lost the gradients"
    owner = tiny.layer_names(model, opt)
    moved = {owner[name] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {layer for active in watch_of(run).active for layer in active}


CLIPS = r"max_grad_norm=1.0\) clips nothing.* pass max_grad_norm=0"


def test_clipping_that_updates_inside_backward_rule_out_is_told_once(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=6, save_strategy="no", gradient_accumulation_steps=1)
    assert args.max_grad_norm == 1.0, "Trainer's default"
    fused = tiny.config(probe_steps=0, fused_backward=True)
    model = tiny.llama(layers=4)
    with pytest.warns(UserWarning, match=CLIPS):
        given = trainer_optimizer(lr=LR, config=fused, args=args)
    run = Trainer(model, args, train_dataset=Ids(), optimizer_cls_and_kwargs=given)
    run.train()  # a second warning would be an error
    assert method_of(run).step_count == 6


@pytest.mark.parametrize(
    ("fused", "options"), [(True, {"max_grad_norm": 0}), (True, None), (False, {})], ids=str
)
def test_no_warning_where_nothing_is_clipped_in_vain(
    tmp_path: Path, fused: bool, options: dict[str, Any] | None
) -> None:
    args = None if options is None else arguments(tmp_path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factory, given = trainer_optimizer(lr=LR, config=tiny.config(fused_backward=fused), args=args)
        opt = factory()(tiny.llama(layers=4), **given)
    assert isinstance(opt, grass.GrassAdamW)


# -- settings of TrainingArguments -------------------------------------------------------------------------------------

GIVEN = {
    "learning_rate": 3e-3,
    "weight_decay": 0.3,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-5,
}


def settings(opt: torch.optim.Optimizer) -> list[tuple[Any, ...]]:
    return [
        tuple(group.get("initial_lr", group["lr"]) if key == "lr" else group[key] for key in KEYS)
        for group in opt.param_groups
    ]


KEYS = ("lr", "weight_decay", "betas", "eps")


def test_settings_of_the_arguments_are_those_of_trainers_own_optimizer(tmp_path: Path) -> None:
    args = arguments(tmp_path, **GIVEN)
    own = Trainer(tiny.llama(), args).create_optimizer()
    config = tiny.config()
    factory = Trainer(
        tiny.llama(), args, optimizer_cls_and_kwargs=trainer_optimizer(args=args, config=config)
    ).create_optimizer()
    made = make_optimizer(tiny.llama(), args=args, config=config)
    assert settings(factory) == settings(made) == settings(own)


def test_explicit_settings_win_over_the_arguments(tmp_path: Path) -> None:
    args = arguments(tmp_path, **GIVEN)
    explicit = {"lr": 1e-4, "weight_decay": 0.0, "betas": (0.7, 0.6), "eps": 1e-7}
    opt = make_optimizer(tiny.llama(), args=args, config=tiny.config(), **explicit)
    assert settings(opt)[0] == tuple(explicit.values())
    partly = make_optimizer(tiny.llama(), args=args, config=tiny.config(), lr=1e-4)
    assert settings(partly)[0] == (1e-4, 0.3, (0.8, 0.9), 1e-5)


def test_without_arguments_there_are_defaults() -> None:
    assert settings(make_optimizer(tiny.llama()))[0] == (1e-3, 0.0, (0.9, 0.999), 1e-8)


def test_each_training_of_a_search_reads_its_own_arguments(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=4, save_strategy="no")
    run = Trainer(
        args=args,
        model_init=lambda: tiny.llama(layers=3),
        train_dataset=Ids(),
        optimizer_cls_and_kwargs=trainer_optimizer(args=args, config=tiny.config()),
    )
    run.add_callback(GrassCallback(run))
    found = []
    for rate, decay in ((1e-2, 0.1), (5e-3, 0.2)):
        run.args.learning_rate, run.args.weight_decay = rate, decay  # as a search does
        run.train()
        found.append(settings(method_of(run))[0][:2])
    assert found == [(1e-2, 0.1), (5e-3, 0.2)]


# -- trainers that take only ``optimizers=`` ---------------------------------------------------------------------------


def test_an_optimizer_that_is_made_before_trains_as_that_of_the_factory(tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="no")
    runs = []
    for made in (False, True):
        model = tiny.llama(layers=4)
        if made:
            extra = {"optimizers": (make_optimizer(model, args=args, config=tiny.config()), None)}
        else:
            extra = {"optimizer_cls_and_kwargs": trainer_optimizer(args=args, config=tiny.config())}
        run = Trainer(model, args, train_dataset=Ids(), **extra)
        run.train()
        runs.append(run)
    tiny.assert_same_run(runs[0].model, method_of(runs[0]), runs[1].model, method_of(runs[1]))


def test_seq2seq_trainer(tmp_path: Path) -> None:
    args = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=6, use_cpu=True, report_to=[], dataloader_pin_memory=False, disable_tqdm=True
    )
    model = tiny.t5()
    opt = make_optimizer(model, args=args, config=tiny.config(active_layers=1))
    run = Seq2SeqTrainer(model, args, train_dataset=Ids(), optimizers=(opt, None))
    run.train()
    assert method_of(run) is opt
    assert opt.step_count == 6
    assert opt.importance.min() > 0


def test_decay_groups_are_those_of_trainer(tmp_path: Path) -> None:
    model = tiny.llama()
    own = Trainer(model, arguments(tmp_path)).create_optimizer().param_groups
    groups = decay_groups(model, DECAY)
    assert [group["weight_decay"] for group in groups] == [DECAY, 0.0]
    for group, other in zip(groups, own, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in other["params"]]


def test_a_model_is_moved_only_where_a_trainer_would() -> None:
    def device_after(**options: Any) -> str:
        model = nn.Linear(2, 2)
        _place(model, SimpleNamespace(**{"device": torch.device("meta"), **options}))
        return model.weight.device.type

    assert device_after(place_model_on_device=None) == "meta"
    assert device_after(place_model_on_device=False) == "cpu"
    assert device_after(place_model_on_device=None, device=torch.device("cpu")) == "cpu"


def test_clipping_is_told_by_make_optimizer_too(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    with pytest.warns(UserWarning, match=CLIPS):
        make_optimizer(tiny.llama(), args=args, config=tiny.config(fused_backward=True))
