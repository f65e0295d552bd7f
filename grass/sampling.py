"""Samplers: from the importance of layers to probabilities, and from these to the active layers.

``p = softmax(scale(m) / tau)``, where ``m`` is the importance of the layers. ``gamma`` layers are drawn without
replacement by Gumbel top-k on ``log p``, which is Plackett-Luce sampling: each layer is drawn with probability
proportional to p among the remaining ones. Samplers compute in float64 on the CPU and have a generator of their own,
so draws neither depend on the random state of torch nor change it.

A new sampler is a subclass of `Sampler`, an entry in `SAMPLER_CLASSES` and a name in `grass.choices.SamplerName`.

Source: paper, "sampling probability". The scales are an addition of this library: raw gradient norms between 1e-6 and
1e-3 would make the softmax uniform.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grass.choices import ImportanceScale

if TYPE_CHECKING:
    from grass.config import GrassConfig


def scale_importance(importance: Tensor, kind: ImportanceScale) -> Tensor:
    """Transform the importance so that the softmax does not depend on the size of the gradients.

    Args:
        importance: [L], nonnegative.
        kind: ``"mean"`` for m / mean(m), ``"log"`` for ln(m), ``"zscore"`` for (m - mean(m)) / std(m), ``"none"``
            for m.

    Returns:
        float64 [L]; zeros if the transformation is undefined (a mean or standard deviation of 0).
    """
    m = importance.double()
    mean = m.mean()
    if kind == "none":
        return m
    if not mean > 0:
        return torch.zeros_like(m)
    if kind == "mean":
        return m / mean
    if kind == "log":
        # A layer without gradient can still be drawn: it counts as 1e-12 of the largest.
        return m.clamp_min(float(m.max()) * 1e-12).log()
    spread = (m - mean).square().mean().sqrt()
    return (m - mean) / spread if spread > 0 else torch.zeros_like(m)


class Sampler:
    """Adaptive layer-wise importance sampling, and the base class of the other samplers.

    Args:
        config: ``active_layers``, ``temperature``, ``importance_scale``, ``min_probability`` and ``seed`` are used.
        eligible: for each layer, True if it can be drawn (it has a trainable parameter).

    Attributes:
        probes: True if gradients are measured before the first draw.
        adapts: True if the importance is updated during training.
        remeasures: True if it is updated by the norms of one step that measures all layers, also frozen ones.
        probabilities: float64 [L], probabilities of the next draw.
        num_draws: number of draws so far.
    """

    probes = True
    adapts = True
    remeasures = False

    def __init__(self, config: "GrassConfig", eligible: list[bool]) -> None:
        self.config = config
        self.eligible = torch.tensor(eligible, device="cpu")
        self.generator = torch.Generator().manual_seed(config.seed)
        self.num_draws = 0
        self.probabilities = self.eligible.double() / max(1, int(self.eligible.sum()))

    def refresh(self, importance: Tensor) -> None:
        """Recompute the probabilities from the importance, [L]."""
        self.probabilities = self._from_importance(importance)

    def draw(self) -> tuple[int, ...]:
        """Draw ``active_layers`` layers, or all if there are fewer, and return their indices, ascending."""
        self.num_draws += 1
        return tuple(sorted(self.ranking()[: self._num_to_draw]))

    def ranking(self) -> list[int]:
        """Return the layers that can be drawn in random order: the next is drawn by p among the remaining ones."""
        noise = torch.empty_like(self.probabilities).exponential_(generator=self.generator).log().neg()
        keys = torch.where(self.eligible, self.probabilities.log() + noise, -torch.inf)
        # Layers whose probability underflowed to 0 rank behind all others, in random order.
        underflowed = self.eligible & (self.probabilities <= 0)
        keys = torch.where(underflowed, noise - 1e6, keys)
        order: list[int] = keys.topk(int(self.eligible.sum())).indices.tolist()
        return order

    @property
    def _num_to_draw(self) -> int:
        return min(self.config.active_layers, int(self.eligible.sum()))

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a dict of tensors and numbers."""
        return {
            "generator": self.generator.get_state(),
            "num_draws": self.num_draws,
            "probabilities": self.probabilities.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state returned by `state_dict`."""
        # trainers move all tensors of a state dict to the device
        self.generator.set_state(state["generator"].cpu())
        self.num_draws = int(state["num_draws"])
        self.probabilities = state["probabilities"].detach().cpu().double()

    def _from_importance(self, importance: Tensor) -> Tensor:
        scaled = torch.full_like(self.eligible, -torch.inf, dtype=torch.float64)
        kind, tau, floor = (
            self.config.importance_scale,
            self.config.temperature,
            self.config.min_probability,
        )
        if not self.eligible.any():
            return self.eligible.double()
        logits = scale_importance(importance.cpu()[self.eligible], kind)
        # Subtract the maximum before dividing: with a tiny temperature the quotient would be inf, and the softmax NaN.
        scaled[self.eligible] = (logits - logits.max()) / tau
        count = int(self.eligible.sum())
        floor = min(floor, 1 / count)  # there may be more layers than at construction
        return (1 - count * floor) * scaled.softmax(0) + floor * self.eligible.double()


class StaticSampler(Sampler):
    """Use the importance measured by the probe for the whole run (the paper's "static GRASS")."""

    adapts = False


class RemeasuredSampler(Sampler):
    """Adapt to norms of all layers that are measured in the same step: those of a frozen layer are never old."""

    remeasures = True


class ShuffledSampler(Sampler):
    """Assign the adaptive probabilities to permuted layers, with one permutation that depends on the seed.

    A control experiment: the probabilities keep their values, and each layer gets that of another.
    """

    def __init__(self, config: "GrassConfig", eligible: list[bool]) -> None:
        super().__init__(config, eligible)
        indices = self.eligible.nonzero().flatten()
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(indices), generator=generator, device="cpu")
        self.permutation = torch.arange(len(eligible), device="cpu")
        self.permutation[indices[order]] = indices[order.roll(1)]  # a cycle: no layer has its own

    def refresh(self, importance: Tensor) -> None:
        """Recompute the probabilities from the importance, [L], and permute them."""
        self.probabilities = self._from_importance(importance)[self.permutation]


class UniformSampler(Sampler):
    """Draw all layers with the same probability, as LISA does."""

    probes = False
    adapts = False

    def refresh(self, importance: Tensor) -> None:
        """Do nothing: the probabilities do not depend on the importance."""


class WeightNormSampler(Sampler):
    """Use the root mean square of each layer's weights, computed once at construction, as importance."""

    probes = False
    adapts = False


class CyclicSampler(UniformSampler):
    """Take ``active_layers`` layers at a time in order, starting again after the last.

    ``probabilities`` is 1 / ``active_layers`` for the layers drawn last.
    """

    def draw(self) -> tuple[int, ...]:
        """Return the indices of the next ``active_layers`` eligible layers, ascending."""
        indices = self.eligible.nonzero().flatten().tolist()
        gamma = self._num_to_draw
        chosen = [indices[(self.num_draws * gamma + i) % len(indices)] for i in range(gamma)]
        self.num_draws += 1
        self.probabilities = torch.zeros_like(self.probabilities)
        self.probabilities[chosen] = 1 / max(1, gamma)
        return tuple(sorted(chosen))


SAMPLER_CLASSES: dict[str, type[Sampler]] = {
    "adaptive": Sampler,
    "static": StaticSampler,
    "uniform": UniformSampler,
    "weight_norm": WeightNormSampler,
    "cyclic": CyclicSampler,
    "shuffled": ShuffledSampler,
    "remeasured": RemeasuredSampler,
}


def make_sampler(config: "GrassConfig", eligible: list[bool]) -> Sampler:
    """Construct the sampler that ``config.sampler`` names."""
    return SAMPLER_CLASSES[config.sampler](config, eligible)
