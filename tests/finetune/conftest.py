"""A tiny model and a few problems on disk, as a user would have them."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grass.finetune.arithmetic import word_problems
from grass.finetune.demo import demo_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return demo_tokenizer()


@pytest.fixture(scope="session")
def llm_adapters():
    """Folder of LLM-Adapters' data sets: `GRASS_LLM_ADAPTERS`, or shared/data/llm-adapters beside the checkout."""
    beside = Path(__file__).parents[3] / "shared" / "data" / "llm-adapters"
    folder = Path(os.environ.get("GRASS_LLM_ADAPTERS") or beside)
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: set GRASS_LLM_ADAPTERS to the folder of LLM-Adapters' data sets")
    return folder


def save_tiny_model(folder: Path, tokenizer, num_layers: int = 4) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tokenizer):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), tokenizer)


@pytest.fixture(scope="session")
def problem_files(tmp_path_factory):
    """Paths of a training file (48 problems) and a held-out file (8)."""
    folder = tmp_path_factory.mktemp("data")
    paths = []
    for name, problems in zip(("train", "heldout"), word_problems(48, 8, seed=0), strict=True):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(p.record) + "\n" for p in problems))
        paths.append(path)
    return paths
