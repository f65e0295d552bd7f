"""A tiny model, and files named and written as those of LLM-Adapters."""

import json

import pytest

from grass.finetune.arithmetic import word_problems
from grass.finetune.demo import demo_tokenizer
from tests.support.saved_model import save_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", demo_tokenizer())


@pytest.fixture
def data_dir(tmp_path):
    """Folder with 40 training problems and two tasks of 6, of which two each are also among the training problems."""
    folder = tmp_path / "dataset"
    train, heldout = word_problems(40, 8, seed=0)
    records = [problem.record | {"input": ""} for problem in train]
    write(folder / "math_data.json", records)
    for i, task in enumerate(("AddSub", "gsm8k")):
        own = [problem.record | {"input": ""} for problem in heldout[4 * i : 4 * i + 4]]
        known = [dict(record) for record in records[2 * i : 2 * i + 2]]
        known[0]["instruction"] = known[0]["instruction"].upper().replace(" ", "  ")
        write(folder / task / "test.json", own + known)
    return folder


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
