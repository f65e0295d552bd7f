"""Methods of the study. Each makes an optimizer for a base model; layer methods train a quarter of the layers."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import grass
from bench.quality.tasks import Data
from bench.quality.training import LAYERS, loss_of
from grass.sampling import Sampler

ACTIVE = LAYERS // 4
PERIOD, WINDOW, PROBE = 10, 20, 20  # T_s, T_u, T_p for runs of 400 to 800 steps
MEASURED = 64  # problems of an oracle's measurement


@dataclass
class Made:
    """A model with the optimizer that trains it.

    Attributes:
        model: the base model, possibly wrapped.
        optimizer: its optimizer; learning rates are set from outside.
    """

    model: nn.Module
    optimizer: Optimizer


Method = Callable[[nn.Module, Data, int], Made]
"""From a base model, the training problems and a seed to what is trained."""


def _grass(**settings: Any) -> Method:
    values = {
        "active_layers": ACTIVE,
        "probe_steps": PROBE,
        "sample_interval": PERIOD,
        "update_interval": WINDOW,
    }

    def make(model: nn.Module, train: Data, seed: int) -> Made:
        pattern = settings.get("pattern")
        config = grass.GrassConfig(
            **{**values, "seed": seed, **{k: v for k, v in settings.items() if k != "pattern"}}
        )
        return Made(model, grass.GrassAdamW(model, config=config, pattern=pattern, weight_decay=0.0))

    return make


def _full(model: nn.Module, train: Data, seed: int) -> Made:
    return Made(model, torch.optim.AdamW(model.parameters(), weight_decay=0.0))


def _lora(rank: int, **options: Any) -> Method:
    def make(model: nn.Module, train: Data, seed: int) -> Made:
        import peft

        torch.manual_seed(seed)
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", **options)
        wrapped = peft.get_peft_model(model, config)
        params = [p for p in wrapped.parameters() if p.requires_grad]
        return Made(wrapped, torch.optim.AdamW(params, weight_decay=0.0))

    return make


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


Scores = Callable[[nn.Module, Data, torch.Generator], Tensor]
"""A score of each layer at the current weights, [L]."""


def _blocks(model: nn.Module) -> list[nn.Module]:
    decoder: Any = model.get_submodule("model")
    return list(decoder.layers)


@torch.enable_grad()
def mean_gradient_norms(model: nn.Module, data: Data, generator: torch.Generator) -> Tensor:
    """Return the root mean square of each layer's gradient, of the mean over `MEASURED` problems: the signal itself."""
    chosen = torch.randperm(len(data), generator=generator)[:MEASURED]
    blocks = _blocks(model)
    params = [p for block in blocks for p in block.parameters()]
    flags = [p.requires_grad for p in params]
    for p in params:
        p.requires_grad_(True)
    loss = loss_of(model, *data.batch(chosen))
    grads = iter(torch.autograd.grad(loss, params))
    for p, flag in zip(params, flags, strict=True):
        p.requires_grad_(flag)
    layers = [torch.cat([next(grads).flatten() for _ in block.parameters()]) for block in blocks]
    return torch.stack([grad.square().mean().sqrt() for grad in layers])


def by_rule(scores: Scores | None, choose: Callable[[Tensor, torch.Generator], Sequence[int]]) -> Method:
    """Return a method whose layers are chosen by their scores at the beginning of each period.

    Args:
        scores: measures the layers with gradients of problems that are not part of the step; None for no scores.
        choose: the layers to train, from their scores.
    """

    def make(model: nn.Module, train: Data, seed: int) -> Made:
        generator = torch.Generator().manual_seed(seed)
        config = grass.GrassConfig(
            active_layers=ACTIVE, sample_interval=PERIOD, update_interval=PERIOD, sampler="uniform", seed=seed
        )

        def rule() -> Sequence[int]:
            measured = torch.ones(LAYERS) if scores is None else scores(model, train, generator)
            return choose(measured, generator)

        optimizer = grass.GrassAdamW(model, config=config, weight_decay=0.0)
        optimizer._scheduler.sampler = RuleSampler(config, [True] * LAYERS, rule)
        optimizer._apply_change(
            optimizer._scheduler.draw_at_once()
        )  # in place of what was drawn at construction
        return Made(model, optimizer)

    return make


def largest(scores: Tensor, generator: torch.Generator) -> Sequence[int]:
    """Return the layers with the largest scores: not sampling at all."""
    return scores.topk(ACTIVE).indices.tolist()


def drawn(power: float) -> Callable[[Tensor, torch.Generator], Sequence[int]]:
    """Return a choice that draws layers in proportion to a power of their scores."""

    def choose(scores: Tensor, generator: torch.Generator) -> Sequence[int]:
        weights = scores.double().pow(power)
        return torch.multinomial(weights / weights.sum(), ACTIVE, generator=generator).tolist()

    return choose


def lowest(scores: Tensor, generator: torch.Generator) -> Sequence[int]:
    """Return the layers nearest to the input."""
    return range(ACTIVE)


UNITS = ["model.layers.*.self_attn", "model.layers.*.mlp"]

METHODS: dict[str, Method] = {
    "full": _full,
    "lora-r8": _lora(8),
    "lora-r32": _lora(32),
    "dora-r32": _lora(32, use_dora=True),
    "uniform-reset": _grass(sampler="uniform", moments="reset"),
    "uniform": _grass(sampler="uniform"),
    "weight-norm": _grass(sampler="weight_norm"),
    "cyclic": _grass(sampler="cyclic"),
    "cyclic-reset": _grass(sampler="cyclic", moments="reset"),
    "static": _grass(sampler="static"),
    "grass": _grass(),
    "shuffled": _grass(sampler="shuffled"),
    "grass-floor": _grass(min_probability=0.5 / LAYERS),
    "modules-uniform": _grass(pattern=UNITS, active_layers=2 * ACTIVE, sampler="uniform"),
    "modules-grass": _grass(pattern=UNITS, active_layers=2 * ACTIVE),
    "uniform-inside": _grass(sampler="uniform", always_active="none"),
    "grass-inside": _grass(always_active="none"),
    "top": by_rule(mean_gradient_norms, largest),
    "oracle": by_rule(mean_gradient_norms, drawn(1.0)),
    "oracle-2": by_rule(mean_gradient_norms, drawn(2.0)),
    "oracle-inverse": by_rule(mean_gradient_norms, drawn(-1.0)),
    "lowest": by_rule(None, lowest),
}


def make(name: str, model: nn.Module, train: Data, seed: int) -> Made:
    """Return a copy of a base model with the optimizer of a method."""
    return METHODS[name](copy.deepcopy(model), train, seed)
