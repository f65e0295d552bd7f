"""Integration with the trainers of transformers and TRL: the optimizer with their arguments, and a callback."""

import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from grass.config import GrassConfig
from grass.layers import LayerMap, Pattern
from grass.optim.grass_adamw import GrassAdamW
from grass.optim.requires_grad import trainable_flags

if TYPE_CHECKING:
    from grass.integrations.trainer_callback import GrassCallback

__all__ = ["GrassCallback", "decay_groups", "make_optimizer", "trainer_optimizer"]

Factory = Callable[[], Callable[..., GrassAdamW]]

_DEFAULTS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}
# Optimizers whose trainer was known, and has been checked, when they were constructed.
_CHECKED: "weakref.WeakSet[GrassAdamW]" = weakref.WeakSet()


def __getattr__(name: str) -> Any:
    """Return `GrassCallback`, whose base class needs transformers; this module is imported without it."""
    if name == "GrassCallback":
        from grass.integrations.trainer_callback import GrassCallback

        return GrassCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def trainer_optimizer(
    *,
    args: Any = None,
    lr: float | Tensor | None = None,
    config: GrassConfig | None = None,
    weight_decay: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    pattern: LayerMap | Pattern | None = None,
    **more: Any,
) -> tuple[Factory, dict[str, Any]]:
    """Return the value of ``Trainer(optimizer_cls_and_kwargs=...)`` to train with `grass.GrassAdamW`.

    Trainer constructs the optimizer at the start of training, by `make_optimizer`, after it has moved the model to the
    device. A trainer that has no such argument (`Seq2SeqTrainer`, `DPOTrainer`, `GRPOTrainer`) takes
    ``optimizers=(make_optimizer(model, args=args), None)``.

    Trainer advances the learning-rate schedule in every step, also in the ``probe_steps`` first ones, which update no
    parameter: a warm-up no longer than the probe has no effect.

    Args:
        args: the ``TrainingArguments`` of the trainer. ``learning_rate``, ``weight_decay``, ``adam_beta1``,
            ``adam_beta2`` and ``adam_epsilon`` are read when the optimizer is constructed, so that those of a
            hyperparameter search are used.
        lr, weight_decay, betas, eps: as in `grass.AdamW`; they take precedence over ``args``. Without either: 1e-3,
            0, (0.9, 0.999), 1e-8.
        config: configuration of the method.
        pattern: as in `grass.GrassAdamW`.
        more: further keyword arguments of `grass.GrassAdamW`, such as ``master_weights``.

    With ``GrassConfig(fused_backward=True)`` set ``max_grad_norm=0`` in ``args``, whose default is 1. Trainer clips
    after backward, when the gradients have been freed, and would clip nothing; that is a warning.

    Example:
        >>> Trainer(model, args, optimizer_cls_and_kwargs=trainer_optimizer(args=args, config=GrassConfig()), ...)
    """
    _warn_of_clipping(config, args, stacklevel=3)
    options = {
        "args": args,
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
    return _construct


def make_optimizer(
    model: nn.Module,
    *,
    args: Any = None,
    lr: float | Tensor | None = None,
    config: GrassConfig | None = None,
    weight_decay: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    pattern: LayerMap | Pattern | None = None,
    **more: Any,
) -> GrassAdamW:
    """Return a `grass.GrassAdamW` for ``optimizers=(optimizer, None)``, which every trainer accepts.

    With ``args`` the model is first moved to the trainer's device, as the trainer would do later.

    Args:
        model: the model that is given to the trainer.
        args, lr, config, weight_decay, betas, eps, pattern, more: as in `trainer_optimizer`; ``args`` are read now.

    Example:
        >>> optimizer = make_optimizer(model, args=args, config=GrassConfig())
        >>> trainer = DPOTrainer(model, args=args, optimizers=(optimizer, None), ...)
    """
    _warn_of_clipping(config, args, stacklevel=3)
    if args is not None:
        _place(model, args)
    return _construct(
        model,
        args=args,
        lr=lr,
        config=config,
        weight_decay=weight_decay,
        betas=betas,
        eps=eps,
        pattern=pattern,
        **more,
    )


def _construct(
    model: nn.Module, *, args: Any, config: GrassConfig | None, pattern: Any, **options: Any
) -> GrassAdamW:
    """Return the optimizer with explicit settings, those of ``args``, or defaults, in this order."""
    settings = dict(_DEFAULTS)
    if args is not None:
        settings = {
            "lr": args.learning_rate,
            "weight_decay": args.weight_decay,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
        }
    settings.update({name: value for name, value in options.items() if value is not None})
    groups = decay_groups(model, settings.pop("weight_decay"))
    optimizer = GrassAdamW(groups, model=model, config=config, pattern=pattern, **settings)
    if args is not None:
        _CHECKED.add(optimizer)
    return optimizer


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the two parameter groups that Trainer makes for its own AdamW: biases and norms have no weight decay.

    Contains the parameters that require grad, or did before an earlier `grass.GrassAdamW` froze them.

    Args:
        model: the model.
        weight_decay: weight decay of the other parameters.

    Example:
        >>> optimizer = grass.GrassAdamW(decay_groups(model, 0.01), model=model, lr=1e-5)
    """
    from transformers import Trainer

    # An instance method that does not use the instance.
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    named = list(model.named_parameters())
    flags = trainable_flags([p for _, p in named])
    trainable = [(name, p) for (name, p), flag in zip(named, flags, strict=True) if flag]
    return [
        {"params": [p for name, p in trainable if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0},
    ]


def _place(model: nn.Module, args: Any) -> None:
    """Move a model to the device of ``args`` where a trainer would: if all of it is on the CPU."""
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    if on_cpu and args.device.type != "cpu" and args.place_model_on_device is not False:
        model.to(args.device)


def warn_of_clipping(optimizer: GrassAdamW, args: Any) -> None:
    """Warn once for an optimizer if ``args`` ask for clipping that cannot work."""
    if optimizer not in _CHECKED:
        _CHECKED.add(optimizer)
        _warn_of_clipping(optimizer.config, args, stacklevel=4)


def _warn_of_clipping(config: GrassConfig | None, args: Any, stacklevel: int) -> None:
    if config is not None and config.fused_backward and args is not None and args.max_grad_norm:
        warnings.warn(
            f"TrainingArguments(max_grad_norm={args.max_grad_norm}) clips nothing: with fused_backward gradients are "
            "freed inside backward, before Trainer clips them; pass max_grad_norm=0, or leave fused_backward out",
            stacklevel=stacklevel,
        )
