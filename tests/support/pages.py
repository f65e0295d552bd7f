"""Results as benchmarks leave them, and the page that is made of them."""

import json
from pathlib import Path

from bench.kernels.cases import Case
from bench.kernels.rows import failed_row
from bench.report import make_page

CARD = {
    "device": "Card A", "driver": "1.2", "torch": "2.11", "triton": "3.6", "python": "3.12", "commit": "0123456789ab",
    "dirty": False,
}  # fmt: skip
HOST = {**CARD, "device": "A CPU", "driver": None}


def kernel_row(case: Case, variant: str = "grass", **other) -> dict:
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


def host_row(tensors: int, variant: str, seconds: float, situation: str = "in place") -> dict:
    keys = {"suite": "host", "tensors": tensors, "situation": situation, "variant": variant}
    return {**keys, "seconds_median": seconds, **HOST}


def write_rows(results: Path, name: str, rows: list[dict]) -> None:
    """As a benchmark on its own leaves them."""
    (results / name).mkdir(parents=True)
    (results / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(results: Path, name: str, rows: list[dict], tests_passed: bool | None = True) -> None:
    """As the suite leaves them."""
    write_rows(results, name, rows)
    summary = {"tests_passed": tests_passed, "stages": []}
    (results / name / "summary.json").write_text(json.dumps(summary))


def page_of(results: Path) -> str:
    return make_page(results, results / "page.md")


def lines_of(page: str, *words: str) -> list[list[str]]:
    """The cells after the name, of table lines that contain all words."""
    found = [line for line in page.splitlines() if line.startswith("| ") and all(w in line for w in words)]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")][1:] for line in found]
