"""A model folder that holds a configuration alone: wide enough for memory to have a shape, small enough for a test."""

from pathlib import Path

import pytest

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 128,  # of every shape a multiple of 128: the store's segments have no gaps
    "intermediate_size": 320,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig

    path = tmp_path_factory.mktemp("model")
    LlamaConfig(**SIZES).save_pretrained(path)
    return path
