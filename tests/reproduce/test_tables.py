"""Reading the paper's tasks.

Would catch: a test record that the model was trained on; validation records that are trained on, or differ from run to
run; a task or record that is left out without a word; figures that are not the paper's.
"""

import json

import pytest

from grass.errors import DataError
from grass.reproduce.tables import TABLES, read_table
from tests.reproduce.conftest import write


def texts(records):
    return {" ".join(record.messages[0].content.lower().split()) for record in records}


def test_training_validation_and_test_records_are_disjoint(data_dir):
    data = read_table(data_dir, "arithmetic", (), validation=10)
    assert len(data.train) == 30
    assert len(data.validation) == 10
    assert not texts(data.train) & texts(data.validation)
    known = texts(data.train) | texts(data.validation)
    for task in ("AddSub", "gsm8k"):
        assert len(data.tests[task]) == 4
        assert data.shared[task] == 2
        assert not texts(data.tests[task]) & known
    assert data.absent == ["MultiArith", "AQuA", "SingleEq", "SVAMP"]
    again = read_table(data_dir, "arithmetic", ("AddSub",), validation=10)
    assert again.validation == data.validation
    assert list(again.tests) == ["AddSub"]


def test_no_question_of_llm_adapters_is_on_both_sides(llm_adapters):
    """At most as many test records as differ from all training ones in lower case, white space folded.

    Three of the training records have no output: they are not trained on, so that their questions may be tested.
    """
    data = read_table(llm_adapters, "arithmetic", (), validation=100)
    known = texts(data.train) | texts(data.validation)
    most = {"MultiArith": 109, "AddSub": 79, "SingleEq": 102, "SVAMP": 200, "gsm8k": 264, "AQuA": 51}
    assert data.tests.keys() == most.keys()
    for task, records in data.tests.items():
        assert not texts(records) & known
        assert 0.7 * most[task] <= len(records) <= most[task] + data.num_skipped
    assert data.num_skipped == 3
    data = read_table(llm_adapters, "commonsense", ("ARC-Easy", "openbookqa"), validation=100)
    known = texts(data.train) | texts(data.validation)
    assert all(records and not texts(records) & known for records in data.tests.values())


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("A firm of 2,041 employees .", "a firm of 2041 employees."),
        ("How many are left?  He has $3.50.", "how many are left ? He has $3.50"),
        ('Ann\'s "box"', "Ann s box"),
    ],
)
def test_questions_that_differ_in_writing_only_are_the_same(data_dir, text, same):
    records = json.loads((data_dir / "math_data.json").read_text())
    write(data_dir / "math_data.json", [*records, records[0] | {"instruction": text}])
    write(data_dir / "AddSub" / "test.json", [records[0] | {"instruction": t} for t in (same, "Another one")])
    data = read_table(data_dir, "arithmetic", ("AddSub",), validation=10)
    assert data.shared["AddSub"] == 1


@pytest.mark.parametrize(
    ("text", "other"), [("3 + 4", "3 - 4"), ("-5", "5"), ("x^2 + 1", "x^2 - 1"), ("0.5", "5"), ("1.5", "15")]
)
def test_questions_with_other_numbers_or_operators_are_others(data_dir, text, other):
    records = json.loads((data_dir / "math_data.json").read_text())
    write(data_dir / "math_data.json", [*records, records[0] | {"instruction": text}])
    write(data_dir / "AddSub" / "test.json", [records[0] | {"instruction": other}])
    assert read_table(data_dir, "arithmetic", ("AddSub",), validation=10).shared["AddSub"] == 0


def test_unusable_training_records_are_counted_and_many_are_an_error(data_dir):
    records = json.loads((data_dir / "math_data.json").read_text())
    write(data_dir / "math_data.json", [*records * 5, records[0] | {"output": ""}])
    assert read_table(data_dir, "arithmetic", (), validation=10).num_skipped == 1
    write(data_dir / "math_data.json", [*records, records[0] | {"output": ""}])
    with pytest.raises(DataError, match="1 of 41 records cannot be used"):
        read_table(data_dir, "arithmetic", (), validation=10)


def test_tasks_with_files_of_their_own_are_joined_and_the_large_file_comes_first(data_dir):
    problems = json.loads((data_dir / "math_data.json").read_text())
    folder = data_dir.parent / "commonsense"
    for i, task in enumerate(("boolq", "ARC-Easy")):
        write(folder / task / "train.json", problems[10 * i : 10 * i + 10])
        write(folder / task / "test.json", problems[30 + i : 31 + i])
    data = read_table(folder, "commonsense", (), validation=5)
    assert len(data.train) == 15
    data = read_table(folder, "commonsense", ("boolq",), validation=5)
    assert len(data.train) == 5
    write(folder / "commonsense_170k.json", problems[20:26])
    assert len(read_table(folder, "commonsense", ("boolq",), validation=5).train) == 1


@pytest.mark.parametrize(
    ("remove", "tasks", "validation", "message"),
    [
        ("math_data.json", (), 10, r"no file to train on: math_10k.json or math_data.json, or a train.json"),
        ("AddSub/test.json", ("AddSub",), 10, "AddSub/test.json: no such file"),
        (None, ("boolq",), 10, "boolq is no task of arithmetic: choose of MultiArith, gsm8k"),
        (None, (), 40, "40 training records leave none after 40 for validation"),
    ],
)
def test_what_is_missing_is_named(data_dir, remove, tasks, validation, message):
    if remove:
        (data_dir / remove).unlink()
    with pytest.raises(DataError, match=message):
        read_table(data_dir, "arithmetic", tasks, validation)


def test_a_folder_without_tasks_says_where_they_come_from(tmp_path):
    with pytest.raises(DataError, match="folder `dataset` of the repository LLM-Adapters"):
        read_table(tmp_path, "arithmetic", (), 10)


def test_a_task_of_training_records_only_is_refused(data_dir):
    records = json.loads((data_dir / "math_data.json").read_text())
    write(data_dir / "SVAMP" / "test.json", records[:3])
    with pytest.raises(
        DataError, match=r"SVAMP/test.json: all of its records are among the training records"
    ):
        read_table(data_dir, "arithmetic", (), 10)


def test_a_question_is_on_one_side_only(data_dir):
    records = json.loads((data_dir / "math_data.json").read_text())
    again = [record | {"instruction": record["instruction"].lower()} for record in records]
    write(data_dir / "math_data.json", records + again)
    data = read_table(data_dir, "arithmetic", (), validation=10)
    assert len(data.train) == 30
    assert not texts(data.train) & texts(data.validation)


def test_a_task_without_answers_is_refused(data_dir):
    records = json.loads((data_dir / "AddSub" / "test.json").read_text())
    for record in records[:2]:
        del record["answer"]
    write(data_dir / "AddSub" / "test.json", records)
    with pytest.raises(
        DataError, match=r"AddSub/test.json: 2 records have no answer, by which they are scored"
    ):
        read_table(data_dir, "arithmetic", (), 10)


def test_paper_averages_keep_the_order_that_the_paper_reports():
    """The paper's headlines: GRASS is 4.38 points above LoRA r=128 on TinyLlama, and below full fine-tuning at 7B."""
    paper = TABLES["arithmetic"].paper
    assert paper["grass"][0] - paper["lora-r128"][0] == pytest.approx(4.38)
    for table in TABLES.values():
        assert all(len(values) == 3 for values in table.paper.values())
        assert table.paper["grass"][2] < table.paper["full"][2]
        assert all(a > b for a, b in zip(table.paper["grass"], table.paper["lora-r128"], strict=True))
