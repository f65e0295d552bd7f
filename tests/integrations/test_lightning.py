"""Failures these tests catch: micro-batches of Lightning that `fused_backward` takes for steps, also at the end of an
epoch that does not divide into steps; clipping that is asked for and cannot be; metrics that do not reach Lightning's
loggers; a model left with most parameters frozen after training; early stopping that counts evaluations in which
nothing has been trained, in the run or in one resumed from its checkpoint.
"""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import grass
from tests.support import tiny

lightning = pytest.importorskip("lightning", reason="tests the integration with it")
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger  # noqa: E402

from grass.integrations.lightning import GrassCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # of Lightning
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


class Module(lightning.LightningModule):
    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.model = tiny.stack()
        self.config = tiny.config(**config)

    def training_step(self, ids: torch.Tensor, index: int) -> torch.Tensor:
        return tiny.loss_of(self.model, ids)

    def validation_step(self, ids: torch.Tensor, index: int) -> None:
        self.log("held_out", torch.ones(()) + self.trainer.global_step * 0)  # never improves

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return grass.GrassAdamW(self.model, lr=1e-2, config=self.config)


def batches(count: int) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader([tiny.batch(index) for index in range(count)], batch_size=None)


def trainer(*callbacks: Any, **options: Any) -> Any:
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "callbacks": [*callbacks],
    }
    return lightning.Trainer(**{**defaults, **options})


def optimizer_of(run: Any) -> grass.GrassAdamW:
    (opt,) = run.optimizers
    return opt


# -- gradient accumulation ---------------------------------------------------------------------------------------------


def plain_loop(
    count: int, micro_batches: int, epochs: int, **config: Any
) -> tuple[nn.Module, grass.GrassAdamW]:
    """The same micro-batches by hand, which declares them itself; an epoch's last step has what is left."""
    model = tiny.stack()
    opt = grass.GrassAdamW(model, lr=1e-2, config=tiny.config(**config))
    for _ in range(epochs):
        for index in range(count):
            ends_step = (index + 1) % micro_batches == 0 or index + 1 == count
            with contextlib.nullcontext() if ends_step else opt.accumulate():
                (tiny.loss_of(model, tiny.batch(index)) / micro_batches).backward()
            if ends_step:
                opt.step()
                opt.zero_grad()
    return model, opt


@pytest.mark.parametrize("offload", ["none", "streamed"])
@pytest.mark.parametrize(("count", "micro_batches"), [(12, 2), (11, 2), (11, 3), (6, 1)])
def test_accumulation_is_that_of_the_plain_loop(count: int, micro_batches: int, offload: str) -> None:
    module = Module(fused_backward=True, probe_steps=2, offload=offload)
    run = trainer(GrassCallback(), accumulate_grad_batches=micro_batches)
    run.fit(module, batches(count))
    model, opt = plain_loop(
        count, micro_batches, epochs=2, probe_steps=2, offload=offload, fused_backward=True
    )
    opt.release()
    tiny.assert_same_run(module.model, optimizer_of(run), model, opt)


def test_a_limit_of_batches_ends_a_step_too() -> None:
    module = Module(fused_backward=True, probe_steps=2)
    run = trainer(GrassCallback(), accumulate_grad_batches=2, limit_train_batches=7)
    run.fit(module, batches(12))
    model, opt = plain_loop(7, 2, epochs=2, probe_steps=2, fused_backward=True)
    opt.release()
    tiny.assert_same_run(module.model, optimizer_of(run), model, opt)


class Watch(lightning.Callback):
    """Return if layers were updated inside each backward after the probe, and if a step followed."""

    def __init__(self) -> None:
        self.fused: list[bool] = []
        self.stepped: list[bool] = []
        self.steps = 0

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.fused.append(bool(optimizer_of(trainer).torn_layers))

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.stepped.append(trainer.global_step > self.steps)
        self.steps = trainer.global_step


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 5}], ids=str)
@pytest.mark.parametrize("sized", [True, False])
def test_the_last_backward_of_every_step_updates_layers(options: dict[str, int], sized: bool) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return map(tiny.batch, range(7))

    watch = Watch()
    data = batches(7) if sized else torch.utils.data.DataLoader(Stream(), batch_size=None)
    run = trainer(GrassCallback(), watch, accumulate_grad_batches=3, **options)
    run.fit(Module(fused_backward=True, probe_steps=0), data)
    count = options.get("limit_train_batches", 7)
    assert watch.stepped == [index % 3 == 2 or index + 1 == count for index in range(count)] * 2
    assert watch.fused == watch.stepped


class Failure(nn.Module):
    """A head that raises inside backward when told so."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def fail(grad: torch.Tensor) -> None:
            if self.fails:
                raise RuntimeError("out of memory")

        x.register_hook(fail)
        return self.head(x)


def test_an_accumulation_ends_with_a_backward_that_fails() -> None:
    module = Module(fused_backward=True, probe_steps=0)
    module.model.head = Failure(module.model.head)
    module.model.head.fails = True
    run = trainer(GrassCallback(), accumulate_grad_batches=2)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.fit(module, batches(4))
    module.model.head.fails = False
    opt = optimizer_of(run)
    opt.zero_grad()
    tiny.loss_of(module.model, tiny.batch(0)).backward()
    assert opt.torn_layers, "the accumulation is still open"


# -- the log -----------------------------------------------------------------------------------------------------------


def test_loggers_get_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="writes and reads its files")
    loggers = [CSVLogger(tmp_path / "csv", flush_logs_every_n_steps=1), TensorBoardLogger(tmp_path / "tb")]
    run = trainer(
        GrassCallback(), logger=loggers, log_every_n_steps=3, max_epochs=1, accumulate_grad_batches=2
    )
    run.fit(Module(probe_steps=3), batches(24))
    from tensorboard.backend.event_processing import event_accumulator as accumulator

    (file,) = (tmp_path / "tb").rglob("events.out.tfevents.*")
    events = accumulator.EventAccumulator(str(file.parent))
    events.Reload()

    def values(tag: str) -> list[tuple[int, float]]:
        return [(e.step, e.value) for e in events.Scalars(tag)]

    assert values("grass/phase") == [(3, 0), (6, 1), (9, 1), (12, 1)]
    assert [value > 0 for _, value in values("grass/grad_norm")] == [True] * 4
    opt = optimizer_of(run)
    for index, name in enumerate(opt.layers.names):
        assert values(f"grass/importance/{name}")[-1][1] == pytest.approx(opt.importance[index].item())
    header, *lines = (file for file in next((tmp_path / "csv").rglob("metrics.csv")).read_text().splitlines())
    assert len(lines) == 4
    assert "grass/step_seconds" in header


def test_the_callback_changes_nothing() -> None:
    results = []
    for callbacks in ([GrassCallback()], []):
        module = Module()
        run = trainer(*callbacks, max_epochs=1, accumulate_grad_batches=2)
        run.fit(module, batches(20))
        optimizer_of(run).release()
        results.append((module.model, optimizer_of(run)))
    tiny.assert_same_run(*results[0], *results[1])


def test_all_parameters_require_grad_after_training() -> None:
    module = Module()
    module.model.head.requires_grad_(False)
    trainer(GrassCallback(), max_epochs=1).fit(module, batches(8))
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == ["model.head.weight"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_run_goes_on_as_the_whole(tmp_path: Path, epoch: int) -> None:
    def fit(folder: Path, **options: Any) -> tuple[Module, grass.GrassAdamW]:
        module = Module(fused_backward=True, probe_steps=7)
        saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        run = trainer(
            GrassCallback(), saving, enable_checkpointing=True, max_epochs=4, accumulate_grad_batches=2
        )
        run.fit(module, batches(9), weights_only=False, **options)
        return module, optimizer_of(run)

    whole, expected = fit(tmp_path / "whole")
    resumed, opt = fit(tmp_path / "again", ckpt_path=tmp_path / "whole" / f"epoch={epoch}.ckpt")
    tiny.assert_same_run(resumed, opt, whole, expected)


# -- early stopping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_epoch_end", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_does_not_count_the_probe(at_epoch_end: bool, first: bool) -> None:
    stopping = EarlyStopping("held_out", patience=2, check_on_train_epoch_end=at_epoch_end)
    callbacks = [GrassCallback(), stopping] if first else [stopping, GrassCallback()]
    run = trainer(*callbacks, max_epochs=20)
    run.fit(Module(probe_steps=5), batches(1), batches(1))
    # evaluated after steps 5, which sets the best score, 6 and 7
    assert run.global_step == 7
    assert stopping.patience == 2


def test_a_checkpoint_of_the_probe_has_early_stopping_as_it_was(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True)
    stopping = EarlyStopping("held_out", patience=2)
    run = trainer(saving, stopping, GrassCallback(), enable_checkpointing=True, max_epochs=20)
    run.fit(Module(probe_steps=5), batches(1), batches(1))
    checkpoint = torch.load(tmp_path / "epoch=3-step=4.ckpt", weights_only=False)
    state = checkpoint["callbacks"][stopping.state_key]
    assert (state["patience"], state["wait_count"]) == (2, 0)
    later = torch.load(tmp_path / "epoch=5-step=6.ckpt", weights_only=False)
    assert later["callbacks"][stopping.state_key]["wait_count"] == 1


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_clipping_that_cannot_be_is_an_error() -> None:
    run = trainer(GrassCallback(), gradient_clip_val=1.0)
    with pytest.raises(grass.ConfigError, match=r"gradient_clip_val=1.0\) clips nothing with fused_backward"):
        run.fit(Module(fused_backward=True), batches(8))


def test_clipping_is_possible_without_fused_backward() -> None:
    run = trainer(GrassCallback(), gradient_clip_val=1.0)
    run.fit(Module(), batches(4))
    assert optimizer_of(run).step_count == 8


def test_a_run_inside_the_probe_is_an_error() -> None:
    with pytest.raises(grass.ConfigError, match="ends after 3 steps, inside the probe"):
        trainer(GrassCallback(), max_epochs=1).fit(Module(probe_steps=3), batches(3))


def test_another_optimizer_is_an_error() -> None:
    module = Module()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters())
    with pytest.raises(grass.ConfigError, match="found AdamW where it needs a GrassAdamW"):
        trainer(GrassCallback()).fit(module, batches(4))
