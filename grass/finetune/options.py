"""FinetuneOptions: what `grass finetune` is asked to do, next to the method's own `GrassConfig`."""

from dataclasses import dataclass

from grass.errors import ConfigError

METHODS = ("grass", "full")
DTYPES = ("auto", "float32", "bfloat16")
LOSSES = ("auto", "full", "chunked")
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class FinetuneOptions:
    """Settings of a fine-tuning run. Without model and data: the built-in demo.

    Args:
        model: folder of a causal language model, or its name on the hub.
        data: JSON or JSONL file to train on: instruction/input/output/answer, chat messages or plain text.
        eval: file of held-out records, of the same formats.
        eval_fraction: without a file of held-out records, the share of the training records to hold out.
        method: "grass", or "full" for AdamW on all parameters.
        pattern: module paths of the layers, such as "model.layers.*", one for each stack; found when not given.
        template: prompt around an instruction, "alpaca" or "plain" (the instruction and a line end).
        context: longest text in tokens; longer ones are cut. Default: what the model allows, at most 1024.
        steps: optimizer steps; instead of epochs.
        epochs: passes over the data, when no steps are given.
        batch_size: texts in a forward pass.
        gradient_accumulation: forward passes in an optimizer step.
        lr: highest learning rate.
        scheduler: of the learning rate: linear, cosine, constant or constant_with_warmup.
        warmup: share of the steps in which the learning rate rises from zero, in [0, 1).
        weight_decay: of AdamW, not on biases and norms.
        max_grad_norm: length to which gradients are clipped; 0 leaves them.
        dtype: of the weights while training: auto (as stored), float32 or bfloat16.
        loss: "chunked" keeps the logits of a whole batch out of memory; "full" is the model's own; "auto" is chunked
            where the vocabulary is large and the model allows it.
        activation_checkpointing: recompute activations in the backward pass, to save memory.
        log_steps: steps between two rows of metrics.jsonl.
        save_steps: steps between two checkpoints; the newest is kept. 0 saves none but at Ctrl-C.
        eval_steps: steps between two held-out losses while training; 0 for before and after only.
        eval_batch_size: held-out texts in a forward pass.
        eval_answers: at most so many held-out records are answered by generation, for the accuracy.
        max_new_tokens: longest generated answer, in tokens.
        output: folder of the run; default: a new one under runs/.

    Raises:
        ConfigError: a value out of range, with the remedy.
    """

    model: str = ""
    data: str = ""
    eval: str = ""
    eval_fraction: float = 0.0
    method: str = "grass"
    pattern: str | tuple[str, ...] = ""
    template: str = "alpaca"
    context: int | None = None
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    gradient_accumulation: int = 1
    lr: float = 1e-5
    scheduler: str = "linear"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dtype: str = "auto"
    loss: str = "auto"
    activation_checkpointing: bool = False
    log_steps: int = 10
    save_steps: int = 500
    eval_steps: int = 0
    eval_batch_size: int = 16
    eval_answers: int = 200
    max_new_tokens: int = 128
    output: str = ""

    def __post_init__(self) -> None:
        _choice("method", self.method, METHODS)
        _choice("dtype", self.dtype, DTYPES)
        _choice("loss", self.loss, LOSSES)
        _choice("scheduler", self.scheduler, SCHEDULERS)
        for name in ("batch_size", "gradient_accumulation", "log_steps", "eval_batch_size", "max_new_tokens"):
            _at_least(name, getattr(self, name), 1)
        for name in ("save_steps", "eval_steps", "eval_answers", "weight_decay", "max_grad_norm"):
            _at_least(name, getattr(self, name), 0)
        for name in ("steps", "context"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1 if name == "steps" else 2)
        for name in ("lr", "epochs"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a positive number, not {getattr(self, name)}")
        for name in ("warmup", "eval_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if bool(self.model) != bool(self.data):
            given, missing = ("model", "data") if self.model else ("data", "model")
            raise ConfigError(
                f"--{given} needs --{missing} as well; without both, the built-in demo runs on its own model"
            )
        if self.eval and not self.data:
            raise ConfigError("--eval needs --model and --data as well")
        if self.eval and self.eval_fraction:
            raise ConfigError("--eval and --eval-fraction exclude each other: pass one of them")

    @property
    def is_demo(self) -> bool:
        """Whether the run makes its own model and data."""
        return not self.model


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def _at_least(name: str, value: float, least: int) -> None:
    if not least <= value < float("inf"):
        raise ConfigError(f"{name} must be at least {least}, not {value}")
