"""Records that cannot be used, or not as they are meant.

Would catch: a file refused for a few bad records; bad records skipped without a count, a place or a limit; held-out
records without output that are refused or learnt; a key whose meaning is lost: rejected answers, calls of tools
and images trained as if they were not there, messages of weight 0 learnt, system and history left out of the prompt.
"""

import json
from dataclasses import replace

import pytest

from grass import ConfigError, DataError, GrassConfig
from grass.finetune.data import read_records
from grass.finetune.job import prepare, start_run
from grass.finetune.options import FinetuneOptions
from grass.finetune.records import Conversation, Message
from grass.finetune.run_folder import read_rows
from grass.finetune.screen import Screen, quiet_libraries

CONFIG = GrassConfig(active_layers=1, probe_steps=1, sample_interval=2, update_interval=2)
GOOD = {"instruction": "1 + 1", "output": "2", "answer": "2"}
EMPTY = {"instruction": "2 + 2", "output": "\n", "answer": "4"}
TURNS = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]


@pytest.fixture(autouse=True)
def quiet():
    with quiet_libraries():
        yield


@pytest.fixture
def options(tiny_model, tmp_path):
    return FinetuneOptions(
        model=str(tiny_model),
        data=str(tmp_path / "train.jsonl"),
        template="plain",
        steps=2,
        max_new_tokens=4,
        output=str(tmp_path / "run"),
    )


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_few_bad_records_are_skipped_counted_and_listed(options, tmp_path, capsys):
    rows = [GOOD] * 500
    rows[6], rows[9], rows[20], rows[30] = EMPTY, '{"instruction', {"instruction": "2"}, EMPTY
    path = write(tmp_path / "train.jsonl", rows)
    results = start_run(options, CONFIG, Screen())
    assert results["skipped_records"] == 4
    listed = read_rows(tmp_path / "run" / "skipped.jsonl")
    assert [(row["file"], row["line"], row["record"]) for row in listed] == [
        (str(path), line, None) for line in (7, 10, 21, 31)
    ]
    assert listed[0]["reason"] == '"output" is empty'
    shown = capsys.readouterr().err
    assert "4 of 500 training records cannot be used and are skipped" in shown
    assert f'{path}:7: "output" is empty' in shown
    assert f"{path}:31" not in shown  # the first few on the screen, all in the file
    assert "skipped.jsonl" in shown


def test_records_of_an_array_are_listed_by_line_and_index(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([GOOD] * 99 + [EMPTY], indent=0))
    bad = read_records(path, max_skipped=0.01).bad
    assert [(b.line, b.record) for b in bad] == [(2 + 99 * 5, 100)]


def test_without_bad_records_nothing_is_listed(options, tmp_path, capsys):
    write(tmp_path / "train.jsonl", [GOOD] * 5)
    assert start_run(options, CONFIG, Screen())["skipped_records"] == 0
    assert not (tmp_path / "run" / "skipped.jsonl").exists()
    assert "skipped" not in capsys.readouterr().err


def test_more_bad_records_than_the_share_are_an_error(options, tmp_path):
    path = write(tmp_path / "train.jsonl", [GOOD] * 40 + [EMPTY] * 2 + [{"text": 5}] + [GOOD] * 57)
    with pytest.raises(DataError) as caught:
        prepare(options, CONFIG, Screen())
    message = str(caught.value)
    assert message.startswith(f'{path}:41: "output" is empty; ')
    assert "3 of 100 records cannot be used (lines 41, 42, 43)" in message
    assert "--max-skipped" in message
    assert '"text" must be a string' in message  # every reason once
    assert not (tmp_path / "run").exists()
    assert len(prepare(replace(options, max_skipped=0.03), CONFIG, Screen()).dataset) == 97
    with pytest.raises(ConfigError, match="max_skipped"):
        replace(options, max_skipped=1.0)


def test_heldout_records_need_an_answer_or_an_output(options, tmp_path, capsys):
    write(tmp_path / "train.jsonl", [GOOD] * 5)
    rows = [
        GOOD,
        EMPTY,
        {"instruction": "3 + 3", "answer": 6},
        {"instruction": "3 + 4", "output": None, "answer": 7},
    ]
    rows += [{"messages": TURNS[:1], "answer": "2"}]
    heldout = write(tmp_path / "heldout.jsonl", rows)
    options = replace(options, eval=str(heldout))
    run = prepare(options, CONFIG, Screen())
    assert len(run.questions) == 5
    assert len(run.heldout) == 1
    assert (
        "4 of 5 held-out records have no output: they count for the accuracy only" in capsys.readouterr().err
    )
    write(heldout, rows[1:])
    results = start_run(options, CONFIG, Screen())
    assert results["answers"] == 4
    assert results["heldout_loss_after"] is None
    write(heldout, [*rows, {"instruction": "a"}])
    with pytest.raises(DataError, match=r"heldout\.jsonl:6: .*1 of 6 records cannot be used"):
        prepare(options, CONFIG, Screen())


def test_heldout_records_without_output_are_found_among_the_training_records(options, tmp_path, capsys):
    write(tmp_path / "train.jsonl", [GOOD] * 5)
    heldout = write(tmp_path / "heldout.jsonl", [{"instruction": "1 + 1", "answer": "2"}])
    prepare(replace(options, eval=str(heldout)), CONFIG, Screen())
    assert "warning: 1 held-out records are also among the training records" in capsys.readouterr().err


def test_the_question_of_a_chat_is_all_before_the_answer(tmp_path):
    longer = [*TURNS, {"role": "user", "content": "2 + 2"}]
    path = write(
        tmp_path / "d.jsonl", [{"messages": longer, "answer": "4"}, {"messages": TURNS, "answer": "2"}]
    )
    records = read_records(path, evaluation=True).records
    assert [[(m.role, m.content) for m in r.question[1:]] for r in records] == [
        [("user", "1 + 1"), ("assistant", "2"), ("user", "2 + 2")],
        [("user", "1 + 1")],
    ]
    write(path, [{"messages": TURNS[1:], "answer": "2"}])
    with pytest.raises(DataError, match='"answer" but no message before it'):
        read_records(path)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({**GOOD, "rejected": "3"}, '"rejected": .*preference'),
        ({"messages": TURNS, "chosen": TURNS, "rejected": TURNS}, '"chosen": .*DPOTrainer'),
        ({"chosen": "a", "rejected": "b"}, '"chosen": .*preference'),
        ({**GOOD, "kto_tag": False}, '"kto_tag": .*preference'),
        ({"messages": TURNS, "label": False}, '"label": .*preference'),
        ({"messages": TURNS, "rejected_response": "3"}, "preference"),
        ({**GOOD, "images": ["a.png"]}, '"images": .*text only'),
        ({"messages": TURNS, "images": ["a.png"]}, '"images": .*text only'),
        ({"text": "a", "audio": "a.wav"}, '"audio": .*text only'),
        ({"messages": TURNS, "tools": {"name": "add"}}, '"tools" must be a list, not an object'),
        ({"messages": TURNS, "tools": "[add]"}, '"tools" is a string that is not valid JSON'),
        (
            {"messages": [{**TURNS[0], "tool_calls": [{"id": 1}]}, TURNS[1]]},
            'message 1: "tool_calls" of a message of the user',
        ),
        (
            {"messages": [TURNS[0], {"role": "assistant", "content": None}]},
            '"content" must be a string, not null',
        ),
        (
            {"messages": [TURNS[0], {**TURNS[1], "function_call": {"name": "add"}}]},
            'message 2: "function_call": .*tools',
        ),
        (
            {"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "hm"}]},
            '"reasoning_content": .*"content"',
        ),
        ({"messages": [TURNS[0], {**TURNS[1], "train": False}]}, '"train": .*"weight": 0'),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0.5}]}, '"weight" must be 0 or 1, not 0.5'),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}, "no message of the assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "a"}]}]}, "one string"),
        (
            {"system": "be brief", "messages": [{"role": "system", "content": "x"}, *TURNS]},
            "two system prompts",
        ),
        ({"history": [["a", "b"]], "messages": TURNS}, '"history": .*"messages"'),
        ({**GOOD, "history": ["a", "b"]}, '"history" must be a list of pairs'),
        ({**GOOD, "system": 5}, '"system" must be a string'),
    ],
)
def test_what_would_be_learnt_wrongly_is_refused_with_the_remedy(tmp_path, record, says):
    path = write(tmp_path / "d.jsonl", [record])
    with pytest.raises(DataError, match=says):
        read_records(path)


def test_a_refused_key_without_content_loses_nothing(tmp_path):
    empty = {"images": [], "rejected": None, "tools": "", "tool_calls": {}}
    turns = [{**turn, "tool_calls": None} for turn in TURNS]
    path = write(tmp_path / "d.jsonl", [{**GOOD, **empty}, {"messages": turns, **empty}])
    read = read_records(path)
    assert len(read.records) == 2
    assert read.unused == {}


def test_keys_that_are_not_used_are_told_once_with_their_count(options, tmp_path, capsys):
    named = [{**TURNS[0], "name": "Ada", "weight": 1}, {**TURNS[1], "name": "Bo"}]
    rows = [
        {**GOOD, "id": 0},
        {**GOOD, "id": 1, "text": "a"},
        {"text": "b", "answer": "c"},
        {"messages": named},
    ]
    path = write(tmp_path / "train.jsonl", rows)
    assert read_records(path).unused == {
        '"id"': 2,
        '"text"': 1,
        '"answer"': 1,
        '"name" of messages': 1,
        '"weight" of messages that are not the assistant\'s': 1,
    }
    prepare(options, CONFIG, Screen())
    shown = capsys.readouterr().err
    assert shown.count('"id" (2 records)') == 1
    assert "keys of training records that are not used: " in shown


def test_what_is_cheap_to_respect_is_read(tmp_path):
    old = {**TURNS[1], "weight": 0}
    rows = [
        {**GOOD, "system": "be brief", "history": [["1 + 0", "1"]]},
        {"messages": [TURNS[0], old, *TURNS], "system": "be brief"},
        {**GOOD, "system": None, "history": []},
    ]
    system, asked, reply = Message("system", "be brief"), Message("user", "1 + 1"), Message("assistant", "2")
    earlier = Message("user", "1 + 0"), Message("assistant", "1", learnt=False)
    assert read_records(write(tmp_path / "d.jsonl", rows)).records == [
        Conversation((system, *earlier, asked, reply), "2"),
        Conversation((system, asked, replace(reply, learnt=False), asked, reply)),
        Conversation((asked, reply), "2"),
    ]


def test_files_of_llm_adapters_are_accepted(llm_adapters):
    training = read_records(llm_adapters / "math_data.json", max_skipped=FinetuneOptions.max_skipped)
    assert (len(training.records), len(training.bad), training.unused) == (3257, 3, {})
    assert {bad.reason for bad in training.bad} == {'"output" is empty'}
    for path in sorted(llm_adapters.glob("*/test.json")):
        read = read_records(path, evaluation=True)
        assert len(read.records) == len(json.loads(path.read_text(encoding="utf-8")))
        assert all(record.answer is not None for record in read.records)
