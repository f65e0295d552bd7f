"""Reading of training data: JSON or JSONL files of records, the bad ones among them, and the held-out part.

A file may mix the kinds of `grass.finetune.records`. Every error names the file, and the line or the record.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from grass.errors import DataError
from grass.finetune.records import FORMATS, Record, parse_record


@dataclass(frozen=True)
class BadRecord:
    """Record that cannot be used.

    Attributes:
        file, line: its place; of a record of an array, the line in which it begins.
        record: its number in an array, from 1; None in JSONL.
        reason: the reason, with the remedy.
    """

    file: str
    line: int
    record: int | None
    reason: str

    def __str__(self) -> str:
        """Return place and reason."""
        number = "" if self.record is None else f" record {self.record}:"
        return f"{self.file}:{self.line}:{number} {self.reason}"


@dataclass(frozen=True)
class RecordFile:
    """Content of a data file.

    Attributes:
        records: the records that can be used.
        bad: the others.
        unused: number of records by name of a key that is not used.
    """

    records: list[Record]
    bad: list[BadRecord]
    unused: dict[str, int]


def read_records(path: str | Path, *, evaluation: bool = False, max_skipped: float = 0.0) -> RecordFile:
    """Read all records of a JSON file (an array) or a JSONL file (an object per line).

    Args:
        path: the file; a JSON file begins with ``[``.
        evaluation: accept records that have an answer and no output.
        max_skipped: largest fraction of bad records.

    Raises:
        DataError: the file is missing, unreadable, empty or malformed, or has more bad records; the message names the
            lines.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; pass one JSON or JSONL file") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    records: list[Record] = []
    bad: list[BadRecord] = []
    unused: Counter[str] = Counter()
    for line, number, item in _array(path, text) if text.lstrip().startswith("[") else _lines(text):
        try:
            record, keys = parse_record(_load(item) if number is None else item, evaluation=evaluation)
        except DataError as error:
            bad.append(BadRecord(str(path), line, number, str(error)))
        else:
            records.append(record)
            unused.update(keys)
    if not records and not bad:
        raise DataError(f"{path}: no records; expected objects with {FORMATS}")
    if len(bad) > max_skipped * (len(records) + len(bad)) + 1e-9:  # 0.29 * 100 is less than 29
        raise DataError(_too_many(bad, len(records) + len(bad), evaluation=evaluation))
    return RecordFile(records, bad, dict(unused))


def _too_many(bad: Sequence[BadRecord], total: int, *, evaluation: bool) -> str:
    kind = "lines" if bad[0].record is None else "records"
    places = ", ".join(str(b.record or b.line) for b in bad[:5]) + (", ..." if len(bad) > 5 else "")
    reasons = list(dict.fromkeys(b.reason for b in bad))
    also = f", also because: {'; '.join(reasons[1:4])}" if len(reasons) > 1 else ""
    remedy = "mend them"
    if evaluation:
        remedy += ": a score of the other records would not be that of the file"
    elif 2 * len(bad) <= total:
        remedy += f", or leave them out with --max-skipped {ceil(1000 * len(bad) / total) / 1000:g}"
    return f"{bad[0]}; {len(bad):,} of {total:,} records cannot be used ({kind} {places}){also}: {remedy}"


def _array(path: Path, text: str) -> Iterator[tuple[int, int, Any]]:
    """Yield line, number and value of the elements of a JSON array."""
    try:
        count = len(json.loads(text))  # the whole file must be valid before its records are parsed
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{path}: not valid JSON: nested too deeply") from None
    decoder, line, counted = json.JSONDecoder(), 1, 0
    end = text.index("[") + 1
    for index in range(1, count + 1):
        start = end
        while text[start] in ", \t\r\n":
            start += 1
        line, counted = line + text.count("\n", counted, start), start
        item, end = decoder.raw_decode(text, start)
        yield line, index, item


def _lines(text: str) -> Iterator[tuple[int, None, str]]:
    """Yield number and text of the lines that are not blank."""
    # Not splitlines(): JSON strings may contain U+2028 and similar characters, which do not end a line of JSONL.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, None, line


def _load(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON: {error.msg}") from None
    except RecursionError:
        raise DataError("not valid JSON: nested too deeply") from None


def split_heldout(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Split off a fraction of the records; equal records stay on the same side.

    Args:
        records: all records.
        fraction: fraction to hold out, in (0, 1); at least one distinct record is held out.
        seed: seed of the random choice.

    Returns:
        Training records and held-out records, in their original order.

    Raises:
        DataError: there are fewer than two distinct records.
    """
    distinct = list(dict.fromkeys(records))
    if len(distinct) < 2:
        raise DataError("cannot hold records out: there are fewer than two distinct ones")
    count = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    heldout = set(random.Random(seed).sample(distinct, count))
    return [r for r in records if r not in heldout], [r for r in records if r in heldout]


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file; a resumed run compares it to detect changed data."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
