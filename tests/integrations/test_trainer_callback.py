"""Failures these tests catch: metrics that do not reach the logger that ``report_to`` names, or are not those of the
optimizer; a callback that changes the training; a model left with most parameters frozen after training; early stopping
that counts evaluations in which nothing has been trained; a gradient norm of 0 in the log where there are gradients; a
Trainer whose optimizer is another; a run that ends inside the probe, without a word.
"""

import gc
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import grass
from grass.integrations.monitor import Monitor, find_optimizer
from grass.integrations.transformers import GrassCallback, trainer_optimizer
from tests.integrations.test_trainer import Ids, arguments, method_of
from tests.support import tiny

SCALARS = {
    "grass/phase",
    "grass/trainable_parameters",
    "grass/entropy",
    "grass/grad_norm",
    "grass/skipped_steps",
    "grass/nonfinite_norms",
    "grass/h2d_bytes",
    "grass/d2h_bytes",
    "grass/step_seconds",
}
BY_LAYER = ("active", "importance", "probability", "draws", "layer_grad_norm")

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


def trainer(
    folder: Path, callback: str = "trainer", config: dict[str, Any] | None = None, **options: Any
) -> Trainer:
    """A Trainer with the callback that has it, or that has none, or without the callback."""
    callbacks: list[TrainerCallback] = options.pop("callbacks", [])
    extra = {"eval_dataset": torch.utils.data.Subset(Ids(), range(4))}
    args = arguments(
        folder,
        **{"gradient_accumulation_steps": 1, "save_strategy": "no", "logging_steps": 1, **options},
    )
    given = trainer_optimizer(lr=1e-2, config=tiny.config(**(config or {})))
    if callback == "alone":
        callbacks = [*callbacks, GrassCallback()]
    run = Trainer(
        tiny.llama(layers=4),
        args,
        train_dataset=Ids(),
        callbacks=callbacks,
        optimizer_cls_and_kwargs=given,
        **extra,
    )
    if callback == "trainer":
        run.add_callback(GrassCallback(run))
    return run


def rows(run: Trainer) -> list[dict[str, Any]]:
    return [row for row in run.state.log_history if "loss" in row]


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars of the only run in a folder, as (step, value)."""
    from tensorboard.backend.event_processing import event_accumulator as accumulator

    (file,) = folder.rglob("events.out.tfevents.*")
    events = accumulator.EventAccumulator(str(file.parent), {accumulator.SCALARS: 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_metric_of_every_row(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="writes and reads its files")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of tensorboard and protobuf
        run = trainer(tmp_path, report_to="tensorboard", max_steps=9)
        run.train()
        found = read_events(tmp_path)
    names = method_of(run).layers.names
    expected = SCALARS | {f"grass/{key}/{name}" for key in BY_LAYER for name in names}
    assert {tag.removeprefix("train/") for tag in found if "grass/" in tag} == expected
    history = rows(run)
    assert len(history) == 9
    for key in expected:
        steps, values = zip(*found[f"train/{key}"], strict=True)
        assert list(steps) == list(range(1, 10))
        assert list(values) == pytest.approx([row[key] for row in history], rel=1e-6)


class Truth(TrainerCallback):
    """Record the optimizer at each step, for comparison with the logged rows."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        opt = kwargs["optimizer"].optimizer
        on = [p for group in opt.param_groups for p in group["params"] if p.requires_grad]
        self.steps.append(
            {"phase": opt.phase, "active": opt.active_layers, "trainable": sum(p.numel() for p in on)}
        )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        opt = kwargs["optimizer"].optimizer
        self.steps[-1].update(
            norm=float(opt.grad_norm), draws=opt.draw_counts, importance=opt.importance.tolist()
        )


@pytest.mark.parametrize("fused", [False, True])
def test_rows_tell_what_the_optimizer_did(tmp_path: Path, fused: bool) -> None:
    truth = Truth()
    run = trainer(tmp_path, config={"fused_backward": fused}, max_steps=9, max_grad_norm=0, callbacks=[truth])
    run.train()
    names = method_of(run).layers.names
    for row, step in zip(rows(run), truth.steps, strict=True):
        probing = step["phase"] == "probe"
        assert row["grass/phase"] == (0 if probing else 1)
        assert row["grass/trainable_parameters"] == (0 if probing else step["trainable"])
        assert [i for i, name in enumerate(names) if row[f"grass/active/{name}"]] == list(step["active"])
        assert [row[f"grass/draws/{name}"] for name in names] == step["draws"]
        assert [row[f"grass/importance/{name}"] for name in names] == step["importance"]
        assert row["grass/grad_norm"] == step["norm"] > 0
        assert row["grad_norm"] == pytest.approx(step["norm"], rel=1e-4), "Trainer's own is 0"
        layers = sum(row[f"grass/layer_grad_norm/{name}"] ** 2 for name in names)
        assert 0 < layers <= step["norm"] ** 2
        assert row["grass/step_seconds"] > 0
    assert rows(run)[0]["grass/entropy"] == pytest.approx(torch.tensor(4.0).log().item())


@pytest.mark.parametrize("how", ["trainer", "alone"])
def test_the_callback_changes_nothing(tmp_path: Path, how: str) -> None:
    with_it, without = trainer(tmp_path, how), trainer(tmp_path, "none")
    for run in (with_it, without):
        run.train()
    method_of(without).release()
    tiny.assert_same_run(with_it.model, method_of(with_it), without.model, method_of(without))
    ours = {"grad_norm", *(key for row in rows(with_it) for key in row if key.startswith("grass/"))}
    for row, other in zip(rows(with_it), rows(without), strict=True):
        assert {k: v for k, v in row.items() if k not in ours} == {
            k: v for k, v in other.items() if k not in ours
        }


def test_metrics_are_only_in_rows_of_training(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=6, eval_strategy="steps", eval_steps=2)
    run.train()
    assert len(rows(run)) == 6
    for row in run.state.log_history:
        assert ("grass/phase" in row) == ("loss" in row)


def test_a_callback_that_cannot_reach_the_loggers_says_so(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="is the logger that cannot be reached")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        run = trainer(tmp_path, "alone", report_to="tensorboard", max_steps=4)
        with pytest.warns(
            UserWarning, match=r"cannot reach .*tensorboard.* trainer.add_callback\(GrassCallback\("
        ):
            run.train()
    assert not SCALARS - rows(run)[-1].keys()


@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_goes_on_as_the_whole(tmp_path: Path, stop: int) -> None:
    whole = trainer(tmp_path / "whole", max_steps=9, save_strategy="steps", save_steps=stop)
    whole.train()
    again = trainer(tmp_path / "again", max_steps=9)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    tiny.assert_same_run(whole.model, method_of(whole), again.model, method_of(again))
    ours = [{k: v for k, v in row.items() if k.startswith("grass/")} for row in rows(whole)[stop:]]
    for row, other in zip(rows(again)[stop:], ours, strict=True):
        assert all(row[k] == v for k, v in other.items() if k != "grass/step_seconds")


# -- the end of training -----------------------------------------------------------------------------------------------


def test_all_parameters_require_grad_after_training(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=8)
    run.model.lm_head.requires_grad_(False)
    run.train()
    assert [name for name, p in run.model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_a_second_training_needs_a_new_optimizer_and_says_so(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=5)
    run.train()
    with pytest.raises(
        grass.GrassError, match=r"released at the end of the last training: set trainer.optimizer = None"
    ):
        run.train()
    run.optimizer = None
    run.train()
    assert method_of(run).step_count == 5


def test_an_optimizer_that_is_kept_goes_on_in_a_second_training(tmp_path: Path) -> None:
    run = trainer(tmp_path, "none", max_steps=5, callbacks=[GrassCallback(release=False)])
    run.train()
    run.train()
    assert method_of(run).step_count == 10


def test_trainer_and_optimizer_are_freed_without_a_collection(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=5)
    run.train()
    gc.collect()
    gc.disable()
    try:
        refs = weakref.ref(run), weakref.ref(method_of(run))
        del run
        assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()


# -- early stopping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_early_stopping_does_not_count_the_probe(tmp_path: Path, strategy: str) -> None:
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    options = {"eval_strategy": strategy, "metric_for_best_model": "loss", "greater_is_better": False}
    if strategy == "steps":
        options.update(eval_steps=1, max_steps=10)
    else:  # epochs of one step
        options.update(num_train_epochs=10, max_steps=-1, per_device_train_batch_size=256)
    run = trainer(
        tmp_path,
        config={"probe_steps": 5},
        callbacks=[stopping],
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.train()
    evaluated = [row["step"] for row in run.state.log_history if "eval_loss" in row]
    assert run.state.global_step > 5, "stopped inside the probe"
    assert evaluated[0] == 5, "the last step of the probe is the first with a meaning"


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_another_optimizer_is_an_error(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=2)
    run = Trainer(tiny.llama(), args, train_dataset=Ids(), callbacks=[GrassCallback()])
    with pytest.raises(grass.ConfigError, match="needs a GrassAdamW: pass the optimizer to the trainer too"):
        run.train()


def test_a_run_inside_the_probe_is_an_error(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=3)
    with pytest.raises(grass.ConfigError, match="ends after 3 steps, inside the probe of 3 steps"):
        run.train()


def test_clipping_that_cannot_be_is_told_when_only_the_callback_knows(tmp_path: Path) -> None:
    run = trainer(tmp_path, config={"fused_backward": True}, max_steps=5)
    with pytest.warns(UserWarning, match=r"max_grad_norm=1.0\) clips nothing"):
        run.train()


def test_clipping_is_told_once(tmp_path: Path) -> None:
    args: TrainingArguments = arguments(tmp_path, max_steps=5, save_strategy="no")
    with pytest.warns(UserWarning, match="clips nothing"):
        given = trainer_optimizer(args=args, config=tiny.config(fused_backward=True))
    run = Trainer(tiny.llama(), args, train_dataset=Ids(), optimizer_cls_and_kwargs=given)
    run.add_callback(GrassCallback(run))
    run.train()  # a second warning would be an error


@pytest.mark.parametrize(("warmup", "level"), [(3, "WARNING"), (4, "INFO"), (0, "INFO")])
def test_a_warm_up_inside_the_probe_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, warmup: int, level: str
) -> None:
    run = trainer(tmp_path, max_steps=5, warmup_steps=warmup)
    with caplog.at_level("INFO", logger="grass"):
        run.train()
    (record,) = (record for record in caplog.records if "learning-rate schedule" in record.message)
    assert record.levelname == level
    assert ("no effect" in record.message) == (level == "WARNING")


# -- the monitor -------------------------------------------------------------------------------------------------------


def test_the_optimizer_is_found_inside_wrappers() -> None:
    opt = grass.GrassAdamW(tiny.stack(), config=tiny.config())
    wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=opt))
    assert find_optimizer(opt) is find_optimizer(wrapped) is opt


def test_skipped_steps_and_transfers_are_counted() -> None:
    model = tiny.stack()
    opt = grass.GrassAdamW(model, config=tiny.config(probe_steps=0, offload="streamed"))
    monitor = Monitor(opt)
    for index in range(4):
        monitor.begin_step()
        tiny.loss_of(model, tiny.batch(index)).backward()
        opt.step()
        opt.zero_grad()
        monitor.end_step(skipped=index in (1, 2))
    metrics = monitor.metrics()
    assert metrics["grass/skipped_steps"] == 2
    assert metrics["grass/h2d_bytes"] == opt.transfer_stats.h2d_bytes
    assert metrics["grass/d2h_bytes"] == opt.transfer_stats.d2h_bytes
    assert all(type(value) in (int, float) for value in metrics.values())
    assert "grass/step_seconds" not in monitor.metrics(), "no step since the last call"


@pytest.mark.parametrize("fused", [False, True])
def test_a_batch_size_finder_starts_the_method_again(
    tmp_path: Path, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer keeps the optimizer of the attempt that ran out of memory: it was past its probe."""
    failed: list[int] = []
    begun: list[int] = []

    class Failing(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begun.append(find_optimizer(kwargs["optimizer"]).step_count)

    run = trainer(
        tmp_path,
        config={"fused_backward": fused},
        auto_find_batch_size=True,
        per_device_train_batch_size=4,
        max_steps=8,
        max_grad_norm=0,
    )
    run.add_callback(Failing)
    block = run.model.model.layers[0]

    def out_of_memory(module: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad and len(hidden) > 2 and method_of(run).phase == "adapt":
            failed.append(method_of(run).step_count)
            hidden.register_hook(lambda grad: (_ for _ in ()).throw(RuntimeError("CUDA out of memory.")))

    block.register_forward_hook(out_of_memory)
    run.train()
    assert set(failed) == {3}  # behind the probe
    assert begun == [0] * (len(failed) + 1)
    assert run.state.global_step == 8
    assert run.optimizer is None or method_of(run).step_count == 8
