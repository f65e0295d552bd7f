"""Failures these tests catch: a target called met that was missed; a ratio upside down; a figure read from the wrong
case, variant or situation; a ratio across runs or cards, or to torch in other dtypes; a number that reads like the
target it missed; figures quoted from a run whose tests failed; tests said to have passed that nobody ran; rows of an
uncommitted tree that pass for a commit's; a figure that no command measures; a page that is not what the committed
results give.
"""

import json
from dataclasses import replace

import pytest

from bench import integration
from bench.cpu_step import CASES
from bench.gpu import stages
from bench.gpu.figures import LARGE, OF_ONE_DTYPE, PARTS, Reading, Rows, figure_cases, figures
from bench.host import SITUATIONS, TENSORS, VARIANTS
from bench.kernels.cases import Case
from bench.kernels.rows import failed_row
from bench.offload.rows import VARIANTS as OFFLOAD_VARIANTS
from bench.report import PAGE, RESULTS, UNMEASURED, make_page
from bench.targets import beside

CARD = {
    "device": "Card A", "driver": "1.2", "torch": "2.11", "triton": "3.6", "python": "3.12", "commit": "0123456789ab",
    "dirty": False,
}  # fmt: skip
BF16 = Case(10**8, mixture=OF_ONE_DTYPE["all bf16"])
HALF = replace(LARGE, active_share=1 / 2)
NO_NORMS = replace(LARGE, norms=False)


def kernel(case=LARGE, variant="grass", **other) -> dict:
    measured = {
        "measured": True,
        "bytes": 100,
        "seconds_median": 0.01,
        "gb_per_s": 2500.0,
        "percent_of_copy": 93.5,
        "time_ratio_to_torch": 1.3,
        "byte_ratio_to_torch": 1.25,
        "baseline": "torch_fused, same dtypes",
        "error_ulps": 0.5,
        "peak_bytes": 4_000_000,
    }
    return {**failed_row(case, variant, CARD, None), **measured, **other}


def host(variant, seconds, tensors=291, situation="in place") -> dict:
    keys = {"suite": "host", "tensors": tensors, "situation": situation, "variant": variant}
    return {**keys, "seconds_median": seconds, **CARD}


def cpu(variant, seconds, case=CASES[0].name, clip=False) -> dict:
    keys = {"suite": "cpu step", "case": case, "clip": clip, "variant": variant}
    return {**keys, "seconds_median": seconds, **CARD}


def in_trainer(variant, seconds, case=0) -> dict:
    keys = {"suite": "integration", "case": str(integration.CASES[case]), "variant": variant}
    spread = {"ratio_p20": 0.99, "ratio_p80": 1.125, "turns": 7} if variant == "grass" else {}
    return {**keys, "seconds_median": seconds, **spread, **CARD}


def memory(extra) -> dict:
    return {"suite": "memory", "state_bytes": 10**9, "extra_bytes": extra, **CARD}


def offload(seconds, variant="overlapped", source="device", **ring) -> dict:
    keys = {
        "suite": "offload",
        "variant": variant,
        "source": source,
        "buffer_count": 3,
        "update_priority": -1,
        **ring,
    }
    return {**keys, "seconds": seconds, "floor_seconds": 1.0, **CARD}


FUSED_METHOD = "grass-streamed-fused"


def trained(method, peak=10.0, seconds=1.0, seq=1024) -> dict:
    keys = {"suite": "training", "method": method, "seq": seq}
    measured = {
        "peak_active_gib": peak,
        "peak_gib": 1.0,
        "predicted_peak_gib": 10.0,
        "tokens_per_second": 1.0,
    }
    return {**keys, **measured, "seconds_median": seconds, **CARD}


def read(part, name, rows) -> Reading | None:
    (figure,) = [f for f in figures() if f.part.startswith(part) and f.name.startswith(name)]
    return figure.read(Rows(rows))


CASES_OF_FIGURES = [case for part in PARTS for case in figure_cases(part)]
FEW = "grass, 291 tensors, in place"
CPU = f"{CASES[0].name}, without"

READINGS = [
    # part, name, rows, what it says, met
    ("1e9", "share", [kernel(percent_of_copy=93.0)], "93.0 % (2500 GB/s)", True),
    ("1e9", "share", [kernel(percent_of_copy=92.0)], "92.000 %", True),
    ("1e9", "share", [kernel(percent_of_copy=91.96)], "91.96 %", False),
    ("1e9", "share", [kernel(percent_of_copy=50.0), kernel(variant="torch_fused")], "50.0 %", False),
    *(
        (
            "1e9",
            "what the norms cost",
            [
                kernel(variant="grass_kernels", seconds_median=seconds),
                kernel(seconds_median=9.0),  # always has norms
                kernel(NO_NORMS, "grass_kernels"),
            ],
            says,
            met,
        )
        for seconds, says, met in ((0.01009, "+0.90 %", True), (0.0101003, "+1.003 %", False))
    ),
    *(
        (label, f"{words}, 1e8", [kernel(replace(case, **work), time_ratio_to_torch=ratio)], says, met)
        for label, case in (("all bf16", BF16), ("all fp32", replace(BF16, mixture=OF_ONE_DTYPE["all fp32"])))
        for work, words, least in (
            ({"norms": False}, "torch fused, without norms", 1.0),
            ({}, "torch fused and norms by layer", 1.1),
            ({"norms": False, "clip": True}, "clip_grad_norm_ and torch fused, both clipping", 1.2),
        )
        for ratio, says, met in ((least, f"{least:.3f}x", True), (least - 2e-4, f"{least - 2e-4:.4f}x", False))
    ),
    ("Frozen", "1/2", [kernel(), kernel(HALF, bytes=50, seconds_median=0.0052)], "1.040 (0.5200 of", True),
    ("Frozen", "1/2", [kernel(), kernel(HALF, bytes=50, seconds_median=0.00525002)], "1.050004", False),
    ("Frozen", "1/2", [kernel(), kernel(HALF, bytes=50, seconds_median=0.0047)], "0.940", False),
    ("The host's", FEW, [host("grass", 4e-4), host("torch fused", 1e-3)], "0.40x (0.4 of 1 ms)", True),
    ("The host's", FEW, [host("grass", 5e-4), host("torch fused", 1e-3)], "0.500x", True),
    ("The host's", FEW, [host("grass", 5.004e-4), host("torch fused", 1e-3)], "0.5004x", False),
    (
        "The host's",
        "grass clipping, 5,000 tensors, after",
        [
            *(host(v, 1.0) for v in VARIANTS),  # of another situation and number of tensors
            host("grass clipping", 0.6, 5000, "after backward"),
            host("grass", 0.1, 5000, "after backward"),
            host("torch fused", 1.0, 5000, "after backward"),
        ],
        "0.60x",
        False,
    ),
    ("A step on", CPU, [cpu("grass", 1.29e-3), cpu("torch fused", 1e-3)], "1.29x (1.29 of 1 ms)", True),
    ("A step on", CPU, [cpu("grass", 1.3002e-3), cpu("torch fused", 1e-3)], "1.3002x", False),
    (
        "A step on",
        "300 groups, equal settings, both clipping",
        [
            *(cpu(v, 1.0, "300 groups, equal settings") for v in ("grass", "torch fused")),
            *(cpu(v, s, "300 groups, equal settings", True) for v, s in (("grass", 1.9), ("torch fused", 1.0))),
        ],
        "1.90x",
        True,
    ),
    (
        "A step in Trainer",
        "Llama of 6 layers, 128 wide, 8 x 128",
        [
            *(in_trainer(v, 1.0) for v in ("grass", "torch fused")),
            *(in_trainer(v, s, 1) for v, s in (("grass", 1.031), ("torch fused", 1.0))),
        ],
        "1.031x (1.03e+03 of 1e+03 ms); 0.990 to 1.125 in 7 turns",
        False,
    ),
    (
        "A step in Trainer",
        "Llama of 6 layers, 128 wide, 4 x 64",
        [in_trainer("grass", 0.041), in_trainer("torch fused", 0.04)],
        "1.02x (41 of 40 ms); 0.990",
        True,
    ),
    ("Memory", "kept", [memory(2 * 10**6), kernel()], "0.2000 % (2.00 MB)", False),
    ("Memory", "kept", [memory(10**6)], "0.1000 %", True),
    ("Memory", "needed", [kernel()], "0.0500 % (4.00 MB)", True),
    ("Memory", "needed", [kernel(peak_bytes=8_000_100)], "0.100001 %", False),
    ("States", "a streamed step", [offload(9.0, "vanilla"), offload(1.04)], "1.040x (1040 ms)", True),
    ("States", "a streamed step", [offload(9.0, buffer_count=2), offload(1.04)], "1.040x (1040 ms)", True),
    ("States", "a streamed step", [offload(1.04, source="simulation"), offload(1.0501)], "1.0501x", False),
    ("States", "a resident", [trained("grass-resident", seconds=1.01), trained("grass")], "1.010x", True),
    ("States", "a resident", [trained("grass-resident", seconds=1.03), trained("grass")], "1.030x", False),
    ("A 7B", "full", [trained("full", 99.0, seq=512), trained("full", 9.6)], "9.60 GiB (0.960x", True),
    ("A 7B", "full", [trained("full", 10.501)], "10.50 GiB (1.0501x", False),
    ("A 7B", "full", [trained("full", 9.0)], "9.00 GiB (0.900x", False),
    ("A 7B", f"{FUSED_METHOD}: memory", [trained(FUSED_METHOD, 14.5)], "14.500 GiB", True),
    ("A 7B", f"{FUSED_METHOD}: memory", [trained(FUSED_METHOD, 14.87)], "14.87 GiB", False),
    ("A 7B", f"{FUSED_METHOD}: a step", [trained(FUSED_METHOD, seconds=1.04), trained("grass")], "1.04x", True),
    ("A 7B", f"{FUSED_METHOD}: a step", [trained(FUSED_METHOD, seconds=1.06), trained("grass")], "1.06x", False),
]  # fmt: skip


@pytest.mark.parametrize(("part", "name", "rows", "says", "met"), READINGS)
def test_a_figure_says_what_its_rows_do(part, name, rows, says, met):
    reading = read(part, name, rows)
    assert reading.value.startswith(says)
    assert reading.passed is met


@pytest.mark.parametrize(
    ("part", "name", "rows"),
    [
        ("all bf16", "torch fused and norms by layer, 1e8", [kernel(BF16, baseline="torch_fused, others")]),
        ("1e9", "share", [failed_row(LARGE, "grass", CARD, "out of memory")]),
        ("1e9", "share", [kernel(BF16)]),
        ("The host's", FEW, [host("grass", 1.0), host("torch fused", 1.0, situation="lr changes")]),
        ("The host's", FEW, [host("grass", 1.0), host("torch fused", 1.0, tensors=5000)]),
        ("A step on", CPU, [cpu("grass", 1.0), cpu("torch fused", 1.0, clip=True)]),
        (
            "A step in",
            "Llama of 6 layers, 128 wide, 4",
            [in_trainer("grass", 1.0), in_trainer("torch fused", 1.0, 1)],
        ),
        ("A 7B", "full", [trained("full", seq=512)]),
        ("A 7B", "full", [trained("full", peak=None)]),
        ("A 7B", "full", [{**trained("full"), "predicted_peak_gib": None}]),
        ("A 7B", "full", [{**trained("full"), "measured": False, "reason": "killed"}]),
    ],
)
def test_rows_of_something_else_say_nothing(part, name, rows):
    assert read(part, name, rows) is None


@pytest.mark.parametrize(
    ("value", "targets", "shown"),
    [
        (2.85, (3,), "2.85"),
        (3.0014, (3,), "3.001"),
        (1.00004, (1,), "1.00004"),
        (1, (1,), "1.000"),
        (0.9496, (0.95, 1.05), "0.9496"),
    ],
)
def test_a_number_does_not_read_like_its_target(value, targets, shown):
    assert beside(value, *targets) == shown


def test_the_commands_measure_every_figure():
    """A figure that no stage of `make gpu` can fill would stay unmeasured for ever."""
    rows = [
        *(kernel(case, variant) for case in CASES_OF_FIGURES for variant in ("grass", "grass_kernels")),
        *(host(v, 1.0, n, s) for v in VARIANTS for n in TENSORS for s in SITUATIONS),
        *(
            cpu(v, 1.0, case.name, clip)
            for v in ("grass", "torch fused")
            for case in CASES
            for clip in (0, 1)
        ),
        *(
            in_trainer(v, 1.0, case)
            for v in ("grass", "torch fused")
            for case in range(len(integration.CASES))
        ),
        memory(0),
        *(offload(1.0, variant) for variant in OFFLOAD_VARIANTS),
        *(trained(name, seq=stages.SEQUENCE) for name in stages.METHODS),
    ]
    assert [figure.name for figure in figures() if figure.read(Rows(rows)) is None] == []
    assert len(CASES_OF_FIGURES) == len(set(CASES_OF_FIGURES)) == 17


# -- the page -------------------------------------------------------------------------------------------


def write_run(results, name, rows, tests_passed=True):
    """As `make gpu` leaves a run; as a benchmark alone does if `tests_passed` is "none"."""
    (results / name).mkdir(parents=True)
    (results / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if tests_passed != "none":
        (results / name / "summary.json").write_text(json.dumps({"tests_passed": tests_passed, "stages": []}))


def cells(results, *words):
    """Cells after the first of the page's table lines that contain all words."""
    page = make_page(results, results / "page.md")
    found = [line for line in page.splitlines() if line.startswith("| ") and all(w in line for w in words)]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")][1:] for line in found]


def test_the_committed_page_is_what_the_committed_results_give():
    assert PAGE.read_text(encoding="utf-8") == make_page(RESULTS, PAGE)


def test_without_results_every_figure_is_unmeasured_and_bytes_are_known(tmp_path):
    assert len(cells(tmp_path, UNMEASURED)) == len(figures())
    ratios = [
        cells(tmp_path, words, "1e8")[0][2] for words in ("without norms", "norms by layer", "both clipping")
    ]
    assert ratios == ["1.000x", "1.143x", "1.250x"]


def test_two_runs_are_two_lines(tmp_path):
    for name, percent in (("a", 93.0), ("b", 90.0)):
        write_run(tmp_path, name, [kernel(percent_of_copy=percent)])
    assert cells(tmp_path, "share of the copy") == [
        [">= 92 %", "93.0 % (2500 GB/s)", "1.250x", "met", "1"],
        [">= 92 %", "90.0 % (2500 GB/s)", "1.250x", "**missed**", "2"],
    ]


def test_no_figure_mixes_runs_or_cards(tmp_path):
    """One half of each comparison in each folder, and two cards in one folder: nothing to compare."""
    write_run(tmp_path, "a", [kernel(), kernel(HALF, device="Card B")])
    write_run(tmp_path, "b", [kernel(HALF)])
    assert cells(tmp_path, "| 1/2 active")[0][1] == UNMEASURED
    assert [len(cells(tmp_path, card)) for card in ("Card A", "Card B")] == [2, 1]


@pytest.mark.parametrize(
    ("passed", "quoted", "verdict"),
    [
        (True, True, "passed"),
        (False, False, "**failed: not quoted**"),
        (None, True, "none came to an end"),
        ("none", True, "none run"),
    ],
)
def test_a_run_tells_which_tests_it_ran_and_is_not_quoted_if_they_failed(tmp_path, passed, quoted, verdict):
    write_run(tmp_path, "a", [kernel()], passed)
    assert (cells(tmp_path, "share of the copy")[0][1] != UNMEASURED) is quoted
    assert cells(tmp_path, "[a](a)")[0][-2] == verdict
    assert ("93.5" in make_page(tmp_path, tmp_path / "page.md")) is quoted


@pytest.mark.parametrize(
    ("identity", "said"),
    [
        ({"dirty": False}, "commit `ffffffffff`"),
        ({"dirty": True}, "commit `ffffffffff`, **with uncommitted changes**"),
        ({"dirty": None}, "commit `ffffffffff`, with or without changes: unknown"),
        ({"dirty": None, "commit": None}, "commit unknown"),
    ],
)
def test_a_run_tells_its_commit_and_whether_it_holds_the_code(tmp_path, identity, said):
    write_run(tmp_path, "a", [kernel(**{"commit": "f" * 40, **identity}), kernel(commit="e" * 40)])
    assert f"- run 1, [a](a): {said}\n" in make_page(tmp_path, tmp_path / "page.md")
    assert [line[6] for line in cells(tmp_path, "[a](a)")] == [said, "commit `eeeeeeeeee`"]
