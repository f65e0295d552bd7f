"""Monitor: what the callbacks of all trainers log about a `GrassAdamW`. The optimizer does not depend on it."""

import time
from typing import Any

import torch

from grass.errors import ConfigError
from grass.optim.grass_adamw import GrassAdamW


def find_optimizer(optimizer: Any) -> GrassAdamW:
    """Return the `GrassAdamW` inside the wrappers of accelerate and Lightning, which have it as ``.optimizer``.

    Raises:
        ConfigError: there is none.
    """
    inner = optimizer
    while not isinstance(inner, GrassAdamW):
        if getattr(inner, "optimizer", None) is None:
            raise ConfigError(
                f"GrassCallback found {type(optimizer).__name__} where it needs a GrassAdamW: pass the optimizer to "
                "the trainer too, for transformers by trainer_optimizer or make_optimizer"
            )
        inner = inner.optimizer
    return inner


def check_run_length(optimizer: GrassAdamW, steps: float) -> None:
    """Raise if a run ends inside the probe.

    Args:
        optimizer: the optimizer.
        steps: number of steps that the run still takes; inf if it is not known.

    Raises:
        ConfigError: the run would update no parameter.
    """
    probe_steps = optimizer.config.probe_steps - optimizer.step_count
    if optimizer.phase == "probe" and steps <= probe_steps:
        raise ConfigError(
            f"the run ends after {steps:.0f} steps, inside the probe of {probe_steps} steps, and would update no "
            "parameter: pass a smaller GrassConfig(probe_steps=...), or train for more steps"
        )


class Monitor:
    """Observes the steps of an optimizer, and returns metrics of them.

    Args:
        optimizer: the optimizer.
    """

    def __init__(self, optimizer: GrassAdamW) -> None:
        self.optimizer = optimizer
        self._active: tuple[int, ...] = ()
        self._probing: bool | None = None  # None before the first step
        self._num_trainable = 0
        self._began: float | None = None
        self._seconds, self._num_timed, self._num_skipped = 0.0, 0, 0

    @property
    def probing(self) -> bool:
        """True if the last step belonged to the probe."""
        return bool(self._probing)

    @property
    def has_steps(self) -> bool:
        """True if a step has been observed."""
        return self._probing is not None

    def begin_step(self) -> None:
        """Observe what the coming step trains, and start the clock."""
        active, probing = self.optimizer.active_layers, self.optimizer.phase == "probe"
        if (active, probing) != (self._active, self._probing):
            self._active, self._probing = active, probing
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            self._num_trainable = 0 if probing else sum(p.numel() for p in params if p.requires_grad)
        self._began = time.perf_counter()

    def end_step(self, *, skipped: bool = False) -> None:
        """Stop the clock.

        Args:
            skipped: True if a GradScaler has skipped the step.
        """
        self._num_skipped += skipped
        if self._began is not None:
            self._seconds += time.perf_counter() - self._began
            self._num_timed += 1
            self._began = None

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the last step, as numbers. Reading them is a device sync.

        - ``grass/phase``: 0 for the probe, 1 for a step that updates parameters.
        - ``grass/trainable_parameters``: number of elements that the step updates; 0 in the probe.
        - ``grass/entropy``: entropy of the probabilities of the layers, in nats.
        - ``grass/grad_norm``: norm of all gradients that the optimizer got, also where a trainer finds none: in the
          probe and with ``fused_backward``. A trainer has clipped them before, ``max_grad_norm`` of the optimizer not.
        - ``grass/skipped_steps``: number of steps since the training began that a GradScaler has skipped.
        - ``grass/nonfinite_norms``: number of norms that were NaN or inf, since construction.
        - ``grass/h2d_bytes``, ``grass/d2h_bytes``: bytes copied to the device and back, since construction.
        - ``grass/step_seconds``: mean wall time of a step since the last call, on the host; a GPU may be behind it.
        - ``grass/active/LAYER``: 1 if the step updates the layer, 0 if not. LAYER is its module path.
        - ``grass/importance/LAYER``, ``grass/probability/LAYER``: as of the last refresh.
        - ``grass/draws/LAYER``: number of draws after which it has trained.
        - ``grass/layer_grad_norm/LAYER``: the part of the layer in ``grass/grad_norm``; 0 for frozen layers.
        """
        optimizer = self.optimizer
        probabilities = optimizer.probabilities
        transfers = optimizer.transfer_stats
        metrics: dict[str, float] = {
            "grass/phase": 0 if self.probing else 1,
            "grass/trainable_parameters": self._num_trainable,
            "grass/entropy": float(torch.special.entr(probabilities).sum()),
            "grass/skipped_steps": self._num_skipped,
            "grass/nonfinite_norms": int(optimizer.nonfinite_norms),
            "grass/h2d_bytes": transfers.h2d_bytes,
            "grass/d2h_bytes": transfers.d2h_bytes,
        }
        if self._num_timed:
            metrics["grass/step_seconds"] = self._seconds / self._num_timed
            self._seconds, self._num_timed = 0.0, 0
        names = optimizer.layers.names
        by_layer: dict[str, list[float]] = {
            "active": [int(layer in self._active) for layer in range(len(names))],
            "importance": optimizer.importance.tolist(),
            "probability": probabilities.tolist(),
            "draws": [*optimizer.draw_counts],
        }
        norm, layer_norms = optimizer.grad_norm, optimizer.layer_grad_norms
        if norm is not None and layer_norms is not None:
            metrics["grass/grad_norm"] = float(norm)
            by_layer["layer_grad_norm"] = layer_norms.tolist()
        for key, values in by_layer.items():
            metrics.update({f"grass/{key}/{name}": value for name, value in zip(names, values, strict=True)})
        return metrics
