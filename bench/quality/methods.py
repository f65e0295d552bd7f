"""Methods of the study. Each makes an optimizer for a base model; layer methods train a quarter of the layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import grass
from bench.quality.tasks import Data
from bench.quality.training import LAYERS, layer_gradients, loss_of, root_mean_squares
from grass.reproduce import methods
from grass.reproduce.methods import Method
from grass.sampling import Sampler, ShuffledSampler, StaticSampler

ACTIVE = LAYERS // 4
PERIOD = 10
MEASURED = 128  # problems of a rule's measurement, as many as eight steps see


CONFIG = grass.GrassConfig(
    active_layers=ACTIVE, probe_steps=20, sample_interval=PERIOD, update_interval=2 * PERIOD
)
"""Sampling in runs of a few hundred steps."""


class RuleSampler(Sampler):
    """Sampler whose layers are chosen by a rule, when the optimizer draws.

    Args:
        config, eligible: as for `Sampler`.
        rule: returns the layers to train next.
    """

    probes = False
    adapts = False

    def __init__(
        self, config: grass.GrassConfig, eligible: list[bool], rule: Callable[[], Sequence[int]]
    ) -> None:
        super().__init__(config, eligible)
        self.rule = rule

    def refresh(self, importance: Tensor) -> None:
        """Do nothing: the rule measures for itself."""

    def draw(self) -> tuple[int, ...]:
        """Return the layers that the rule chooses."""
        self.num_draws += 1
        return tuple(sorted(self.rule()))


@dataclass
class View:
    """Model, optimizer and data that a rule reads; gradients of all layers are at hand, as in no practical method.

    Attributes:
        model: the model in training.
        optimizer: its optimizer.
        data: training problems.
        generator: random state of the rule.
        unseen: for each layer, number of periods since it was trained last.
        trained: for each layer, number of periods in which it was trained.
        first: the scores at the beginning of training, of a rule that is `once` measured.
    """

    model: nn.Module
    optimizer: Optimizer
    data: Data
    generator: torch.Generator
    unseen: Tensor = field(default_factory=lambda: torch.zeros(LAYERS, dtype=torch.float64))
    trained: Tensor = field(default_factory=lambda: torch.zeros(LAYERS, dtype=torch.float64))
    first: Tensor | None = None

    @property
    def blocks(self) -> list[nn.Module]:
        """Modules of the layers."""
        decoder: Any = self.model.get_submodule("model")
        return list(decoder.layers)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Return random problems."""
        return self.data.batch(torch.randperm(len(self.data), generator=self.generator)[:size])

    def gradients(self, batch: tuple[Tensor, Tensor]) -> list[list[Tensor]]:
        """Return the gradients of each layer's parameters."""
        layers = [list(block.parameters()) for block in self.blocks]
        return layer_gradients(layers, lambda: loss_of(self.model, *batch))


Scores = Callable[[View], Tensor]
"""A score of each layer at the current weights, [L]."""


def signal(view: View) -> Tensor:
    """Return the root mean square of each layer's mean gradient over `MEASURED` problems, which has little noise."""
    return root_mean_squares(view.gradients(view.batch(MEASURED)))


def noisy(view: View) -> Tensor:
    """Return the same of the gradient of 16 problems, as in a training step."""
    return root_mean_squares(view.gradients(view.batch(16)))


def absolute(view: View) -> Tensor:
    """Return the mean absolute gradient: the decrease of the loss by a small step in the direction of the signs."""
    layers = view.gradients(view.batch(MEASURED))
    return torch.stack([torch.cat([t.flatten() for t in layer]).abs().mean() for layer in layers])


def relative(view: View) -> Tensor:
    """Return `signal` over the root mean square of the weights: the gradient of a relative change."""
    weights = [[p.detach() for p in block.parameters()] for block in view.blocks]
    return signal(view) / root_mean_squares(weights)


def progress(view: View) -> Tensor:
    """Return the sum of gradient times AdamW's direction, from moments that do not contain this gradient.

    Parameters without moments count with the sign of the gradient, which is AdamW's first direction.
    """
    scores = []
    for block, grads in zip(view.blocks, view.gradients(view.batch(MEASURED)), strict=True):
        products = [
            (grad * _direction(view.optimizer.state.get(p, {}), grad)).sum()
            for p, grad in zip(block.parameters(), grads, strict=True)
        ]
        scores.append(torch.stack(products).sum())
    return torch.stack(scores).clamp_min(1e-12)


def update(view: View) -> Tensor:
    """Return the root mean square of AdamW's direction, which is smaller where gradients change their sign."""
    directions = [
        [
            _direction(view.optimizer.state.get(p, {}), grad)
            for p, grad in zip(block.parameters(), grads, strict=True)
        ]
        for block, grads in zip(view.blocks, view.gradients(view.batch(MEASURED)), strict=True)
    ]
    return root_mean_squares(directions)


def _direction(state: Mapping[str, Any], grad: Tensor) -> Tensor:
    """Return AdamW's direction by the moments so far; the sign of the gradient if there are none."""
    steps = int(state["step"]) if "step" in state else 0
    if not steps:
        return grad.sign()
    mean = state["exp_avg"] / (1 - 0.9**steps)
    square = state["exp_avg_sq"] / (1 - 0.999**steps)
    return cast(Tensor, mean / (square.sqrt() + 1e-8))


@torch.no_grad()
def decrease(view: View) -> Tensor:
    """Return the decrease of the loss by a step of each layer alone, in the direction of the signs, at half the rate.

    Gradients and decrease are of different problems.
    """
    half = view.optimizer.param_groups[0]["lr"] / 2
    batch = view.batch(MEASURED)
    before = loss_of(view.model, *batch)
    scores = []
    for block, grads in zip(view.blocks, view.gradients(view.batch(MEASURED)), strict=True):
        kept = [p.clone() for p in block.parameters()]
        for p, grad in zip(block.parameters(), grads, strict=True):
            p.sub_(half * grad.sign())
        scores.append(before - loss_of(view.model, *batch))
        for p, saved in zip(block.parameters(), kept, strict=True):
            p.copy_(saved)
    return torch.stack(scores).clamp_min(1e-12)


@torch.enable_grad()
def activations(view: View) -> Tensor:
    """Return the root mean square gradient of each layer's output, which costs no gradient of a weight."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if not hidden.requires_grad:
            hidden = hidden.requires_grad_()
        outputs.append(hidden)

    hooks = [block.register_forward_hook(keep) for block in view.blocks]
    loss = loss_of(view.model, *view.batch(MEASURED))
    for hook in hooks:
        hook.remove()
    return torch.stack([grad.square().mean().sqrt() for grad in torch.autograd.grad(loss, outputs)])


def hopeful(scores: Scores) -> Scores:
    """Return scores times 1 + the number of periods since a layer was trained: optimism for the unseen."""
    return lambda view: scores(view) * (1 + view.unseen)


def diminishing(scores: Scores) -> Scores:
    """Return scores over 1 + the number of periods in which a layer was trained: less is left to gain."""
    return lambda view: scores(view) / (1 + view.trained)


def once(scores: Scores) -> Scores:
    """Return scores that are measured at the beginning of training only."""

    def measured(view: View) -> Tensor:
        if view.first is None:
            view.first = scores(view)
        return view.first

    return measured


def nothing(view: View) -> Tensor:
    """Return ones."""
    return torch.ones(LAYERS)


Choice = Callable[[View, Tensor], Sequence[int]]
"""The layers to train, from a view and the scores."""


Rule = Callable[[nn.Module, grass.GrassConfig, Data], Optimizer]


def by_rule(scores: Scores, choose: Choice) -> Rule:
    """Return a method whose layers are chosen by their scores at the beginning of each period."""

    def make(model: nn.Module, config: grass.GrassConfig, train: Data) -> Optimizer:
        config = replace(config, sampler="uniform", update_interval=config.sample_interval)
        optimizer = grass.GrassAdamW(model, config=config, weight_decay=0.0)
        view = View(model, optimizer, train, torch.Generator().manual_seed(config.seed))

        def rule() -> Sequence[int]:
            chosen = choose(view, scores(view).double())
            view.unseen += 1
            view.unseen[list(chosen)] = 0
            view.trained[list(chosen)] += 1
            return chosen

        optimizer._scheduler.sampler = RuleSampler(config, [True] * LAYERS, rule)
        # In place of what was drawn at construction.
        optimizer._apply_change(optimizer._scheduler.draw_at_once())
        return optimizer

    return make


def largest(view: View, scores: Tensor) -> Sequence[int]:
    """Return the layers with the largest scores: not sampling at all."""
    return scores.topk(ACTIVE).indices.tolist()


def drawn(power: float) -> Choice:
    """Return a choice that draws layers in proportion to a power of their scores."""

    def choose(view: View, scores: Tensor) -> Sequence[int]:
        weights = scores.pow(power)
        return torch.multinomial(weights / weights.sum(), ACTIVE, generator=view.generator).tolist()

    return choose


def longest_unseen(view: View, scores: Tensor) -> Sequence[int]:
    """Return the layers that were not trained for longest; of equals, random ones."""
    noise = torch.rand(LAYERS, generator=view.generator)
    return (view.unseen + noise).topk(ACTIVE).indices.tolist()


def always(*layers: int) -> Choice:
    """Return a choice of the same layers in every period."""
    return lambda view, scores: layers


def by_position(*shares: float) -> Choice:
    """Return a choice that trains each layer in its share of the periods, whatever its gradients are.

    The shares sum to `ACTIVE`. Layers are put in a random order on a line, each as long as its share, and those at
    points 1 apart are trained, the first point at random (systematic sampling).

    Source: Madow, On the theory of systematic sampling, 1949.
    """

    def choose(view: View, scores: Tensor) -> Sequence[int]:
        order = torch.randperm(LAYERS, generator=view.generator)
        ends = torch.tensor(shares, dtype=torch.float64)[order].cumsum(0)
        points = torch.rand(1, generator=view.generator, dtype=torch.float64) + torch.arange(ACTIVE)
        return order[torch.searchsorted(ends, points, right=True).clamp_max(LAYERS - 1)].tolist()

    return choose


class PermutedSampler(ShuffledSampler):
    """The probabilities of ``remeasured`` on permuted layers: its control."""

    remeasures = True


class PermutedStaticSampler(ShuffledSampler, StaticSampler):
    """The probabilities of ``static-top`` on permuted layers: its control."""


def shuffled(method: Method, sampler: type[ShuffledSampler]) -> Method:
    """Return a method whose probabilities are those of other layers, by a sampler of this kind."""

    def make(model: nn.Module, config: grass.GrassConfig) -> Optimizer:
        optimizer = method(model, config)
        assert isinstance(optimizer, grass.GrassAdamW)
        scheduler = optimizer._scheduler
        before = scheduler.sampler  # may have drawn the first layers, by importance of ones
        scheduler.sampler = sampler(before.config, [True] * LAYERS)
        scheduler.sampler.load_state_dict(before.state_dict())
        return optimizer

    return make


METHODS: dict[str, Method] = {
    **{name: method for name, method in methods.METHODS.items() if "128" not in name and name != "galore"},
    "lora-r32": methods.low_rank(32),
    "dora-r32": methods.low_rank(32, use_dora=True),
    "galore": methods.galore(32),
    "remeasured-shuffled": shuffled(methods.remeasured, PermutedSampler),
    "static-top-shuffled": shuffled(methods.METHODS["static-top"], PermutedStaticSampler),
}
"""Methods that a user can choose, and controls; low ranks are for a width of 88."""

RULES: dict[str, Rule] = {
    "lowest": by_rule(nothing, always(*range(ACTIVE))),
    "highest": by_rule(nothing, always(*range(LAYERS - ACTIVE, LAYERS))),
    "unseen": by_rule(nothing, longest_unseen),
    "signal-top": by_rule(signal, largest),
    "noisy-top": by_rule(noisy, largest),
    "first-top": by_rule(once(signal), largest),
    "signal": by_rule(signal, drawn(1.0)),
    "signal-squared": by_rule(signal, drawn(2.0)),
    "signal-inverse": by_rule(signal, drawn(-1.0)),
    "noisy": by_rule(noisy, drawn(1.0)),
    "noisy-squared": by_rule(noisy, drawn(2.0)),
    "absolute": by_rule(absolute, drawn(1.0)),
    "relative": by_rule(relative, drawn(1.0)),
    "progress": by_rule(progress, drawn(1.0)),
    "progress-top": by_rule(progress, largest),
    "decrease": by_rule(decrease, drawn(1.0)),
    "decrease-top": by_rule(decrease, largest),
    "activations": by_rule(activations, drawn(1.0)),
    "update": by_rule(update, drawn(1.0)),
    "hopeful": by_rule(hopeful(signal), drawn(1.0)),
    "hopeful-progress": by_rule(hopeful(progress), drawn(1.0)),
    "diminishing": by_rule(diminishing(signal), drawn(1.0)),
    "positions": by_rule(nothing, by_position(0.80, 0.20, 0.20, 0.18, 0.14, 0.21, 0.15, 0.12)),
}
"""Rules of the oracle study. The shares of ``positions`` are those of ``remeasured`` in the key contrast."""
BLIND = ("lowest", "highest", "unseen", "positions")
"""Rules that look at no gradient."""

SETTINGS: dict[str, Method] = {
    "period-5": methods.sampled(sample_interval=5),
    "period-20": methods.sampled(sample_interval=20),
    "period-40": methods.sampled(sample_interval=40, update_interval=40),
    "period-25": methods.sampled(sample_interval=25, update_interval=100),
    "window-10": methods.sampled(update_interval=10),
    "window-80": methods.sampled(update_interval=80),
    "probe-0": methods.sampled(probe_steps=0),
    "probe-5": methods.sampled(probe_steps=5),
    "ema-0.1": methods.sampled(ema=0.1),
    "ema-1": methods.sampled(ema=1.0),
    "tau-0.05": methods.sampled(temperature=0.05),
    "tau-0.25": methods.sampled(temperature=0.25),
    "tau-0.5": methods.sampled(temperature=0.5),
    "tau-2": methods.sampled(temperature=2.0),
    "scale-mean": methods.sampled(importance_scale="mean"),
    "scale-zscore": methods.sampled(importance_scale="zscore"),
    "scale-none": methods.sampled(importance_scale="none"),
    "reset": methods.sampled(moments="reset"),
    "ahead-0": methods.sampled(draw_ahead=0),
    "ahead-5": methods.sampled(draw_ahead=5),
    "active-1": methods.sampled(active_layers=1),
    "active-4": methods.sampled(active_layers=4),
}
"""GRASS with one setting changed. Their learning rate is that of ``grass``."""

NAMES = (*METHODS, *RULES, *SETTINGS)


def make(name: str, model: nn.Module, train: Data, seed: int) -> Any:
    """Return the optimizer of a method, which may change the model.

    Args:
        name: name of the method.
        model: a copy of the base model.
        train: training problems, which rules look at.
        seed: seed of the method's draws.
    """
    config = replace(CONFIG, seed=seed)
    if name in RULES:
        return RULES[name](model, config, train)
    return (METHODS | SETTINGS)[name](model, config)
