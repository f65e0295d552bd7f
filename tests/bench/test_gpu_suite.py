"""`make gpu`, rehearsed without a GPU.

Failures these tests catch: a process that outlives its limit, or leaves others behind; one that stops those after it,
or beside it; time that nobody uses; a failed test that the exit code does not tell, or a failed benchmark that it
does; a benchmark that fails without a row; rows that appear only at the end, twice or in halves; more or larger files
than come back from a machine; a process that needs what a GPU machine may lack; rows of an uncommitted tree that nobody
was warned of.
"""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.__main__ import main, make_parser
from bench.gpu import process, sanitized, smoke, stages, suite
from bench.gpu.process import LogTail, RowTail
from bench.gpu.rehearsal import SIZES, rehearsal
from bench.gpu.stages import CHART, ROOT, ROWS, SECONDS, Stage, Task, make_stages
from bench.gpu.suite import FILES, Suite

MOST_FILES, MOST_BYTES = 8, 16 * 2**20


class Clock:
    """A clock that stands still, and jumps when a file appears.

    Args:
        jumps: the time that it shows once a file is there.
    """

    def __init__(self, jumps: dict[Path, float] | None = None) -> None:
        self.jumps = jumps or {}

    def __call__(self) -> float:
        return max([0.0, *(time for path, time in self.jumps.items() if path.exists())])


def task(name: str, script: str, **other) -> Task:
    return Task(name, ("sh", "-c", script, ROWS), **other)


def stage(*tasks: Task, kind: str = "bench", seconds: float = 30.0, **other) -> Stage:
    return Stage(tasks[0].name, "a stage", kind, seconds, tasks, **other)


def run_suite(
    out: Path, *chosen: Stage, clock: Clock | None = None, **options
) -> tuple[int, dict[str, dict]]:
    """The exit code, and the results by task, of a run of as many seconds as the stages have."""
    scratch = out / "scratch"
    scratch.mkdir()
    minutes = sum(s.seconds for s in chosen) / 60
    made = Suite(out, chosen, minutes, {"gpu": "a card"}, scratch, clock=clock or Clock(), **options)
    code = made.run()
    return code, {result["task"]: result for result in summary(out)["tasks"]}


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def statuses(results: dict[str, dict]) -> list[str]:
    return [result["status"] for result in results.values()]


def is_gone(pid: int) -> bool:
    """True if a process has ended; a zombie that nobody has waited for counts."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


# -- the whole of it -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_run_at_a_tiny_size_with_a_crash_and_a_hang(tmp_path, monkeypatch, capsys):
    """All commands of a GPU; the clock ends the one that hangs."""
    out, hung, child = tmp_path / "out", tmp_path / "hung", tmp_path / "child"
    crash = task(
        "crash", 'echo \'{"suite": "crash"}\' > $0; printf \'{"half\' >> $0; echo CUDA error; kill -SEGV $$'
    )
    hang = task("hang", f"sleep 600 & echo $! > {child}; touch {hung}; wait", row={"suite": "training"})
    clock = Clock()

    def with_accidents(made: list[Stage], folder: Path) -> list[Stage]:
        chosen = rehearsal(made, folder)
        chosen[3:3] = [stage(crash), stage(hang)]
        total = sum(s.seconds for s in chosen)
        clock.jumps[hung] = 540 / total * sum(s.seconds for s in chosen[:5]) + 1
        return chosen

    monkeypatch.setattr(suite, "rehearsal", with_accidents)
    monkeypatch.setattr(suite, "Suite", functools.partial(Suite, clock=clock))
    predictions = tmp_path / "predictions"
    predictions.write_text("")
    assert main(["gpu", "--rehearse", "--output", str(out), "--predictions", str(predictions)]) == 0
    printed = capsys.readouterr().out

    results = {result["task"]: result for result in summary(out)["tasks"]}
    made = [t.name for s in make_stages() for t in s.tasks]
    assert sorted(results) == sorted([*made, "crash", "hang"])
    others = {name: result["status"] for name, result in results.items() if result["status"] != "passed"}
    assert (others.pop("crash"), others.pop("hang")) == ("failed", "killed")
    need_a_gpu = {"tests-rounding", "tests-offload", "tests-torch", "memcheck", "racecheck"}
    assert others.keys() <= need_a_gpu, (out / "log.txt").read_text() + (out / "tests.txt").read_text()
    assert set(others.values()) <= {"left out"}
    assert all(f"\n{name} " in printed for name in list(results)[1:])
    assert summary(out)["tests_passed"] is True
    assert is_gone(int(child.read_text()))

    rows = rows_of(out)
    assert {row["suite"] for row in rows} == {"smoke", "kernels", "offload", "training", "crash", "run"}
    accidents = [row for row in rows if row.get("task") in ("crash", "hang")]
    assert [(row["suite"], row["measured"], row["reason"]) for row in accidents] == [
        ("run", False, "failed: exit code -11: CUDA error"),
        ("training", False, "killed: it reached its limit"),
    ]
    trained = [row for row in rows if row["suite"] == "training" and "task" not in row]
    assert [row["method"] for row in trained] == list(stages.METHODS)
    assert {(row["measured"], row["predicted_peak_gib"]) for row in trained} == {(True, None)}

    left = list(out.rglob("*"))
    assert {str(path.relative_to(out)) for path in left} <= set(FILES)
    assert {"rows.jsonl", "environment.json", "summary.json", "tests.txt", "log.txt"} <= {
        p.name for p in left
    }
    assert len(FILES) <= MOST_FILES
    assert all(path.stat().st_size < MOST_BYTES for path in left)
    assert json.loads((out / "environment.json").read_text())["torch"] == torch.__version__
    assert re.search(r"^tests-mixtures\| .*PASSED", (out / "tests.txt").read_text(), re.MULTILINE)
    assert "\nsmoke| bf16-bf16-bf16 " in (out / "log.txt").read_text()


def test_a_rehearsal_is_of_the_same_processes(tmp_path):
    """Its commands are those of a GPU with sizes after them, so what was rehearsed is what runs."""
    made = make_stages()
    for ours, theirs in zip(rehearsal(made, tmp_path), made, strict=True):
        for mine, its in zip(ours.tasks, theirs.tasks, strict=True):
            assert mine.command[: len(its.command)] == its.command
            assert (len(mine.command) > len(its.command)) == (theirs.name in SIZES)


def test_what_travels_with_a_run_is_predicted_before(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(suite.training, "write_predictions", lambda *arguments: asked.append(arguments))
    assert main(["gpu", "--predict", str(tmp_path / "file")]) == 0
    assert main(["gpu", "--predict"]) == 0
    methods = list(stages.METHODS)
    assert asked == [(path, methods, 1024) for path in (tmp_path / "file", stages.PREDICTIONS)]
    given = tmp_path / "predictions"
    assert main(["gpu", "--list", "--predictions", str(given)]) == 2
    assert f"--predictions {given}: no such file" in capsys.readouterr().err
    given.write_text("")
    for default, options in ((tmp_path / "nowhere", ["--predictions", str(given)]), (given, [])):
        monkeypatch.setattr(suite, "PREDICTIONS", default)
        assert main(["gpu", "--list", *options]) == 0
        assert capsys.readouterr().out.count(f"--predictions {given}") == len(methods)
    monkeypatch.setattr(suite, "PREDICTIONS", tmp_path / "nowhere")
    assert main(["gpu", "--list"]) == 0
    assert "--predictions" not in capsys.readouterr().out


def test_a_rehearsal_does_not_end_up_among_the_results(capsys):
    assert main(["gpu", "--rehearse"]) == 2
    assert "--rehearse needs --output" in capsys.readouterr().err


# -- limits and what becomes of a process --------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "end", "status", "exit_code", "passed"),
    [
        ("tests", "exit 0", "passed", 0, True),
        ("tests", "exit 1", "failed", 1, False),
        ("tests", "exit 5", "left out", 0, None),
        ("tests", "touch {late}; sleep 600", "killed", 1, False),
        ("check", "exit 1", "failed", 1, False),
        ("check", "touch {late}; sleep 600", "killed", 0, None),
        ("sanitizer", "exit 86", "failed", 1, False),
        ("sanitizer", "exit 255", "left out", 0, None),
        ("bench", "exit 1", "failed", 0, None),
        ("bench", "exit 5", "failed", 0, None),
        ("bench", "kill -KILL $$", "failed", 0, None),
    ],
)
def test_what_becomes_of_a_process(tmp_path, kind, end, status, exit_code, passed):
    late = tmp_path / "late"
    one = stage(task("one", f"echo begun; {end.format(late=late)}"), kind=kind)
    code, results = run_suite(tmp_path, one, stage(task("two", "")), clock=Clock({late: 31.0}))
    assert statuses(results) == [status, "passed"]
    assert (code, summary(tmp_path)["tests_passed"]) == (exit_code, passed)
    failures = [row for row in rows_of(tmp_path) if row["task"] == "one"]
    assert len(failures) == (kind == "bench")
    text = tmp_path / ("tests.txt" if kind == "tests" else "log.txt")
    assert text.read_text() == "one| begun\n"


def test_a_command_that_does_not_exist_is_a_failure(tmp_path):
    code, results = run_suite(tmp_path, stage(Task("one", ("/nowhere/at/all",))), stage(task("two", "")))
    assert (code, statuses(results)) == (0, ["failed", "passed"])
    assert results["one"]["reason"] == "cannot be started: No such file or directory"


def test_at_its_limit_a_process_may_finish_its_report_and_is_stopped_with_all_it_started(
    tmp_path, monkeypatch
):
    """One writes a last row when it is asked to stop; one ignores that, and has a child of its own."""
    monkeypatch.setattr(process, "GRACE", 0.5)
    late, later = tmp_path / "late", tmp_path / "later"
    (tmp_path / "rows.jsonl").write_text('{"old": 1}\n')
    asked = f"""
        finish() {{ echo report; echo '{{"last": 1}}' >> $0; exit 1; }}
        trap finish INT
        echo begun; echo '{{"new": 1}}' >> $0; sleep 600 & touch {late}; wait
    """
    deaf = f"trap '' INT; sleep 600 & echo $!; touch {later}; wait"
    _, results = run_suite(
        tmp_path,
        stage(task("asked", asked)),
        stage(task("deaf", deaf)),
        stage(task("last", "echo here")),
        clock=Clock({late: 31.0, later: 61.0}),
    )
    assert statuses(results) == ["killed", "killed", "passed"]
    assert results["asked"]["reason"] == "it reached its limit"
    begun, report, child, here = (tmp_path / "log.txt").read_text().splitlines()
    assert (begun, report, here) == ("asked| begun", "asked| report", "last| here")
    assert is_gone(int(child.removeprefix("deaf| ")))
    assert [row for row in rows_of(tmp_path) if "suite" not in row] == [{"new": 1}, {"last": 1}]
    assert results["asked"]["rows"] == 2


def test_what_a_process_leaves_running_is_stopped(tmp_path):
    _, results = run_suite(tmp_path, stage(task("one", "sleep 600 & echo $!")))
    assert statuses(results) == ["passed"]
    assert is_gone(int((tmp_path / "log.txt").read_text().removeprefix("one| ")))


def test_tasks_of_a_stage_one_by_one_share_its_time_and_what_is_left_goes_on(tmp_path):
    """The first may take 20 s of 30; if it takes none, the second has all 30, and the next stage 60."""
    tasks = (task("one", "", seconds=2.0), task("two", "echo {seconds}", seconds=1.0))
    _, results = run_suite(tmp_path, stage(*tasks), stage(task("three", "")))
    assert [result["limit"] for result in results.values()] == [20.0, 30.0, 60.0]


def test_a_hang_in_a_parallel_stage_delays_nobody(tmp_path):
    late = tmp_path / "late"
    # Where the others do not run beside it, it ends soon, and passes.
    wait = f"for i in $(seq 99); do [ -e {tmp_path}/two ] && touch {late} && sleep 600; sleep 0.1; done"
    hang = task("hang", wait)
    others = [task(name, f"touch {tmp_path}/{name}") for name in ("one", "two")]
    tests = stage(hang, *others, kind="tests", parallel=True)
    code, results = run_suite(tmp_path, tests, stage(task("next", "")), clock=Clock({late: 31.0}), cores=2)
    assert code == 1
    assert {name: result["status"] for name, result in results.items()} == {
        "one": "passed", "two": "passed", "hang": "killed", "next": "passed",
    }  # fmt: skip
    assert [results[name]["limit"] for name in ("hang", "two", "next")] == [30.0, 30.0, 29.0]


def test_a_task_is_left_out_without_time_or_what_it_needs(tmp_path):
    late = tmp_path / "late"
    lacking = stage(task("lacking", "", missing="no expecttest"), kind="tests")
    slow = stage(task("slow", f"touch {late}; sleep 600"), task("none", "echo here", seconds=0.1))
    code, results = run_suite(tmp_path, lacking, slow, clock=Clock({late: 59.9}))
    assert statuses(results) == ["left out", "killed", "left out"]
    assert [results[name]["reason"] for name in ("lacking", "none")] == ["no expecttest", "no time left"]
    assert not (tmp_path / "log.txt").exists()
    assert code == 0


@pytest.mark.parametrize(("spent", "status"), [(19.0, "passed"), (21.0, "left out")])
def test_a_task_of_no_seconds_takes_what_the_others_leave(tmp_path, spent, status):
    late = tmp_path / "late"
    tasks = (task("one", f"touch {late}", seconds=30.0), task("two", "", seconds=0.0))
    _, results = run_suite(tmp_path, stage(*tasks), stage(task("three", "")), clock=Clock({late: spent}))
    assert statuses(results) == ["passed", status, "passed"]


def test_a_run_that_is_stopped_stops_what_it_started_and_keeps_what_it_has(tmp_path):
    def too_early(number, frame):
        pytest.fail("the suite does not heed SIGTERM")

    before = signal.signal(signal.SIGTERM, too_early)
    try:
        script = "sleep 600 & echo $!; echo '{\"a\": 1}' > $0; kill -TERM $PPID; wait"
        with pytest.raises(KeyboardInterrupt, match="what was measured is in"):
            run_suite(tmp_path, stage(task("one", script)), stage(task("two", "")))
        assert signal.getsignal(signal.SIGTERM) is too_early
    finally:
        signal.signal(signal.SIGTERM, before)
    assert is_gone(int((tmp_path / "log.txt").read_text().removeprefix("one| ")))
    assert rows_of(tmp_path)[0] == {"a": 1}
    (result,) = summary(tmp_path)["tasks"]
    assert (result["status"], result["reason"]) == ("killed", "the run was stopped")


def test_what_a_process_is_given(tmp_path, monkeypatch):
    """The source tree as its place and on its path, its own variables, no interpreter, its time."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.chdir(tmp_path)
    script = 'echo "$PWD ${PYTHONPATH%%:*} ${TRITON_INTERPRET-unset} $X $0 $1"'
    one = Task("one", ("sh", "-c", script, SECONDS, CHART))
    _, results = run_suite(tmp_path, stage(one, environment={"X": "y"}))
    assert statuses(results) == ["passed"]
    # of 30 seconds, with room for the rest
    expected = f"one| {ROOT} {ROOT} unset y 21 {tmp_path / 'chart.png'}\n"
    assert (tmp_path / "log.txt").read_text() == expected


# -- what is passed on ---------------------------------------------------------------------------------


def test_rows_are_passed_on_as_they_come(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    tail = RowTail(source, target)
    tail.pass_on()  # there is none yet
    with source.open("w") as out:
        for text, expected in (
            ('{"a"', ""),
            (": 1}\n", '{"a": 1}\n'),
            ('{"b": 2}\n{', '{"a": 1}\n{"b": 2}\n'),
        ):
            out.write(text)
            out.flush()
            tail.pass_on()
            assert (target.read_text() if target.exists() else "") == expected
    tail.end()
    assert target.read_text() == '{"a": 1}\n{"b": 2}\n'
    assert tail.lines == 2


def test_of_a_long_output_the_beginning_and_the_end_are_passed_on(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "HEAD_BYTES", 65)
    monkeypatch.setattr(process, "LAST_BYTES", 30)
    source, target = tmp_path / "source", tmp_path / "target"
    tail = LogTail(source, target, "one")
    with source.open("w") as out:
        for number in range(100):
            out.write(f"line {number:02}\n")  # 13 bytes, with the name
            out.flush()
            tail.pass_on()
        assert target.read_text().splitlines()[-1] == "one| line 04"  # at once
        out.write("the end")
    tail.end()
    assert target.read_text().splitlines() == [
        *(f"one| line {number:02}" for number in range(5)),
        "one| ... 94 lines left out ...",
        "one| line 99",
        "one| the end",
    ]
    assert tail.last_line == "the end"


def test_a_file_stays_below_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "MOST_BYTES", 100)
    for number in range(3):
        source = tmp_path / f"{number}"
        source.write_text('{"a": 1}\n' * 5)
        RowTail(source, tmp_path / "rows").end()
    assert (tmp_path / "rows").read_text() == '{"a": 1}\n' * 10
    assert process.MOST_BYTES < MOST_BYTES


@pytest.mark.parametrize(("dirty", "lines"), [(True, 1), (False, 0), (None, 0)])
def test_a_tree_with_uncommitted_changes_is_told_in_one_line_at_the_start(tmp_path, capsys, dirty, lines):
    environment = {"gpu": "a card", "commit": "f" * 40, "dirty": dirty}
    Suite(tmp_path, [stage(task("one", ""))], 1.0, environment, tmp_path).run()
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if "uncommitted changes" in line] == printed[:lines]
    assert all("ffffffffff" in line for line in printed[:lines])
    assert json.loads((tmp_path / "environment.json").read_text())["dirty"] == (
        "unknown" if dirty is None else dirty
    )


# -- the stages ----------------------------------------------------------------------------------------


def test_the_stages_are_listed_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["gpu", "--list", "--output", str(tmp_path / "results"), "--minutes", "18"]
    assert main(arguments) == 0
    listing = capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert list(dict.fromkeys(entry["stage"] for entry in listed)) == [
        "smoke", "figures", "tests", "offload", "training", "sanitizer", "kernels",
    ]  # fmt: skip
    assert all(f" {entry['task']}, " in listing for entry in listed)
    assert listed[0]["seconds"] == pytest.approx(40)
    assert list(tmp_path.iterdir()) == []


def test_nine_minutes_are_shared_as_planned():
    made = make_stages()
    assert {s.name: s.seconds for s in made} == {
        "smoke": 20, "figures": 110, "tests": 100, "offload": 66, "training": 170, "sanitizer": 40, "kernels": 34,
    }  # fmt: skip
    assert sum(s.seconds for s in made) == 540
    names = [t.name for s in made for t in s.tasks]
    assert len(set(names)) == len(names)  # of files
    assert [t.row["method"] for s in made for t in s.tasks if s.name == "training"] == [
        "grass-streamed-fused", "grass-streamed", "grass-resident", "grass", "full", "lisa", "lora-r128",
    ]  # fmt: skip


def test_every_test_that_needs_a_gpu_is_in_the_suite_in_a_process_of_its_own():
    assert sorted(stages.TEST_FILES) == sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "gpu").glob("test_*.py")
    )
    (tests,) = (s for s in make_stages() if s.kind == "tests")
    files = [[part for part in t.command if part.startswith("tests/")] for t in tests.tasks]
    assert ["-n" in t.command for t in tests.tasks][1:] == [False] * 7
    assert files == [*([path] for path in stages.TEST_FILES), ["tests/optim/test_torch_contract.py"]]


def test_commands_of_benchmarks_are_right(tmp_path):
    """Each is a command of `python -m bench` with options that it has, at its size and rehearsed."""
    predictions = tmp_path / "predictions"
    for s in (*make_stages(predictions), *rehearsal(make_stages(predictions), tmp_path)):
        if s.name not in ("tests", "sanitizer"):
            for t in s.tasks:
                command = ["5" if part == SECONDS else part for part in t.command]
                assert command[:3] == [sys.executable, "-m", "bench"]
                parsed = make_parser().parse_args(command[3:])
                assert parsed.out == ROWS
                assert getattr(parsed, "predictions", predictions) == predictions


def test_the_gpu_tests_collect_without_development_tools(tmp_path):
    """Neither xdist nor hypothesis nor expecttest, nor anything of this machine's site: skipped, not broken."""
    blocked = ("xdist", "pytest_timeout", "hypothesis", "expecttest", "_hypothesis_pytestplugin")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
    )
    (tests,) = (s for s in make_stages() if s.kind == "tests")
    options = [part for part in tests.tasks[1].command[3:] if not part.startswith("tests/")]
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    environment |= {**tests.environment, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *stages.TEST_FILES],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " skipped" in ended.stdout
    assert torch.cuda.is_available() or " passed" not in ended.stdout


@pytest.mark.parametrize("installed", [False, True])
def test_the_file_that_compiles_most_has_workers_where_xdist_is_installed(monkeypatch, tmp_path, installed):
    monkeypatch.setattr(stages.importlib.util, "find_spec", lambda module: installed or None)
    (tests,) = (s for s in make_stages() if s.kind == "tests")
    assert ("-n 4" in " ".join(tests.tasks[0].command)) is installed
    rehearsed = rehearsal([tests], tmp_path)[0].tasks[0].command
    assert rehearsed[-2:] == (("-n", "0") if installed else ("-k", SIZES["tests"][1]))


# -- smoke and the sanitizer ---------------------------------------------------------------------------


def smoke_rows(capsys, monkeypatch) -> tuple[int, list[dict], str]:
    monkeypatch.setattr(smoke.grass_kernels, "runs_triton", lambda device: True)
    code = main(["smoke", "--json"])
    printed = capsys.readouterr()
    return code, json.loads(printed.out), printed.err


def test_smoke_tells_which_mixture_differs_and_which_fails(capsys, monkeypatch):
    def update(*arguments, **options):
        smoke.reference.masked_adamw_(*arguments, **options)
        params = arguments[0]
        if "rounding_seeds" in options:
            raise RuntimeError("a launch failed\nhere")
        if "remainders" in options:
            params[0].add_(1)

    monkeypatch.setattr(smoke.grass_kernels, "masked_adamw_", update)
    code, rows, errors = smoke_rows(capsys, monkeypatch)
    assert code == 1
    assert len(errors.splitlines()) == 2
    assert {row["mixture"]: (row["differing"], row["reason"]) for row in rows if row["differing"] != 0} == {
        "bf16-bf16-fp32-master": (1, None),
        "bf16-bf16-fp32-stochastic": (None, "RuntimeError: a launch failed"),
    }
    assert len(rows) == 12


def test_smoke_passes_where_all_are_the_same(capsys, monkeypatch):
    monkeypatch.setattr(smoke.grass_kernels, "masked_adamw_", smoke.reference.masked_adamw_)
    code, rows, _ = smoke_rows(capsys, monkeypatch)
    assert (code, {row["differing"] for row in rows}) == (0, {0})


def test_rates_are_a_row_each_and_one_that_fails_loses_no_other(monkeypatch):
    def failing(device):
        raise RuntimeError("no stream\nat all")

    monkeypatch.setattr(smoke, "measure_link", failing)
    monkeypatch.setattr(smoke, "measure_hbm", lambda device: 1e12)
    monkeypatch.setattr(smoke, "_pinning", lambda: 1e9)
    rows = list(smoke.rates(torch.device("cpu")))
    assert [(row["measured"], row["reason"]) for row in rows] == [
        (False, "RuntimeError: no stream"), (True, None), (True, None),
    ]  # fmt: skip
    assert rows[1]["hbm_bytes_per_second"] == 1e12


def test_the_sanitizer_is_found_beside_the_toolkit(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    assert stages.find_sanitizer((str(tmp_path),)) == str(tool)
    assert stages.find_sanitizer((str(tmp_path / "nowhere"),)) is None


def test_what_is_sanitized_runs(capsys):
    assert sanitized.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("offload ")]) == 3
    assert len(lines) == 12 + 3


def test_what_is_sanitized_fails_where_offloading_trains_otherwise(monkeypatch):
    plain, calls = sanitized.trained, []

    def wrong(device, **settings):
        weights = plain(device, **settings)
        if calls.append(settings) or settings.get("fused_backward"):
            weights[-1][0] += 1
        return weights

    monkeypatch.setattr(sanitized, "trained", wrong)
    with pytest.raises(SystemExit, match="offload streamed, fused_backward"):
        sanitized.main()
    assert [call.get("offload") for call in calls] == ["none", "streamed", "resident", "streamed"]
