"""The benchmarks as commands: `python -m bench kernels|offload|figures|training|report`, and what is installed.

Would catch: rows that are lost when a run is stopped, or that differ from what is printed; a table that hides a gap; a
wrong exit code; a failure of ours that goes by; a picture of cases that are not comparable or were not measured; a
wheel with benchmarks in it, or without a package.
"""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.gpu import measure
from bench.gpu.candidates import Candidate, Edit
from bench.gpu.stages import make_stages
from bench.kernels import plan as plans
from bench.kernels.cases import BASE, F32, Case, Mixture
from bench.kernels.chart import draw_chart, points_by_mixture
from bench.kernels.plan import CPU_SIZES, make_plan
from bench.kernels.rows import KEYS, failed_row
from bench.kernels.runner import NO_TIME_LEFT
from bench.kernels.table import Table
from bench.offload.rows import KEYS as OFFLOAD_KEYS

ROOT = Path(__file__).parent.parent.parent
CARD = {"device": "a card", "torch": "2.13", "commit": "0123456789abcdef", "dirty": True}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """No device, and a copy to compare with that takes no time."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(plans.ROOF_BYTES, "cpu", 1 << 16)


def bench(*arguments):
    return main([str(argument) for argument in arguments])


def rows_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_prints_a_table_and_writes_rows_and_a_chart(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="charts are optional")
    out, chart = tmp_path / "rows.jsonl", tmp_path / "chart.png"
    out.write_text("an older run\n")
    assert bench("kernels", "--sizes", 20, "--seconds", 1e-3, "--out", out, "--plot", chart) == 0
    printed = capsys.readouterr().out
    rows = rows_in(out)
    assert {tuple(row) for row in rows} == {KEYS}
    measured = [row["variant"] for row in rows if row["measured"]]
    assert {"grass", "grass_kernels", "torch_fused", "torch_foreach", "copy"} <= set(measured)
    assert all(f"\n{variant}" in printed for variant in measured)
    assert "could not measure:" in printed
    assert chart.read_bytes().startswith(b"\x89PNG")


OFFLOAD = ("offload", "--model", "4x256x512x1000", "--pcie-gbs", 25, "--duplex-factor", 0.5)


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (("kernels", "--sizes", 20, "--seconds", 1e-3), KEYS),
        (OFFLOAD, OFFLOAD_KEYS),
        (("figures", "--largest", 5000, "--seconds", 1e-3), KEYS),
    ],
    ids=lambda value: value[0],
)
def test_json_is_the_list_of_the_rows_in_the_file(tmp_path, capsys, arguments, keys):
    assert bench(*arguments, "--out", tmp_path / "rows", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {tuple(row) for row in rows} == {keys}
    assert rows == rows_in(tmp_path / "rows")


def test_figures_come_first(capsys):
    assert bench("figures", "--largest", 5000, "--seconds", 1e-3, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["variant"] for row in rows} >= {"grass", "grass_kernels", "torch_fused"}
    assert rows[0]["case"] == "5e3/300t/bf16-bf16-fp32/active1:1/norms"
    assert rows[0]["measured"]


def test_candidates_are_measured_beside_ours_in_a_process_of_their_own(capsys, monkeypatch):
    def tasks():
        return [t.name for s in make_stages() for t in s.tasks if s.name == "figures"]

    parts = ["figures-mixed", "figures-all-bf16", "figures-all-fp32"]
    assert tasks() == [*parts, "figures-candidates"]
    candidate = Candidate("candidate", [], "nothing")
    stale = Candidate("stale", [Edit("table.py", "not in it", "")], "nothing")
    monkeypatch.setattr(measure, "CANDIDATES", ())
    assert tasks() == parts
    monkeypatch.setattr(measure, "CANDIDATES", (candidate, stale))
    arguments = ("figures", "--largest", 5000, "--seconds", 1e-3, "--json", "--part")
    assert bench(*arguments, "candidates") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["variant"] for row in rows if row["measured"]] == ["grass_kernels", "candidate", "copy"]
    (reason,) = {
        row["reason"] for row in rows if row["variant"] == "stale" and "no time" not in row["reason"]
    }
    assert reason.startswith("StaleEditError: stale: table.py must have this text once, not 0 times")
    assert list(dict.fromkeys(row["case"].split("/", 2)[2] for row in rows)) == [
        "bf16-bf16-fp32/active1:1/norms",
        "bf16-bf16-fp32/active1:16/norms",
        "bf16-bf16-fp32/active1:1/norms/zeros",
        "bf16-bf16-bf16/active1:1/plain",
        "fp32-fp32-fp32/active1:1/plain",
    ]
    assert bench(*arguments, "all-bf16") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["variant"] for row in rows} == {"grass_kernels", "grass", "torch_fused", "copy"}
    assert {row["case"].split("/")[2] for row in rows} == {"bf16-bf16-bf16"}


def test_the_list_of_cases(capsys):
    assert bench("kernels", "--list", "--json", "--sizes", "1e4,2e4", "5e3") == 0
    listed = json.loads(capsys.readouterr().out)
    assert set(listed) == {"cases", "variants", "missing"}
    assert {case.split("/")[0] for case in listed["cases"]} == {"1e4", "2e4", "5e3"}
    assert "torch_fused" in listed["variants"]


def test_layers_of_the_offload_benchmark_by_index_and_by_number(tmp_path, capsys):
    for options, active in ((("--layer-indices", "1,0"), (0, 1)), (("--active-layers", 2), (1, 3))):
        assert bench(*OFFLOAD, *options, "--json") == 0
        rows = json.loads(capsys.readouterr().out)
        assert {tuple(row["active_layers"]) for row in rows} == {active}
        assert {row["h2d_bytes_per_second"] for row in rows} == {25e9}
    assert bench(*OFFLOAD) == 0
    printed = capsys.readouterr().out
    assert "overlapped" in printed
    assert "not measured: needs a CUDA device" in printed
    pytest.importorskip("matplotlib", reason="pictures are optional")
    assert bench(*OFFLOAD, "--plot", tmp_path / "step.png") == 0
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_training_without_a_device_says_what_to_do(capsys):
    assert bench("training") == 1
    assert "grass plan predicts" in capsys.readouterr().err


def test_the_report_is_written_and_checked(tmp_path):
    arguments = ("report", "--results", tmp_path, "--page", tmp_path / "page.md")
    assert bench(*arguments, "--check") == 1
    assert bench(*arguments) == 0
    assert bench(*arguments, "--check") == 0
    (tmp_path / "page.md").write_text("another")
    assert bench(*arguments, "--check") == 1


def unmeasured(variant="grass", measured=False):
    return {**failed_row(Case(10**4), variant, {}, "out of memory: all gone"), "measured": measured}


def test_rows_are_kept_when_a_run_is_stopped(monkeypatch, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"

    def stopped(plan, *, seconds, report):
        report(unmeasured())
        assert out.read_text().endswith("}\n")  # at once: a run that is killed closes no file
        raise KeyboardInterrupt

    monkeypatch.setattr(plans, "run_plan", stopped)
    assert bench("kernels", "--out", out) == 130
    assert [row["variant"] for row in rows_in(out)] == ["grass"]
    assert capsys.readouterr().err == "python -m bench kernels: stopped\n"


@pytest.mark.parametrize(
    ("measured", "failures", "code"), [(True, [], 0), (True, ["grass: wrong"], 1), (False, [], 1)]
)
def test_exit_code(monkeypatch, capsys, measured, failures, code):
    outcome = plans.Outcome([unmeasured(measured=measured)], ["nothing"], failures)
    monkeypatch.setattr(plans, "run_plan", lambda *args, **kwargs: outcome)
    assert bench("kernels") == code
    printed = capsys.readouterr()
    assert all(failure in printed.err for failure in failures)
    assert "could not measure:\n  nothing" in printed.out


def test_a_cpu_takes_the_small_sizes_and_says_so():
    plan = make_plan()
    assert {case.numel for case in plan.cases} == set(CPU_SIZES)
    assert "sizes 1e7, 1e8, 1e9, 2e9: need a CUDA device" in plan.missing
    assert "peak memory: needs a CUDA device" in plan.missing
    assert {case.numel for case in make_plan([10**7]).cases} == {10**7}


def row(case, variant="grass", percent=50.0, **other):
    measured = {
        "measured": True,
        "seconds_median": 0.0125,
        "seconds_p20": 0.012,
        "seconds_p80": 0.0135,
        "gb_per_s": 1760.04,
        "percent_of_copy": percent,
        "time_ratio_to_torch": 1.25,
        "byte_ratio_to_torch": 0.64,
        "baseline": "torch_fused, same dtypes",
        "error_ulps": 0.5,
        "peak_bytes": 2_500_000,
    }
    return {**failed_row(case, variant, CARD, None), **measured, **other}


def test_the_table_shows_numbers_gaps_and_other_dtypes():
    table = Table()
    case = Case(10**6)
    ours = table.lines(row(case, baseline="torch_fused, bf16-bf16-bf16: 1 bytes; this row: 2 bytes"))
    numbers = ["grass", "12.500", "12.000-13.500", "1760.0", "50.0", "1.25*", "0.64", "0.50", "2.5"]
    assert (ours[-2], ours[-1].split()) == (str(case), numbers)
    copy = {"time_ratio_to_torch": None, "error_ulps": None, "peak_bytes": None, "baseline": None}
    assert table.lines(row(case, "copy", **copy))[0].split()[5:] == ["-", "0.64", "-", "-"]
    (gap,) = table.lines(failed_row(case, "optimi", CARD, "out of memory: all gone"))
    assert gap.split(maxsplit=1) == ["optimi", "not measured: out of memory: all gone"]
    assert table.lines(failed_row(Case(10**5), "optimi", CARD, f"{NO_TIME_LEFT} 3 seconds")) == []


def test_the_chart_shows_what_differs_in_size_alone(tmp_path):
    rows = [
        row(Case(10**9), percent=90.0),
        row(Case(10**6), percent=30.0),
        row(Case(100, 100), percent=5.0),  # fewer parameters than tensors
        row(Case(10**6), "torch_fused", percent=20.0),
        row(Case(10**6, tensors=1), percent=99.0),
        row(Case(10**6, norms=False), percent=98.0),
        row(Case(10**6, active_share=1 / 2), percent=97.0),
        failed_row(Case(10**8), "grass", CARD, "out of memory"),
        row(Case(10**6, mixture=Mixture(F32, F32, F32)), percent=40.0),
    ]
    assert points_by_mixture(rows) == {
        str(BASE): {"grass": [(100, 5.0), (10**6, 30.0), (10**9, 90.0)], "torch_fused": [(10**6, 20.0)]},
        "fp32-fp32-fp32": {"grass": [(10**6, 40.0)]},
    }
    pytest.importorskip("matplotlib", reason="charts are optional")
    for drawn in ([], rows):  # nothing measured, and something
        draw_chart(drawn, tmp_path / "chart")
        assert (tmp_path / "chart").read_bytes().startswith(b"\x89PNG")


def test_the_wheel_holds_the_library_alone(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="builds the wheel")
    source = tmp_path / "source"
    for name in ("grass", "grass_kernels", "bench", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    library = {
        str(path.relative_to(ROOT))
        for top in ("grass", "grass_kernels")
        for path in (ROOT / top).rglob("*.py")
    }
    assert {name for name in packed if name.endswith(".py")} == library
    assert {name.split("/")[0] for name in packed} == {"grass", "grass_kernels"}
    for name in ("recording", "order", "timeline"):  # what only tests and benchmarks import
        assert f"grass/offload/{name}.py" not in packed
    assert "grass/cli/bench.py" not in packed
