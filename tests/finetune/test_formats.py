"""Kinds of records and kinds of files.

Would catch: a format of the field that is refused, or read as another; a value of a table that changes its type on the
way; a place that is wrong in pretty-printed or packed files; a broken record that takes its neighbours with it; columns
renamed into each other; a data set of the hub asked for with the wrong split.
"""

import csv
import gzip
import json

import pytest

from grass import ConfigError, DataError
from grass.finetune.data import check_source, read_records
from grass.finetune.options import FinetuneOptions
from grass.finetune.records import Conversation, Message, PlainText, parse_record

ASKED, REPLY = Message("user", "1 + 1"), Message("assistant", "2")
TURNS = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
PAIR = Conversation((ASKED, REPLY))
WITH_INPUT = Conversation((Message("user", "1 + 1", input="fast"), REPLY))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"instruction": "1 + 1", "input": "", "output": "2"}, PAIR),  # Alpaca, LLM-Adapters
        ({"instruction": "1 + 1", "input": "fast", "output": "2"}, WITH_INPUT),
        ({"instruction": "1 + 1", "context": "fast", "response": "2"}, WITH_INPUT),  # Dolly
        ({"prompt": "1 + 1", "completion": "2"}, PAIR),
        ({"prompt": "1 + 1", "response": "2"}, PAIR),
        ({"question": "1 + 1", "response": "2"}, PAIR),
        ({"query": "1 + 1", "response": "2"}, PAIR),  # MetaMath
        ({"messages": TURNS}, PAIR),  # OpenAI, TRL
        ({"conversations": TURNS}, PAIR),
        (
            {"conversations": [{"from": "human", "value": "1 + 1"}, {"from": "gpt", "value": "2"}]},
            PAIR,
        ),  # ShareGPT
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, PAIR),  # TRL
        ({"prompt": TURNS}, None),  # nothing of it is learnt
        (
            {"prompt": [*TURNS, TURNS[0]], "completion": TURNS[1:]},
            Conversation((ASKED, Message("assistant", "2", learnt=False), ASKED, REPLY)),
        ),
        (
            {
                "system": "s",
                "conversations": [{"from": "human", "value": "1 + 1"}, {"from": "gpt", "value": "2"}],
            },
            Conversation((Message("system", "s"), ASKED, REPLY)),
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "1 + 1"}]}, TURNS[1]]}, PAIR),
        ({"text": "1 + 1"}, PlainText("1 + 1")),
        (
            {"question": "1 + 1", "answer": "One more.\n#### 2"},  # GSM8K
            Conversation((ASKED, Message("assistant", "One more.\n#### 2")), "2"),
        ),
        ({"question": "1 + 1", "answer": "2"}, Conversation((ASKED, REPLY), "2")),
        ({"instruction": "1 + 1", "answer": "2"}, None),  # no reply to learn
    ],
)
def test_formats(item, expected):
    if expected is None:
        with pytest.raises(DataError):
            parse_record(item)
    else:
        assert parse_record(item) == (expected, set())


@pytest.mark.parametrize("task", ["instruction", "question", "prompt"])
def test_a_task_with_an_answer_alone_is_evaluated(task):
    record, unused = parse_record({task: "1 + 1", "answer": 2}, evaluation=True)
    assert record.answer == "2"
    assert record.question == PAIR.question
    assert not unused
    assert record.has_target == (task == "question")  # there the answer is the reply


def test_columns_are_renamed(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"q": "1 + 1", "output": "1 + 1", "a": "2"}) + "\n")
    names = {"q": "instruction", "a": "output", "output": "id"}
    assert read_records(path, columns=names).records == [PAIR]
    options = FinetuneOptions(model="m", data="d", columns=("instruction=q", "output=a", "id=output"))
    assert options.renamed_columns() == names
    with pytest.raises(DataError, match=r'd\.jsonl:1: "a" cannot be renamed: there is another "output"'):
        read_records(path, columns={"q": "instruction", "a": "output"})
    with pytest.raises(DataError, match=r'no record has the column "z" that is to be renamed \(--columns\)'):
        read_records(path, columns={**names, "z": "system"})
    other = tmp_path / "e.jsonl"
    other.write_text(json.dumps({"messages": TURNS}))
    assert read_records([str(path), str(other)], columns=names).records == [PAIR, PAIR]
    for wrong in ("instruction", "a=", "a=a", ("a=b", "a=c"), ("a=b", "c=b")):
        with pytest.raises(ConfigError, match="entries new=old"):
            FinetuneOptions(model="m", data="d", columns=wrong)


ROWS = [{"instruction": f"{i} +\n1,", "output": f' "{i + 1}"', "answer": f"00{i}"} for i in range(5)]


def write_parquet(path):
    import datasets

    datasets.Dataset.from_list(ROWS).to_parquet(str(path))


def write_csv(path, delimiter=","):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS = {
    "array.json": lambda path: path.write_text(json.dumps(ROWS)),
    "pretty.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "wrapped.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS}, indent=1)),
    "lines.jsonl": lambda path: path.write_text("\n".join(map(json.dumps, ROWS))),
    "pretty.jsonl": lambda path: path.write_text("\n".join(json.dumps(row, indent=2) for row in ROWS)),
    "windows.jsonl": lambda path: path.write_bytes("\r\n".join(map(json.dumps, ROWS)).encode("utf-8-sig")),
    "lines.json.gz": lambda path: path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
    "table.csv": write_csv,
    "semicolons.csv": lambda path: write_csv(path, ";"),
    "table.tsv": lambda path: write_csv(path, "\t"),
    "table.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_files(tmp_path, name):
    expected = [parse_record(row)[0] for row in ROWS]
    path = tmp_path / name
    WRITERS[name](path)
    assert read_records(path).records == expected
    assert read_records([str(path), str(path)]).records == expected * 2
    assert read_records(path).digest == read_records(path).digest
    assert read_records(path).digest != read_records([str(path), str(path)]).digest


def test_a_folder_and_a_hub_name_are_loaded_by_datasets(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "train.parquet")
    assert read_records(tmp_path / "set").records == [parse_record(row)[0] for row in ROWS]

    asked = []
    monkeypatch.setattr("grass.finetune.data.check_hub", lambda name, kind: asked.append((name, kind)))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, **options: asked.append((path, options)) or ROWS
    )
    for source in ("own/set", "own/set:main", "own/set::test[:10]", "own/set:main:test"):
        assert len(read_records(source).records) == 5
    options = [entry[1] for entry in asked if isinstance(entry[1], dict)]
    assert [(o["name"], o["split"]) for o in options] == [
        (None, "train"),
        ("main", "train"),
        (None, "test[:10]"),
        ("main", "test"),
    ]
    assert set(asked[0]) == {"own/set", "dataset"}


@pytest.mark.parametrize(
    "source", ["none.json", "none", "./own/set", "/own/set", "a/b/c", "own/set.parquet", "~/x"]
)
def test_what_cannot_be_a_hub_name_is_no_file(source):
    with pytest.raises(DataError, match="no such file"):
        check_source(source)
    check_source("own/set-1.5:main:test")


BROKEN = [
    # text, (line, reason) of the bad records, number of good ones
    ('{"text": "a"}\n{"text": \n{"text": "b"}\n', [(2, "not valid JSON")], 2),
    ('{"text": "a"} x\n{"text": "b"}\n', [(1, "Extra data")], 1),
    ('{\n  "text": "a"\n}\n{\n  "text": "b",\n  "x\n}\n{\n  "text": "c"\n}\n', [(4, "not valid JSON")], 2),
    ('{"text": "a"}\n5\n"b"\n{"text": "c"}', [(2, "found a number"), (3, "found a string")], 2),
    ('{"text": "a"}\n' + "[" * 100_000 + '\n{"text": "c"}', [(2, "nested too deeply")], 2),
    ('{\n "text": "a"\n}\n\n\n{\n "txt": "b"\n}\n{"text": "c"}', [(6, 'found "txt"')], 2),
]


@pytest.mark.parametrize(("text", "bad", "good"), BROKEN)
def test_a_broken_record_leaves_its_neighbours(tmp_path, text, bad, good):
    path = tmp_path / "d.jsonl"
    path.write_text(text)
    read = read_records(path, max_skipped=0.9)
    assert len(read.records) == good
    assert [b.line for b in read.bad] == [line for line, _ in bad]
    for found, (_, reason) in zip(read.bad, bad, strict=True):
        assert reason in found.reason


def test_places_in_tables(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('text,answer\n"a\nb",1\n,2\nc,3,4\nd,5\n')
    read = read_records(path, max_skipped=0.9)
    assert read.records == [PlainText("a\nb"), PlainText("d")]
    assert [(b.line, b.record) for b in read.bad] == [(4, 2), (5, 3)]
    assert "1 more cells than columns" in read.bad[1].reason
    path.write_text('text\n"a\n')
    with pytest.raises(DataError, match=r"d\.csv:\d: not a valid table"):
        read_records(path)
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}')[:-4])
    with pytest.raises(DataError, match="damaged"):
        read_records(path)


def test_a_table_of_mixed_forms_has_empty_columns(tmp_path):
    """As parquet stores records of different forms: every row has every column."""
    import datasets

    rows = [{"instruction": "1 + 1", "output": "2"}, {"messages": TURNS}, {"text": "a"}]
    columns = {key: [row.get(key) for row in rows] for key in ("instruction", "output", "messages", "text")}
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "d.parquet"))
    assert read_records(tmp_path / "d.parquet").records == [PAIR, PAIR, PlainText("a")]


def test_a_saved_data_set_and_a_text_file(tmp_path):
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": data.select([0]), "train": data}).save_to_disk(tmp_path / "dict")
    expected = [parse_record(row)[0] for row in ROWS]
    assert read_records(tmp_path / "one").records == read_records(tmp_path / "dict").records == expected
    (tmp_path / "story.txt").write_text("Once upon\n\na time.")
    assert read_records(tmp_path / "story.txt").records == [PlainText("Once upon\n\na time.")]


def test_tables_hold_messages_and_tools_as_json(tmp_path):
    path = tmp_path / "d.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["messages", "tools"])
        writer.writeheader()
        writer.writerow({"messages": json.dumps(TURNS), "tools": json.dumps([{"name": "find"}])})
    (record,) = read_records(path).records
    assert record.messages == PAIR.messages
    assert json.loads(record.tools) == [{"name": "find"}]


def test_a_column_of_texts_with_semicolons_and_a_large_cell(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("text\na; b; c\n" + "d" * 200_000 + "\n")
    assert [r.text for r in read_records(path).records] == ["a; b; c", "d" * 200_000]


@pytest.mark.parametrize("damage", [10, 20, -5])
def test_a_damaged_archive_is_one_line(tmp_path, damage):
    content = bytearray(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS * 50).encode()))
    content[damage] ^= 0xFF
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"d\.jsonl\.gz"):
        read_records(path)


def test_calls_of_functions_in_sharegpt_are_calls_of_tools():
    call = {"name": "find", "arguments": {"a": 1}}
    turns = [
        {"from": "human", "value": "1 + 1"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "2"},
    ]
    record, unused = parse_record({"conversations": turns, "tools": json.dumps([{"name": "find"}])})
    assert [m.role for m in record.messages] == ["user", "assistant", "tool", "assistant"]
    assert record.messages[1].as_dict()["tool_calls"] == [{"type": "function", "function": call}]
    assert not unused
    developer = [{"role": "developer", "content": "s"}, *TURNS]
    assert parse_record({"messages": developer})[0].messages[0] == Message("system", "s")


@pytest.mark.parametrize(
    "item",
    [
        {"prompt": "1 + 1", "completion": "2", "label": 1},
        {"prompt": "1 + 1", "completion": "2", "label": False},
        {"instruction": "1 + 1", "output": "2", "negative_output": "3"},
        {"instruction": "1 + 1", "output": "2", "weight": 0},
    ],
)
def test_what_must_not_be_learnt_is_refused(item):
    with pytest.raises(DataError, match=r"preference|weight"):
        parse_record(item)
