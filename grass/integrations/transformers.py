"""Hugging Face Trainer: an optimizer factory, nothing else."""

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
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes to train by GRASS.

    The optimizer gets the two groups Trainer makes for its own AdamW: biases and norms are not decayed.
    Trainer asks for it once the model stands where it will be trained.

    Args:
        lr, weight_decay, betas, eps: as for `grass.AdamW`; Trainer does not pass its own
            ``learning_rate`` and ``weight_decay`` on, so give ``lr=args.learning_rate`` and so on.
        config: settings of the method.
        pattern: as for `grass.GrassAdamW`.
        args: Trainer's own, a ``TrainingArguments``, which it does not show to optimizers: to be told if they ask for
            clipping that cannot be; nothing else of them is used.
        more: its other keywords, such as ``master_weights``.

    With ``GrassConfig(fused_backward=True)`` give Trainer ``max_grad_norm=0``, for its default is 1: it clips after
    backward, when gradients are gone, and would clip nothing without a word. With ``args`` there is a warning.

    Example:
        >>> Trainer(model, args, optimizer_cls_and_kwargs=trainer_optimizer(lr=1e-5, config=GrassConfig()), ...)
    """
    if config is not None and config.fused_backward and args is not None and args.max_grad_norm:
        warnings.warn(
            f"TrainingArguments(max_grad_norm={args.max_grad_norm}) clips nothing: with fused_backward gradients are "
            "freed inside backward, before Trainer would clip them; pass max_grad_norm=0, or leave fused_backward out",
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
    """Trainer's groups: decayed and not decayed, without what does not require grad."""
    from transformers import Trainer

    # An instance method that reads nothing of the instance.
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    named = list(model.named_parameters())
    flags = trainable_flags([p for _, p in named])  # also what an older optimizer has frozen
    trainable = [(name, p) for (name, p), flag in zip(named, flags, strict=True) if flag]
    return [
        {"params": [p for name, p in trainable if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0},
    ]
