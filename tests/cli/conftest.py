"""A tiny model and its data on disk, and a finished run."""

import json

import pytest

from grass.cli import main
from grass.finetune import demo
from grass.finetune.arithmetic import word_problems
from grass.finetune.run_folder import RunFolder
from tests.support.saved_model import save_tiny_model

QUICK = "--probe-steps 2 --sample-interval 3 --update-interval 3 --active-layers 1"
QUICK += " --template plain --batch-size 4 --eval-answers 4 --max-new-tokens 4"


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Arguments that name a tiny model and its data, and make a run quick."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_model(folder / "model", demo.demo_tokenizer(), num_layers=3)
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
