"""Options of a fine-tuning run, in addition to `grass.GrassConfig`."""

from dataclasses import dataclass
from typing import Any, Literal

from grass.config import check_choices
from grass.errors import ConfigError

Method = Literal["grass", "full"]
Template = Literal["auto", "chat", "alpaca", "plain"]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup"]
Dtype = Literal["auto", "float32", "bfloat16"]
Rounding = Literal["master", "stochastic", "nearest"]
Loss = Literal["auto", "full", "chunked"]


@dataclass(frozen=True)
class FinetuneOptions:
    """Options of a fine-tuning run. Without `model` and `data` the built-in demo runs.

    Args:
        model: folder of a causal language model, or its name on the hub.
        revision: branch, tag or commit of a model on the hub.
        trust_remote_code: run code that comes with the model, from its folder or the hub.
        data: files to train on (JSON, JSONL, CSV, TSV or parquet, possibly with .gz), a folder, or a data set of the
            hub, as name:configuration:split; chats, instructions, questions and answers, or plain text.
        eval: the same for held-out records.
        columns: names of columns to be read under another name, such as "instruction=query,output=solution".
        eval_fraction: fraction of the training records to hold out, if there are no held-out records.
        eval_limit: maximum number of held-out records, chosen at random; by default all are used.
        max_skipped: largest fraction of the training records that may be skipped because they cannot be used.
        method: "grass", or "full" for AdamW on all parameters.
        pattern: module paths of the layers, such as "model.layers.*", one for each stack; found automatically by
            default.
        template: how conversations are written: "chat" for the model's own template, "alpaca", "plain" (the task and a
            newline), or "auto" for the model's own if it has one, else alpaca.
        context: maximum length in tokens of a text that is learnt, or of which the held-out loss is computed. Longer
            conversations are truncated, longer plain texts divided. Default: the limit of the model, at most 1024.
        packing: join short texts to rows of up to `context` tokens, each of which sees only itself; batch_size then
            counts rows.
        steps: number of optimizer steps; replaces epochs.
        epochs: number of passes over the data, if steps is not given.
        batch_size: number of texts in a forward pass.
        gradient_accumulation: number of forward passes in an optimizer step.
        lr: maximum learning rate.
        scheduler: learning-rate schedule: linear, cosine, constant or constant_with_warmup.
        warmup: fraction of the steps in which the learning rate rises from zero, in [0, 1).
        weight_decay: weight decay of AdamW; not applied to biases and norms.
        max_grad_norm: maximum gradient norm; 0 disables clipping.
        dtype: dtype of the weights during training: auto (as saved), float32 or bfloat16.
        rounding: how updates of bfloat16 weights are stored: "master" keeps 16 more bits of each weight with the
            optimizer states, so that updates are those of float32; "stochastic" rounds without bias; "nearest" loses
            updates of less than half a unit in the last place, which is most of them at usual learning rates.
        loss: "full" is the loss of the model; "chunked" never materializes the logits of a whole batch; "auto" uses
            chunked if the vocabulary is large and the model allows it.
        activation_checkpointing: recompute activations in the backward pass to save memory.
        log_steps: number of steps between two rows of metrics.jsonl.
        save_steps: number of steps between two checkpoints. 0 saves on Ctrl-C only.
        save_total_limit: number of checkpoints to keep, the newest ones; with more than 1 they stay after training.
        load_best: keep the weights of the checkpoint with the lowest held-out loss, rather than those of the last step;
            the loss is measured at every checkpoint.
        report_to: loggers of transformers that get all metrics, such as "tensorboard", "wandb" or "trackio".
        eval_steps: number of steps between two held-out losses during training; 0 evaluates before and after only.
        eval_batch_size: number of held-out texts in a forward pass.
        eval_answers: maximum number of held-out records that are answered by generation, for the accuracy.
        max_new_tokens: maximum length of a generated answer, in tokens.
        output: folder of the run; a new one in runs/ by default.

    Raises:
        ConfigError: a value is out of range, or values exclude each other.
    """

    model: str = ""
    revision: str = ""
    trust_remote_code: bool = False
    data: str | tuple[str, ...] = ""
    eval: str | tuple[str, ...] = ""
    columns: str | tuple[str, ...] = ""
    eval_fraction: float = 0.0
    eval_limit: int | None = None
    max_skipped: float = 0.01
    method: Method = "grass"
    pattern: str | tuple[str, ...] = ""
    template: Template = "auto"
    context: int | None = None
    packing: bool = False
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    gradient_accumulation: int = 1
    lr: float = 1e-5
    scheduler: Scheduler = "linear"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dtype: Dtype = "auto"
    rounding: Rounding = "master"
    loss: Loss = "auto"
    activation_checkpointing: bool = False
    log_steps: int = 10
    save_steps: int = 500
    save_total_limit: int = 1
    load_best: bool = False
    report_to: str | tuple[str, ...] = ""
    eval_steps: int = 0
    eval_batch_size: int = 16
    eval_answers: int = 200
    max_new_tokens: int = 128
    output: str = ""

    def __post_init__(self) -> None:
        check_choices(self)
        positive = ("batch_size", "gradient_accumulation", "log_steps", "eval_batch_size", "max_new_tokens")
        for name in (*positive, "save_total_limit"):
            at_least(name, getattr(self, name), 1)
        for name in ("save_steps", "eval_steps", "eval_answers", "weight_decay", "max_grad_norm"):
            at_least(name, getattr(self, name), 0)
        for name, least in (("steps", 1), ("context", 2), ("eval_limit", 1)):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), least)
        for name in ("lr", "epochs"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a positive number, not {getattr(self, name)}")
        for name in ("warmup", "eval_fraction", "max_skipped"):
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
        self.renamed_columns()
        if self.eval_limit is not None and not (self.eval or self.eval_fraction or self.is_demo):
            raise ConfigError("--eval-limit needs held-out records: pass --eval or --eval-fraction")
        if self.load_best:
            if not (self.eval or self.eval_fraction or self.is_demo):
                raise ConfigError("--load-best needs held-out records: pass --eval or --eval-fraction")
            if not self.save_steps or self.eval_steps not in (0, self.save_steps):
                raise ConfigError(
                    "--load-best compares checkpoints, at each of which the held-out loss is measured: leave out "
                    "--eval-steps, and pass --save-steps of at least 1"
                )

    def renamed_columns(self) -> dict[str, str]:
        """Return the new name of each column in `columns`.

        Raises:
            ConfigError: an entry is not of the form new=old, or a name occurs twice.
        """
        names: dict[str, str] = {}
        for entry in as_tuple(self.columns):
            new, sign, old = entry.partition("=")
            if not (new and sign and old) or new == old or old in names or new in names.values():
                raise ConfigError(f"columns must be entries new=old with different names, not {entry!r}")
            names[old] = new
        return names

    def optimizer_options(self) -> dict[str, Any]:
        """Return `rounding` as keyword arguments of the optimizers."""
        return {
            "master_weights": self.rounding == "master",
            "stochastic_rounding": self.rounding == "stochastic",
        }

    @property
    def steps_between_evaluations(self) -> int:
        """Number of steps between two held-out losses during training; 0 for none."""
        return self.save_steps if self.load_best else self.eval_steps

    @property
    def is_demo(self) -> bool:
        """True if the run generates its own model and data."""
        return not self.model


def as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the texts of an option that takes one or several."""
    return (value,) if isinstance(value, str) and value else tuple(value)


def at_least(name: str, value: float, least: int) -> None:
    """Raise a `ConfigError` if a number is not finite or below the least."""
    if not least <= value < float("inf"):
        raise ConfigError(f"{name} must be at least {least}, not {value}")
