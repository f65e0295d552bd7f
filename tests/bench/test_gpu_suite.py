"""Failures these tests catch: a stage that outlives its limit, or leaves processes behind; one that stops those
after it; a failed test that the exit code does not tell, or a failed benchmark that it does; rows that appear only
at the end, twice or in halves; a result that is written though there is no GPU; a stage that needs what a GPU
machine may lack; rows of an uncommitted tree that nobody was warned of.
"""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_suite
from bench.gpu import measure, sanitized, stages
from bench.gpu.process import RowTail
from bench.gpu.stages import ROOT, Stage, make_stages
from bench.gpu_suite import Suite, main


def stage(name: str, code: str, kind: str = "bench", share: float = 0.5, **other) -> Stage:
    return Stage(name, "a stage", kind, share, (sys.executable, "-c", textwrap.dedent(code)), **other)


def run_suite(out: Path, *chosen: Stage, minutes: float = 1.0) -> tuple[int, dict]:
    code = Suite(out, chosen, minutes, {"gpu": "a card"}).run()
    return code, json.loads((out / "summary.json").read_text())


def statuses(summary: dict) -> list[str]:
    return [result["status"] for result in summary["stages"]]


@pytest.mark.parametrize(
    ("kind", "code", "status", "exit_code", "passed"),
    [
        ("tests", "pass", "passed", 0, True),
        ("tests", "raise SystemExit(1)", "failed", 1, False),
        ("tests", "raise SystemExit(5)", "left out", 0, None),
        ("check", "raise SystemExit(86)", "failed", 1, False),
        ("bench", "raise SystemExit(1)", "failed", 0, None),
        ("bench", "raise SystemExit(5)", "failed", 0, None),
    ],
)
def test_what_becomes_of_a_stage(tmp_path, kind, code, status, exit_code, passed):
    returned, summary = run_suite(tmp_path, stage("one", code, kind), stage("two", "print('here')"))
    assert statuses(summary) == [status, "passed"]
    assert returned == exit_code
    assert summary["tests_passed"] is passed
    assert (tmp_path / "two.log").read_text() == "here\n"
    assert json.loads((tmp_path / "environment.json").read_text()) == {"gpu": "a card"}


@pytest.mark.parametrize(("kind", "exit_code", "passed"), [("tests", 1, False), ("check", 0, None)])
def test_a_stage_at_its_limit_is_stopped_with_all_it_started(tmp_path, monkeypatch, kind, exit_code, passed):
    """It ignores being asked, and has a child of its own."""
    monkeypatch.setattr("bench.gpu.process._GRACE", 0.3)
    code = """
        import signal, subprocess, sys, time
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, flush=True)
        time.sleep(600)
    """
    returned, summary = run_suite(
        tmp_path, stage("one", code, kind, share=0.05), stage("two", "pass"), minutes=1.0
    )
    assert statuses(summary) == ["killed", "passed"]
    assert summary["stages"][0]["reason"] == "it reached its limit"
    assert returned == exit_code
    assert summary["tests_passed"] is passed
    assert is_gone(int((tmp_path / "one.log").read_text()))


def is_gone(pid: int) -> bool:
    """Whether a process has ended; a zombie that nobody has waited for counts."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def test_a_stage_that_is_asked_may_finish_its_report(tmp_path):
    code = """
        import time
        try:
            print("begun", flush=True)
            time.sleep(600)
        except KeyboardInterrupt:
            print("report", flush=True)
    """
    _, summary = run_suite(tmp_path, stage("one", code, share=0.05))
    assert statuses(summary) == ["killed"]
    assert (tmp_path / "one.log").read_text() == "begun\nreport\n"


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


def test_rows_of_a_killed_stage_are_kept_and_those_of_an_earlier_run_are_not(tmp_path):
    rows = tmp_path / "one.jsonl"
    rows.write_text('{"old": 1}\n')
    (tmp_path / "rows.jsonl").write_text('{"old": 1}\n')
    code = f"""
        import time
        with open({str(rows)!r}, "a") as out:
            out.write('{{"new": 1}}\\n')
            out.flush()
            try:
                time.sleep(600)
            except KeyboardInterrupt:
                out.write('{{"last": 1}}\\n')
    """
    _, summary = run_suite(tmp_path, stage("one", code, rows=rows, share=0.05))
    assert (tmp_path / "rows.jsonl").read_text() == '{"new": 1}\n{"last": 1}\n'
    assert summary["stages"][0]["rows"] == 2


@pytest.mark.parametrize(("dirty", "lines"), [(True, 1), (False, 0), ("unknown", 0)])
def test_a_tree_with_uncommitted_changes_is_told_in_one_line_at_the_start(tmp_path, capsys, dirty, lines):
    environment = {"gpu": "a card", "commit": "f" * 40, "dirty": dirty}
    Suite(tmp_path, [stage("one", "pass")], 1.0, environment).run()
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if "uncommitted changes" in line] == printed[:lines]
    assert all("ffffffffff" in line for line in printed[:lines])


def test_no_stage_is_begun_without_time(tmp_path):
    late = [stage(name, "import time; time.sleep(600)", share=1.0) for name in ("one", "two")]
    _, summary = run_suite(tmp_path, *late, minutes=1 / 30)
    assert statuses(summary) == ["killed", "left out"]
    assert summary["stages"][1]["reason"] == "no time left"
    assert not (tmp_path / "two.log").exists()


def test_stages_that_cannot_run_say_why(tmp_path):
    returned, summary = run_suite(tmp_path, stage("one", "pass", "tests", missing="no expecttest"))
    assert statuses(summary) == ["left out"]
    assert summary["stages"][0]["reason"] == "no expecttest"
    assert returned == 0


def test_what_a_stage_is_given(tmp_path, monkeypatch):
    """The source tree as its place and on its path, its own variables, no interpreter, its time."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = """
        import os, sys
        import bench.gpu_suite, grass
        print(os.getcwd(), os.environ.get("TRITON_INTERPRET"), os.environ["X"], sys.argv[1])
    """
    chosen = stage("one", code, environment={"X": "y"})
    chosen = Stage(**{**vars(chosen), "command": (*chosen.command, "{seconds}")})
    monkeypatch.chdir(tmp_path)
    _, summary = run_suite(tmp_path, chosen)
    assert statuses(summary) == ["passed"], (tmp_path / "one.log").read_text()
    assert (tmp_path / "one.log").read_text() == f"{ROOT} None y 21\n"  # of 30, with room for the rest


def test_without_a_gpu_one_line_and_nothing_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path / "results")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_stages_are_listed_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--dry-run", "--out", str(tmp_path / "results"), "--minutes", "10"]) == 0
    listing = capsys.readouterr().out
    names = [name for name in (s.name for s in make_stages(tmp_path)) if f"  {name} " in listing]
    assert names == [
        "tests",
        "tests-torch",
        "memcheck",
        "racecheck",
        "figures",
        "training",
        "offload",
        "host",
        "kernels",
    ]
    assert "at most 210 s" in listing
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--minutes", "0"], ["--minutes", "nan"], ["--out", __file__], ["--minute", "1"]]
)
def test_wrong_usage(arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_every_test_of_the_gpu_room_is_in_the_suite():
    assert sorted(stages.TEST_FILES) == sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "gpu").glob("test_*.py")
    )


def test_limits_leave_time_for_the_figures(tmp_path):
    made = make_stages(tmp_path)
    before = sum(s.share for s in made if s.kind != "bench")
    assert before < 0.65


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


def test_the_figures_stage_writes_rows_as_the_page_reads_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules["bench.kernels.plan"].ROOF_BYTES, "cpu", 1 << 16)
    out = tmp_path / "rows.jsonl"
    assert measure.main(["--seconds", "2", "--out", str(out), "--largest", "5000"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["variant"] for row in rows} >= {"grass", "grass_kernels", "torch_fused"}
    assert rows[0]["case"] == "5e3/300t/bf16-bf16-fp32/active1:1/norms"
    assert rows[0]["measured"]


def test_a_card_s_name_as_a_folder():
    assert gpu_suite._slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
