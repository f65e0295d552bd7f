"""A tiny model and its data on disk, and a finished run."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grass.cli import main
from grass.finetune import demo
from grass.finetune.arithmetic import word_problems
from grass.finetune.run_folder import RunFolder

QUICK = "--probe-steps 2 --sample-interval 3 --update-interval 3 --active-layers 1"
QUICK += " --template plain --batch-size 4 --eval-answers 4 --max-new-tokens 4"


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Arguments that name a tiny model and its data, and make a run quick."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = demo.demo_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, problems in zip(("train", "heldout"), word_problems(40, 6, 0), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(p.record) + "\n" for p in problems))
    return [
        *("--model", str(folder / "model"), "--data", str(folder / "train.jsonl")),
        *("--eval", str(folder / "heldout.jsonl")),
        *QUICK.split(),
    ]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, inputs):
    """Folder and record of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["finetune", *inputs, "--steps", "4", "--output", str(folder)]) == 0
    return folder, RunFolder.open(folder).record
