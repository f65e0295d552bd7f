"""GrassCallback: logs the method in the trainers of transformers and TRL, and releases the optimizer at the end."""

import logging
import warnings
import weakref
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback

from grass.errors import GrassError
from grass.integrations.monitor import Monitor, check_run_length, find_optimizer
from grass.integrations.transformers import warn_of_clipping
from grass.optim.grass_adamw import GrassAdamW

_logger = logging.getLogger(__name__)


class GrassCallback(TrainerCallback):
    """Adds the metrics of the method to the rows that a trainer logs, and releases the optimizer when training ends.

    ::

        trainer = Trainer(model, args, optimizer_cls_and_kwargs=trainer_optimizer(args=args, config=config), ...)
        trainer.add_callback(GrassCallback(trainer))

    The metrics are those of `grass.integrations.monitor.Monitor.metrics`; their names begin with ``grass/``. They are
    in every row that has a training loss, on the console, in ``trainer.state.log_history`` and in the loggers that
    ``report_to`` names. ``grad_norm`` of such a row is the optimizer's in the probe and with ``fused_backward``, where
    the trainer finds no gradients.

    The trainer advances the learning-rate schedule during the probe; a warm-up that ends in it is logged as a warning.
    Evaluations inside the probe are left out, since no parameter changes, so that early stopping does not count them;
    the first one is after the last step of the probe.

    A training that starts at step 0 after one that was broken off, as by a batch size that was too large for memory
    (``auto_find_batch_size``), restarts the optimizer.

    At the end of training ``requires_grad`` is again as before, and the optimizer cannot be used any more. For another
    ``trainer.train()`` set ``trainer.optimizer = None`` with an optimizer from `trainer_optimizer`, or make a new
    trainer.

    Args:
        trainer: the trainer, whose loggers are called with the metrics. Without it, as in
            ``callbacks=[GrassCallback()]``, the callback is called after the loggers that ``report_to`` names, and
            cannot add to what they get: only the console and ``log_history`` have the metrics; that is a warning.
        release: release the optimizer when training ends.

    Raises:
        ConfigError: at the start of training, if the trainer has no `grass.GrassAdamW`, or the run ends inside the
            probe.
        GrassError: at the start of training, if the optimizer has been released.
    """

    def __init__(self, trainer: Any = None, *, release: bool = True) -> None:
        # The trainer holds the callback: a strong reference would keep both, and the optimizer, until a collection.
        self._trainer = None if trainer is None else weakref.ref(trainer)
        self._release = release
        self._monitor: Monitor | None = None
        self._released: weakref.WeakSet[GrassAdamW] = weakref.WeakSet()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the optimizer, and check what the arguments ask for."""
        optimizer = find_optimizer(kwargs["optimizer"])
        if optimizer in self._released:
            raise GrassError(
                "the optimizer was released at the end of the last training: set trainer.optimizer = None, so that the "
                "trainer constructs a new one, make a new trainer, or pass GrassCallback(release=False)"
            )
        was_broken_off = self._monitor is not None and self._monitor.optimizer is optimizer
        if was_broken_off and state.global_step == 0 and optimizer.step_count:
            what = "training starts again: the optimizer, which had taken %d steps, does too"
            _logger.warning(what, optimizer.step_count)
            optimizer.restart()
        check_run_length(optimizer, state.max_steps - state.global_step)
        warn_of_clipping(optimizer, args)
        self._tell_of_schedule(optimizer, args, state)
        self._monitor = Monitor(optimizer)
        trainer = None if self._trainer is None else self._trainer()
        if trainer is not None:
            self._move_before_loggers(trainer.callback_handler.callbacks)
        elif args.report_to and args.report_to != ["none"]:
            warnings.warn(
                f"GrassCallback() cannot reach the loggers {args.report_to}, which are called before it: call "
                "trainer.add_callback(GrassCallback(trainer)) in place of callbacks=[GrassCallback()]",
                stacklevel=2,
            )

    def _tell_of_schedule(self, optimizer: GrassAdamW, args: Any, state: Any) -> None:
        """Log that the learning-rate schedule advances during the probe; a warning if the warm-up is lost by it."""
        if optimizer.phase == "probe":
            end = state.global_step + optimizer.config.probe_steps - optimizer.step_count
            warmup = args.get_warmup_steps(state.max_steps)
            lost = 0 < warmup <= end
            _logger.log(
                logging.WARNING if lost else logging.INFO,
                "the learning-rate schedule advances during the probe, which ends at step %d%s",
                end,
                f": the warm-up of {warmup} steps ends in it, and has no effect" if lost else "",
            )

    def _move_before_loggers(self, callbacks: list[TrainerCallback]) -> None:
        """Move this callback in front of all but `DefaultFlowCallback`, whose decisions it reads."""
        callbacks.remove(self)
        flow = [
            index for index, callback in enumerate(callbacks) if isinstance(callback, DefaultFlowCallback)
        ]
        callbacks.insert(flow[0] + 1 if flow else 0, self)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Observe the coming step."""
        if self._monitor is not None:
            self._monitor.begin_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Observe the end of a step."""
        if self._monitor is not None:
            self._monitor.end_step(skipped=bool(getattr(kwargs["optimizer"], "step_was_skipped", False)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave out an evaluation inside the probe."""
        self._skip_evaluation(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave out an evaluation inside the probe."""
        self._skip_evaluation(state, control)

    def _skip_evaluation(self, state: Any, control: Any) -> None:
        probing = self._monitor is not None and self._monitor.optimizer.phase == "probe"
        if probing and control.should_evaluate and not control.should_training_stop:
            control.should_evaluate = False
            _logger.info(
                "step %d: no evaluation inside the probe, which changes no parameter", state.global_step
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the metrics to a row that has a training loss."""
        if self._monitor is None or not self._monitor.has_steps or logs is None or "loss" not in logs:
            return
        added = self._monitor.metrics()
        is_freed = self._monitor.probing or self._monitor.optimizer.config.fused_backward
        if is_freed and "grad_norm" in logs and "grass/grad_norm" in added:
            added["grad_norm"] = added["grass/grad_norm"]
        logs.update(added)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(added)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Release the optimizer."""
        if self._monitor is not None and self._release:
            self._monitor.optimizer.release()
            self._released.add(self._monitor.optimizer)
        self._monitor = None
