"""Trainer callback that writes the metrics and layers of a run, and shows its progress."""

import time
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grass.finetune.encoding import Collator
from grass.finetune.run_folder import RunFolder, append_row, read_rows
from grass.finetune.screen import Screen
from grass.finetune.stopping import StopRequest
from grass.optim import GrassAdamW


def inner_optimizer(optimizer: Any) -> Optimizer:
    """Return the optimizer inside accelerate's wrapper, which does not forward attributes."""
    return getattr(optimizer, "optimizer", optimizer)


class LayerLog:
    """Write a row to layers.jsonl after every refresh, draw or switch of the active layers.

    All rows have the same fields; ``active`` and ``trained_params`` are valid for the steps after ``step``.

    Args:
        path: path of the file.
        optimizer: its counters are compared after every step; they are integers on the host.
        step: number of steps taken before; at 0 a first row is written, unless the file has one.
    """

    def __init__(self, path: Path, optimizer: GrassAdamW, step: int) -> None:
        self._path = path
        self._optimizer = optimizer
        self._last = self._counters()
        self._read_importance()
        if step == 0 and not read_rows(path):
            self._write(step, ["start"] + (["draw", "switch"] if optimizer.num_draws else []))

    def _counters(self) -> tuple[int, int, tuple[int, ...]]:
        return self._optimizer.num_refreshes, self._optimizer.num_draws, self._optimizer.active_layers

    def _read_importance(self) -> None:
        self._importance = self._optimizer.importance.tolist()
        self._probabilities = self._optimizer.probabilities.tolist()

    def update(self, step: int) -> bool:
        """Write a row if the counters have changed at the end of `step`; return True if they have."""
        now = self._counters()
        if now == self._last:
            return False
        events = [
            name for name, a, b in zip(("refresh", "draw", "switch"), self._last, now, strict=True) if a != b
        ]
        self._last = now
        if "refresh" in events or "draw" in events:
            self._read_importance()
        self._write(step, events)
        return True

    def _write(self, step: int, events: list[str]) -> None:
        optimizer = self._optimizer
        upcoming = optimizer.next_active_layers
        trained = (p.numel() for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
        row = {
            "step": step,
            "events": events,
            "phase": optimizer.phase,
            "importance": self._importance,
            "probabilities": self._probabilities,
            "active": list(optimizer.active_layers),
            "next_active": None if upcoming is None else list(upcoming),
            "trained_params": 0 if optimizer.phase == "probe" else sum(trained),
        }
        append_row(self._path, row)


class Recorder(TrainerCallback):
    """Write metrics and layers, show progress, and stop training on request.

    Args:
        folder: folder in which the rows are written.
        screen: shows progress.
        title: title of the progress bar.
        stop: checked after every step.
        load_best: the weights after the last step are evaluated and saved like those of any checkpoint.

    Attributes:
        collator: its token count gives the training speed.
        seconds: training time, without saving and evaluation.
        optimizer: the optimizer, once training has begun.
    """

    def __init__(
        self, folder: RunFolder, screen: Screen, title: str, stop: StopRequest, *, load_best: bool = False
    ) -> None:
        self.folder = folder
        self.collator: Collator | None = None
        self.screen = screen
        self.title = title
        self.stop = stop
        self.load_best = load_best
        self.seconds = 0.0
        self.optimizer: Optimizer | None = None
        self._layers: LayerLog | None = None
        self._loss = ""

    @property
    def tokens_per_second(self) -> float:
        """Training speed of this process in tokens per second."""
        return self._num_tokens() / self.seconds if self.seconds else 0.0

    def _num_tokens(self) -> int:
        return 0 if self.collator is None else self.collator.num_tokens

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Start the progress bar and the layer log."""
        self.optimizer = inner_optimizer(context["optimizer"])
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # evaluation before training is not part of it
        if isinstance(self.optimizer, GrassAdamW):
            self._layers = LayerLog(self.folder.layers, self.optimizer, state.global_step)
        self.screen.start(self.title, state.max_steps, state.global_step)
        self._show()
        self._mark, self._logged_tokens, self._logged_seconds = time.perf_counter(), 0, 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Update progress and layer log, and stop training if this was requested."""
        self._count_time()
        self.screen.advance()
        if self._layers is not None and self._layers.update(state.global_step):
            self._show()
        if state.global_step >= state.max_steps:
            # The finished model is saved and evaluated separately.
            control.should_save = control.should_evaluate = self.load_best
            control.should_log = True
        elif self.stop.requested:
            control.should_save = control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **context: Any,
    ) -> None:
        """Write a row of metrics."""
        if logs and "eval_loss" in logs:
            append_row(self.folder.metrics, {"step": state.global_step, "heldout_loss": logs["eval_loss"]})
        if not logs or "loss" not in logs:
            return  # the summary that Trainer logs at the end
        self._count_time()
        tokens, seconds = self._num_tokens(), self.seconds
        row: dict[str, Any] = {
            "step": state.global_step,
            "epoch": logs["epoch"],
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": self._grad_norm(state, logs),
            "tokens_per_second": (tokens - self._logged_tokens) / max(seconds - self._logged_seconds, 1e-9),
        }
        self._logged_tokens, self._logged_seconds = tokens, seconds
        append_row(self.folder.metrics, row)
        self._loss = f"loss {logs['loss']:.3f}"
        self._show()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Exclude saving from the training time."""
        self.skip_time()

    def resume_progress(self, state: TrainerState) -> None:
        """Show the progress bar of training again, after that of an evaluation."""
        self.screen.start(self.title, state.max_steps, state.global_step)
        self._show()
        self.skip_time()

    def skip_time(self) -> None:
        """Exclude the time since the end of the last step from the training time."""
        self._mark = time.perf_counter()

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now

    def _grad_norm(self, state: TrainerState, logs: dict[str, float]) -> float | None:
        optimizer = self.optimizer
        if isinstance(optimizer, GrassAdamW) and state.global_step <= optimizer.config.probe_steps:
            # The probe frees gradients before Trainer computes their norm; the optimizer has measured it.
            norm = optimizer.grad_norm
            return None if norm is None else float(norm)
        return logs.get("grad_norm")

    def _show(self) -> None:
        layers = ""
        if isinstance(self.optimizer, GrassAdamW):
            active = " ".join(map(str, self.optimizer.active_layers))
            layers = f"layers {active}" if active else "probing"
        self.screen.note("  ".join(part for part in (self._loss, layers) if part))
