"""Reading records.

Would catch: a format taken for another; an error without file and line; a blank line or a byte-order mark
that breaks a file; U+2028 taken for a line end; an `answer` lost or turned into the wrong type; held-out
records that also stay among the training records.
"""

import json

import pytest

from grass import DataError
from grass.finetune.data import read_records, split_heldout
from grass.finetune.records import Conversation, Message, PlainText

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write(tmp_path, text, name="d.jsonl"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_all_three_formats_in_one_file(tmp_path):
    rows = [
        {"instruction": "2+2?", "input": "", "output": "It is 4", "answer": 4.0},
        {"messages": TURNS, "answer": "hello"},
        {"text": "once"},
        {"instruction": "no input", "input": None, "output": "x", "answer": ""},
    ]
    path = write(tmp_path, "\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n")
    assert read_records(path).records == [
        Conversation((Message("user", "2+2?"), Message("assistant", "It is 4")), "4.0"),
        Conversation((Message("user", "hi"), Message("assistant", "hello")), "hello"),
        PlainText("once"),
        Conversation((Message("user", "no input"), Message("assistant", "x"))),
    ]


def test_json_array_is_the_same_as_lines(tmp_path):
    rows = [{"text": "a"}, {"text": "b"}]
    array = write(tmp_path, json.dumps(rows, indent=1), "a.json")
    lines = write(tmp_path, "\n".join(map(json.dumps, rows)))
    assert read_records(array).records == read_records(lines).records == [PlainText("a"), PlainText("b")]


def test_unicode_line_separators_stay_in_a_record(tmp_path):
    path = write(tmp_path, json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False))
    assert read_records(path).records == [PlainText("a\u2028b\x85c")]


@pytest.mark.parametrize(
    ("text", "place", "says"),
    [
        ('{"text": "a"}\n\n{"text": }\n', ":3", "not valid JSON"),
        ('{"text": "a"}\n{"text": 5}\n', ":2", '"text" must be a string, not a number'),
        ('{"text": "  "}\n', ":1", '"text" is empty'),
        ('"just a string"\n', ":1", "found a string"),
        ('{"prompt": "a", "solution": "b"}\n', ":1", 'found "prompt", "solution"'),
        ('{"instruction": "a", "output": true}\n', ":1", '"output" must be a string, not true or false'),
        ('{"instruction": "a", "output": "b", "answer": []}\n', ":1", '"answer" must be'),
        ('{"messages": []}\n', ":1", "non-empty list"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', ":1", "no message of the assistant"),
        ('{"messages": [{"role": "boss", "content": "a"}]}\n', ":1: message 1", "role must be one of"),
        ('{"messages": [{"from": "user"}]}\n', ":1: message 1", '"role" and "content"'),
        ('[{"text": "a"}, {"txt": "b"}]', ":1: record 2", 'found "txt"'),
        ('[\n  {"text":\n "a"}\n,\n\n  {"txt": "b"}]', ":6: record 2", 'found "txt"'),
        ('[{"text": "a"},\n {"text": }]', ":2", "not valid JSON"),
        ("", "", "no records"),
        ("[]", "", "no records"),
        ("[" * 100_000, "", "nested too deeply"),
    ],
)
def test_malformed_data_is_named_with_its_place(tmp_path, text, place, says):
    path = write(tmp_path, text)
    with pytest.raises(DataError) as caught:
        read_records(path)
    message = str(caught.value)
    assert message.startswith(f"{path}{place}: ")
    assert says in message
    assert "\n" not in message


def test_missing_folder_and_binary(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"cannot be loaded: .*; check the files"):
        read_records(tmp_path)
    path = tmp_path / "b.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:2: not UTF-8"):
        read_records(path)


def test_heldout_split_is_disjoint_seeded_and_complete():
    records = [PlainText(str(i % 40)) for i in range(100)]
    train, heldout = split_heldout(records, 0.25, seed=3)
    assert not set(train) & set(heldout)
    assert sorted(r.text for r in train + heldout) == sorted(r.text for r in records)
    assert len(set(heldout)) == 10
    assert split_heldout(records, 0.25, seed=3) == (train, heldout)
    assert split_heldout(records, 0.25, seed=4) != (train, heldout)
    with pytest.raises(DataError, match="fewer than two"):
        split_heldout([PlainText("a")] * 5, 0.5, seed=0)


def test_digest_follows_content(tmp_path):
    a, b = write(tmp_path, '{"text": "x"}', "a"), write(tmp_path, '{"text": "y"}', "b")
    assert read_records(a).digest != read_records(b).digest
    assert read_records(a).digest == read_records(write(tmp_path, '{"text": "x"}', "c")).digest
