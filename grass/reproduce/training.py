"""Training and evaluation of one run: the same loop for every method."""

import math
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import grass
from grass.activation_checkpointing import checkpoint_activations
from grass.config import GrassConfig
from grass.errors import GrassError, first_line
from grass.finetune.encoding import Example
from grass.finetune.evaluation import answer_questions, heldout_loss
from grass.finetune.loss import IGNORED, chunked_loss, use_chunked_loss
from grass.finetune.model import load_model, pad_token_id
from grass.finetune.preparation import stop_at_end_of_reply, to_device
from grass.finetune.screen import quiet_libraries
from grass.optim import GrassAdamW
from grass.reproduce.methods import METHODS
from grass.reproduce.options import ReproduceOptions
from grass.reproduce.preparation import Prepared, prepare
from grass.reproduce.study import Job, Row

STEPS_BETWEEN_CHECKS = 10  # for a loss that is not finite


def schedule(step: int, steps: int, warmup: float = 0.05) -> float:
    """Return the factor of the learning rate: a linear rise over a share of the steps, and a linear fall to zero.

    Raises:
        ValueError: the step is after the last one, where the factor would be negative.
    """
    if step > steps:
        raise ValueError(f"step {step} is after the last of {steps} steps")
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


def run_job(options: ReproduceOptions, config: GrassConfig, origin: Mapping[str, Any], job: Job) -> Row:
    """Train and evaluate: a run of the search on validation records, others on the table's test records.

    Args:
        options: what is reproduced.
        config: configuration of sampling; its seed is replaced by that of the order.
        origin: what to add to the row.
        job: the run.

    Raises:
        GrassError: the device has no memory left.
    """
    try:
        with quiet_libraries():
            return _run_job(options, config, job) | dict(origin)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise GrassError(
            f"{first_line(error).rstrip('.')}. A run of {job.method} has no memory left: pass a smaller "
            "--micro-batch-size, or --activation-checkpointing; finished runs are kept"
        ) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Return True for lack of memory; the allocator of CPUs has no exception of its own."""
    texts = ("DefaultCPUAllocator", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def _run_job(options: ReproduceOptions, config: GrassConfig, job: Job) -> Row:
    start = time.monotonic()
    torch.set_num_threads(options.threads or max(1, (os.cpu_count() or 1) // options.workers))
    is_search = job.order in options.search.orders
    steps = (options.search_steps if is_search else None) or options.steps
    prepared = prepare(options)
    model, tokenizer = load_model(options.model, options.dtype, trust_remote_code=options.trust_remote_code)
    to_device(model)
    stop_at_end_of_reply(model, prepared.encoder)
    if options.activation_checkpointing:
        checkpoint_activations(model)
    chunked = use_chunked_loss(model, "auto", lambda line: None)
    model.train()
    torch.manual_seed(job.order)  # of dropout: a process may have executed other runs before
    optimizer = METHODS[job.method](model, replace(config.for_run(steps), seed=job.order))
    losses, probed, pad = list[Tensor](), 0, pad_token_id(tokenizer)
    for step, batch in enumerate(batches(prepared.train, options.batch_size, steps, job.order)):
        probed += getattr(optimizer, "phase", "adapt") == "probe"  # the rate rises from zero after the probe
        set_lr(optimizer, job.lr * schedule(step - probed, steps - probed))
        losses.append(train_step(model, optimizer, batch, options, pad, chunked=chunked))
        # Waits for the device, so not in every step.
        if step % STEPS_BETWEEN_CHECKS == 0 and not losses[-1].isfinite():
            break
    curve = torch.stack(losses).tolist()  # a device sync, once at the end
    row: Row = {
        "steps": len(losses),
        "batch_size": options.batch_size,
        "num_examples": len(prepared.train),
        "training_seconds": round(time.monotonic() - start, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **{name: module.__version__ for name, module in (("torch", torch), ("transformers", transformers))},
        "grass": grass.__version__,
    }
    if isinstance(optimizer, GrassAdamW):
        row |= {
            "draw_counts": optimizer.draw_counts,
            # Once, after training; the importance is a tensor of the host.
            "importance": [float(f"{m:.4g}") for m in optimizer.importance.tolist()],
        }
        optimizer.release()
    if not math.isfinite(curve[-1]):
        row |= {"log_loss": None}
    else:
        row |= {"curve": curve_of(curve)} | evaluate(
            model, prepared, options, chunked=chunked, is_search=is_search
        )
    return row | {"seconds": round(time.monotonic() - start, 1)}


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
) -> Tensor:
    """Take a step, without clipping of gradients; return the mean loss of the targets of the batch, on the device."""
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
    return total


def evaluate(
    model: PreTrainedModel, prepared: Prepared, options: ReproduceOptions, *, chunked: bool, is_search: bool
) -> Row:
    """Return the log-loss of validation records, or the mean log-loss of the tasks and the accuracy of each.

    The log-loss is a mean over the tokens of the outputs, in nats; the accuracy is by LLM-Adapters' rules, of answers
    that are generated by greedy decoding.
    """
    tokenizer, size = prepared.encoder.tokenizer, options.eval_batch_size
    pad = pad_token_id(tokenizer)
    if is_search:
        return {"log_loss": heldout_loss(model, prepared.validation, size, pad, chunked)}
    losses = {task: heldout_loss(model, of, size, pad, chunked) for task, of in prepared.tests.items()}
    accuracies = {}
    for task, questions in prepared.questions.items():
        rules, length = prepared.rules[task], options.max_new_tokens
        answers = answer_questions(model, tokenizer, questions, rules, size, length, pad)
        accuracies[task] = sum(bool(answer.correct) for answer in answers) / len(answers)
    return {"log_loss": mean(losses.values()), "log_losses": losses, "accuracies": accuracies}
