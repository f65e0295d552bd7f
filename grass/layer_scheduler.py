"""LayerScheduler: norms in, active layers out. The method, without parameters, moments or hooks.

It joins three parts that do not know each other: the clock (`grass.schedule`), the importance
(`grass.importance`) and the sampler (`grass.sampling`). The optimizer tells it the norms of each step and
is told which layers to prepare and which to switch to.

Source: paper, "the method".
"""

import zlib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grass.config import IMPORTANCE_SCALES, MOMENTS, SAMPLERS, GrassConfig
from grass.errors import StateMismatchError
from grass.importance import MeanGradientNorm
from grass.sampling import make_sampler
from grass.schedule import Events, Schedule

_PLACES = (
    "offload",
    "buffer_mb",
    "buffer_count",
    "fused_backward",
)  # where and when, not what: they may change
_CHOICES = {"importance_scale": IMPORTANCE_SCALES, "sampler": SAMPLERS, "moments": MOMENTS}
_FORMAT = 1


class Change(NamedTuple):
    """What a step brought about: None where nothing happened."""

    drawn: tuple[int, ...] | None  # the next period's layers
    left: tuple[int, ...] | None  # on a switch: layers that were active and no longer are


class LayerScheduler:
    """Decides which layers train.

    Args:
        config: settings of the method.
        layer_names: module paths, to recognise a checkpoint of another model.
        num_params: for each layer, how many elements can have a gradient; 0 excludes it from drawing.
        device: where norms are computed.
        weight_norms: float32 [L], root-mean-square weights; the importance of the ``weight_norm`` sampler.

    Attributes:
        active: layers the step about to be taken trains; () while probing.
        next_active: layers of the next period; None until drawn.
        draw_counts: for each layer, in how many sets it has been.
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
        self.sampler = make_sampler(config, [count > 0 for count in num_params])
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
                self.importance.importance = torch.ones(len(num_params))
        self._apply(self.schedule.start(), ends_probe=False)
        self.beginning = self.state_dict()

    def recount(self, num_params: Sequence[int]) -> None:
        """Take the layers' sizes anew, after parameters were added; all else goes on."""
        sampler = make_sampler(self.config, [count > 0 for count in num_params])
        sampler.load_state_dict(self.sampler.state_dict())
        self.sampler, self.num_params = sampler, list(num_params)
        self.importance.count(num_params, self.importance.device)

    @property
    def probing(self) -> bool:
        """Whether the step about to be taken only measures."""
        return self.schedule.phase == "probe"

    def finish_step(
        self,
        sq_norms: Tensor,
        observed: Sequence[bool],
        skipped: Tensor | None = None,
        accumulated: bool = False,
    ) -> Change:
        """Count a step: observe its norms, then refresh, draw and switch as is due.

        Args:
            sq_norms: float32 [L] on the device, squared norms of the gradients consumed.
            observed: for each layer, whether it had a gradient.
            skipped: device scalar, not zero if the step was skipped.
            accumulated: the probe measured single micro-batches.
        """
        if self.probing:
            self.importance.accumulated |= accumulated
        # Filled by index rather than copied from the host, which would wait for the device.
        mask = torch.zeros(len(observed), dtype=torch.bool, device=sq_norms.device)
        for layer, seen in enumerate(observed):
            if seen:
                mask[layer] = True
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
            assert self.next_active is not None
            left = tuple(layer for layer in self.active if layer not in self.next_active)
            self.active, self.next_active = self.next_active, None
        return Change(drawn, left)

    # -- checkpoints: plain tensors and numbers ---------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The whole method, as tensors, numbers and dicts of them."""
        return {
            "format": _FORMAT,
            "config": _config_numbers(self.config),
            "names_checksum": self._names_checksum,
            "num_params": torch.tensor(self.num_params),
            "step_count": self.schedule.step_count,
            # of one shape at all times: checkpoint libraries load into the tensors of a fresh optimizer
            "active": self._as_tensor(self.active),
            "next_active": self._as_tensor(self.next_active or ()),
            "draw_counts": torch.tensor(self.draw_counts),
            "sampler": self.sampler.state_dict(),
            "importance": self.importance.state_dict(),
        }

    def _as_tensor(self, layers: tuple[int, ...]) -> Tensor:
        """int64 [active_layers], -1 where there is no layer."""
        padding = [-1] * (self.config.active_layers - len(layers))
        return torch.tensor([*layers, *padding], dtype=torch.int64)

    def check(self, state: dict[str, Any]) -> None:
        """Refuse the state of another method, before anything is changed.

        Raises:
            StateMismatchError: another format, model or configuration, with what differs.
        """
        if int(state.get("format", -1)) != _FORMAT:
            raise StateMismatchError(
                f"the checkpoint's method state has format {state.get('format')}, this version reads {_FORMAT}"
            )
        damaged = _missing(state, self.beginning)
        if damaged:
            raise StateMismatchError(
                f"the checkpoint's method state lacks {', '.join(damaged)}: it is damaged; load one that is whole"
            )
        saved = state["num_params"].tolist()
        if saved != self.num_params or int(state["names_checksum"]) != self._names_checksum:
            raise StateMismatchError(
                f"the checkpoint is of another layer map: it has {len(saved)} layers of {saved[:3]}... trainable "
                f"elements, this model {len(self.num_params)} of {self.num_params[:3]}...; load it into the model "
                "it was saved from"
            )
        own, theirs = _config_numbers(self.config), state["config"]
        different = sorted(name for name in own if theirs.get(name) != own[name])
        if different:
            listed = ", ".join(
                f"{name} {_readable(name, theirs.get(name))} there, {_readable(name, own[name])} here"
                for name in different
            )
            raise StateMismatchError(
                f"the checkpoint is of another GrassConfig ({listed}); construct the optimizer with that "
                'configuration, or delete param_groups[0]["grass"] from the state dict to keep the moments only'
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.schedule.step_count = int(state["step_count"])
        self.active = tuple(layer for layer in state["active"].tolist() if layer >= 0)
        self.next_active = tuple(layer for layer in state["next_active"].tolist() if layer >= 0) or None
        self.draw_counts = state["draw_counts"].tolist()
        self.sampler.load_state_dict(state["sampler"])
        self.importance.load_state_dict(state["importance"])


def _missing(state: dict[str, Any], complete: dict[str, Any]) -> list[str]:
    """Keys that a state lacks, also in the parts it is made of."""
    missing = [key for key in complete if key not in state]
    for part in ("sampler", "importance"):
        if part in state:
            missing += [f"{part}.{key}" for key in complete[part] if key not in state[part]]
    return missing


def _config_numbers(config: GrassConfig) -> dict[str, int | float]:
    """The configuration as numbers: choices by their place, name patterns by a checksum."""
    numbers: dict[str, int | float] = {}
    for field in fields(config):
        if field.name in _PLACES:
            continue
        value = getattr(config, field.name)
        if field.name in _CHOICES:
            numbers[field.name] = _CHOICES[field.name].index(value)
        elif field.name == "always_active":
            text = value if isinstance(value, str) else "\n".join(value)
            numbers[field.name] = zlib.crc32(text.encode())
        else:  # a NumPy float passes for a float, but not through torch.load(weights_only=True)
            numbers[field.name] = float(value) if isinstance(value, float) else value
    return numbers


def _readable(name: str, number: Any) -> str:
    if name in _CHOICES and number is not None:
        return _CHOICES[name][int(number)]
    return "another list" if name == "always_active" else str(number)
