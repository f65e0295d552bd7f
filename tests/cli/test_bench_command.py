"""Failures these tests catch: bad input found after minutes of measuring, or in a traceback; rows that are lost
when a run is stopped; a wrong exit code; an installed library that pretends to have the benchmarks.
"""

import json

import pytest

import grass
from grass.cli import main
from grass.cli.bench import _import_from_the_source

plans = _import_from_the_source("bench.kernels.plan")
KEYS = _import_from_the_source("bench.kernels.rows").KEYS


@pytest.fixture(autouse=True)
def _small_roof(monkeypatch):
    monkeypatch.setitem(plans.ROOF_BYTES, "cpu", 1 << 16)
    monkeypatch.setitem(plans.ROOF_BYTES, "cuda", 1 << 16)


@pytest.fixture
def nothing_runs(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("this was refused too late")

    monkeypatch.setattr(plans, "run_plan", fail)


def bench(*arguments):
    return main(["bench", "kernels", *map(str, arguments)])


def test_a_run_prints_a_table_and_writes_rows_and_a_chart(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="charts are optional")
    out, chart = tmp_path / "rows.jsonl", tmp_path / "chart.png"
    out.write_text("an older run\n")
    assert bench("--sizes", 20, "--seconds", 1e-3, "--out", out, "--plot", chart) == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(tuple(row) == KEYS for row in rows)
    measured = [row["variant"] for row in rows if row["measured"]]
    assert {"grass", "grass_kernels", "torch_fused", "torch_foreach", "copy"} <= set(measured)
    for variant in measured:
        assert f"\n{variant}" in printed
    assert "could not measure:" in printed
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_json_is_a_list_of_rows_and_nothing_else(capsys):
    assert bench("--sizes", 20, "--seconds", 1e-3, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {tuple(row) for row in rows} == {KEYS}


@pytest.mark.usefixtures("nothing_runs")
def test_list(capsys):
    assert bench("--list", "--sizes", "1e4,2e4", "5e3") == 0
    printed = capsys.readouterr().out
    assert "2e4/300t/bf16-bf16-fp32/active1:1/norms" in printed
    assert "5e3/300t" in printed
    assert "torch_fused" in printed
    assert bench("--list", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)) == {"cases", "variants", "missing"}


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "many"], "'many' is not a number"),
        (["--sizes", "0"], "whole number"),
        (["--sizes", "1e5,-3"], "whole number"),
        (["--sizes", "1.5"], "whole number"),
        (["--sizes", "inf"], "whole number"),
        (["--sizes", ","], "no size"),
        (["--seconds", "0"], "more than 0"),
        (["--seconds", "-1"], "more than 0"),
        (["--seconds", "nan"], "more than 0"),
        (["--seconds", "soon"], "not a number"),
        (["--size", "1e5"], "unrecognized arguments"),
    ],
)
def test_wrong_usage_is_refused_at_once(capsys, arguments, message):
    assert bench(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("option", ["--out", "--plot"])
@pytest.mark.parametrize("place", ["missing/file", "."])
def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path, capsys, option, place):
    assert bench(option, tmp_path / place) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"grass bench: {option} ")
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nothing_runs")
def test_a_refused_run_leaves_no_file(tmp_path):
    pytest.importorskip("matplotlib", reason="charts are optional")
    assert bench("--plot", tmp_path / "chart.png", "--out", tmp_path / "missing" / "rows.jsonl") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nothing_runs")
def test_a_suite_has_to_be_named(capsys):
    assert main(["bench"]) == 2
    assert "SUITE" in capsys.readouterr().err


def test_without_the_source_tree_it_says_where_to_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(grass, "__file__", str(tmp_path / "site-packages" / "grass" / "__init__.py"))
    assert bench("--sizes", 20) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "clone" in printed.err


def test_help_names_every_option(capsys):
    assert bench("--help") == 0
    printed = capsys.readouterr().out
    for option in ("--sizes", "--seconds", "--out", "--plot", "--json", "--list"):
        assert option in printed


def row_of(measured, variant="grass"):
    row = dict.fromkeys(KEYS)
    return {
        **row,
        "case": "1e4/…",
        "variant": variant,
        "measured": measured,
        "reason": "out of memory: all gone",
    }


def test_rows_are_kept_when_a_run_is_stopped(monkeypatch, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"

    def stopped(plan, *, seconds, report):
        report(row_of(False))
        assert out.read_text().endswith("}\n")  # at once: a run that is killed closes no file
        raise KeyboardInterrupt

    monkeypatch.setattr(plans, "run_plan", stopped)
    assert bench("--sizes", 20, "--out", out) == 130
    assert json.loads(out.read_text())["variant"] == "grass"
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("measured", "failures", "code"), [(True, [], 0), (True, ["grass: wrong"], 1), (False, [], 1)]
)
def test_exit_code(monkeypatch, capsys, measured, failures, code):
    monkeypatch.setattr(
        plans, "run_plan", lambda *a, **k: plans.Outcome([row_of(measured)], ["nothing"], failures)
    )
    assert bench("--sizes", 20) == code
    printed = capsys.readouterr()
    assert all(failure in printed.err for failure in failures)
    assert "could not measure:\n  nothing" in printed.out
