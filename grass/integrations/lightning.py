"""Integration with Lightning: a callback that logs the method, declares accumulation, and releases the optimizer."""

import contextlib
import sys
from typing import Any

from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from grass.errors import ConfigError
from grass.integrations.monitor import Monitor, check_run_length, find_optimizer
from grass.optim.grass_adamw import GrassAdamW


class GrassCallback(Callback):
    """Logs the method by the loggers of a Lightning trainer, and releases the optimizer when training ends.

    ::

        Trainer(callbacks=[GrassCallback()])  # and a GrassAdamW from the module's configure_optimizers

    - The metrics of `grass.integrations.monitor.Monitor.metrics` are logged every ``log_every_n_steps`` steps.
    - With ``fused_backward`` and ``accumulate_grad_batches`` all backwards of a step but the last are run inside
      `grass.GrassAdamW.accumulate`. In manual optimization that is up to the module.
    - `EarlyStopping` does not count evaluations inside the probe, since no parameter changes; the first counted one is
      after the last step of the probe.
    - After ``trainer.fit()`` ``requires_grad`` is again as before, and the optimizer cannot be used any more.

    Raises:
        ConfigError: at the start of training, if there is no `grass.GrassAdamW`, the run ends inside the probe, or
            ``gradient_clip_val`` is set with ``fused_backward``, which frees gradients before they could be clipped.
    """

    def __init__(self) -> None:
        self._monitor: Monitor | None = None
        self._batch_index = 0
        self._open_accumulation: contextlib.ExitStack | None = None
        self._held: dict[EarlyStopping, dict[str, Any]] = {}  # states before evaluations that do not count

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the optimizer, and check what the trainer is asked for."""
        optimizer = _optimizer_of(trainer)
        if optimizer.config.fused_backward and trainer.gradient_clip_val:
            raise ConfigError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) clips nothing with fused_backward: gradients "
                "are freed inside backward, before Lightning clips them; leave gradient_clip_val or fused_backward out"
            )
        with contextlib.suppress(MisconfigurationException):  # accumulation that differs between epochs
            steps = trainer.estimated_stepping_batches
            if steps >= 0:  # -1 if it is not known
                check_run_length(optimizer, steps - trainer.global_step)
        self._monitor = Monitor(optimizer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Observe the coming step, and let early stopping count again."""
        self._count_again()
        self._batch_index = batch_idx
        if self._monitor is not None and batch_idx % trainer.accumulate_grad_batches == 0:
            self._monitor.begin_step()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Declare accumulation, unless this backward is the last of a step."""
        if self._monitor is not None and pl_module.automatic_optimization and not self._ends_step(trainer):
            self._open_accumulation = contextlib.ExitStack()
            self._open_accumulation.enter_context(self._monitor.optimizer.accumulate())

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """End what `on_before_backward` has declared."""
        if self._open_accumulation is not None:
            self._open_accumulation.close()
            self._open_accumulation = None

    def _ends_step(self, trainer: Any) -> bool:
        """Return if Lightning takes a step after this batch."""
        is_full = (self._batch_index + 1) % trainer.accumulate_grad_batches == 0
        return is_full or bool(trainer.is_last_batch)  # the last batch of an epoch

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and keep early stopping from counting an evaluation that follows inside the probe."""
        monitor = self._monitor
        if monitor is None or not self._ends_step(trainer):
            return
        monitor.end_step()
        if trainer.global_step % trainer.log_every_n_steps == 0:
            metrics = monitor.metrics()
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
        if monitor.optimizer.phase == "probe":
            for callback in trainer.early_stopping_callbacks:
                self._held.setdefault(callback, callback.state_dict())
                callback.patience = sys.maxsize

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save the states of early stopping without evaluations that do not count."""
        for callback, state in self._held.items():
            checkpoint["callbacks"][callback.state_key] = state

    def _count_again(self) -> None:
        for callback, state in self._held.items():
            callback.load_state_dict(state)
        self._held.clear()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """End what was declared for a step that has failed."""
        self.on_after_backward(trainer, pl_module)
        self._count_again()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Release the optimizer, after the last checkpoint."""
        self._count_again()
        if self._monitor is not None:
            self._monitor.optimizer.release()
        self._monitor = None


def _optimizer_of(trainer: Any) -> GrassAdamW:
    """Return the only optimizer of a trainer.

    Raises:
        ConfigError: it is no `grass.GrassAdamW`, or there are several.
    """
    if len(trainer.optimizers) != 1:
        raise ConfigError(
            f"GrassCallback needs one optimizer, the module has {len(trainer.optimizers)}: return one GrassAdamW from "
            "configure_optimizers"
        )
    return find_optimizer(trainer.optimizers[0])
