"""The run folder: one place on disk for all that a run reads again or leaves behind.

::

    run.json        the marker: options, method, versions, seed, command, state of the run
    metrics.jsonl   loss, learning rate, gradient norm and tokens a second; held-out results
    layers.jsonl    importance and probabilities at each refresh, the set at each draw
    layers.png      both over time
    checkpoints/    Trainer's checkpoints, from which `--resume` goes on
    model/          the result, for `AutoModelForCausalLM.from_pretrained`
    results.json    the numbers of the final table
    base/, data/    of the demo: the run that trains the small model, and the generated problems
"""

import json
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grass.errors import RunFolderError

MARKER = "run.json"


class RunFolder:
    """A folder that is a run of ours; make one with `create`, open one with `open`.

    Args:
        path: the folder.
        record: the content of its marker.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self.record = record
        self.metrics = path / "metrics.jsonl"
        self.layers = path / "layers.jsonl"
        self.picture = path / "layers.png"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.results = path / "results.json"

    @classmethod
    def create(cls, path: Path, record: Mapping[str, Any]) -> "RunFolder":
        """Make the folder and its marker.

        Raises:
            RunFolderError: the folder exists, or cannot be made.
        """
        check_is_free(path)
        try:
            path.mkdir(parents=True)
            folder = cls(path, {})
            folder.update(state="started", **record)
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be written ({error.strerror})") from None
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open an existing run.

        Raises:
            RunFolderError: no such folder, or not a run of ours.
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
        """``"started"``, ``"stopped"``, ``"trained"`` (evaluation and table are left) or ``"finished"``."""
        return str(self.record["state"])

    def update(self, **entries: Any) -> None:
        """Set entries of the marker; it is replaced as a whole, so that it is never half written."""
        self.record.update(entries)
        write_json(self.path / MARKER, self.record)

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint: the one whose last-written file is there."""
        found = {
            int(match[1]): path
            for path in (self.checkpoints.iterdir() if self.checkpoints.is_dir() else ())
            if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
            and (path / "trainer_state.json").is_file()
        }
        return found[max(found)] if found else None

    def forget_after(self, step: int) -> None:
        """Drop rows of steps after `step`: a run that goes on from there writes them again."""
        for path in (self.metrics, self.layers):
            if path.exists():
                kept = "".join(_line(row) for row in read_rows(path) if row["step"] <= step)
                _replace(path, kept)


def check_is_free(path: Path) -> None:
    """Refuse a folder that exists, with the remedy that fits it.

    Raises:
        RunFolderError: the path exists.
    """
    if not path.exists() and not path.is_symlink():
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
    """A new folder under runs/, named by the time."""
    stem = Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")
    path, number = stem, 2
    while path.exists():
        path, number = stem.with_name(f"{stem.name}-{number}"), number + 1
    return path


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a JSONL file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(row))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSONL file; none if it does not exist. A half-written last row is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one piece: a reader sees the old one or the new one."""
    _replace(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _line(row: Mapping[str, Any]) -> str:
    # NaN and infinity are no JSON: a diverged loss is written as null.
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(clean, ensure_ascii=False) + "\n"
