"""Configuration of the method: `GrassConfig`, and the check of choices that other option classes share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin

from grass.choices import ImportanceScale, Moments, Offload, SamplerName
from grass.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class GrassConfig:
    """Configuration of layer sampling, offloading and fused backward. Intervals are in optimizer steps.

    Args:
        active_layers: gamma, number of layers trained at a time.
        probe_steps: T_p, number of initial steps that measure the gradients of all layers and update nothing.
            Samplers that use no gradients (``uniform``, ``cyclic``, ``weight_norm``) skip the probe.
        sample_interval: T_s, number of steps between two changes of the active layers.
        update_interval: T_u, number of steps between two updates of the importance; a multiple of
            ``sample_interval``.
        temperature: tau, temperature of the softmax over layers.
        ema: alpha, weight of the newest measurement in a layer's importance, in (0, 1].
        importance_scale: transformation of the importance before the softmax. ``"mean"`` divides by the mean
            over layers, ``"log"`` takes the logarithm (p proportional to m^(1/tau)), ``"zscore"``
            standardizes: with these, probabilities do not depend on the size of the gradients. ``"none"``
            is the formula of the paper.
        sampler: ``"adaptive"`` follows the gradient norms during training and is the method of the paper;
            ``"static"`` uses the norms of the probe only; ``"uniform"`` and ``"cyclic"`` use no norms;
            ``"weight_norm"`` uses the root mean square of the weights; ``"shuffled"`` assigns the adaptive
            probabilities to randomly permuted layers, as a control; ``"remeasured"`` is adaptive, but the last step
            before each update of the importance measures all layers, while it trains the active ones, and the other
            steps measure none. That step takes a full backward and the activation memory of the probe; with gradient
            accumulation its first micro-batch is measured.
        min_probability: lower bound f of each layer's probability, p = (1 - L f) softmax + f.
        always_active: parameters trained in every step: ``"outside"`` for all parameters that belong to no
            layer, ``"none"`` for no parameters, or name patterns (``"lm_head*"``), which may also match
            parameters of layers. Other parameters outside the layers are frozen.
        moments: ``"keep"`` keeps the moments of a layer while it is frozen, ``"reset"`` restarts them from
            zero when the layer becomes active again.
        draw_ahead: number of steps before the end of a period at which the next layers are drawn, at most
            ``sample_interval - 1`` (0 if ``sample_interval`` is 1).
        seed: seed of the sampler's generator.
        offload: where the optimizer states are kept. ``"none"``: on the device of their parameters.
            ``"resident"``: in host memory, and on the device for layers that are active. ``"streamed"``: in
            host memory; they pass through device buffers in every step. ``"auto"``: resident for a model on one GPU
            whose states fit into host memory, otherwise none; the choice is logged. All modes train bitwise the same
            parameters (with ``fused_backward`` the reported ``grad_norm`` may differ in its last bit).
        buffer_mb: size of a device buffer with ``"streamed"``, in MiB.
        buffer_count: number of device buffers with ``"streamed"``. With three, copies in both directions go on
            during an update; with one, nothing overlaps.
        fused_backward: update each layer inside backward, as soon as its gradients are complete, and free
            them. Every backward is then a step; for gradient accumulation see `GrassAdamW.accumulate`. Cannot
            be combined with ``max_grad_norm``, a GradScaler, or clipping or reading gradients after backward.

    Raises:
        ConfigError: a value is out of range, or values cannot be combined.

    Source: paper sections "probing", "sampling probability" and "adaptation". ``importance_scale``,
    ``min_probability``, ``moments``, ``draw_ahead`` and ``"remeasured"`` are additions of this library.
    """

    active_layers: int = 2
    probe_steps: int = 20
    sample_interval: int = 25
    update_interval: int = 100
    temperature: float = 1.0
    ema: float = 0.5
    importance_scale: ImportanceScale = "log"
    sampler: SamplerName = "adaptive"
    min_probability: float = 0.0
    always_active: str | Sequence[str] = "outside"
    moments: Moments = "keep"
    draw_ahead: int = 1
    seed: int = 0
    offload: Literal["auto", Offload] = "auto"
    buffer_mb: float = 64
    buffer_count: int = 3
    fused_backward: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("active_layers", "sample_interval", "update_interval", "buffer_count"):
            _check_int(name, getattr(self, name), least=1)
        for name in ("probe_steps", "draw_ahead", "seed"):
            _check_int(name, getattr(self, name), least=0)
        if self.seed >= 2**32:
            raise ConfigError(
                f"seed must be below 2**32, not {self.seed}: it also seeds NumPy, which accepts no larger one"
            )
        if not (_is_number(self.buffer_mb) and 0 < self.buffer_mb < math.inf):
            raise ConfigError(f"buffer_mb must be a positive number of MiB, not {self.buffer_mb!r}")
        if not isinstance(self.fused_backward, bool):
            raise ConfigError(f"fused_backward must be True or False, not {self.fused_backward!r}")
        if not (_is_number(self.temperature) and 0 < self.temperature < math.inf):
            raise ConfigError(f"temperature must be a positive number, not {self.temperature!r}")
        if not (_is_number(self.ema) and 0 < self.ema <= 1):
            raise ConfigError(f"ema must be in (0, 1], not {self.ema!r}; 1 uses the newest measurement only")
        if not (_is_number(self.min_probability) and 0 <= self.min_probability <= 1):
            raise ConfigError(f"min_probability must be in [0, 1], not {self.min_probability!r}")
        if self.update_interval % self.sample_interval:
            raise ConfigError(
                f"update_interval ({self.update_interval}) must be a multiple of sample_interval "
                f"({self.sample_interval}): importance is updated when layers are drawn"
            )
        if self.draw_ahead > max(1, self.sample_interval - 1):
            raise ConfigError(
                f"draw_ahead ({self.draw_ahead}) must be at most sample_interval - 1 "
                f"({self.sample_interval - 1}): layers are drawn in the period before the one they train in"
            )
        if not isinstance(self.always_active, (str, Sequence)):
            raise ConfigError(
                f'always_active must be "outside", "none" or name patterns, not {self.always_active!r}'
            )
        if not isinstance(self.always_active, str):
            object.__setattr__(self, "always_active", tuple(self.always_active))
            if not self.always_active or not all(isinstance(p, str) and p for p in self.always_active):
                raise ConfigError(
                    'always_active must be "outside", "none" or a non-empty list of name patterns, '
                    f"not {self.always_active!r}"
                )
        elif not self.always_active:
            raise ConfigError(
                'always_active must not be empty; "none" freezes all parameters outside the layers'
            )

    @property
    def effective_draw_ahead(self) -> int:
        """Number of steps before the end of a period at which the next layers are drawn."""
        return min(self.draw_ahead, self.sample_interval - 1)

    @property
    def always_active_patterns(self) -> tuple[str, ...] | None:
        """Name patterns in ``always_active``; None if it is ``"outside"`` or ``"none"``."""
        if self.always_active in ("outside", "none"):
            return None
        return (self.always_active,) if isinstance(self.always_active, str) else tuple(self.always_active)

    def check_options(self, max_grad_norm: float | None) -> None:
        """Check the configuration against arguments of the optimizer.

        Raises:
            ConfigError: the two cannot be combined.
        """
        if self.fused_backward and max_grad_norm is not None:
            raise ConfigError(
                "fused_backward and max_grad_norm exclude each other: most layers are updated before the norm of all "
                "gradients is known, at the end of backward; leave one of them out"
            )

    def for_run(self, num_steps: int) -> "GrassConfig":
        """Return the configuration for a run of `num_steps` steps: with a probe of a quarter of them at most.

        The probe updates no weights, so a run that is no longer than its probe would train nothing.
        """
        most = min(max(1, num_steps // 4), num_steps - 1)
        return replace(self, probe_steps=min(self.probe_steps, max(0, most)))

    def check_layers(self, num_layers: int) -> None:
        """Check the configuration against the number of layers that can be drawn.

        Raises:
            ConfigError: there are fewer layers than ``active_layers``, or ``min_probability`` is too high.
        """
        if self.active_layers > num_layers:
            raise ConfigError(
                f"active_layers is {self.active_layers}, but only {num_layers} layers can be trained; "
                f"pass active_layers between 1 and {num_layers}"
            )
        if num_layers * self.min_probability > 1:
            raise ConfigError(
                f"min_probability {self.min_probability} for each of {num_layers} layers adds up to more than "
                f"1; pass at most {1 / num_layers:.6g}"
            )


def choices_of(options: type) -> dict[str, tuple[Any, ...]]:
    """Return the allowed values of each dataclass field that is annotated with a ``Literal``."""
    return {f.name: get_args(f.type) for f in fields(options) if get_origin(f.type) is Literal}


def check_choices(options: Any) -> None:
    """Check the fields of a dataclass instance that are annotated with a ``Literal``.

    Raises:
        ConfigError: a value is not one of the choices.
    """
    for name, choices in choices_of(type(options)).items():
        value = getattr(options, name)
        if value not in choices:
            raise ConfigError(
                f"{name} must be one of {', '.join(choices)}, not {value!r}{did_you_mean(value, choices)}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, not {value!r}")
