"""Reading of training data: JSON or JSONL files with three kinds of records.

========================================================  ==========================================
``{"instruction", "input"?, "output", "answer"?}``        `Instruction`, the format of LLM-Adapters
``{"messages": [{"role", "content"}, ...], "answer"?}``   `Chat`
``{"text"}``                                              `PlainText`
========================================================  ==========================================

A file may mix the kinds. Every error names the file, and the line or the record.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grass.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
FORMATS = '"instruction" and "output", or "messages", or "text"'


@dataclass(frozen=True)
class Instruction:
    """Task and solution; evaluation compares the generated text with `answer`, if there is one."""

    instruction: str
    output: str
    input: str = ""
    answer: str | None = None


@dataclass(frozen=True)
class Chat:
    """Conversation as (role, content) pairs, with at least one message of the assistant."""

    messages: tuple[tuple[str, str], ...]
    answer: str | None = None


@dataclass(frozen=True)
class PlainText:
    """Text of which every token is a target."""

    text: str
    answer: None = None


Record = Instruction | Chat | PlainText


def read_records(path: str | Path) -> list[Record]:
    """Read all records of a JSON file (an array) or a JSONL file (an object per line).

    Args:
        path: the file; a JSON file begins with ``[``.

    Raises:
        DataError: the file is missing, unreadable, empty or malformed; the message names the line.
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
    objects = _array(path, text) if text.lstrip().startswith("[") else _lines(path, text)
    records = [_parse(place, item) for place, item in objects]
    if not records:
        raise DataError(f"{path}: no records; expected objects with {FORMATS}")
    return records


def _array(path: Path, text: str) -> Iterator[tuple[str, Any]]:
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
        yield f"{path}:{line}: record {index}", item


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines(): JSON strings may contain U+2028 and similar characters, which do not end a line of JSONL.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not valid JSON: {error.msg}") from None
        except RecursionError:
            raise DataError(f"{path}:{number}: not valid JSON: nested too deeply") from None


def _parse(place: str, item: Any) -> Record:
    if not isinstance(item, dict):
        raise DataError(f"{place}: expected an object with {FORMATS}, found {_kind(item)}")
    if "messages" in item:
        return Chat(_messages(place, item["messages"]), _answer(place, item))
    if "instruction" in item and "output" in item:
        return Instruction(
            _text(place, item, "instruction"),
            _text(place, item, "output"),
            # Some files have null for a missing input.
            _text(place, item, "input", may_be_empty=True) if item.get("input") is not None else "",
            _answer(place, item),
        )
    if "text" in item:
        return PlainText(_text(place, item, "text"))
    keys = ", ".join(json.dumps(key) for key in list(item)[:6]) or "no keys"
    raise DataError(f"{place}: expected {FORMATS}; found {keys}")


def _text(place: str, item: dict[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    value = item[key]
    if not isinstance(value, str):
        raise DataError(f'{place}: "{key}" must be a string, not {_kind(value)}')
    if not value.strip() and not may_be_empty:
        raise DataError(f'{place}: "{key}" is empty')
    return value


def _answer(place: str, item: dict[str, Any]) -> str | None:
    value = item.get("answer")
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f'{place}: "answer" must be a string or a number, not {_kind(value)}')
    return str(value)


def _messages(place: str, value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f'{place}: "messages" must be a non-empty list')
    turns = []
    for index, message in enumerate(value, start=1):
        location = f"{place}: message {index}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise DataError(f'{location}: expected an object with "role" and "content"')
        role = message["role"]
        if role not in ROLES:
            raise DataError(f"{location}: role must be one of {', '.join(ROLES)}, not {json.dumps(role)}")
        turns.append((role, _text(location, message, "content", may_be_empty=role != "assistant")))
    if not any(role == "assistant" for role, _ in turns):
        raise DataError(f"{place}: no message of the assistant: there is nothing to learn")
    return tuple(turns)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


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
