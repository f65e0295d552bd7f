"""GrassConfig: every setting of the method, checked once, immutable after."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grass.errors import ConfigError

IMPORTANCE_SCALES = ("mean", "log", "zscore", "none")
SAMPLERS = ("adaptive", "static", "uniform", "weight_norm", "cyclic", "shuffled")
MOMENTS = ("keep", "reset")
OFFLOADS = ("none", "resident", "streamed")


@dataclass(frozen=True)
class GrassConfig:
    """Settings of the method, in optimizer steps unless said otherwise.

    Args:
        active_layers: gamma, how many layers train at a time.
        probe_steps: T_p, steps at the start that measure all gradients and update nothing. Samplers that
            use no gradient (``uniform``, ``cyclic``, ``weight_norm``) skip the probe.
        sample_interval: T_s, steps with one active set.
        update_interval: T_u, steps between two refreshes of the importance; a multiple of
            ``sample_interval``.
        temperature: tau of the softmax, dimensionless.
        ema: alpha, the share of the newest window in a sampled layer's importance, in (0, 1].
        importance_scale: what is done to the importance before the softmax, so that it does not depend on
            the size of the gradients: ``"mean"`` divides by the mean over layers, ``"log"`` takes the
            logarithm (p proportional to m^(1/tau)), ``"zscore"`` standardises, ``"none"`` is the paper's
            formula to the letter.
        sampler: ``"adaptive"`` is the method; ``"static"`` keeps the probe's importance; ``"uniform"`` and
            ``"cyclic"`` ignore it; ``"weight_norm"`` uses the root-mean-square weight; ``"shuffled"`` gives
            the adaptive probabilities to the wrong layers, a control.
        min_probability: floor f of each layer's probability, p = (1 - L f) softmax + f.
        always_active: ``"outside"`` trains all that is in no layer at every step, ``"none"`` freezes it,
            name patterns (``"lm_head*"``) train what matches, also inside layers.
        moments: ``"keep"`` continues a returning layer's moments, ``"reset"`` starts them from zero.
        draw_ahead: how many steps before a period's end the next set is drawn, at most
            ``sample_interval - 1`` (taken as 0 when ``sample_interval`` is 1).
        seed: of the sampler's own generator.
        offload: where states live. ``"none"``: beside their parameters. ``"resident"``: in host memory, and on the
            device while their layers train. ``"streamed"``: in host memory, and on the device while they are updated.
            What is trained is the same to the bit (a logged ``grad_norm`` may differ in its last one with
            ``fused_backward``).
        buffer_mb: size of a device buffer of ``"streamed"``, in MiB.
        buffer_count: how many there are. Two overlap copies with updates.
        fused_backward: update a layer inside backward, as soon as its gradients are complete, and free them. One
            backward is one step; for micro-batches see `GrassAdamW.accumulate`. Excludes ``max_grad_norm``, a
            GradScaler, and clipping or reading gradients after backward.

    Raises:
        ConfigError: a value out of range, with the remedy.

    Source: paper sections "probing", "sampling probability" and "adaptation". ``importance_scale``,
    ``min_probability``, ``moments`` and ``draw_ahead`` are ours.
    """

    active_layers: int = 2
    probe_steps: int = 20
    sample_interval: int = 25
    update_interval: int = 100
    temperature: float = 1.0
    ema: float = 0.5
    importance_scale: str = "log"
    sampler: str = "adaptive"
    min_probability: float = 0.0
    always_active: str | Sequence[str] = "outside"
    moments: str = "keep"
    draw_ahead: int = 1
    seed: int = 0
    offload: str = "none"
    buffer_mb: float = 64
    buffer_count: int = 2
    fused_backward: bool = False

    def __post_init__(self) -> None:
        for name in ("active_layers", "sample_interval", "update_interval"):
            _check_int(name, getattr(self, name), least=1)
        for name in ("probe_steps", "draw_ahead", "seed"):
            _check_int(name, getattr(self, name), least=0)
        if self.seed >= 2**32:
            raise ConfigError(
                f"seed must be below 2**32, not {self.seed}: other generators of a run share it"
            )
        _check_choice("importance_scale", self.importance_scale, IMPORTANCE_SCALES)
        _check_choice("sampler", self.sampler, SAMPLERS)
        _check_choice("moments", self.moments, MOMENTS)
        _check_choice("offload", self.offload, OFFLOADS)
        _check_int("buffer_count", self.buffer_count, least=1)
        if not (_is_number(self.buffer_mb) and 0 < self.buffer_mb < math.inf):
            raise ConfigError(f"buffer_mb must be a positive number of MiB, not {self.buffer_mb!r}")
        if not isinstance(self.fused_backward, bool):
            raise ConfigError(f"fused_backward must be True or False, not {self.fused_backward!r}")
        if not (_is_number(self.temperature) and 0 < self.temperature < math.inf):
            raise ConfigError(f"temperature must be a positive number, not {self.temperature!r}")
        if not (_is_number(self.ema) and 0 < self.ema <= 1):
            raise ConfigError(f"ema must be in (0, 1], not {self.ema!r}; 1 forgets all earlier windows")
        if not (_is_number(self.min_probability) and 0 <= self.min_probability <= 1):
            raise ConfigError(f"min_probability must be in [0, 1], not {self.min_probability!r}")
        if self.update_interval % self.sample_interval:
            raise ConfigError(
                f"update_interval ({self.update_interval}) must be a multiple of sample_interval "
                f"({self.sample_interval}): importance is refreshed when a set is drawn"
            )
        if self.draw_ahead > max(1, self.sample_interval - 1):
            raise ConfigError(
                f"draw_ahead ({self.draw_ahead}) must be at most sample_interval - 1 "
                f"({self.sample_interval - 1}): a set is drawn within the period before its own"
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
            raise ConfigError('always_active must not be empty; "none" freezes all that is in no layer')

    @property
    def effective_draw_ahead(self) -> int:
        """Steps before a period's end at which the next set is drawn."""
        return min(self.draw_ahead, self.sample_interval - 1)

    @property
    def always_active_patterns(self) -> tuple[str, ...] | None:
        """Name patterns of ``always_active``; None for the two words ``"outside"`` and ``"none"``."""
        if self.always_active in ("outside", "none"):
            return None
        return (self.always_active,) if isinstance(self.always_active, str) else tuple(self.always_active)

    def check_options(self, max_grad_norm: float | None) -> None:
        """Check what depends on the optimizer's options.

        Raises:
            ConfigError: options that exclude each other.
        """
        if self.fused_backward and max_grad_norm is not None:
            raise ConfigError(
                "fused_backward and max_grad_norm exclude each other: the norm of all gradients is known when backward "
                "has ended, and most layers are updated by then; leave one of them out"
            )

    def check_layers(self, num_layers: int) -> None:
        """Check what depends on how many layers can be drawn.

        Raises:
            ConfigError: more active layers than layers, or a floor that cannot be given to all.
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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, not {value!r}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
