"""Prompts and texts that are longer than the room for them.

Would catch: questions cut to the length of training texts, or to nothing, to leave room for the answer; a cut that is
not told with its number and share; an evaluation of questions, or a training of texts, of which nothing useful remains.
"""

import json
import re
from dataclasses import replace

import pytest

from grass import ConfigError, DataError, GrassConfig
from grass.finetune.job import prepare, start_run
from grass.finetune.options import FinetuneOptions
from grass.finetune.run_folder import read_rows
from grass.finetune.screen import Screen, quiet_libraries

CONFIG = GrassConfig(active_layers=1, probe_steps=1, sample_interval=2, update_interval=2)
SHORT = {"instruction": "How many apples are in the box now", "output": "3", "answer": "3"}  # 9 tokens
LONG = {**SHORT, "instruction": " ".join([SHORT["instruction"]] * 5)}  # 41 tokens


@pytest.fixture(autouse=True)
def quiet():
    with quiet_libraries():
        yield


@pytest.fixture
def options(tiny_model, tmp_path):
    """A model of 64 positions."""
    (tmp_path / "train.jsonl").write_text((json.dumps(SHORT) + "\n") * 8)
    write_heldout(tmp_path, [SHORT] * 3 + [LONG])
    return FinetuneOptions(
        model=str(tiny_model),
        data=str(tmp_path / "train.jsonl"),
        eval=str(tmp_path / "heldout.jsonl"),
        template="plain",
        steps=2,
        max_new_tokens=4,
        output=str(tmp_path / "run"),
    )


def write_heldout(folder, rows):
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_context_of_training_does_not_cut_questions(options, tmp_path, capsys):
    results = start_run(replace(options, context=16, max_new_tokens=16), CONFIG, Screen())
    rows = read_rows(tmp_path / "run" / "answers.jsonl")
    prompts = [row["prompt"] for row in rows if row["when"] == "after"]
    assert prompts == [f"<s> {row['instruction']}" for row in [SHORT] * 3 + [LONG]]
    assert results["questions_cut"] == 0
    assert "their beginning is cut" not in capsys.readouterr().err


def test_a_cut_question_keeps_its_end_and_is_told(options, tmp_path, capsys):
    results = start_run(replace(options, max_new_tokens=34), CONFIG, Screen())
    rows = read_rows(tmp_path / "run" / "answers.jsonl")
    prompts = [row["prompt"] for row in rows if row["when"] == "after"]
    assert prompts[0] == f"<s> {SHORT['instruction']}"
    assert prompts[3] == " ".join(LONG["instruction"].split()[-30:])
    assert results["questions_cut"] == 1
    told = "1 of 4 questions (25.0%) are longer than the 30 tokens that 34 new ones leave of the model's 64 positions"
    assert told in re.sub(r"\s+", " ", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("rows", "max_new_tokens", "remedy"),
    [
        ([SHORT] * 3 + [LONG], 128, "at most 23"),  # as many new tokens as positions, or more
        ([SHORT] * 3 + [LONG], 63, "at most 23"),  # one token of every question
        ([SHORT], 60, "at most 55"),
        ([{**SHORT, "instruction": "How " * 70, "output": ""}], 4, "a model with more positions"),
    ],
)
def test_questions_of_which_nothing_useful_remains_are_refused(
    options, tmp_path, rows, max_new_tokens, remedy
):
    write_heldout(tmp_path, rows)
    with pytest.raises(ConfigError, match=rf"{len(rows)} of {len(rows)} questions .*{remedy}"):
        start_run(replace(options, max_new_tokens=max_new_tokens), CONFIG, Screen())
    assert not (tmp_path / "run").exists()


def test_cut_texts_are_told_with_their_share(options, tmp_path, capsys):
    answer = {**SHORT, "output": "3 " * 10}
    rows = [SHORT] * 5 + [LONG] * 2 + [answer]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = prepare(replace(options, context=16), CONFIG, Screen())
    assert len(run.dataset) == 6
    shown = capsys.readouterr().err
    assert "3 of 8 training texts (37.5%) are longer than 16 tokens and are truncated" in shown
    assert (
        "2 (25.0%) are left out: their prompt fills the context, so that no token to learn remains" in shown
    )
    assert "1 of 4 held-out texts (25.0%) are longer than 16 tokens" in shown


def test_texts_of_which_mostly_nothing_remains_are_refused(options):
    with pytest.raises(DataError, match=r"8 of 8 texts have no token to learn .* 8 tokens.*--context"):
        prepare(replace(options, context=8), CONFIG, Screen())
