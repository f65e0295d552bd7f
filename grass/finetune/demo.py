"""Built-in demo: full training of a small Llama on plain sums, then fine-tuning on word problems. No download."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grass.config import GrassConfig
from grass.finetune.arithmetic import plain_sums, vocabulary, word_problems
from grass.finetune.encoding import Encoder
from grass.finetune.options import FinetuneOptions
from grass.finetune.records import PlainText
from grass.finetune.run_folder import RunFolder
from grass.finetune.screen import Screen
from grass.finetune.training import train

NUM_TRAIN, NUM_HELDOUT = 4000, 200
CONTEXT = 64

# Defaults of the demo.
DEMO_OPTIONS = FinetuneOptions(
    template="plain",
    steps=1600,
    batch_size=16,
    lr=2e-3,
    scheduler="linear",
    warmup=0.05,
    log_steps=20,
    eval_batch_size=100,
    eval_answers=NUM_HELDOUT,
    max_new_tokens=8,
)

# Training of the base model. It ends before the sums are perfect; fine-tuning continues to train them.
BASE_OPTIONS = FinetuneOptions(method="full", steps=400, batch_size=96, lr=3e-3, warmup=0.1, log_steps=20)


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each word, number and sign of the task."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {word: i for i, word in enumerate(special + vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
    )


def demo_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return a randomly initialized Llama with six layers and half a million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=80,
        intermediate_size=224,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch operations on one thread inside the context.

    A second thread gains little for matrices as small as those of the demo, and on a busy machine threads that wait
    for each other in every operation are many times slower. One thread also sums in a fixed order, so the results of
    the demo do not depend on the number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_demo(
    folder: RunFolder, options: FinetuneOptions, config: GrassConfig, screen: Screen
) -> FinetuneOptions:
    """Write the data of the demo and train its base model, unless the folder already contains the trained model.

    Args:
        folder: run folder of the demo.
        options: options of the demo.
        config: only its seed is used.
        screen: shows progress.

    Returns:
        The options with `model`, `data` and `eval` set, with which the demo continues as any other run.

    Raises:
        Stopped: the user asked to stop.
    """
    data = folder.path / "data"
    data.mkdir(exist_ok=True)
    train_problems, heldout_problems = word_problems(NUM_TRAIN, NUM_HELDOUT, config.seed)
    files = {"train": train_problems, "heldout": heldout_problems}
    for name, problems in files.items():
        lines = "".join(json.dumps(problem.record) + "\n" for problem in problems)
        (data / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    base = _open_or_create(folder.path / "base", config.seed)
    if base.state != "trained":
        screen.say("training a small Llama on plain sums, all parameters")
        tokenizer = demo_tokenizer()
        sums = [PlainText(record["text"]) for record in plain_sums()]
        dataset = Encoder(tokenizer, "plain", CONTEXT).encode(sums, "plain sums").dataset()
        model = demo_model(tokenizer, config.seed)
        base_options = replace(BASE_OPTIONS, save_steps=options.save_steps)
        train(model, tokenizer, dataset, [], base_options, config, base, screen, "base model")
    return replace(
        options,
        model=str(base.model),
        data=str(data / "train.jsonl"),
        eval=str(data / "heldout.jsonl"),
    )


def _open_or_create(path: Path, seed: int) -> RunFolder:
    if path.exists():
        return RunFolder.open(path)
    return RunFolder.create(path, {"command": "base model of the demo", "seed": seed})
