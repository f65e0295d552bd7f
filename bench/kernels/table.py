"""Rows as text: a block for each case, columns aligned over all of them."""

from typing import Any

from bench.kernels.rows import Row
from bench.kernels.runner import NO_TIME_LEFT

HEAD = (
    f"{'variant':<18} {'median ms':>10} {'p20-p80 ms':>19} {'GB/s':>8} {'% copy':>7} {'time x':>7}  "
    f"{'bytes x':>7} {'ulps':>7} {'peak MB':>9}"
)
LEGEND = (
    "% copy: of the bandwidth of a large copy in the same rounds. time x, bytes x: torch fused's by this one's;\n"
    "above 1 this one is faster, or moves less. ulps: largest error against float64, in the stored dtype.\n"
    "*: the ratio is to torch fused in other dtypes, since it does not take these (see the row's baseline)."
)


class Table:
    """Make the lines of a table, row by row."""

    def __init__(self) -> None:
        self._case: str | None = None

    def lines(self, row: Row) -> list[str]:
        """The lines that a row adds: the case's name when it begins, and the row's own.

        Cases that found no time left add none: what is said of them once, at the end, is enough.
        """
        lines: list[str] = []
        if row["reason"] is not None and row["reason"].startswith(NO_TIME_LEFT):
            return lines
        if self._case is None:
            lines.append(HEAD)
        if row["case"] != self._case:
            self._case = row["case"]
            lines += ["", self._case]
        if row["measured"]:
            lines.append(_measured(row))
        else:
            lines.append(f"{row['variant']:<18} not measured: {row['reason']}")
        return lines


def _measured(row: Row) -> str:
    spread = f"{row['seconds_p20'] * 1e3:.3f}-{row['seconds_p80'] * 1e3:.3f}"
    other = "*" if row["baseline"] and "same dtypes" not in row["baseline"] else " "
    peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 1e6
    cells = [
        f"{row['variant']:<18}",
        f"{row['seconds_median'] * 1e3:>10.3f}",
        f"{spread:>19}",
        f"{row['gb_per_s']:>8.1f}",
        f"{row['percent_of_copy']:>7.1f}",
        _cell(row["time_ratio_to_torch"], 2) + other,
        _cell(row["byte_ratio_to_torch"], 2),
        _cell(row["error_ulps"], 2),
        _cell(peak, 1, 9),
    ]
    return " ".join(cells).rstrip()


def _cell(value: Any, digits: int, width: int = 7) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"
