"""Gradient norms of a real model's layers: by task, and along a fine-tuning run (the paper's Figures 1 and 6)."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from bench.quality.real import CONFIG, STAGES, options_for
from bench.quality.training import layer_gradients, root_mean_squares
from grass.finetune.data import read_records
from grass.finetune.encoding import Encoder, Example
from grass.finetune.model import load_model, pad_token_id
from grass.finetune.options import as_tuple
from grass.finetune.records import Conversation
from grass.layers import LayerMap
from grass.reproduce.methods import METHODS
from grass.reproduce.preparation import encode
from grass.reproduce.study import Row
from grass.reproduce.tables import TABLES, read_table
from grass.reproduce.training import batches, schedule, set_lr, train_step

BATCH, BATCHES = 8, 6


def measure(model_dir: str, data_dir: str, lr: float) -> Iterator[Row]:
    """Yield a row for each task whose test.json is there, and each stage of a run of uniform sampling on arithmetic.

    Args:
        model_dir: folder of the model.
        data_dir: folder with LLM-Adapters' files.
        lr: maximum learning rate of the run.
    """
    torch.set_num_threads(2)
    options = options_for("arithmetic", model_dir, data_dir, "", 1, 1e6)
    model, tokenizer = load_model(options.model, options.dtype)
    encoder = Encoder(tokenizer, options.template, options.context)
    data = read_table(Path(data_dir), "arithmetic", as_tuple(options.tasks), options.validation)
    for name, table in TABLES.items():
        tasks = [task for task in table.tasks if (Path(data_dir) / task / "test.json").is_file()]
        for task in tasks:
            read = read_records(str(Path(data_dir) / task / "test.json"), evaluation=True).records
            records = [record for record in read if isinstance(record, Conversation)]
            if any(record.has_target for record in records):
                yield _row(name, task, model, _examples(encoder, records))
    fixed = _examples(encoder, data.validation)
    examples = [
        example for example in encode(encoder, data.train) if len(example.input_ids) <= options.context
    ]
    optimizer = METHODS["uniform"](model, replace(CONFIG, seed=0))
    steps, pad = options.steps, pad_token_id(tokenizer)
    model.train()
    for step, batch in enumerate(batches(examples, options.batch_size, max(STAGES) + 1, seed=0)):
        if step in STAGES:
            yield _row("arithmetic, while training", f"step {step}", model, fixed)
        set_lr(optimizer, lr * schedule(step, steps))
        train_step(model, optimizer, batch, options, pad, chunked=False)


def layer_norms(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """Return the mean over batches of the root mean square gradient of each layer, float64 [L]."""
    layers = [list(module.parameters()) for module in LayerMap.from_model(model).modules(model)]
    collate = DataCollatorForLanguageModeling(0)
    norms = []
    for i in range(0, len(examples), BATCH):
        batch = collate([e._asdict() for e in examples[i : i + BATCH]])
        grads = layer_gradients(layers, partial(_loss, model, batch))
        norms.append(root_mean_squares(grads).double())
    return torch.stack(norms).mean(dim=0)


def _loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch, use_cache=False).loss
    return loss


def _examples(encoder: Encoder, records: Sequence[Conversation]) -> list[Example]:
    """Return as many short examples as are measured, in whole batches, the same ones each time."""
    found = [e for e in encode(encoder, [r for r in records if r.has_target]) if len(e.input_ids) <= 160]
    return random.Random(0).sample(found, min(len(found) // BATCH, BATCHES) * BATCH)


def _row(panel: str, name: str, model: PreTrainedModel, examples: Sequence[Example]) -> Row:
    norms = layer_norms(model, examples)
    return {
        "panel": panel,
        "name": name,
        "model": Path(str(model.config.name_or_path)).name,
        "records": len(examples),
        "batch_size": BATCH,
        "norms": [float(f"{norm:.4g}") for norm in norms.tolist()],
    }
