"""Samplers: from importance to probabilities, from probabilities to a set of active layers.

``p = softmax(scale(m) / tau)`` with the layers' importance ``m``; ``gamma`` layers are drawn without
replacement by Gumbel top-k on ``log p``, which is Plackett-Luce sampling (each next layer with
probability proportional to p among those left). All in float64 on the CPU, with the sampler's own
generator, so a draw neither disturbs nor depends on the training run's random numbers.

A new sampler is a subclass of `Sampler` and an entry in `SAMPLER_CLASSES`.

Source: paper, "sampling probability"; the scales are ours (raw gradient norms of 1e-6 to 1e-3 would make
the softmax uniform).
"""

from typing import Any

import torch
from torch import Tensor

from grass.config import GrassConfig


def scale_importance(importance: Tensor, kind: str) -> Tensor:
    """Bring importance to a scale on which a temperature near 1 means something.

    Args:
        importance: [L], not negative.
        kind: ``"mean"`` m / mean(m); ``"log"`` ln(m); ``"zscore"`` (m - mean(m)) / std(m); ``"none"`` m.

    Returns:
        float64 [L]. Importance that does not tell the layers apart gives zeros.
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
        # A layer that has shown no gradient stays drawable: one in 1e12 of the largest.
        return m.clamp_min(float(m.max()) * 1e-12).log()
    spread = (m - mean).square().mean().sqrt()
    return (m - mean) / spread if spread > 0 else torch.zeros_like(m)


class Sampler:
    """Adaptive layer-wise importance sampling, and the base of its alternatives.

    Args:
        config: gamma, temperature, scale, floor, seed.
        eligible: for each layer, whether it can be drawn (it has a trainable parameter).

    Attributes:
        probes: whether the method measures before the first draw.
        adapts: whether refreshes change the importance.
        probabilities: float64 [L], what the next draw uses.
        num_draws: how many sets have been drawn.
    """

    probes = True
    adapts = True

    def __init__(self, config: GrassConfig, eligible: list[bool]) -> None:
        self.config = config
        self.eligible = torch.tensor(eligible)
        config.check_layers(int(self.eligible.sum()))
        self.generator = torch.Generator().manual_seed(config.seed)
        self.num_draws = 0
        self.probabilities = self.eligible.double() / self.eligible.sum()

    def refresh(self, importance: Tensor) -> None:
        """Recompute the probabilities from importance, [L]."""
        self.probabilities = self._from_importance(importance)

    def draw(self) -> tuple[int, ...]:
        """Draw the next set: ``active_layers`` indices, ascending."""
        noise = torch.empty_like(self.probabilities).exponential_(generator=self.generator).log().neg()
        keys = torch.where(self.eligible, self.probabilities.log() + noise, -torch.inf)
        # A probability that underflowed to 0 ranks behind every other, and among its like by chance.
        underflowed = self.eligible & (self.probabilities <= 0)
        keys = torch.where(underflowed, noise - 1e6, keys)
        self.num_draws += 1
        return tuple(sorted(keys.topk(self.config.active_layers).indices.tolist()))

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as plain tensors and numbers."""
        return {
            "generator": self.generator.get_state(),
            "num_draws": self.num_draws,
            "probabilities": self.probabilities.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.generator.set_state(state["generator"].cpu())  # trainers move every tensor to the device
        self.num_draws = int(state["num_draws"])
        self.probabilities = state["probabilities"].detach().cpu().double()

    def _from_importance(self, importance: Tensor) -> Tensor:
        scaled = torch.full(self.eligible.shape, -torch.inf, dtype=torch.float64)
        kind, tau, floor = (
            self.config.importance_scale,
            self.config.temperature,
            self.config.min_probability,
        )
        own = scale_importance(importance.cpu()[self.eligible], kind)
        # The largest becomes 0 first: a tiny temperature must not divide to inf, whose softmax is NaN.
        scaled[self.eligible] = (own - own.max()) / tau
        count = int(self.eligible.sum())
        return (1 - count * floor) * scaled.softmax(0) + floor * self.eligible.double()


class StaticSampler(Sampler):
    """The probe's importance for the whole run (the paper's "static GRASS")."""

    adapts = False


class ShuffledSampler(Sampler):
    """Adaptive probabilities given to the wrong layers: one fixed permutation, drawn from the seed.

    A control: it keeps how unequal the probabilities are, and drops which layer has which.
    """

    def __init__(self, config: GrassConfig, eligible: list[bool]) -> None:
        super().__init__(config, eligible)
        places = self.eligible.nonzero().flatten()
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(config.seed))
        self.permutation = torch.arange(len(eligible))
        self.permutation[places] = places[order]

    def refresh(self, importance: Tensor) -> None:
        """Recompute the probabilities from importance, [L], and permute them."""
        self.probabilities = self._from_importance(importance)[self.permutation]


class UniformSampler(Sampler):
    """Every layer alike (LISA's choice)."""

    probes = False
    adapts = False

    def refresh(self, importance: Tensor) -> None:
        """Importance changes nothing."""


class WeightNormSampler(Sampler):
    """Importance is the root-mean-square weight of each layer, read once by the optimizer."""

    probes = False
    adapts = False


class CyclicSampler(UniformSampler):
    """Blocks of gamma in layer order, wrapping round; p is 1 / gamma on the set drawn last."""

    def draw(self) -> tuple[int, ...]:
        """Take the next ``active_layers`` eligible layers."""
        places = self.eligible.nonzero().flatten().tolist()
        gamma = self.config.active_layers
        chosen = [places[(self.num_draws * gamma + i) % len(places)] for i in range(gamma)]
        self.num_draws += 1
        self.probabilities = torch.zeros_like(self.probabilities)
        self.probabilities[chosen] = 1 / gamma
        return tuple(sorted(chosen))


SAMPLER_CLASSES: dict[str, type[Sampler]] = {
    "adaptive": Sampler,
    "static": StaticSampler,
    "uniform": UniformSampler,
    "weight_norm": WeightNormSampler,
    "cyclic": CyclicSampler,
    "shuffled": ShuffledSampler,
}


def make_sampler(config: GrassConfig, eligible: list[bool]) -> Sampler:
    """The sampler that ``config.sampler`` names.

    Raises:
        ConfigError: more active layers than can be drawn, or too high a floor.
    """
    return SAMPLER_CLASSES[config.sampler](config, eligible)
