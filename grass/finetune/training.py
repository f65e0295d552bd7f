"""Training with TRL's SFTTrainer and `grass.GrassAdamW`."""

import resource
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from grass.activation_checkpointing import checkpoint_activations
from grass.config import GrassConfig
from grass.errors import ConfigError, GrassError, RunFolderError, SaveError, did_you_mean, first_line
from grass.finetune.disk import free_bytes
from grass.finetune.encoding import Collator, Example, to_dataset
from grass.finetune.evaluation import heldout_loss
from grass.finetune.loss import chunked_loss
from grass.finetune.model import layer_pattern, pad_token_id
from grass.finetune.options import FinetuneOptions, as_tuple
from grass.finetune.recording import Recorder
from grass.finetune.run_folder import RunFolder
from grass.finetune.screen import Screen
from grass.finetune.stopping import Stopped, StopRequest
from grass.integrations.transformers import GrassCallback, trainer_optimizer
from grass.layers import LayerMap
from grass.optim import AdamW, GrassAdamW
from grass.sampling import SAMPLER_CLASSES


@dataclass(frozen=True)
class TrainingSummary:
    """Results of training, which are saved in ``run.json``.

    Attributes:
        steps: number of optimizer steps.
        seconds: time of this process in training, without saving and evaluation.
        tokens_per_second: speed of this process.
        peak_device_bytes: largest size of all tensors on the device; None on a CPU.
        peak_host_bytes: largest resident size of the process so far.
        optimizer_state_bytes, optimizer_state_bytes_active: size of the optimizer state, and its part of the active
            layers.
        best_step, best_heldout_loss: the checkpoint whose weights are kept, with `load_best`.
        draw_counts: number of draws of each layer; None for full fine-tuning.
        nonfinite_norms: number of gradient norms that were left out.
    """

    steps: int
    seconds: float
    tokens_per_second: float
    peak_device_bytes: int | None
    peak_host_bytes: int
    optimizer_state_bytes: int
    optimizer_state_bytes_active: int
    best_step: int | None
    best_heldout_loss: float | None
    draw_counts: list[int] | None
    nonfinite_norms: int


def count_steps(options: FinetuneOptions, num_examples: int) -> int:
    """Return the number of optimizer steps of a run, given by `steps` or `epochs`."""
    if options.steps is not None:
        return options.steps
    batches = ceil(num_examples / options.batch_size)
    return max(1, round(options.epochs * ceil(batches / options.gradient_accumulation)))


def optimizer_for(options: FinetuneOptions, config: GrassConfig) -> tuple[Any, dict[str, Any]]:
    """Return ``optimizer_cls_and_kwargs`` for Trainer."""
    if options.method == "full":
        # Weight decay is set in Trainer's parameter groups.
        return AdamW, {"lr": options.lr, **options.optimizer_options()}
    return trainer_optimizer(
        lr=options.lr,
        config=config,
        weight_decay=options.weight_decay,
        pattern=layer_pattern(options),
        **options.optimizer_options(),
    )


def check_loggers(options: FinetuneOptions) -> None:
    """Check that the loggers of `report_to` exist and are installed.

    Raises:
        ConfigError: one does not, or is not.
    """
    for name in as_tuple(options.report_to):
        if name not in INTEGRATION_TO_CALLBACK:
            known = sorted(INTEGRATION_TO_CALLBACK)
            raise ConfigError(
                f"report_to must name loggers of transformers ({', '.join(known)}), not {name!r}"
                f"{did_you_mean(name, known)}"
            )
        if name not in get_available_reporting_integrations():
            raise ConfigError(f"--report-to {name} needs the package {name}, which is not installed")


def optimizer_state_bytes(optimizer: Optimizer, *, active_only: bool = False) -> int:
    """Return the size of the optimizer state in bytes, of all parameters or of those that require grad."""
    states = (state for p, state in optimizer.state.items() if p.requires_grad or not active_only)
    tensors = (value for state in states for value in state.values() if isinstance(value, torch.Tensor))
    return sum(t.numel() * t.element_size() for t in tensors)


def peak_host_bytes() -> int:
    """Return the largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _after_probe(schedule: Callable[[int], float], probe_steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate of a schedule that begins after the probe, which updates nothing."""
    return lambda step: schedule(max(0, step - probe_steps))


class _Metrics(GrassCallback):
    """Log the method's metrics, and change nothing: a run is the same with loggers and without."""

    def _tell_of_schedule(self, *args: Any) -> None:
        """Do nothing: the schedule of `GrassTrainer` does not advance during the probe."""

    def _skip_evaluation(self, *args: Any) -> None:
        """Do nothing: evaluations inside the probe take place."""


class GrassTrainer(SFTTrainer):
    """SFTTrainer whose learning-rate schedule begins after the probe, and that goes on if a checkpoint cannot be saved.

    Its loss is `chunked_loss`, or that of the model. SFTTrainer's own takes more memory where the head trains, as it
    sums its gradient in float32, and waits for the device in every micro-batch.

    Args:
        recorder: counts tokens and shows progress; it tells of checkpoints that fail.
        measure: returns the held-out loss, as before and after training.
        chunked: use `chunked_loss`.
        probe_steps: number of steps that update nothing.
        arguments: those of SFTTrainer.
    """

    def __init__(
        self,
        recorder: Recorder,
        measure: Callable[[], float],
        chunked: bool,
        probe_steps: int,
        **arguments: Any,
    ) -> None:
        self.recorder, self.measure, self.chunked, self.probe_steps = recorder, measure, chunked, probe_steps
        super().__init__(**arguments)
        recorder.collator = self.data_collator = Collator(self.data_collator)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Return the loss, normalized over the micro-batches of a step as in Trainer."""
        if return_outputs or not self.chunked or not isinstance(model, PreTrainedModel):
            # A wrapper relies on its own forward. With a cache packed texts would see each other.
            inputs = {**inputs, "use_cache": False}
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        with self.accelerator.autocast():  # accelerate applies it to model.forward, which is not called here
            return chunked_loss(model, inputs, num_items_in_batch)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the held-out loss, the mean over tokens; Trainer's is a mean over batches."""
        metrics = {"eval_loss": self.measure()}
        self.recorder.resume_progress(self.state)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: the run folder describes the run."""

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Return Trainer's schedule for the steps after the probe, and its first value during the probe."""
        scheduler = super().create_scheduler(num_training_steps - self.probe_steps, optimizer)
        if self.probe_steps:
            assert isinstance(scheduler, LambdaLR)  # as all schedules of `FinetuneOptions` are
            factors = [_after_probe(factor, self.probe_steps) for factor in scheduler.lr_lambdas]
            scheduler = self.lr_scheduler = LambdaLR(scheduler.optimizer, factors)
        return scheduler

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint. If that fails, the earlier one is kept and training goes on, also after Ctrl-C."""
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # of the disk, as OSError, RuntimeError or safetensors' own type
            folder, screen = self.recorder.folder, self.recorder.screen
            step = self.state.global_step
            shutil.rmtree(folder.checkpoints / f"checkpoint-{step}", ignore_errors=True)
            kept = folder.last_checkpoint()
            screen.say(
                f"the checkpoint of step {step} cannot be saved: {_failed_save(error, folder)}; "
                + (f"{kept.name} is kept" if kept else "there is no earlier one")
            )
            if self.control.should_training_stop:
                self.control.should_training_stop = self.recorder.stop.requested = False
                screen.say(
                    "training goes on: make room, and press Ctrl-C again (twice to stop without a checkpoint)"
                )


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    heldout: Sequence[Example],
    options: FinetuneOptions,
    config: GrassConfig,
    folder: RunFolder,
    screen: Screen,
    title: str = "training",
    chunked: bool = False,
) -> TrainingSummary:
    """Train a model, starting from the newest checkpoint in the folder if there is one, and save it as ``model/``.

    Args:
        model: the model, trained in place.
        tokenizer: saved with the model.
        dataset: rows with ``input_ids`` and ``labels``, and with ``seq_lengths`` if they are packed.
        heldout: examples for the loss every ``eval_steps`` steps; may be empty.
        options, config: options of the run, configuration of the method; full fine-tuning uses its seed only.
        folder: folder of the run.
        screen: shows progress.
        title: title of the progress bar.
        chunked: use `chunked_loss`.

    Raises:
        Stopped: the user stopped training; a checkpoint of the last step has been saved.
        RunFolderError: the newest checkpoint cannot be loaded.
        SaveError: the trained model cannot be saved; the newest checkpoint is kept.
    """
    steps = count_steps(options, len(dataset))
    stop = StopRequest()
    recorder = Recorder(folder, screen, title, stop, load_best=options.load_best)
    if options.activation_checkpointing:
        fused = options.method != "full" and config.fused_backward
        checkpoint_activations(model, LayerMap.from_model(model, layer_pattern(options)) if fused else None)
    probes = options.method == "grass" and SAMPLER_CLASSES[config.sampler].probes

    def measure() -> float:
        screen.start("held-out loss", len(heldout), unit="text", delay=2.0)
        pad = pad_token_id(tokenizer)
        return heldout_loss(model, heldout, options.eval_batch_size, pad, chunked, screen.advance)

    evaluates = bool(options.steps_between_evaluations and heldout)
    trainer = GrassTrainer(
        recorder,
        measure,
        chunked,
        config.probe_steps if probes else 0,
        model=model,
        args=_arguments(options, config, folder, steps, evaluates=evaluates),
        processing_class=tokenizer,
        train_dataset=dataset,
        eval_dataset=to_dataset(heldout) if evaluates else None,
        callbacks=[recorder],
        optimizer_cls_and_kwargs=optimizer_for(options, config),
    )
    trainer.remove_callback(PrinterCallback)
    if options.report_to and options.method == "grass":
        trainer.add_callback(_Metrics(trainer, release=False))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = callback.logging_dir or str(folder.path / "tensorboard")
    checkpoint = folder.last_checkpoint()
    folder.drop_rows_after(int(checkpoint.name.split("-")[1]) if checkpoint else 0)
    try:
        with stop.on_signals(screen.say):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except Exception as error:
        has_begun = checkpoint is None or recorder.optimizer is not None
        if has_begun or isinstance(error, (GrassError, torch.OutOfMemoryError)):
            raise
        raise RunFolderError(
            f"{checkpoint} cannot be loaded: {first_line(error)}; remove that folder and resume, to continue from the "
            "beginning of training"
        ) from error
    finally:
        screen.stop()
    if trainer.state.global_step < steps:
        raise Stopped(f"stopped after step {trainer.state.global_step} of {steps}")
    optimizer = recorder.optimizer
    assert optimizer is not None  # training has begun
    sampled = optimizer if isinstance(optimizer, GrassAdamW) else None
    best = trainer.state.best_global_step if options.load_best else None
    summary = TrainingSummary(
        steps=steps,
        seconds=recorder.seconds,
        tokens_per_second=recorder.tokens_per_second,
        peak_device_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        peak_host_bytes=peak_host_bytes(),
        best_step=best,
        best_heldout_loss=None if best is None else trainer.state.best_metric,
        optimizer_state_bytes=optimizer_state_bytes(optimizer),
        optimizer_state_bytes_active=optimizer_state_bytes(optimizer, active_only=True),
        draw_counts=sampled.draw_counts if sampled else None,
        nonfinite_norms=sampled.nonfinite_norms if sampled else 0,
    )
    if sampled:
        sampled.release()
    _save(model, tokenizer, folder)
    folder.update(state="trained", training=asdict(summary))
    if options.save_total_limit == 1:  # no longer needed: the model has been saved
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
    return summary


def _arguments(
    options: FinetuneOptions, config: GrassConfig, folder: RunFolder, steps: int, *, evaluates: bool
) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder.checkpoints),
        run_name=folder.path.name,
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.lr,
        lr_scheduler_type=options.scheduler,
        warmup_steps=round(options.warmup * steps),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        seed=config.seed,
        bf16=False,  # no autocast: the weights have the dtype of the computation
        gradient_checkpointing=False,  # `checkpoint_activations` does it
        logging_steps=options.log_steps,
        logging_nan_inf_filter=False,  # log a diverged loss as it is; the filter would be a device sync
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 1,
        # With a limit of 1 Trainer ends by removing all checkpoints but the best, also the newest of a stopped run.
        save_total_limit=max(options.save_total_limit, 2) if options.load_best else options.save_total_limit,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=options.steps_between_evaluations or None,
        load_best_model_at_end=options.load_best,
        metric_for_best_model="eval_loss" if options.load_best else None,
        report_to=list(as_tuple(options.report_to)) or "none",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},  # it has been encoded
        max_length=None,
        padding_free=options.packing,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: RunFolder) -> None:
    """Save the model to a temporary folder and rename it, so that ``model/`` is always complete."""
    temporary = folder.path / "model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(folder.model, ignore_errors=True)
        temporary.rename(folder.model)
    except Exception as error:  # of the disk, as OSError or safetensors' own type
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(f"the trained model cannot be saved: {_failed_save(error, folder)}") from error


def _failed_save(error: Exception, folder: RunFolder) -> str:
    """Return the reason with the free space: torch reports a full disk as a wrong position in the file."""
    return f"{first_line(error)} ({free_bytes(folder.path):,} bytes are free on the disk)"
