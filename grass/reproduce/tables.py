"""Tables of the paper: their tasks, their files as LLM-Adapters names them, and what the paper reports."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from grass.errors import DataError
from grass.finetune.data import read_records
from grass.finetune.records import Conversation, Record
from grass.reproduce.options import TableName

MAX_SKIPPED = 0.01  # largest share of unusable training records: math_data.json has three without an output
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")
_PUNCTUATION = re.compile(r"[,;:!?\"'`]|\.(?!\d)")  # not what belongs to a number or an equation
T = TypeVar("T")
PAPER_MODELS = ("TinyLlama", "Gemma-2B", "LLaMA2-7B")


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Args:
        train: files with the training records of all tasks; the first that exists is used.
        tasks: folders of the tasks, each with a test.json; without a file of `train`, those that have a train.json
            are trained on.
        paper: average accuracy in percent by method, for each of `PAPER_MODELS`.
    """

    train: Sequence[str]
    tasks: Sequence[str]
    paper: Mapping[str, tuple[float, float, float]]


TABLES: dict[str, Table] = {
    "arithmetic": Table(
        ("math_10k.json", "math_data.json"),
        ("MultiArith", "gsm8k", "AddSub", "AQuA", "SingleEq", "SVAMP"),
        {
            "full": (33.48, 60.16, 60.46),
            "lora-r128": (29.84, 58.75, 58.83),
            "dora-r128": (33.36, 59.23, 59.23),
            "lisa": (33.63, 56.46, 56.57),
            "static": (30.69, 59.00, 56.59),
            "grass": (34.22, 60.65, 59.59),
        },
    ),
    "commonsense": Table(
        ("commonsense_170k.json",),
        (
            *("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande"),
            *("ARC-Easy", "ARC-Challenge", "openbookqa"),
        ),
        {
            "full": (39.34, 69.51, 77.80),
            "lora-r128": (37.20, 66.04, 75.29),
            "lisa": (37.34, 68.63, 75.05),
            "grass": (38.59, 69.30, 76.30),
        },
    ),
}
"""Source: the paper's tables of accuracy."""


@dataclass
class TableData:
    """Records of a table.

    Attributes:
        train: training records, each question once.
        validation: records that are held out of the training records, to choose learning rates.
        tests: test records of each task.
        shared: number of test records of each task that were left out, as they are among the training records.
        absent: tasks of the table without a file.
        num_skipped: number of training records that cannot be used.
        digests: SHA-256 of the training records and of each task's.
    """

    train: list[Conversation]
    validation: list[Conversation]
    tests: dict[str, list[Conversation]] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    num_skipped: int = 0
    digests: dict[str, str] = field(default_factory=dict)


def read_table(folder: Path, name: TableName, tasks: Sequence[str], validation: int) -> TableData:
    """Read the records of a table.

    Args:
        folder: folder with the files of LLM-Adapters.
        name: name of the table.
        tasks: some of its tasks; all that have files if there are none.
        validation: number of training records to hold out; the same ones for every run.

    Raises:
        DataError: a file is missing or malformed, or a task is not of the table.
    """
    table = TABLES[name]
    if unknown := [task for task in tasks if task not in table.tasks]:
        raise DataError(f"{unknown[0]} is no task of {name}: choose of {', '.join(table.tasks)}")
    wanted = tasks or table.tasks
    files = {task: folder / task / "test.json" for task in wanted}
    if tasks and (missing := [str(path) for path in files.values() if not path.is_file()]):
        raise DataError(f"{missing[0]}: no such file; pass --tasks without it")
    found = {task: path for task, path in files.items() if path.is_file()}
    if not found:
        raise DataError(
            f"{folder}: none of the tasks of {name} has a folder with a test.json there ({', '.join(wanted)}); get "
            "the folder `dataset` of the repository LLM-Adapters"
        )
    whole = [folder / file for file in table.train if (folder / file).is_file()]
    train_files = whole[:1] or [path for task in found if (path := folder / task / "train.json").is_file()]
    if not train_files:
        raise DataError(
            f"{folder}: no file to train on: {' or '.join(table.train)}, or a train.json of a task"
        )
    read = read_records([str(path) for path in train_files], max_skipped=MAX_SKIPPED)
    train = list({_folded(record): record for record in _conversations(read.records)}.values())
    random.Random(0).shuffle(train)
    if len(train) <= validation:
        raise DataError(
            f"{folder}: {len(train)} training records leave none after {validation} for validation: pass a smaller "
            "--validation"
        )
    result = TableData(train[validation:], train[:validation])
    result.num_skipped = len(read.bad)
    result.digests["train"] = read.digest
    result.absent = [task for task in wanted if task not in found]
    known = {_folded(record) for record in train}
    for task, path in found.items():
        of_task = read_records(str(path), evaluation=True)
        result.digests[task] = of_task.digest
        records = _conversations(of_task.records)
        result.tests[task] = [record for record in records if _folded(record) not in known]
        result.shared[task] = len(records) - len(result.tests[task])
        if not result.tests[task]:
            raise DataError(
                f"{path}: all of its records are among the training records; pass --tasks without it"
            )
        if unanswered := sum(record.answer is None for record in result.tests[task]):
            raise DataError(
                f"{path}: {unanswered:,} records have no answer, by which they are scored: complete them, or "
                "pass --tasks without it"
            )
    return result


def _conversations(records: Sequence[Record]) -> list[Conversation]:
    return [record for record in records if isinstance(record, Conversation)]


def _folded(record: Conversation) -> str:
    """Return the question without differences of case, white space, punctuation and thousands separators."""
    texts = " ".join(f"{m.content} {m.input}" for m in record.messages if m.role == "user").lower()
    return " ".join(_PUNCTUATION.sub(" ", _THOUSANDS.sub("", texts)).split())


def limited(items: Sequence[T], limit: int) -> Sequence[T]:
    """Return at most `limit` items, the same ones for every run."""
    return items if len(items) <= limit else random.Random(0).sample(list(items), limit)
