"""Runs of a study: which are missing, and going on after a stop.

Would catch: a rate at the edge of what was tried, or chosen from runs of the results; a run done twice, or never; a row
that is lost when the study stops.
"""

from dataclasses import asdict
from itertools import islice

import pytest

from grass.finetune.run_folder import read_rows
from grass.reproduce.study import Job, Search, missing_jobs, run_missing

SEARCH = Search(rates=(1.0, 2.0, 4.0), pairs=((100, 0), (101, 0)))


def rows_of(losses, method="a"):
    return [
        {**asdict(Job("t", method, lr, *pair)), "log_loss": loss}
        for lr, loss in losses.items()
        for pair in SEARCH.pairs
    ]


def chosen(losses):
    return SEARCH.next_rates(rows_of(losses), "t", "a")


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


def test_a_rate_counts_when_it_was_run_on_all_pairs_and_other_rows_do_not():
    rows = rows_of({1.0: 3.0, 2.0: 1.0, 4.0: 2.0})
    assert SEARCH.next_rates(rows[:-1], "t", "a") == (None, [4.0])
    result = {**asdict(Job("t", "a", 4.0, 0, 0)), "log_loss": 0.0}
    assert SEARCH.next_rates([*rows, result], "t", "a") == (2.0, [])
    assert SEARCH.next_rates(rows, "t", "b") == (None, [1.0, 2.0, 4.0])


def test_a_method_may_use_the_rate_of_another():
    wanted = [("t", "b", [(0, 0), (1, 0)])]
    rows = rows_of({1.0: 3.0, 2.0: 1.0, 4.0: 2.0})
    searched = missing_jobs([], SEARCH, wanted, lambda method: "a")
    assert {job.method for job in searched} == {"a"}
    assert missing_jobs(rows, SEARCH, wanted, lambda method: "a") == [
        Job("t", "b", 2.0, 0, 0),
        Job("t", "b", 2.0, 1, 0),
    ]


def parabola(job):
    return {"log_loss": (job.lr - 2.0) ** 2 + job.order}


def jobs(rows):
    return missing_jobs(rows, SEARCH, [("t", "a", [(0, 0), (0, 1)])])


def test_a_stopped_study_goes_on_and_each_run_is_done_once(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    assert list(run_missing(jobs, parabola, path, seconds=0)) == []
    first = list(islice(run_missing(jobs, parabola, path), 3))
    assert [left for _, left in first] == [5, 4, 3]
    assert read_rows(path) == [row for row, _ in first]
    with path.open("a") as file:
        file.write('{"task": "t", "met')  # killed while it wrote
    list(run_missing(jobs, parabola, path))
    rows = read_rows(path)
    assert len({Job(*(row[k] for k in asdict(Job("t", "a", 1, 0, 0)))) for row in rows}) == len(rows) == 8
    assert [row["log_loss"] for row in rows[-2:]] == [0.0, 1.0]


def test_the_error_of_a_run_ends_the_study_and_keeps_what_is_finished(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ZeroDivisionError):
        list(run_missing(jobs, fails_at_four, path))
    assert [row["lr"] for row in read_rows(path)] == [1.0, 1.0, 2.0, 2.0]


def fails_at_four(job):
    return {"log_loss": 1 / (job.lr - 4.0)}
