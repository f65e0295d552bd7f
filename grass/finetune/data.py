"""Reading of training data: files, folders and data sets of the hub, the bad records in them, and the held-out part.

JSON and CSV are read by Python's own parsers, so that every error names the file and the line; all else by `datasets`.
"""

import csv
import gzip
import hashlib
import io
import json
import random
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from grass.errors import DataError, library_errors
from grass.finetune.records import FORMATS, Record, parse_record, rename_keys
from grass.hub import check_hub

_CSV = {".csv": ",", ".tsv": "\t"}
_FILES = (
    ".json",
    ".jsonl",
    ".ndjson",
    ".csv",
    ".tsv",
    ".parquet",
    ".gz",
    ".txt",
    ".zip",
)  # never a name on the hub
_NOT_BLANK = re.compile(r"\S")
_REST_OF_LINE = re.compile(r"[^\n]*")


@dataclass(frozen=True)
class BadRecord:
    """Record that cannot be used.

    Attributes:
        file, line: its place; of an object, the line in which it begins. The line is None if the file has none.
        record: its number, from 1; None in JSONL.
        reason: the reason, with the remedy.
    """

    file: str
    line: int | None
    record: int | None
    reason: str

    def __str__(self) -> str:
        """Return place and reason."""
        return f"{_place(self.file, self.line, self.record)}: {self.reason}"


def _place(source: str, line: int | None, record: int | None) -> str:
    place = source if line is None else f"{source}:{line}"
    return place if record is None else f"{place}: record {record}"


@dataclass(frozen=True)
class Records:
    """Content of a source, or of several.

    Attributes:
        records: the records that can be used.
        bad: the others.
        unused: number of records by name of a key that is not used.
        digest: SHA-256 of all records; a resumed run compares it to detect changed data.
    """

    records: list[Record]
    bad: list[BadRecord]
    unused: dict[str, int]
    digest: str


@dataclass(frozen=True)
class _Row:
    line: int | None
    record: int | None
    value: Any  # an object, or the error that it is


def read_records(
    sources: str | Path | Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    evaluation: bool = False,
    max_skipped: float = 0.0,
) -> Records:
    """Read all records of one or several sources.

    Args:
        sources: a file (JSON, JSONL, CSV, TSV, parquet or text, possibly with .gz), a folder that `datasets` can load,
            or a data set of the hub: ``name``, ``name:configuration`` or ``name:configuration:split``; or several.
        columns: new name of each key to be renamed.
        evaluation: accept records that have an answer and no reply.
        max_skipped: largest fraction of bad records.

    Raises:
        DataError: a source is missing, unreadable, empty or malformed, or there are more bad records; the message
            names their places.
    """
    records: list[Record] = []
    bad: list[BadRecord] = []
    unused: Counter[str] = Counter()
    digest = hashlib.sha256()
    missing = set(columns or ())
    for source in [sources] if isinstance(sources, (str, Path)) else sources:
        count = len(records) + len(bad)
        for row in _rows(str(source)):
            digest.update(repr(row.value).encode("utf-8", "backslashreplace"))
            try:
                if isinstance(row.value, DataError):
                    raise row.value
                if missing and isinstance(row.value, dict):
                    missing -= row.value.keys()
                record, keys = parse_record(rename_keys(row.value, columns or {}), evaluation=evaluation)
            except DataError as error:
                bad.append(BadRecord(str(source), row.line, row.record, str(error)))
            else:
                records.append(
                    replace(record, source=str(source), place=_place(str(source), row.line, row.record))
                )
                unused.update(keys)
        if len(records) + len(bad) == count:
            raise DataError(f"{source}: no records; expected objects with {FORMATS}")
    if missing:
        raise DataError(
            f"no record has the column {json.dumps(min(missing))} that is to be renamed (--columns)"
        )
    if len(bad) > max_skipped * (len(records) + len(bad)) + 1e-9:  # 0.29 * 100 is less than 29
        raise DataError(_too_many(bad, len(records) + len(bad), evaluation=evaluation))
    return Records(records, bad, dict(unused), digest.hexdigest())


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


def _rows(source: str) -> Iterator[_Row]:
    """Yield the rows of a source."""
    path = Path(source)
    if path.is_file():
        suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
        if suffix == ".parquet":
            return _table(source, "parquet", data_files=source)
        text = _read_text(path)
        if suffix == ".txt":
            return iter([_Row(1, None, {"text": text})])
        return _csv(path, text, _CSV[suffix]) if suffix in _CSV else _json(path, text)
    check_source(source)
    if path.is_dir():
        return _table(source, source)
    name, configuration, split = (*source.split(":", 2), "", "")[:3]
    return _table(source, name, name=configuration or None, split=split or "train")


def check_source(source: str) -> None:
    """Check what can be known of a source at once: that it exists, or can be a name on the hub.

    Raises:
        DataError: it does not exist.
    """
    path = Path(source)
    if path.exists():
        return
    if path.suffix in _FILES or path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise DataError(f"{source}: no such file, and not the name of a data set on the hub (owner/name)")


def _table(source: str, path: str, **options: Any) -> Iterator[_Row]:
    """Yield the rows of what `datasets` loads: a parquet file, a folder or a data set of the hub."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source}: this kind of data needs the package datasets: pip install 'grass-optim[finetune]'"
        ) from error
    remedy = "check the files, and that the cache of datasets can be written (HF_HOME)"
    if not Path(source).exists():
        check_hub(path, "dataset")
        remedy = "check name, configuration and split (owner/name:configuration:split)"
    with library_errors(DataError, f"{source}: cannot be loaded", remedy):
        if Path(path, "state.json").exists() or Path(path, "dataset_dict.json").exists():  # by `save_to_disk`
            loaded = datasets.load_from_disk(path)
            rows = loaded["train"] if isinstance(loaded, dict) else loaded
        else:
            rows = datasets.load_dataset(path, split=options.pop("split", "train"), **options)
    for number, row in enumerate(rows, start=1):
        yield _Row(None, number, row)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{data[: error.start].count(10) + 1}: not UTF-8 text") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged ({error}): copy or download it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _csv(path: Path, text: str, delimiter: str) -> Iterator[_Row]:
    """Yield the rows of a table whose first line names the columns. All values are strings."""
    head = text.split("\n", 1)[0]
    if delimiter not in head and ";" in head:
        delimiter = ";"  # where the comma is a decimal point
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        for number, row in enumerate(reader, start=1):
            value: Any = {key: cell for key, cell in row.items() if cell is not None}
            if None in row:
                value = DataError(
                    f"{len(row[None])} more cells than columns: put texts with {delimiter!r} in quotes"
                )
            yield _Row(line + 1, number, value)
            line = reader.line_num
    except csv.Error as error:
        raise DataError(f"{path}:{line + 1}: not a valid table: {error}") from None


def _json(path: Path, text: str) -> Iterator[_Row]:
    """Yield the objects of a JSON file: an array, an object that holds one, or objects one after another."""
    if text.lstrip().startswith("["):
        return _array(path, text)
    rows = list(_objects(text))
    if len(rows) == 1 and isinstance(rows[0].value, dict):
        lists = [v for v in rows[0].value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        is_record = any(key in rows[0].value for key in ("messages", "conversations", "prompt"))
        if len(lists) == 1 and not is_record:  # {"data": [...]}
            return (_Row(None, number, value) for number, value in enumerate(lists[0], start=1))
    return iter(rows)


def _array(path: Path, text: str) -> Iterator[_Row]:
    """Yield the elements of a JSON array."""
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
        yield _Row(line, index, item)


def _objects(text: str) -> Iterator[_Row]:
    """Yield JSON values, each of which begins on a line of its own and may take several lines."""
    decoder, line, counted, end = json.JSONDecoder(), 1, 0, 0
    while (found := _NOT_BLANK.search(text, end)) is not None:
        start = found.start()
        line, counted = line + text.count("\n", counted, start), start
        try:
            value, end = decoder.raw_decode(text, start)
            if (rest := _REST_OF_LINE.match(text, end)) is not None and rest[0].strip():
                raise json.JSONDecodeError("Extra data", text, end)
        except json.JSONDecodeError as error:
            value, end = DataError(f"not valid JSON: {error.msg}"), _end_of_broken(text, start)
        except RecursionError:
            value, end = DataError("not valid JSON: nested too deeply"), _end_of_broken(text, start)
        yield _Row(line, None, value)


def _end_of_broken(text: str, start: int) -> int:
    """Return the end of a broken object: its line, and the indented lines and closing brackets after it."""
    end = text.find("\n", start) + 1 or len(text)
    while end < len(text) and text[end] in " \t}]":
        end = text.find("\n", end) + 1 or len(text)
    return end


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
