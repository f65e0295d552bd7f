"""The run folder.

Would catch: a foreign or finished folder written into; a half-saved checkpoint taken for the newest one; rows
of steps that a resumed run takes again; a broken last row that stops a resume; NaN written as no JSON.
"""

import json

import pytest

from grass import GrassError, RunFolderError
from grass.finetune.run_folder import RunFolder, append_row, check_is_free, read_rows


def test_create_open_update(tmp_path):
    folder = RunFolder.create(tmp_path / "a" / "b", {"seed": 3})
    folder.update(state="trained")
    again = RunFolder.open(tmp_path / "a" / "b")
    assert (again.state, again.record["seed"]) == ("trained", 3)
    assert [p.name for p in again.path.iterdir()] == ["run.json"]


def test_existing_folders_are_refused_with_the_remedy(tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "file").write_text("x")
    with pytest.raises(RunFolderError, match="is not a run of grass finetune; pass another --output"):
        RunFolder.create(foreign, {})
    assert [path.name for path in foreign.iterdir()] == ["file"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="not a run"):
        check_is_free(tmp_path / "file")
    folder = RunFolder.create(tmp_path / "run", {})
    with pytest.raises(RunFolderError, match="unfinished run; continue it with --resume"):
        check_is_free(folder.path)
    folder.update(state="finished")
    with pytest.raises(RunFolderError, match="finished run; pass another --output"):
        check_is_free(folder.path)
    (tmp_path / "empty").mkdir()
    assert RunFolder.create(tmp_path / "empty", {}).state == "started"
    with pytest.raises(RunFolderError, match="cannot be written"):
        RunFolder.create(tmp_path / "file" / "below", {})


def test_open_refuses_what_is_no_run(tmp_path):
    with pytest.raises(RunFolderError, match="no such folder"):
        RunFolder.open(tmp_path / "none")
    with pytest.raises(RunFolderError, match=r"no run\.json"):
        RunFolder.open(tmp_path)
    for text, says in (("{", "damaged"), ("[]", "not a run"), ("{}", "not a run")):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(RunFolderError, match=says):
            RunFolder.open(tmp_path)


def test_the_last_checkpoint_is_the_newest_complete_one(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {})
    assert folder.last_checkpoint() is None
    for step, complete in ((9, True), (10, True), (100, False)):
        checkpoint = folder.checkpoints / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        if complete:
            (checkpoint / "trainer_state.json").write_text("{}")
    assert folder.last_checkpoint() == folder.checkpoints / "checkpoint-10"


def test_rows_after_the_checkpoint_are_forgotten(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {})
    for step in (0, 10, 20):
        append_row(folder.metrics, {"step": step, "loss": float("nan")})
    with folder.metrics.open("a") as file:
        file.write('{"step": 30, "lo')  # the process died here
    assert [row["step"] for row in read_rows(folder.metrics)] == [0, 10, 20]
    folder.drop_rows_after(10)
    append_row(folder.metrics, {"step": 11, "loss": 1.0})
    assert [row["step"] for row in read_rows(folder.metrics)] == [0, 10, 11]
    first = folder.metrics.read_text().splitlines()[0]
    assert json.loads(first, parse_constant=pytest.fail) == {"step": 0, "loss": None}
    assert read_rows(folder.layers) == []


def test_rows_are_not_lost_by_a_missing_end_of_line_nor_by_a_damaged_line(tmp_path):
    """A row that is complete, whose end of line an editor has dropped; a line that is not JSON, but not the last."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(GrassError, match=r"rows.jsonl, line 2: not JSON; delete this line"):
        read_rows(path)
