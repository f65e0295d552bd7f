"""Plots of a run: importance and selection of the layers over time; losses."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#333333"
_ACTIVE = "#0072b2"  # from Okabe and Ito's palette for colour-blind readers
_PALE = "#e6e6e6"
_MOST_LABELS = 40
_MOST_VALUES = 12
_HEAD: dict[str, Any] = {"loc": "left", "fontsize": 10, "color": _INK}


class LayersOverTime(NamedTuple):
    """Values of each layer over time: column i is valid from step ``edges[i]`` to ``edges[i + 1]``."""

    edges: np.ndarray  # [spans + 1]
    values: np.ndarray  # [num_layers, spans]


def selection_over_time(rows: Sequence[dict[str, Any]], steps: int) -> LayersOverTime:
    """Return 1.0 for layers that were trained and 0.0 for frozen ones, from the rows of layers.jsonl."""
    rows = [row for row in rows if row["step"] < steps]
    values = np.zeros((len(rows[0]["importance"]), len(rows)))
    for column, row in enumerate(rows):
        values[row["active"], column] = 1.0
    return LayersOverTime(np.array([*(row["step"] for row in rows), steps]), values)


def importance_over_time(rows: Sequence[dict[str, Any]], steps: int) -> LayersOverTime | None:
    """Return the importance divided by its mean over layers, for each refresh; None if there was no refresh."""
    rows = [row for row in rows if row["step"] < steps and "refresh" in row["events"]]
    if not rows:
        return None
    values = np.array([row["importance"] for row in rows]).T
    mean = values.mean(axis=0)
    return LayersOverTime(
        np.array([*(row["step"] for row in rows), steps]), values / np.where(mean > 0, mean, 1.0)
    )


def draw_picture(rows: Sequence[dict[str, Any]], steps: int, title: str, path: Path) -> None:
    """Plot importance above selection as a PNG: layers from bottom to top, steps from left to right.

    Args:
        rows: rows of layers.jsonl.
        steps: number of steps of the run.
        title: title of the plot.
        path: path of the PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_layers = len(rows[0]["importance"])
    probe_end = next((row["step"] for row in rows if row["phase"] != "probe"), steps)
    figure = Figure(figsize=(10, 2.4 + 2 * min(4.5, 0.8 + 0.2 * num_layers)), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.suptitle(title, color=_INK, fontsize=12)
    _draw_importance(figure, upper, importance_over_time(rows, steps), num_layers)
    _draw_selection(lower, selection_over_time(rows, steps), num_layers, probe_end)
    for axes in (upper, lower):
        axes.set(xlim=(0, steps), ylim=(-0.5, num_layers - 0.5), yticks=_labelled(num_layers))
        axes.set_ylabel("layer", color=_INK)
        axes.tick_params(axis="x", labelsize=8, colors=_INK)
        axes.tick_params(axis="y", labelsize=_label_size(num_layers), colors=_INK)
        axes.spines[["top", "right"]].set_visible(False)
        for boundary in range(1, num_layers):
            axes.axhline(boundary - 0.5, color="white" if axes is upper else _PALE, lw=0.6)
        if probe_end:
            axes.axvspan(0, probe_end, color=_PALE, lw=0, zorder=0)
            axes.axvline(probe_end, color=_INK, lw=0.8, ls=(0, (4, 3)))
    lower.set_xlabel("step", color=_INK)
    _save(figure, path)


def draw_losses(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Plot the losses of a run as a PNG: of training as a line, of held-out records as points with their values.

    Args:
        rows: rows of metrics.jsonl: ``step`` with ``loss`` or ``heldout_loss``. A loss of None, NaN or inf is left out.
        path: path of the PNG.
        title: title of the plot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    figure.suptitle(title, color=_INK, fontsize=12)
    axes.set_title("Loss per token", **_HEAD)
    steps, losses = _finite(rows, "loss")
    axes.plot(steps, losses, color=_INK, lw=0.8, label="training")
    steps, losses = _finite(rows, "heldout_loss")
    axes.plot(steps, losses, color=_ACTIVE, ls="", marker="o", ms=5, label="held-out records", clip_on=False)
    for index in _with_values(losses):
        axes.annotate(
            f"{losses[index]:.3f}",
            (steps[index], losses[index]),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=_ACTIVE,
        )
    axes.margins(x=0.03, y=0.1)
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("loss", color=_INK)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_PALE, lw=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, labelcolor=_INK)
    _save(figure, path)


def _finite(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a value is finite, and the values."""
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None and np.isfinite(row[key])]
    return [step for step, _ in found], [value for _, value in found]


def _with_values(losses: Sequence[float]) -> list[int]:
    """Return the points that are shown with their value: all, or of many the first, the lowest and the last."""
    if len(losses) <= _MOST_VALUES:
        return list(range(len(losses)))
    return sorted({0, int(np.argmin(losses)), len(losses) - 1})


def _save(figure: "Figure", path: Path) -> None:
    # Without matplotlib's name and version in the metadata, the same run gives the same file.
    figure.savefig(path, dpi=150, format="png", metadata={"Software": None})


def _draw_importance(figure: "Figure", axes: "Axes", data: LayersOverTime | None, num_layers: int) -> None:
    from matplotlib.colors import LogNorm

    axes.set_title("Importance: mean gradient norm, relative to the mean of all layers", **_HEAD)
    if data is None:
        text = "this sampler does not measure importance"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_INK)
        return
    positive = data.values[data.values > 0]
    # A scale symmetric around 1, the mean over layers.
    spread = max(1.25, float(positive.max()), 1 / float(positive.min())) if positive.size else 1.25
    mesh = axes.pcolormesh(
        data.edges,
        np.arange(num_layers + 1) - 0.5,
        np.maximum(data.values, 1 / spread),
        cmap="cividis",  # readable with any kind of colour vision
        norm=LogNorm(1 / spread, spread),
    )
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=12)
    decades = [10.0**n for n in range(-12, 13)] + [2 * 10.0**n for n in range(-1, 1)] + [0.5, 5]
    ticks = sorted(t for t in decades if 1 / spread <= t <= spread)
    bar.set_ticks(ticks, labels=[f"{t:g}x" for t in ticks])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8, colors=_INK)


def _draw_selection(axes: "Axes", data: LayersOverTime, num_layers: int, probe_end: int) -> None:
    from matplotlib.colors import ListedColormap

    axes.set_title("Selection: steps in which a layer was trained", pad=16 if probe_end else 6, **_HEAD)
    axes.pcolormesh(
        data.edges,
        np.arange(num_layers + 1) - 0.5,
        np.ma.masked_equal(data.values, 0.0),
        cmap=ListedColormap([_ACTIVE]),
        vmin=0,
        vmax=1,
    )
    adapt_steps = max(1, int(data.edges[-1]) - probe_end)
    share = data.values @ np.diff(data.edges) / adapt_steps
    right = axes.secondary_yaxis("right")
    right.set_yticks(_labelled(num_layers), labels=[f"{share[i]:.0%}" for i in _labelled(num_layers)])
    right.set_ylabel("share of steps", fontsize=9, color=_INK)
    right.tick_params(length=0, labelsize=_label_size(num_layers), colors=_INK)
    if probe_end:
        axes.annotate(
            f"probe, {probe_end} steps",
            (probe_end, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=8,
            color=_INK,
        )


def _labelled(num_layers: int) -> list[int]:
    """Return the layers to label: all, or at most forty."""
    return list(range(0, num_layers, -(-num_layers // _MOST_LABELS)))


def _label_size(num_layers: int) -> float:
    """Return the font size of the labels of layers, in points, at which neighbours do not touch."""
    return 8.0 if num_layers <= 24 else 7.0
