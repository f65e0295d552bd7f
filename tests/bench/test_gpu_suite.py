"""Failures these tests catch: a stage that outlives its limit, or leaves processes behind; one that stops those
after it; a failed test that the exit code does not tell, or a failed benchmark that it does; rows that appear only
at the end, twice or in halves; a stage that needs what a GPU machine may lack; rows of an uncommitted tree that nobody
was warned of.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.gpu import process, sanitized, stages
from bench.gpu.process import Ended, RowTail
from bench.gpu.stages import ROOT, Stage, make_stages
from bench.gpu.suite import Suite


def stage(name: str, script: str, kind: str = "bench", share: float = 0.5, **other) -> Stage:
    return Stage(name, "a stage", kind, share, ("sh", "-c", script), **other)


def run_suite(out: Path, *chosen: Stage, seconds: float = 60.0) -> tuple[int, dict]:
    code = Suite(out, chosen, seconds / 60, {"gpu": "a card"}).run()
    return code, json.loads((out / "summary.json").read_text())


def statuses(summary: dict) -> list[str]:
    return [result["status"] for result in summary["stages"]]


@pytest.mark.parametrize(
    ("kind", "ended", "status", "exit_code", "passed"),
    [
        ("tests", Ended(0, False, 1.0), "passed", 0, True),
        ("tests", Ended(1, False, 1.0), "failed", 1, False),
        ("tests", Ended(5, False, 1.0), "left out", 0, None),
        ("tests", Ended(-9, True, 1.0), "killed", 1, False),
        ("check", Ended(86, False, 1.0), "failed", 1, False),
        ("check", Ended(-9, True, 1.0), "killed", 0, None),
        ("bench", Ended(1, False, 1.0), "failed", 0, None),
        ("bench", Ended(5, False, 1.0), "failed", 0, None),
    ],
)
def test_what_becomes_of_a_stage(tmp_path, monkeypatch, kind, ended, status, exit_code, passed):
    endings = [ended, Ended(0, False, 1.0)]
    monkeypatch.setattr(process, "run", lambda *args, **kwargs: endings.pop(0))
    returned, summary = run_suite(tmp_path, stage("one", "", kind), stage("two", ""))
    assert statuses(summary) == [status, "passed"]
    assert (returned, summary["tests_passed"]) == (exit_code, passed)
    assert json.loads((tmp_path / "environment.json").read_text()) == {"gpu": "a card"}


def test_a_stage_at_its_limit_may_finish_its_report_and_is_stopped_with_all_it_started(tmp_path, monkeypatch):
    """One writes a last row when it is asked to stop; one ignores that, and has a child of its own."""
    monkeypatch.setattr(process, "_GRACE", 0.5)
    rows = tmp_path / "asked.jsonl"
    for earlier in (rows, tmp_path / "rows.jsonl"):
        earlier.write_text('{"old": 1}\n')
    asked = f"""
        finish() {{ echo report; echo '{{"last": 1}}' >> {rows}; exit 1; }}
        trap finish INT
        echo begun; echo '{{"new": 1}}' >> {rows}; sleep 600 & wait
    """
    deaf = "trap '' INT; sleep 600 & echo $!; wait"
    _, summary = run_suite(
        tmp_path,
        stage("asked", asked, share=0.05, rows=rows),
        stage("deaf", deaf, share=0.05),
        stage("last", "echo here"),
        seconds=20.0,
    )
    assert statuses(summary) == ["killed", "killed", "passed"]
    assert summary["stages"][0]["reason"] == "it reached its limit"
    assert (tmp_path / "asked.log").read_text() == "begun\nreport\n"
    assert (tmp_path / "rows.jsonl").read_text() == '{"new": 1}\n{"last": 1}\n'
    assert summary["stages"][0]["rows"] == 2
    assert is_gone(int((tmp_path / "deaf.log").read_text()))
    assert (tmp_path / "last.log").read_text() == "here\n"


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
    assert tail.lines == 2


@pytest.mark.parametrize(("dirty", "lines"), [(True, 1), (False, 0), ("unknown", 0)])
def test_a_tree_with_uncommitted_changes_is_told_in_one_line_at_the_start(tmp_path, capsys, dirty, lines):
    environment = {"gpu": "a card", "commit": "f" * 40, "dirty": dirty}
    Suite(tmp_path, [stage("one", "")], 1.0, environment).run()
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if "uncommitted changes" in line] == printed[:lines]
    assert all("ffffffffff" in line for line in printed[:lines])


def test_a_stage_is_left_out_without_time_or_what_it_needs(tmp_path):
    late = [stage(name, "sleep 600", share=1.0) for name in ("one", "two")]
    returned, summary = run_suite(
        tmp_path, stage("three", "", "tests", missing="no expecttest"), *late, seconds=1.0
    )
    assert statuses(summary) == ["left out", "killed", "left out"]
    assert [result["reason"] for result in summary["stages"]][::2] == ["no expecttest", "no time left"]
    assert not (tmp_path / "two.log").exists()
    assert returned == 0


def test_what_a_stage_is_given(tmp_path, monkeypatch):
    """The source tree as its place and on its path, its own variables, no interpreter, its time."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.chdir(tmp_path)
    script = 'echo "$PWD ${PYTHONPATH%%:*} ${TRITON_INTERPRET-unset} $X {seconds}"'
    _, summary = run_suite(tmp_path, stage("one", script, environment={"X": "y"}))
    assert statuses(summary) == ["passed"]
    assert (
        tmp_path / "one.log"
    ).read_text() == f"{ROOT} {ROOT} unset y 21\n"  # of 30, with room for the rest


def test_the_stages_are_listed_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["gpu", "--list", "--output", str(tmp_path / "results"), "--minutes", "10"]
    assert main(arguments) == 0
    listing = capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["stage"] for entry in listed] == [
        *("tests", "tests-torch", "memcheck", "racecheck"),
        *("figures", "training", "offload", "host", "kernels"),
    ]
    assert all(f"  {entry['stage']} " in listing for entry in listed)
    assert listed[0]["limit"] == pytest.approx(210)
    assert list(tmp_path.iterdir()) == []


def test_every_test_of_the_gpu_room_is_in_the_suite_which_leaves_time_for_the_figures(tmp_path):
    assert sorted(stages.TEST_FILES) == sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "gpu").glob("test_*.py")
    )
    assert sum(s.share for s in make_stages(tmp_path) if s.kind != "bench") < 0.65


def test_commands_of_benchmarks_are_right(tmp_path):
    """Each is a command of `python -m bench` with options that it has."""
    from bench.__main__ import make_parser

    made = [s for s in make_stages(tmp_path) if s.kind == "bench"]
    for s in made:
        command = [part.replace("{seconds}", "5") for part in s.command]
        assert command[:3] == [sys.executable, "-m", "bench"]
        assert make_parser().parse_args(command[3:]).out == str(s.rows)


def test_the_gpu_tests_collect_without_development_tools(tmp_path):
    """Neither xdist nor hypothesis nor expecttest, nor anything of this machine's site: skipped, not broken."""
    blocked = ("xdist", "hypothesis", "expecttest", "_hypothesis_pytestplugin")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *stages.TEST_FILES, "-q", "-p", "no:cacheprovider"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " skipped" in ended.stdout
    assert torch.cuda.is_available() or " passed" not in ended.stdout


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
    assert [call.get("offload") for call in calls] == [None, "streamed", "resident", "streamed"]
