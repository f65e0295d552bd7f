"""Methods that are compared: each makes an optimizer for a model.

All layer methods train about the same share of parameters: `GrassConfig.active_layers` of the layers, and what is
outside of them unless a method says otherwise.

====================  =====================================================================================
name                  method
====================  =====================================================================================
``full``              AdamW on all parameters
``lora-r8``           LoRA of rank 8 on all linear layers, by peft
``lora-r128``         the same of rank 128
``dora-r128``         DoRA of rank 128, by peft
``galore``            GaLore of rank 128, by galore-torch, with a scale of 1
``lisa``              layers drawn uniformly; moments of a layer restart, as in LISA's experiments
``uniform``           the same, but moments are kept
``weight-norm``       layers drawn by the norms of their weights, in the manner of OWS
``cyclic``            layers in order, as in LIFT
``badam``             the same, but moments restart, as in BAdam
``static``            static GRASS: layers drawn by the norms of the probe
``static-top``        the same at a temperature near 0: always the layers with the largest norms
``grass``             GRASS
``remeasured``        the same by the squares of norms that the last step of each period measures, of all layers
``shuffled``          the probabilities of GRASS, on permuted layers
``grass-floor``       GRASS, each layer with at least half of its uniform probability
``modules-uniform``   attention and MLP drawn uniformly, as many as fit the parameters of the active layers
``modules-grass``     the same drawn by their gradient norms, in the manner of MISA
``uniform-inside``    ``uniform``, nothing outside of the layers
``grass-inside``      ``grass``, nothing outside of the layers
====================  =====================================================================================
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from grass.choices import SamplerName
from grass.config import GrassConfig
from grass.errors import ConfigError
from grass.layers import LayerMap
from grass.optim import AdamW, GrassAdamW
from grass.sampling import Sampler, UniformSampler

Method = Callable[[nn.Module, GrassConfig], Optimizer]
"""From a model, which it may change, and the configuration of sampling (of which other methods use the seed only), to
the optimizer. The learning rate is set from outside, in all groups."""


def full(model: nn.Module, config: GrassConfig) -> Optimizer:
    """Return AdamW on all parameters."""
    return AdamW(model.parameters(), weight_decay=0.0, master_weights=_is_low_precision(model))


def sampled(**changes: Any) -> Method:
    """Return a method that samples layers, with changes of the configuration."""

    def make(model: nn.Module, config: GrassConfig) -> Optimizer:
        return _grass(model, replace(config, **changes), None)

    return make


class ModuleSampler(Sampler):
    """Draw modules by their importance as long as they fit a budget of parameters.

    Args:
        config, eligible: as for `Sampler`.
        sizes: number of parameters of each module.
        budget: largest number of parameters of the modules that train at a time.
    """

    def __init__(self, config: GrassConfig, eligible: list[bool], sizes: Sequence[int], budget: int) -> None:
        super().__init__(config, eligible)
        self.sizes, self.budget = sizes, budget

    def draw(self) -> tuple[int, ...]:
        """Draw modules; one that does not fit what is left of the budget is passed over."""
        self.num_draws += 1
        chosen, left = list[int](), self.budget
        for module in self.ranking():
            if self.sizes[module] <= left:
                chosen.append(module)
                left -= self.sizes[module]
        return tuple(sorted(chosen))


class UniformModuleSampler(ModuleSampler, UniformSampler):
    """Draw modules with the same probability."""


def modules(kind: type[ModuleSampler]) -> Method:
    """Return a method that samples the large modules of layers, such as attention and MLP.

    As many train at a time as fit the parameters of `GrassConfig.active_layers` layers.
    """

    def make(model: nn.Module, config: GrassConfig) -> Optimizer:
        layers = LayerMap.from_model(model)
        blocks = [_size(block) for block in layers.modules(model)]
        names = [
            name
            for name, child in layers.modules(model)[0].named_children()
            if _size(child) > max(blocks) / 20
        ]
        stacks = dict.fromkeys(path.rpartition(".")[0] for path in layers.names)
        patterns = [f"{stack}.*.{name}" for stack in stacks for name in names]
        sizes = [_size(module) for module in LayerMap.from_model(model, patterns).modules(model)]
        budget = config.active_layers * max(blocks)
        most = sum(total <= budget for total in accumulate(sorted(sizes)))
        name: SamplerName = "uniform" if issubclass(kind, UniformSampler) else "adaptive"
        config = replace(config, active_layers=most, sampler=name)
        optimizer = _grass(model, config, patterns)
        scheduler = optimizer._scheduler
        scheduler.sampler = kind(config, [True] * len(sizes), sizes, budget)
        if scheduler.active:  # in place of what was drawn at construction
            scheduler.draw_counts = [0] * len(sizes)
            optimizer._apply_change(scheduler.draw_at_once())
        return optimizer

    return make


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def floored(model: nn.Module, config: GrassConfig) -> Optimizer:
    """Return GRASS with at least half of the uniform probability for each layer."""
    least = 0.5 / len(LayerMap.from_model(model))
    return sampled(min_probability=least)(model, config)


def remeasured(model: nn.Module, config: GrassConfig) -> Optimizer:
    """Return GRASS without a probe, by the squares of norms that the last step of each period measures."""
    changes = {"probe_steps": 0, "update_interval": config.sample_interval, "ema": 1.0, "temperature": 0.5}
    return sampled(sampler="remeasured", **changes)(model, config)


def low_rank(rank: int, **options: Any) -> Method:
    """Return LoRA, or a variant of it that peft's configuration names, with alpha twice the rank."""

    def make(model: nn.Module, config: GrassConfig) -> Optimizer:
        peft = _package("peft", "peft")
        torch.manual_seed(config.seed)
        settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", **options)
        peft.inject_adapter_in_model(settings, model)
        adapters = [p for p in model.parameters() if p.requires_grad]
        return AdamW(adapters, weight_decay=0.0, master_weights=_is_low_precision(model))

    return make


def galore(rank: int) -> Method:
    """Return GaLore on the matrices of the layers, projected anew every 200 steps as by default.

    With a scale of 1 all parameters have the same learning rate.
    """

    def make(model: nn.Module, config: GrassConfig) -> Optimizer:
        if _is_low_precision(model):
            raise ConfigError(
                "galore keeps no float32 copy of bfloat16 weights: pass --dtype float32, or leave it out"
            )
        package = _package("galore_torch", "galore-torch bitsandbytes")
        blocks = LayerMap.from_model(model).modules(model)
        matrices = [p for block in blocks for p in block.parameters() if p.ndim == 2]
        inside = set(map(id, matrices))
        groups = [
            {"params": [p for p in model.parameters() if id(p) not in inside]},
            {"params": matrices, "rank": rank, "update_proj_gap": 200, "scale": 1.0, "proj_type": "std"},
        ]
        optimizer: Optimizer = package.GaLoreAdamW(groups, eps=1e-8, no_deprecation_warning=True)
        return optimizer

    return make


METHODS: dict[str, Method] = {
    "full": full,
    "lora-r8": low_rank(8),
    "lora-r128": low_rank(128),
    "dora-r128": low_rank(128, use_dora=True),
    "galore": galore(128),
    "lisa": sampled(sampler="uniform", moments="reset"),
    "uniform": sampled(sampler="uniform"),
    "weight-norm": sampled(sampler="weight_norm"),
    "cyclic": sampled(sampler="cyclic"),
    "badam": sampled(sampler="cyclic", moments="reset"),
    "static": sampled(sampler="static"),
    "static-top": sampled(sampler="static", temperature=0.01),
    "grass": sampled(),
    "remeasured": remeasured,
    "shuffled": sampled(sampler="shuffled"),
    "grass-floor": floored,
    "modules-uniform": modules(UniformModuleSampler),
    "modules-grass": modules(ModuleSampler),
    "uniform-inside": sampled(sampler="uniform", always_active="none"),
    "grass-inside": sampled(always_active="none"),
}


def _grass(model: nn.Module, config: GrassConfig, pattern: list[str] | None) -> GrassAdamW:
    return GrassAdamW(
        model, config=config, pattern=pattern, weight_decay=0.0, master_weights=_is_low_precision(model)
    )


def _is_low_precision(model: nn.Module) -> bool:
    return any(p.dtype == torch.bfloat16 for p in model.parameters())


def _package(name: str, requirement: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(f"{error}; install with: pip install {requirement}") from error
