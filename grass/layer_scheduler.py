"""Layer scheduler: from the gradient norms of each step to the layers that train.

`LayerScheduler` combines the schedule (`grass.schedule`), the importance (`grass.importance`) and the sampler
(`grass.sampling`), which do not import each other. It knows no parameters, moments or hooks: the optimizer passes
the norms of each step and applies the returned change.

Source: paper, "the method".
"""

import zlib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grass.config import GrassConfig, choices_of
from grass.errors import StateMismatchError
from grass.importance import MeanGradientNorm
from grass.sampling import make_sampler
from grass.schedule import Events, Schedule

# They do not change which parameters are trained, nor to which values: a state dict loads under other settings.
RUNTIME_ONLY_FIELDS = ("offload", "buffer_mb", "buffer_count", "fused_backward")
_CHOICES = choices_of(GrassConfig)
_FORMAT_VERSION = 1


class Change(NamedTuple):
    """Layers that were drawn and deactivated at the end of a step; None if there was no draw or no switch."""

    drawn: tuple[int, ...] | None  # layers of the next period
    left: tuple[int, ...] | None  # layers that were active until this step


class LayerScheduler:
    """Schedule, importance and sampler combined: determines the layers that train.

    Args:
        config: configuration of the method.
        layer_names: module paths of the layers; a state dict of other layers is refused.
        num_params: for each layer, number of elements that can have a gradient; layers with 0 are never drawn.
        device: device on which gradient norms are computed.
        weight_norms: float32 [L], root mean squares of the weights, which the ``weight_norm`` sampler uses as
            importance.

    Attributes:
        active: layers trained in the next step; () during the probe.
        next_active: layers of the next period; None until they are drawn.
        draw_counts: for each layer, number of times that it was drawn.
        beginning: the state before the first step.

    Raises:
        ConfigError: the configuration does not fit the number of layers.
    """

    def __init__(
        self,
        config: GrassConfig,
        layer_names: Sequence[str],
        num_params: Sequence[int],
        device: torch.device,
        weight_norms: Tensor | None = None,
    ) -> None:
        self.config = config
        self.num_params = list(num_params)
        eligible = [count > 0 for count in num_params]
        if any(eligible):  # otherwise the user may unfreeze some later
            config.check_layers(sum(eligible))
        self.sampler = make_sampler(config, eligible)
        self.importance = MeanGradientNorm(num_params, config.ema, device)
        self.schedule = Schedule(
            config.probe_steps if self.sampler.probes else 0,
            config.sample_interval,
            config.update_interval,
            config.effective_draw_ahead,
        )
        self.active: tuple[int, ...] = ()
        self.next_active: tuple[int, ...] | None = None
        self.draw_counts = [0] * len(num_params)
        self._names_checksum = zlib.crc32("\n".join(layer_names).encode())
        if self.schedule.probe_steps == 0:
            if weight_norms is not None:
                self.importance.importance = weight_norms.float().cpu()
                self.sampler.refresh(self.importance.importance)
            else:
                self.importance.importance = torch.ones(len(num_params), device="cpu")
        self._apply(self.schedule.start(), ends_probe=False)
        self.beginning = self.state_dict()

    def recount(self, num_params: Sequence[int]) -> None:
        """Replace the sizes of the layers, after parameters were added, frozen or unfrozen.

        A layer that can be drawn from now on has not been measured: its importance is the mean of the others, or 1.
        """
        before, eligible = self.sampler, [count > 0 for count in num_params]
        self.sampler = make_sampler(self.config, eligible)
        self.sampler.load_state_dict(before.state_dict())
        new = self.sampler.eligible & ~before.eligible
        if new.any():
            known = self.importance.importance[before.eligible]
            self.importance.importance[new] = known.mean() if len(known) else 1.0
        if not torch.equal(self.sampler.eligible, before.eligible):
            self.sampler.probabilities = self.sampler.eligible.double() / max(1, sum(eligible))
            self.sampler.refresh(self.importance.importance)
        self.num_params = list(num_params)
        self.importance.set_num_params(num_params, self.importance.device)

    def draw_at_once(self) -> Change:
        """Draw, and switch to the layers drawn, out of turn: for a model that had no layer to draw before."""
        return self._apply(Events(refresh=False, draw=True, switch=True), ends_probe=False)

    @property
    def trained_draws(self) -> list[int]:
        """For each layer, number of times that it was drawn and then trained, for one step or more.

        Without a set that is drawn ahead, or that the next step is the first to train.
        """
        counts = list(self.draw_counts)
        for layer in (self.next_active or ()) + (self.active if self.schedule.begins_period else ()):
            counts[layer] -= 1
        return counts

    @property
    def reads_norms(self) -> bool:
        """True if the norms of the next step can change what is drawn."""
        return self.probing or (self.remeasuring if self.sampler.remeasures else self.sampler.adapts)

    @property
    def remeasuring(self) -> bool:
        """True if the next step trains the active layers and measures all layers."""
        return self.sampler.remeasures and self.schedule.refreshes_next

    def fingerprint(self) -> dict[str, Any]:
        """Return the state that must be equal in all processes that train one model.

        No device sync: the importance is on the CPU.
        """
        return {
            "step": self.schedule.step_count,
            "draws": self.sampler.num_draws,
            "active": [self.active, self.next_active],
            "importance": self.importance.importance.tolist(),
        }

    @property
    def probing(self) -> bool:
        """True if the next step belongs to the probe."""
        return self.schedule.phase == "probe"

    def finish_step(
        self,
        sq_norms: Tensor,
        observed: Sequence[bool],
        skipped: Tensor | None = None,
        accumulated: bool = False,
    ) -> Change:
        """Observe the norms of a step, then refresh, draw and switch if they are due.

        Args:
            sq_norms: float32 [L] on the device, squared norms of the gradients.
            observed: for each layer, True if it had a gradient.
            skipped: scalar tensor, nonzero if the step was skipped.
            accumulated: True if the step had several backward passes, whose gradients the probe measured one by one.
        """
        if self.probing:
            self.importance.accumulated |= accumulated
        # Filled by index: a copy from the host would be a device sync.
        mask = torch.zeros(len(observed), dtype=torch.bool, device=sq_norms.device)
        for layer, has_grad in enumerate(observed):
            if has_grad:
                mask[layer] = True
        if self.reads_norms or not self.sampler.remeasures:
            self.importance.observe(sq_norms, mask, skipped)
        was_probing = self.probing
        return self._apply(self.schedule.advance(), ends_probe=was_probing and not self.probing)

    def _apply(self, events: Events, ends_probe: bool) -> Change:
        drawn: tuple[int, ...] | None = None
        left: tuple[int, ...] | None = None
        if events.refresh and (ends_probe or self.sampler.adapts):
            self.importance.refresh(probe=ends_probe)
            self.sampler.refresh(self.importance.importance)
        if events.draw:
            drawn = self.next_active = self.sampler.draw()
            for layer in drawn:
                self.draw_counts[layer] += 1
        if events.switch:
            coming = self.next_active or ()  # none if there is no layer to draw
            left = tuple(layer for layer in self.active if layer not in coming)
            self.active, self.next_active = coming, None
        return Change(drawn, left)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of schedule, importance and sampler as tensors, numbers and dicts of them."""
        return {
            "format": _FORMAT_VERSION,
            "config": _config_numbers(self.config),
            "names_checksum": self._names_checksum,
            "num_params": torch.tensor(self.num_params, device="cpu"),
            "step_count": self.schedule.step_count,
            # always of the same shape: checkpoint libraries load into the tensors of a newly constructed optimizer
            "active": self._as_tensor(self.active),
            "next_active": self._as_tensor(self.next_active or ()),
            "draw_counts": torch.tensor(self.draw_counts, device="cpu"),
            "sampler": self.sampler.state_dict(),
            "importance": self.importance.state_dict(),
        }

    def _as_tensor(self, layers: tuple[int, ...]) -> Tensor:
        """Return layers as int64 [active_layers], padded with -1."""
        padding = [-1] * (self.config.active_layers - len(layers))
        return torch.tensor([*layers, *padding], dtype=torch.int64, device="cpu")

    def check(self, state: dict[str, Any]) -> None:
        """Check that a state fits, without loading it.

        Raises:
            StateMismatchError: the state has another format, or was saved with another model or configuration.
        """
        if int(state.get("format", -1)) != _FORMAT_VERSION:
            raise StateMismatchError(
                f'param_groups[0]["grass"] of the state dict has format {state.get("format")}; this version reads '
                f"format {_FORMAT_VERSION}"
            )
        missing = _missing(state, self.beginning)
        if missing:
            raise StateMismatchError(
                f'param_groups[0]["grass"] of the state dict is incomplete: it lacks {", ".join(missing)}; load a '
                "complete state dict"
            )
        saved = state["num_params"].tolist()
        if saved != self.num_params or int(state["names_checksum"]) != self._names_checksum:
            raise StateMismatchError(
                f"the state dict was saved with a different layer map: it has {len(saved)} layers of {saved[:3]}... "
                f"trainable elements, this model has {len(self.num_params)} of {self.num_params[:3]}...; load it into "
                "the model it was saved from"
            )
        own, other = _config_numbers(self.config), state["config"]
        different = sorted(name for name in own if other.get(name) != own[name])
        if different:
            listed = ", ".join(
                "always_active"  # known by its checksum only
                if name == "always_active"
                else f"{name}: saved {_readable(name, other.get(name))}, now {_readable(name, own[name])}"
                for name in different
            )
            raise StateMismatchError(
                f"the state dict was saved with a different GrassConfig ({listed}); construct the optimizer with that "
                'configuration, or delete param_groups[0]["grass"] from the state dict to load the moments only'
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state returned by `state_dict`; see `check`."""
        self.schedule.step_count = int(state["step_count"])
        self.active = tuple(layer for layer in state["active"].tolist() if layer >= 0)
        self.next_active = tuple(layer for layer in state["next_active"].tolist() if layer >= 0) or None
        self.draw_counts = state["draw_counts"].tolist()
        self.sampler.load_state_dict(state["sampler"])
        self.importance.load_state_dict(state["importance"])


def _missing(state: dict[str, Any], complete: dict[str, Any]) -> list[str]:
    """Return the keys that a state lacks, including those of the sampler and the importance."""
    missing = [key for key in complete if key not in state]
    for part in ("sampler", "importance"):
        if part in state:
            missing += [f"{part}.{key}" for key in complete[part] if key not in state[part]]
    return missing


def _config_numbers(config: GrassConfig) -> dict[str, int | float]:
    """Return the configuration as numbers: choices by position, name patterns by checksum."""
    numbers: dict[str, int | float] = {}
    for field in fields(config):
        if field.name in RUNTIME_ONLY_FIELDS:
            continue
        value = getattr(config, field.name)
        if field.name in _CHOICES:
            numbers[field.name] = _CHOICES[field.name].index(value)
        elif field.name == "always_active":
            text = value if isinstance(value, str) else "\n".join(value)
            numbers[field.name] = zlib.crc32(text.encode())
        else:  # torch.load(weights_only=True) refuses a NumPy float, which is an instance of float
            numbers[field.name] = float(value) if isinstance(value, float) else value
    return numbers


def _readable(name: str, number: Any) -> str:
    if name in _CHOICES and number is not None:
        return str(_CHOICES[name][int(number)])
    return str(number)
