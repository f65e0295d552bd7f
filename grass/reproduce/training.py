"""Training and evaluation of one run: the same loop for every method."""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import grass
from grass.activation_checkpointing import checkpoint_activations
from grass.config import GrassConfig
from grass.errors import ConfigError
from grass.finetune.encoding import Encoder, Example
from grass.finetune.evaluation import answer_questions, heldout_loss, make_questions
from grass.finetune.loss import IGNORED, chunked_loss, use_chunked_loss
from grass.finetune.model import context_of, load_model, pad_token_id, positions_of
from grass.finetune.options import as_tuple
from grass.finetune.preparation import to_device
from grass.finetune.records import Conversation
from grass.finetune.scoring import rules_for
from grass.finetune.screen import quiet_libraries
from grass.optim import GrassAdamW
from grass.reproduce.methods import METHODS
from grass.reproduce.options import ReproduceOptions
from grass.reproduce.study import Job, Row
from grass.reproduce.tables import read_table


def schedule(step: int, steps: int, warmup: float = 0.05) -> float:
    """Return the factor of the learning rate: a linear rise over a share of the steps, and a linear fall to zero."""
    rise = max(1, round(warmup * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def curve_of(losses: Sequence[float], points: int = 10) -> list[float]:
    """Return the mean loss of each tenth of a run."""
    size = max(1, len(losses) // points)
    return [round(mean(losses[i : i + size]), 5) for i in range(0, len(losses), size)]


def run_job(options: ReproduceOptions, config: GrassConfig, job: Job) -> Row:
    """Train and evaluate: a run of the search on validation records, others on the table's test records.

    Args:
        options: what is reproduced.
        config: configuration of sampling; its seed is replaced by that of the order.
        job: the run.
    """
    with quiet_libraries():
        return _run_job(options, config, job)


def _run_job(options: ReproduceOptions, config: GrassConfig, job: Job) -> Row:
    start = time.monotonic()
    if options.threads:
        torch.set_num_threads(options.threads)
    is_search = job.order in options.search.orders
    steps = (options.search_steps if is_search else None) or options.steps
    data = read_table(Path(options.data_dir), options.table, as_tuple(options.tasks), options.validation)
    model, tokenizer = load_model(options.model, options.dtype)
    to_device(model)
    encoder = Encoder(tokenizer, options.template, context_of(model, options.context))
    examples = [
        example for example in encode(encoder, data.train) if len(example.input_ids) <= encoder.context
    ]
    if not examples:
        raise ConfigError(
            f"all {len(data.train):,} training records are longer than {options.context} tokens: pass --context"
        )
    if options.activation_checkpointing:
        checkpoint_activations(model)
    chunked = use_chunked_loss(model, "auto", lambda line: None)
    optimizer = METHODS[job.method](model, replace(config.for_run(steps), seed=job.order))
    losses, probed = [], 0
    for step, batch in enumerate(batches(examples, options.batch_size, steps, job.order)):
        probed += getattr(optimizer, "phase", "adapt") == "probe"  # the rate rises from zero after the probe
        set_lr(optimizer, job.lr * schedule(step - probed, steps - probed))
        losses.append(train_step(model, optimizer, batch, options, pad_token_id(tokenizer), chunked=chunked))
    row: Row = {
        "table": options.table,
        "steps": steps,
        "batch_size": options.batch_size,
        "num_examples": len(examples),
        "curve": curve_of(losses),
        "training_seconds": round(time.monotonic() - start, 1),
    }
    if isinstance(optimizer, GrassAdamW):
        row |= {
            "draw_counts": optimizer.draw_counts,
            "importance": [float(f"{m:.4g}") for m in optimizer.importance.tolist()],
        }
        optimizer.release()
    if is_search:
        row |= {"log_loss": log_loss(model, encoder, data.validation, options, chunked=chunked)}
    else:
        row |= evaluate(model, encoder, data.tests, options, chunked=chunked)
    return row | {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "grass": grass.__version__,
        "seconds": round(time.monotonic() - start, 1),
    }


def encode(encoder: Encoder, records: Sequence[Conversation]) -> list[Example]:
    """Return examples, which are not truncated."""
    return [Example(*pair) for record in records for pair in encoder.encode_one(record)]


def batches(examples: Sequence[Example], size: int, steps: int, seed: int) -> Iterator[list[Example]]:
    """Yield batches of shuffled examples, epoch after epoch."""
    rng, order = random.Random(seed), list[int]()
    for _ in range(steps):
        while len(order) < size:
            order += rng.sample(range(len(examples)), len(examples))
        yield [examples[i] for i in order[:size]]
        order = order[size:]


def train_step(
    model: PreTrainedModel,
    optimizer: Optimizer,
    batch: Sequence[Example],
    options: ReproduceOptions,
    pad_token_id: int,
    *,
    chunked: bool,
) -> float:
    """Take a step, without clipping of gradients; return the mean loss of the targets of the batch."""
    collate = DataCollatorForLanguageModeling(pad_token_id)
    num_targets = sum(label != IGNORED for example in batch for label in example.labels[1:])
    size = options.micro_batch_size or options.batch_size
    total = torch.zeros((), device=model.device)
    for i in range(0, len(batch), size):
        rows = collate([example._asdict() for example in batch[i : i + size]])
        inputs: dict[str, Tensor] = {name: value.to(model.device) for name, value in rows.items()}
        if chunked:
            loss = chunked_loss(model, inputs, num_targets)
        else:
            loss = model(**inputs, use_cache=False, num_items_in_batch=num_targets).loss
        loss.backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    return float(total)


def log_loss(
    model: PreTrainedModel,
    encoder: Encoder,
    records: Sequence[Conversation],
    options: ReproduceOptions,
    *,
    chunked: bool,
) -> float:
    """Return the loss of records, a mean over the tokens of their outputs in nats."""
    examples = encode(encoder, limited([record for record in records if record.has_target], options))
    pad = pad_token_id(encoder.tokenizer)
    return heldout_loss(model, examples, options.eval_batch_size, pad, chunked)


def evaluate(
    model: PreTrainedModel,
    encoder: Encoder,
    tests: dict[str, list[Conversation]],
    options: ReproduceOptions,
    *,
    chunked: bool,
) -> Row:
    """Return the mean log-loss of the tasks, and the accuracy of each by LLM-Adapters' rules."""
    losses = {task: log_loss(model, encoder, of, options, chunked=chunked) for task, of in tests.items()}
    return {
        "log_loss": mean(losses.values()),
        "log_losses": losses,
        "accuracies": {task: accuracy(model, encoder, of, options) for task, of in tests.items()},
    }


def accuracy(
    model: PreTrainedModel, encoder: Encoder, records: Sequence[Conversation], options: ReproduceOptions
) -> float:
    """Return the share of right answers among those that the model generates."""
    rules = rules_for([str(record.answer) for record in records])
    questions, _ = make_questions(
        encoder, limited(records, options), positions_of(model), options.max_new_tokens
    )
    answers = answer_questions(
        model,
        encoder.tokenizer,
        questions,
        rules,
        options.eval_batch_size,
        options.max_new_tokens,
        pad_token_id(encoder.tokenizer),
    )
    return sum(bool(answer.correct) for answer in answers) / len(answers)


def limited(records: Sequence[Conversation], options: ReproduceOptions) -> Sequence[Conversation]:
    """Return at most `eval_limit` records, the same ones for every run."""
    if len(records) <= options.eval_limit:
        return records
    return random.Random(0).sample(list(records), options.eval_limit)
