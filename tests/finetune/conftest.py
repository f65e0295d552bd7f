"""A tiny model and a few problems on disk, as a user would have them."""

import json

import pytest

from grass.finetune.arithmetic import word_problems
from grass.finetune.demo import demo_tokenizer
from tests.support.saved_model import save_tiny_model


@pytest.fixture(scope="session")
def tokenizer():
    return demo_tokenizer()


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
