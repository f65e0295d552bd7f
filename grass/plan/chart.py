"""Chart of a plan: peak memory against sequence length, by method."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grass.plan.prediction import PROBING, Row

_INK, _PALE = "#333333", "#e6e6e6"
_HEAD: dict[str, Any] = {"loc": "left", "fontsize": 10, "color": _INK}
# from Okabe and Ito's palette for colour-blind readers; grey for methods other than GRASS
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
_OTHERS = {"full": ("#777777", "-"), "lora-r128": ("#777777", "--"), "lisa": ("#777777", ":")}


def lengths(seq: int, most: int | None) -> list[int]:
    """Return the sequence lengths of the chart: 1/4, 1/2, 1 and 3/2 of `seq`, at most `most`."""
    candidates = {max(1, seq // 4), max(1, seq // 2), seq, seq + seq // 2}
    return sorted(length for length in candidates if most is None or length <= most)


def draw_chart(rows: Mapping[int, Sequence[Row]], gpu_gib: float, title: str, path: Path) -> None:
    """Plot a line per method, and the device memory as a limit, as a PNG.

    Args:
        rows: rows of a plan by sequence length; those of the probe are left out.
        gpu_gib: device memory, GiB.
        title: title of the chart.
        path: path of the PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    figure.suptitle(title, color=_INK, fontsize=12)
    seqs = sorted(rows)
    methods = [row.method for row in rows[seqs[0]] if not row.method.endswith(PROBING)]
    colors = iter(_COLORS)
    for method in methods:
        peaks = [next(row.peak_gib for row in rows[seq] if row.method == method) for seq in seqs]
        color, style = _OTHERS.get(method) or (next(colors), "-")
        axes.plot(seqs, peaks, style, color=color, marker="o", ms=3, lw=1.6, label=method)
    axes.axhline(gpu_gib, color=_INK, lw=0.8, ls=(0, (4, 3)))
    axes.annotate(
        f"{gpu_gib:g} GiB", (seqs[0], gpu_gib), xytext=(0, 3), textcoords="offset points", fontsize=8
    )
    axes.set_title("peak device memory, GiB", **_HEAD)
    axes.set_xlabel("sequence length, tokens", color=_INK)
    axes.set_ylim(bottom=0)
    axes.set_xticks(seqs)
    axes.grid(axis="y", color=_PALE, lw=0.6)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, format="png", dpi=130)
