"""Failures these tests catch: a chart of cases that are not comparable or were not measured, a table that hides a
gap or repeats what is said once, sizes left out without a word.
"""

import pytest
import torch

from bench.kernels.cases import BASE, F32, Case, Mixture
from bench.kernels.chart import draw_chart, points_by_mixture
from bench.kernels.plan import CPU_SIZES, make_plan
from bench.kernels.rows import failed_row
from bench.kernels.runner import NO_TIME_LEFT
from bench.kernels.table import HEAD, Table

ENVIRONMENT = {"device": "a card", "torch": "2.13", "commit": "0123456789abcdef", "dirty": True}


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
    return {**failed_row(case, variant, ENVIRONMENT, None), **measured, **other}


def test_the_chart_shows_what_differs_in_size_alone():
    rows = [
        row(Case(10**9), percent=90.0),
        row(Case(10**6), percent=30.0),
        row(Case(10**6), "torch_fused", percent=20.0),
        row(Case(10**6, tensors=1), percent=99.0),
        row(Case(10**6, norms=False), percent=98.0),
        row(Case(10**6, active_share=1 / 2), percent=97.0),
        failed_row(Case(10**8), "grass", ENVIRONMENT, "out of memory"),
        row(Case(10**6, mixture=Mixture(F32, F32, F32)), percent=40.0),
    ]
    assert points_by_mixture(rows) == {
        "bf16-bf16-fp32": {"grass": [(10**6, 30.0), (10**9, 90.0)], "torch_fused": [(10**6, 20.0)]},
        "fp32-fp32-fp32": {"grass": [(10**6, 40.0)]},
    }


def test_the_chart_takes_sizes_with_fewer_parameters_than_tensors():
    rows = [row(Case(100, 100))]
    assert points_by_mixture(rows) == {str(BASE): {"grass": [(100, 50.0)]}}


@pytest.mark.parametrize("measured", [True, False])
def test_a_png(tmp_path, measured):
    pytest.importorskip("matplotlib", reason="charts are optional")
    path = tmp_path / "chart"
    rows = [row(Case(10**6)), row(Case(10**6), "another library")] if measured else []
    draw_chart(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_table():
    table = Table()
    lines = table.lines(row(Case(10**6), baseline="torch_fused, bf16-bf16-bf16: 1 bytes; this row: 2 bytes"))
    lines += table.lines(row(Case(10**6), "torch_fused"))
    lines += table.lines(
        row(Case(10**6), "copy", time_ratio_to_torch=None, error_ulps=None, peak_bytes=None, baseline=None)
    )
    lines += table.lines(failed_row(Case(10**6), "optimi", ENVIRONMENT, "out of memory: all gone"))
    lines += table.lines(failed_row(Case(10**5), "optimi", ENVIRONMENT, f"{NO_TIME_LEFT} 3 seconds"))
    assert lines == [
        HEAD,
        "",
        "1e6/300t/bf16-bf16-fp32/active1:1/norms",
        "grass                  12.500       12.000-13.500   1760.0    50.0    1.25*    0.64    0.50       2.5",
        "torch_fused            12.500       12.000-13.500   1760.0    50.0    1.25     0.64    0.50       2.5",
        "copy                   12.500       12.000-13.500   1760.0    50.0       -     0.64       -         -",
        "optimi             not measured: out of memory: all gone",
    ]


def test_a_cpu_takes_the_small_sizes_and_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = make_plan()
    assert {case.numel for case in plan.cases} == set(CPU_SIZES)
    assert "sizes 1e7, 1e8, 1e9, 2e9: need a CUDA device" in plan.missing
    assert "peak memory: needs a CUDA device" in plan.missing
    assert {case.numel for case in make_plan([10**7]).cases} == {10**7}
