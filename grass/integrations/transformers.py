"""Integration with Hugging Face Trainer: a factory for the optimizer."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from grass.config import GrassConfig
from grass.layers import LayerMap, Pattern
from grass.optim.grass_adamw import GrassAdamW
from grass.optim.requires_grad import trainable_flags

Factory = Callable[[], Callable[..., GrassAdamW]]


def trainer_optimizer(
    *,
    lr: float | Tensor = 1e-3,
    config: GrassConfig | None = None,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    pattern: LayerMap | Pattern | None = None,
    args: Any = None,
    **more: Any,
) -> tuple[Factory, dict[str, Any]]:
    """Return the value of ``Trainer(optimizer_cls_and_kwargs=...)`` to train with `grass.GrassAdamW`.

    The optimizer gets the two parameter groups that Trainer makes for its own AdamW: biases and norms have no weight
    decay. Trainer constructs it after it has moved the model to the device.

    With ``GrassConfig(fused_backward=True)`` pass ``max_grad_norm=0`` to Trainer, whose default is 1. Trainer clips
    after backward, when the gradients have been freed, and would silently clip nothing.

    Args:
        lr, weight_decay, betas, eps: as in `grass.AdamW`. Trainer does not pass its ``learning_rate`` and
            ``weight_decay`` to the optimizer: pass ``lr=args.learning_rate`` and so on.
        config: configuration of the method.
        pattern: as in `grass.GrassAdamW`.
        args: the ``TrainingArguments`` of the Trainer; only used to warn if they ask for clipping that cannot work.
        more: further keyword arguments of `grass.GrassAdamW`, such as ``master_weights``.

    Example:
        >>> Trainer(model, args, optimizer_cls_and_kwargs=trainer_optimizer(lr=1e-5, config=GrassConfig()), ...)
    """
    if config is not None and config.fused_backward and args is not None and args.max_grad_norm:
        warnings.warn(
            f"TrainingArguments(max_grad_norm={args.max_grad_norm}) clips nothing: with fused_backward gradients are "
            "freed inside backward, before Trainer clips them; pass max_grad_norm=0, or leave fused_backward out",
            stacklevel=2,
        )
    options = {
        "lr": lr,
        "config": config,
        "weight_decay": weight_decay,
        "betas": betas,
        "eps": eps,
        "pattern": pattern,
        **more,
    }
    return _make_factory, options


def _make_factory() -> Callable[..., GrassAdamW]:
    return _build_optimizer


def _build_optimizer(model: nn.Module, *, weight_decay: float, **options: Any) -> GrassAdamW:
    return GrassAdamW(_decay_groups(model, weight_decay), model=model, **options)


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameter groups of Trainer, with and without weight decay, of parameters that require grad."""
    from transformers import Trainer

    # An instance method that does not use the instance.
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    named = list(model.named_parameters())
    flags = trainable_flags(
        [p for _, p in named]
    )  # True also for parameters that an earlier GrassAdamW froze
    trainable = [(name, p) for (name, p), flag in zip(named, flags, strict=True) if flag]
    return [
        {"params": [p for name, p in trainable if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0},
    ]
