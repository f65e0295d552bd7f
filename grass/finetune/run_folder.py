"""Run folder: the files of a fine-tuning run.

::

    run.json        options, configuration, versions, seed, command line and state of the run
    metrics.jsonl   loss, learning rate, gradient norm and tokens per second; held-out results
    layers.jsonl    importance and probabilities at each refresh, layers at each draw
    layers.png      both over time
    loss.png        training and held-out loss over time
    checkpoints/    checkpoints of Trainer, from which `--resume` continues
    skipped.jsonl   file, line and reason of each training record that was skipped, if there are any
    answers.jsonl   prompt, expected answer, generated text, rule and score of each answered record, before and after
    model/          the trained model, for `AutoModelForCausalLM.from_pretrained`
    results.json    the values of the final table
    base/, data/    demo only: the run that trains the base model, and the generated problems
"""

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grass.errors import GrassError, RunFolderError

MARKER = "run.json"


class RunFolder:
    """Folder of a run, made by `create` or opened by `open`.

    Args:
        path: the folder.
        record: content of ``run.json``.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self.record = record
        self.metrics = path / "metrics.jsonl"
        self.layers = path / "layers.jsonl"
        self.picture = path / "layers.png"
        self.answers = path / "answers.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.results = path / "results.json"

    @classmethod
    def create(cls, path: Path, record: Mapping[str, Any]) -> "RunFolder":
        """Create the folder and its ``run.json``.

        Raises:
            RunFolderError: the folder exists and is not empty, or cannot be created.
        """
        check_is_free(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path, {})
            folder.update(state="started", **record)
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be written ({error.strerror})") from None
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open the folder of an existing run.

        Raises:
            RunFolderError: there is no such folder, or it was not created by `grass finetune`.
        """
        try:
            record = json.loads((path / MARKER).read_text(encoding="utf-8"))
        except OSError:
            reason = "no such folder" if not path.exists() else f"not a run of grass finetune (no {MARKER})"
            raise RunFolderError(f"{path}: {reason}") from None
        except ValueError:
            raise RunFolderError(f"{path / MARKER}: damaged, so the run cannot be continued") from None
        if not isinstance(record, dict) or "state" not in record:
            raise RunFolderError(f"{path / MARKER}: not a run of grass finetune")
        return cls(path, record)

    @property
    def state(self) -> str:
        """``"started"``, ``"stopped"``, ``"trained"`` (but not yet evaluated) or ``"finished"``."""
        return str(self.record["state"])

    def update(self, **entries: Any) -> None:
        """Set entries of ``run.json``, which is replaced atomically."""
        self.record.update(entries)
        write_json(self.path / MARKER, self.record)

    def last_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint: one with the file that Trainer writes last."""
        by_step = {
            int(match[1]): path
            for path in (self.checkpoints.iterdir() if self.checkpoints.is_dir() else ())
            if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
            and (path / "trainer_state.json").is_file()
        }
        return by_step[max(by_step)] if by_step else None

    def drop_rows_after(self, step: int) -> None:
        """Drop rows of steps after `step`, which a run that continues from there writes again."""
        for path in (self.metrics, self.layers):
            if path.exists():
                kept = "".join(_line(row) for row in read_rows(path) if row["step"] <= step)
                _replace(path, kept)


def check_is_free(path: Path) -> None:
    """Check that a path for a new run does not exist, or is an empty folder.

    Raises:
        RunFolderError: there is something; the message tells if the run in it can be continued.
    """
    is_missing = not path.exists() and not path.is_symlink()
    if is_missing or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        state = RunFolder.open(path).state
    except RunFolderError:
        raise RunFolderError(
            f"{path}: exists and is not a run of grass finetune; pass another --output"
        ) from None
    if state == "finished":
        raise RunFolderError(f"{path}: holds a finished run; pass another --output")
    raise RunFolderError(
        f"{path}: holds an unfinished run; continue it with --resume {path}, or pass another --output"
    )


def default_path() -> Path:
    """Return the path of a new folder in runs/, named by the current time."""
    stem = Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")
    path, number = stem, 2
    while path.exists():
        path, number = stem.with_name(f"{stem.name}-{number}"), number + 1
    return path


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a JSONL file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(row))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file atomically; remove it if there are no rows."""
    text = "".join(map(_line, rows))
    if text:
        _replace(path, text)
    else:
        path.unlink(missing_ok=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return all rows of a JSONL file, without an incomplete last one; an empty list if there is no file.

    Raises:
        GrassError: another line is not JSON.
    """
    if not path.exists():
        return []
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise GrassError(
                f"{path}, line {number}: not JSON; delete this line: what it records is lost, and may run again"
            ) from error
    with contextlib.suppress(json.JSONDecodeError):  # it was being written when the process was killed
        rows.append(json.loads(last))
    return rows


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically: readers see the old content or the new."""
    _replace(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _line(row: Mapping[str, Any]) -> str:
    # JSON has no NaN and infinity: a diverged loss is written as null.
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(clean, ensure_ascii=False) + "\n"
