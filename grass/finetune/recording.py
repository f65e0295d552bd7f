"""The callback that turns a Trainer run into files and a progress bar."""

import time
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grass.finetune.encoding import Collator
from grass.finetune.run_folder import RunFolder, append_row, read_rows
from grass.finetune.screen import Screen
from grass.finetune.stopping import StopRequest
from grass.optim import GrassAdamW


def inner_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer itself: accelerate's wrapper hides its attributes."""
    return getattr(optimizer, "optimizer", optimizer)


class LayerLog:
    """Writes a row to layers.jsonl whenever a refresh, a draw or a switch of the active set has happened.

    Every row has the same fields; ``active`` and ``trained_params`` hold for the steps after ``step``.

    Args:
        path: the file.
        optimizer: whose counters are watched; they are integers on the host, so looking costs nothing.
        step: steps taken before; at 0 a row for the start is written, unless it is there.
    """

    def __init__(self, path: Path, optimizer: GrassAdamW, step: int) -> None:
        self._path = path
        self._optimizer = optimizer
        self._seen = self._counters()
        self._read_importance()
        if step == 0 and not read_rows(path):
            self._write(step, ["start"] + (["draw", "switch"] if optimizer.num_draws else []))

    def _counters(self) -> tuple[int, int, tuple[int, ...]]:
        return self._optimizer.num_refreshes, self._optimizer.num_draws, self._optimizer.active_layers

    def _read_importance(self) -> None:
        self._importance = self._optimizer.importance.tolist()
        self._probabilities = self._optimizer.probabilities.tolist()

    def look(self, step: int) -> bool:
        """Write a row if anything has happened at the end of `step`; whether it has."""
        now = self._counters()
        if now == self._seen:
            return False
        events = [
            name for name, a, b in zip(("refresh", "draw", "switch"), self._seen, now, strict=True) if a != b
        ]
        self._seen = now
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
    """Metrics, layers and progress of a run; ends it when the user asks.

    Args:
        folder: where rows are written.
        collator: counts the tokens that have been trained on.
        screen: shows progress.
        title: of the progress bar.
        stop: the user's request.
    """

    def __init__(
        self, folder: RunFolder, collator: Collator, screen: Screen, title: str, stop: StopRequest
    ) -> None:
        self.folder = folder
        self.collator = collator
        self.screen = screen
        self.title = title
        self.stop = stop
        self.seconds = 0.0  # of training, without saving and evaluating
        self.optimizer: Optimizer | None = None
        self._layers: LayerLog | None = None
        self._loss = ""

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on in a second, since this process began training."""
        return self.collator.num_tokens / self.seconds if self.seconds else 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Start the bar and the log of layers."""
        self.optimizer = inner_optimizer(context["optimizer"])
        if isinstance(self.optimizer, GrassAdamW):
            self._layers = LayerLog(self.folder.layers, self.optimizer, state.global_step)
        self.screen.start(self.title, state.max_steps, state.global_step)
        self._show()
        self._mark, self._logged_tokens, self._logged_seconds = time.perf_counter(), 0, 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Count, look for changes of the layers, and heed a request to stop."""
        self._count_time()
        self.screen.advance()
        if self._layers is not None and self._layers.look(state.global_step):
            self._show()
        if state.global_step >= state.max_steps:
            control.should_save = False  # the finished model is saved on its own
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
        if not logs or "loss" not in logs:
            return  # Trainer's summary at the end
        self._count_time()
        tokens, seconds = self.collator.num_tokens, self.seconds
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
        """Leave the time of saving out of the training time."""
        self.skip_time()

    def skip_time(self) -> None:
        """Leave the time since the last count out."""
        self._mark = time.perf_counter()

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now

    def _grad_norm(self, state: TrainerState, logs: dict[str, float]) -> float | None:
        optimizer = self.optimizer
        if isinstance(optimizer, GrassAdamW) and state.global_step <= optimizer.config.probe_steps:
            # The probe frees gradients before Trainer can look at them; the optimizer has their norm.
            norm = optimizer.grad_norm
            return None if norm is None else float(norm)
        return logs.get("grad_norm")

    def _show(self) -> None:
        layers = ""
        if isinstance(self.optimizer, GrassAdamW):
            active = " ".join(map(str, self.optimizer.active_layers))
            layers = f"layers {active}" if active else "probing"
        self.screen.note("  ".join(part for part in (self._loss, layers) if part))
