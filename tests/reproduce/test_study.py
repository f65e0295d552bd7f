"""Runs of a study: which are missing, and going on after a stop.

Would catch: a rate at the edge of what was tried, or chosen from runs of the results; a run done twice, or never; a row
that is lost when the study stops; an error of a run that ends more than that run.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pytest

from grass.errors import GrassError
from grass.finetune.run_folder import read_rows
from grass.reproduce.study import Job, Search, missing_jobs, run_missing

SEARCH = Search(rates=(1.0, 2.0, 4.0), orders=(100, 101))


def rows_of(losses, method="a", base=0):
    return [
        {**asdict(Job("t", method, lr, base, order)), "log_loss": loss}
        for lr, loss in losses.items()
        for order in SEARCH.orders
    ]


def chosen(losses):
    return SEARCH.next_rates(rows_of(losses), "t", "a", [0])


def test_a_rate_is_chosen_if_its_neighbours_are_worse():
    assert chosen({}) == (None, [1.0, 2.0, 4.0])
    assert chosen({1.0: 3.0, 2.0: 1.0}) == (None, [4.0])
    assert chosen({1.0: 3.0, 2.0: 1.0, 4.0: 2.0}) == (2.0, [])
    assert chosen({1.0: 3.0, 2.0: 1.0, 4.0: None}) == (2.0, [])


def test_the_search_goes_on_beyond_its_edges_up_to_a_factor():
    assert chosen({1.0: 3.0, 2.0: 2.0, 4.0: 1.0}) == (None, [8.0])
    assert chosen({1.0: 3.0, 2.0: 2.0, 4.0: 1.0, 8.0: 2.0}) == (4.0, [])
    assert chosen({1.0: 1.0, 2.0: 2.0, 4.0: 3.0}) == (None, [0.5])
    falling = {2.0**i: -float(i) for i in range(6)}
    assert chosen(falling) == (32.0, [])


def test_a_rate_counts_when_it_was_run_on_all_orders_and_other_rows_do_not():
    rows = rows_of({1.0: 3.0, 2.0: 1.0, 4.0: 2.0})
    assert SEARCH.next_rates(rows[:-1], "t", "a", [0]) == (None, [4.0])
    result = {**asdict(Job("t", "a", 4.0, 0, 0)), "log_loss": 0.0}
    assert SEARCH.next_rates([*rows, *[result] * 2], "t", "a", [0]) == (2.0, [])
    assert SEARCH.next_rates(rows, "t", "b", [0]) == (None, [1.0, 2.0, 4.0])
    assert SEARCH.next_rates(rows, "t", "a", [1]) == (None, [1.0, 2.0, 4.0])


def test_all_bases_have_one_rate_and_a_method_may_use_that_of_another():
    """Best in the mean, not on either base."""
    wanted = [("t", "b", [(0, 0), (1, 0), (0, 1)])]
    rows = rows_of({1.0: 1.0, 2.0: 1.5, 4.0: 3.0}) + rows_of({1.0: 3.0, 2.0: 1.5, 4.0: 1.0}, base=1)
    searched = missing_jobs([], SEARCH, wanted, lambda method: "a")
    assert {job.method for job in searched} == {"a"}
    assert {job.base for job in searched} == {0, 1}
    assert missing_jobs(rows, SEARCH, wanted, lambda method: "a") == [
        Job("t", "b", 2.0, 0, 0),
        Job("t", "b", 2.0, 1, 0),
        Job("t", "b", 2.0, 0, 1),
    ]
    assert SEARCH.next_rates(rows[:-1], "t", "a", [0, 1]) == (None, [4.0])  # not run on all bases


def parabola(job):
    return {"log_loss": (job.lr - 2.0) ** 2 + job.order}


def jobs(rows):
    return missing_jobs(rows, SEARCH, [("t", "a", [(0, 0), (0, 1)])])


def test_a_stopped_study_goes_on_and_each_run_is_done_once(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    assert list(run_missing(jobs, parabola, path, seconds=0)) == []
    first = list(islice(run_missing(jobs, parabola, path), 3))
    assert [left for _, left in first] == [5, 4, 3]
    rows = read_rows(path)
    assert rows[:3] == [row for row, _ in first]
    with path.open("a") as file:
        file.write('{"task": "t", "met')  # killed while it wrote
    list(run_missing(jobs, parabola, path))
    rows = read_rows(path)
    assert len({Job(*(row[k] for k in asdict(Job("t", "a", 1, 0, 0)))) for row in rows}) == len(rows) == 8
    assert [row["log_loss"] for row in rows[-2:]] == [0.0, 1.0]


def test_a_lone_row_that_was_cut_off_does_not_damage_the_next_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"task": "t", "met')  # killed while it wrote the first row
    row, _ = next(run_missing(jobs, parabola, path))
    assert read_rows(path) == [row]


def test_a_run_that_diverges_is_no_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    for row, _ in run_missing(jobs, nan_at_four, path):
        assert row["log_loss"] is None or row["lr"] != 4.0
    assert {row["lr"] for row in read_rows(path) if row["order"] < 100} == {2.0}


def nan_at_four(job):
    return {"log_loss": float("nan") if job.lr == 4.0 else (job.lr - 2.0) ** 2}


def test_after_an_error_what_others_have_finished_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(GrassError, match="a run of a failed") as caught:
        list(run_missing(jobs, fails_at_one, path, workers=2))
    assert "(LibraryError: no kernel); finished runs are kept" in str(caught.value)
    assert any("fails_at_one" in note for note in caught.value.__notes__)  # the traceback
    assert [row["order"] for row in read_rows(path)] == [101]


class LibraryError(Exception):
    """Does not unpickle, as its arguments are others than those of Exception."""

    def __init__(self, what, code):
        super().__init__(f"no {what}")


def fails_at_one(job):
    if job.order == 101:
        time.sleep(1)
        return {"log_loss": 1.0}
    raise LibraryError("kernel", 7)


def test_a_process_that_is_killed_is_an_error_with_a_remedy(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(GrassError, match=r"the process of a run of a was killed; .* fewer --workers"):
        list(run_missing(jobs, dies_at_four, path))
    assert [row["lr"] for row in read_rows(path)] == [1.0, 1.0, 2.0, 2.0]


def dies_at_four(job):
    if job.lr == 4.0:
        os._exit(9)
    return {"log_loss": 1.0}


STOPPED = """
from pathlib import Path
from grass.reproduce.study import run_missing
from tests.reproduce.test_study import jobs, waits

try:
    for row, left in run_missing(jobs, waits, Path("rows.jsonl"), workers=2):
        print("finished", flush=True)
except KeyboardInterrupt:
    print("stopped")
"""


def waits(job):
    if job.lr > 1.0:
        Path(f"{os.getpid()}.running").touch()
        time.sleep(600)
    return {"log_loss": 1.0}


def processes_of(folder):
    return [int(path.stem) for path in folder.glob("*.running")]


def is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{process}/stat").read_text().split()[2]


def start_and_wait_for_runs(folder):
    """Start a study of two workers, and return when both are in a run that takes some time."""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Pytest may have been started with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    end = time.monotonic() + 120
    while len(processes_of(folder)) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    assert len(processes_of(folder)) == 2
    return process


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda sign: sign.name)
def test_a_stop_ends_all_processes_without_a_traceback_and_keeps_what_is_finished(tmp_path, sign):
    """SIGINT reaches the whole group, as Ctrl-C does, the others the first process only."""
    process = start_and_wait_for_runs(tmp_path)
    workers = processes_of(tmp_path)
    (os.killpg if sign == signal.SIGINT else os.kill)(process.pid, sign)
    output, _ = process.communicate(timeout=60)
    assert "Traceback" not in output
    assert output.startswith("finished\nfinished\n")
    assert (output.splitlines()[-1] == "stopped") == (sign == signal.SIGINT)
    assert len(read_rows(tmp_path / "rows.jsonl")) == 2
    assert not any(map(is_alive, workers))
