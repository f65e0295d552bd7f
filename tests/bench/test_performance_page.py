"""Failures these tests catch: a number on the page that no row gave; a figure read from the wrong case or variant; a
ratio across runs or cards; one to torch in other dtypes; a target met that was missed; a number that reads like the
target it missed; figures quoted from a run whose tests failed; tests said to have
passed that nobody ran; rows of an uncommitted tree that pass for a commit's; a gap that is passed over in silence; a
page that is not what the committed results give.
"""

from dataclasses import replace

import pytest

from bench.gpu.figures import LARGE, OF_ONE_DTYPE, beside, figure_cases, figures
from bench.kernels.cases import Case
from bench.kernels.rows import failed_row
from bench.report import PAGE, RESULTS, UNMEASURED, main, make_page
from tests.support.pages import CARD, host_row, kernel_row, lines_of, page_of, write_rows, write_run


def test_the_committed_page_is_what_the_committed_results_give():
    assert PAGE.read_text(encoding="utf-8") == make_page(RESULTS, PAGE)
    assert main(["--check"]) == 0


def test_without_results_every_figure_is_unmeasured(tmp_path):
    page = page_of(tmp_path)
    assert "No GPU has been measured yet" in page
    assert "make gpu" in page
    for figure in figures():
        (cells,) = [c for c in lines_of(page, f"| {figure.name} |", figure.target) if c[0] == figure.target][
            :1
        ]
        assert cells[1] == UNMEASURED
    # what bytes alone allow is known without a measurement
    assert "| torch fused and norms by layer, 1e8 parameters | >= 1.10x | unmeasured | 1.143x |" in page
    assert "both clipping, 1e9 parameters | >= 1.20x | unmeasured | 1.250x |" in page
    assert "both clipping, 1e9 parameters | >= 1.20x | unmeasured | 1.214x |" not in page


@pytest.mark.parametrize(
    ("percent", "shown", "verdict"),
    [
        (93.0, "93.0", "met"),
        (92.0, "92.000", "met"),
        (91.9, "91.9", "**missed**"),
        (91.96, "91.96", "**missed**"),
    ],
)
def test_share_of_the_copy(tmp_path, percent, shown, verdict):
    write_run(tmp_path, "a", [kernel_row(LARGE, percent_of_copy=percent), kernel_row(LARGE, "torch_fused")])
    page = page_of(tmp_path)
    assert lines_of(page, "share of the copy") == [
        [">= 92 %", f"{shown} % (2500 GB/s)", "1.250x", verdict, "1"]
    ]
    assert "No GPU has been measured" not in page


@pytest.mark.parametrize(("seconds", "verdict"), [(0.01009, "met"), (0.0102, "**missed**")])
def test_the_price_of_norms(tmp_path, seconds, verdict):
    rows = [
        kernel_row(LARGE, "grass_kernels", seconds_median=seconds),
        kernel_row(LARGE, "grass", seconds_median=9.0),  # always has norms
        kernel_row(replace(LARGE, norms=False), "grass_kernels"),
    ]
    write_run(tmp_path, "a", rows)
    percent = f"+{100 * (seconds / 0.01 - 1):.2f} %"
    assert lines_of(page_of(tmp_path), "what the norms cost") == [["<= 1 %", percent, "1.000x", verdict, "1"]]


@pytest.mark.parametrize("label", OF_ONE_DTYPE)
@pytest.mark.parametrize(
    ("work", "words", "least"),
    [
        ({"norms": False}, "torch fused, without norms", 1.0),
        ({}, "torch fused and norms by layer", 1.1),
        ({"norms": False, "clip": True}, "both clipping", 1.2),
    ],
)
@pytest.mark.parametrize("met", [True, False])
def test_ratios_to_torch(tmp_path, label, work, words, least, met):
    case = replace(Case(10**8, mixture=OF_ONE_DTYPE[label]), **work)
    ratio = least if met else least - 0.004
    write_run(tmp_path, "a", [kernel_row(case, time_ratio_to_torch=ratio)])
    page = page_of(tmp_path)
    section = page.split(f"### {label}")[1].split("###")[0]
    cells = lines_of(section, words, "1e8")
    verdict = "met" if met else "**missed**"
    assert cells == [[f">= {least:.2f}x", f"{ratio:.3f}x", "1.250x", verdict, "1"]]
    assert lines_of(section, words, "1e9")[0][1] == UNMEASURED


def test_no_ratio_to_torch_in_other_dtypes(tmp_path):
    case = Case(10**8, mixture=OF_ONE_DTYPE["all bf16"])
    write_run(tmp_path, "a", [kernel_row(case, baseline="torch_fused, fp32-fp32-fp32: 1 bytes; this row: 2")])
    assert lines_of(page_of(tmp_path), "torch fused and norms by layer", "1e8")[0][1] == UNMEASURED


@pytest.mark.parametrize(
    ("seconds", "value", "verdict"), [(0.0052, "1.040", "met"), (0.0053, "1.060", "**missed**")]
)
def test_frozen_layers(tmp_path, seconds, value, verdict):
    half = replace(LARGE, active_share=1 / 2)
    write_run(tmp_path, "a", [kernel_row(LARGE), kernel_row(half, bytes=50, seconds_median=seconds)])
    page = page_of(tmp_path)
    expected = ["0.95 to 1.05", f"{value} ({100 * seconds:.4f} of the time)", "0.5000", verdict, "1"]
    assert lines_of(page, "| 1/2 active") == [expected]
    assert lines_of(page, "| 1/16 active")[0][1] == UNMEASURED


@pytest.mark.parametrize(
    ("value", "targets", "shown"),
    [
        (2.85, (3,), "2.85"),
        (2.998, (3,), "2.998"),
        (3.0014, (3,), "3.001"),
        (1.00004, (1,), "1.00004"),
        (1, (1,), "1.000"),
        (0.9496, (0.95, 1.05), "0.9496"),
        (1.0504, (0.95, 1.05), "1.0504"),
    ],
)
def test_a_number_does_not_read_like_its_target(value, targets, shown):
    assert beside(value, *targets) == shown


def test_no_missed_figure_reads_like_its_target(tmp_path):
    """Each figure's target is just missed; in two or three decimals all would read like it."""
    case = replace(Case(10**8, mixture=OF_ONE_DTYPE["all bf16"]), norms=False)
    rows = [
        host_row(291, "addresses", 10e-6),
        host_row(291, "grass", 30.02e-6),
        host_row(291, "torch fused", 30.01e-6),
        host_row(5000, "addresses", 100e-6),
        host_row(5000, "grass", 300.3e-6),
    ]
    write_rows(tmp_path, "a", rows)
    kernels = [
        kernel_row(case, time_ratio_to_torch=0.9998),
        kernel_row(LARGE, peak_bytes=8_000_100),
        kernel_row(LARGE, "grass_kernels", seconds_median=0.0101003),
        kernel_row(replace(LARGE, norms=False), "grass_kernels"),
        kernel_row(replace(LARGE, active_share=1 / 2), bytes=50, seconds_median=0.0052501),
        {"suite": "offload", "variant": "overlapped", "source": "device", "seconds": 1.0501, "floor_seconds": 1.0,
         **CARD},
        {"suite": "training", "method": "full", "seq": 1024, "peak_gib": 10.501, "predicted_peak_gib": 10.0,
         "tokens_per_second": 1.0, **CARD},
    ]  # fmt: skip
    write_run(tmp_path, "b", kernels)
    page = page_of(tmp_path)
    assert lines_of(page, "291 tensors, in place", "addresses")[0][1:] == [
        "3.002x (30 us)", "-", "**missed**", "1",
    ]  # fmt: skip
    assert lines_of(page, "5000 tensors, in place")[0][1] == "3.003x (60 ns a tensor, of 291: 103)"
    assert lines_of(page, "without norms, 1e8")[0][1] == "0.9998x"
    assert lines_of(page, "what the norms cost")[0][1] == "+1.003 %"
    assert lines_of(page, "| 1/2 active")[0][1].startswith("1.05002 ")
    assert lines_of(page, "a streamed step")[0][1].startswith("1.0501x")
    assert "(1.0501x;" in lines_of(page, "full: peak")[0][1]
    assert lines_of(page, "needed on top")[0][1].startswith("0.100001 %")
    assert page.count("**missed**") >= 8


def test_memory(tmp_path):
    memory = {"suite": "memory", "state_bytes": 10**9, "extra_bytes": 2 * 10**6, **CARD}
    write_run(tmp_path, "a", [memory, kernel_row(LARGE)])
    page = page_of(tmp_path)
    assert lines_of(page, "kept beside the moments") == [
        ["<= 0.1 %", "0.2000 % (2.00 MB)", "-", "**missed**", "1"]
    ]
    assert lines_of(page, "needed on top")[0][1:] == ["0.0500 % (4.00 MB)", "-", "met", "1"]


def test_no_figure_mixes_runs_or_cards(tmp_path):
    """One half of each comparison in each folder, and two cards in one folder: nothing to compare."""
    half, other = replace(LARGE, active_share=1 / 2), {"device": "Card B"}
    write_run(tmp_path, "a", [kernel_row(LARGE), kernel_row(half, **other)])
    write_run(tmp_path, "b", [kernel_row(half)])
    page = page_of(tmp_path)
    assert lines_of(page, "| 1/2 active")[0][1] == UNMEASURED
    assert len(lines_of(page, "Card A")) == 2
    assert len(lines_of(page, "Card B")) == 1


def test_two_runs_are_two_lines(tmp_path):
    for name, percent in (("a", 93.0), ("b", 90.0)):
        write_run(tmp_path, name, [kernel_row(LARGE, percent_of_copy=percent)])
    assert [cells[3:] for cells in lines_of(page_of(tmp_path), "share of the copy")] == [
        ["met", "1"], ["**missed**", "2"],
    ]  # fmt: skip


def test_a_run_whose_tests_failed_is_listed_and_not_quoted(tmp_path):
    write_run(tmp_path, "a", [kernel_row(LARGE)], tests_passed=False)
    page = page_of(tmp_path)
    assert lines_of(page, "share of the copy")[0][1] == UNMEASURED
    assert "not quoted" in page
    assert "93.5" not in page


def test_rows_that_were_not_measured_say_nothing(tmp_path):
    write_run(tmp_path, "a", [failed_row(LARGE, "grass", CARD, "out of memory")])
    assert lines_of(page_of(tmp_path), "share of the copy")[0][1] == UNMEASURED


def test_charts_are_shown(tmp_path):
    write_run(tmp_path, "a", [kernel_row(LARGE)])
    (tmp_path / "a" / "chart.png").write_bytes(b"")
    assert "![a](a/chart.png)" in page_of(tmp_path)


@pytest.mark.parametrize(
    ("identity", "said"),
    [
        ({"dirty": False}, "commit `ffffffffff`"),
        ({"dirty": True}, "commit `ffffffffff`, **with uncommitted changes**"),
        ({"dirty": None}, "commit `ffffffffff`, with or without changes: unknown"),
        ({"dirty": None, "commit": None}, "commit unknown"),
    ],
)
def test_the_page_names_the_commit_of_its_rows_and_whether_it_holds_their_code(tmp_path, identity, said):
    write_run(tmp_path, "a", [kernel_row(LARGE, **{"commit": "f" * 40, **identity})])
    page = page_of(tmp_path)
    before_figures, figures_and_runs = page.split("## Figures")
    assert f"- run 1, [a](a): {said}\n" in before_figures
    assert f"| {said} |" in figures_and_runs.split("## Runs")[1]
    assert ("the commit alone does not tell" in before_figures) is (identity["dirty"] is True)


def test_rows_of_two_commits_in_one_folder_are_both_named(tmp_path):
    rows = [kernel_row(LARGE, commit="a" * 40), kernel_row(LARGE, commit="b" * 40, dirty=True)]
    write_run(tmp_path, "a", rows)
    before_figures = page_of(tmp_path).split("## Figures")[0]
    assert "- run 1, [a](a): commit `aaaaaaaaaa`\n" in before_figures
    assert "- run 2, [a](a): commit `bbbbbbbbbb`, **with uncommitted changes**\n" in before_figures


@pytest.mark.parametrize(
    ("write", "passed", "made_by", "tests"),
    [
        (write_run, (True,), "`make gpu`", "passed"),
        (write_run, (False,), "`make gpu`", "**failed: not quoted**"),
        (write_run, (None,), "`make gpu`", "none came to an end"),
        (write_rows, (), "a benchmark alone: host", "none run"),
    ],
)
def test_what_made_a_run_and_which_tests_it_ran(tmp_path, write, passed, made_by, tests):
    write(tmp_path, "a", [host_row(291, "grass", 1e-5)], *passed)
    runs = page_of(tmp_path).split("## Runs")[1]
    assert lines_of(runs, "[a](a)")[0][-3:] == [made_by, tests, "1"]
    assert "`python -m bench.host`" in runs


def test_the_program_writes_and_checks(tmp_path, capsys):
    arguments = ["--results", str(tmp_path), "--page", str(tmp_path / "page.md")]
    assert main([*arguments, "--check"]) == 1
    assert "python -m bench.report" in capsys.readouterr().err
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    write_run(tmp_path, "a", [kernel_row(LARGE)])
    assert main([*arguments, "--check"]) == 1


def test_every_case_of_a_figure_is_among_those_that_are_measured():
    """A figure that no stage of `make gpu` can fill would stay unmeasured for ever."""
    shown = [kernel_row(case, variant) for case in figure_cases() for variant in ("grass", "grass_kernels")]
    from bench.gpu import training
    from bench.gpu.figures import Rows
    from bench.offload.rows import VARIANTS
    from grass.plan.prediction import METHODS

    memory = {"suite": "memory", "state_bytes": 1, "extra_bytes": 0}
    step = {"suite": "offload", "source": "device", "seconds": 1.0, "floor_seconds": 1.0}
    trained = {"suite": "training", "seq": training.SEQUENCES[0], "seconds_median": 1.0, "peak_gib": 1.0}
    trained.update(predicted_peak_gib=1.0, tokens_per_second=1.0)
    rows = Rows(
        [
            *shown,
            memory,
            *({**step, "variant": variant} for variant in VARIANTS),
            *({**trained, "method": name} for name in METHODS),
        ]
    )
    silent = [figure.name for figure in figures() if figure.read(rows) is None]
    assert all("tensors" in name for name in silent)  # the host's, which are a suite of their own
    assert len(figure_cases()) == len(set(figure_cases())) == 16
