"""Chart of a plan: peak memory against sequence length, by method."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grass.plan.prediction import ADAMW, PROBING, Row

_INK, _PALE = "#333333", "#e6e6e6"
_HEAD: dict[str, Any] = {"loc": "left", "fontsize": 10, "color": _INK}
# from Okabe and Ito's palette for colour-blind readers; grey for methods that do not sample layers by gradients
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
_OTHERS = {
    "full": ("#777777", "-"),
    ADAMW: ("#777777", "-."),
    "lora-r128": ("#777777", "--"),
    "lisa": ("#777777", ":"),
}
_EIGHTHS = (
    8,
    2,
    12,
    4,
    6,
    10,
    1,
)  # of the planned length, in the order in which lengths are added to the chart
_ROOM = 1.5  # the device memory is shown if it is at most this many times the highest peak


def lengths(seq: int, most: int | None, points: int) -> list[int]:
    """Return the sequence lengths of the chart: `seq`, 1/4, 3/2 and 1/2 of it, then others between.

    Args:
        seq: planned length.
        most: maximum length of the model, None for no limit.
        points: number of lengths; short sequences have fewer.
    """
    candidates = dict.fromkeys(max(1, seq * eighths // 8) for eighths in _EIGHTHS)
    return sorted([length for length in candidates if most is None or length <= most][:points])


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
    make_chart(rows, gpu_gib, title).savefig(path, format="png", dpi=130)


def make_chart(rows: Mapping[int, Sequence[Row]], gpu_gib: float, title: str) -> Any:
    """Return the figure of `draw_chart`, in MiB if all peaks are below 1 GiB; a limit far above them is only named."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    figure.suptitle(title, color=_INK, fontsize=12)
    seqs = sorted(rows)
    methods = [row.method for row in rows[seqs[0]] if not row.method.endswith(PROBING)]
    highest = max(row.peak_gib for seq in seqs for row in rows[seq] if row.method in methods)
    scale, unit = (1, "GiB") if highest >= 1 else (1024, "MiB")
    colors = iter(_COLORS)
    for method in methods:
        peaks = [next(row.peak_gib for row in rows[seq] if row.method == method) * scale for seq in seqs]
        color, style = _OTHERS.get(method) or (next(colors), "-")
        axes.plot(seqs, peaks, style, color=color, marker="o", ms=3, lw=1.6, label=method)
    head = f"predicted peak of device memory, {unit}"
    if gpu_gib <= _ROOM * highest:
        limit = gpu_gib * scale
        axes.axhline(limit, color=_INK, lw=0.8, ls=(0, (4, 3)))
        axes.annotate(
            f"{limit:g} {unit}",
            (1, limit),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    else:
        head += f" (the device has {gpu_gib:g} GiB)"
    axes.set_title(head, **_HEAD)
    axes.set_xlabel("sequence length, tokens", color=_INK)
    axes.set_ylim(bottom=0)
    axes.set_xticks(seqs)
    axes.grid(axis="y", color=_PALE, lw=0.6)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure
