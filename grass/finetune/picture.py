"""The picture of a run: importance and selection of the layers over time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_INK = "#333333"
_ACTIVE = "#0072b2"  # the blue of Okabe and Ito, told from grey by everyone
_PROBE = "#e6e6e6"


def selection_matrix(rows: Sequence[dict[str, Any]], num_layers: int, steps: int) -> np.ndarray:
    """Which layers each step trained, from the rows of layers.jsonl.

    Returns:
        bool [num_layers, steps]; column t is step t + 1.
    """
    selected = np.zeros((num_layers, steps), dtype=bool)
    ends = [row["step"] for row in rows[1:]] + [steps]
    for row, end in zip(rows, ends, strict=True):
        selected[row["active"], row["step"] : end] = True
    return selected


def importance_matrix(rows: Sequence[dict[str, Any]]) -> tuple[list[int], np.ndarray]:
    """Importance at each refresh, as a multiple of its mean over the layers.

    Returns:
        Steps of the refreshes; float [num_layers, refreshes].
    """
    refreshes = [row for row in rows if "refresh" in row["events"]]
    if not refreshes:
        return [], np.zeros((0, 0))
    values = np.array([row["importance"] for row in refreshes], dtype=float).T
    mean = values.mean(axis=0)
    return [row["step"] for row in refreshes], values / np.where(mean > 0, mean, 1.0)


def draw_picture(rows: Sequence[dict[str, Any]], steps: int, title: str, path: Path) -> None:
    """Draw importance (refreshes) above selection (steps), layers from bottom to top, as a PNG.

    Args:
        rows: of layers.jsonl.
        steps: of the run.
        title: above the picture.
        path: of the PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    num_layers = len(rows[0]["importance"])
    selected = selection_matrix(rows, num_layers, steps)
    at, importance = importance_matrix(rows)
    probe_end = next((row["step"] for row in rows if row["phase"] != "probe"), steps)

    figure = Figure(figsize=(10, 2.4 + 2 * min(4.5, 0.8 + 0.2 * num_layers)), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.suptitle(title, color=_INK, fontsize=12)

    upper.set_title(
        "Importance: mean gradient norm, relative to the mean of all layers", loc="left", fontsize=10
    )
    if at:
        positive = importance[importance > 0]
        least = float(positive.min()) if positive.size else 0.5
        # Symmetric around 1, the mean, so that runs can be compared by eye.
        spread = max(float(importance.max()), 1 / least, 1.25)
        mesh = upper.pcolormesh(
            np.array([*at, max(steps, at[-1] + 1)]),
            np.arange(num_layers + 1) - 0.5,
            np.maximum(importance, 1 / spread),
            cmap="cividis",
            norm=LogNorm(1 / spread, spread),
        )
        bar = figure.colorbar(mesh, ax=upper, pad=0.01, aspect=12)
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10) if 1 / spread <= t <= spread]
        bar.set_ticks(ticks, labels=[f"{t:g}x" for t in ticks])
        bar.minorticks_off()
        bar.ax.tick_params(labelsize=8, colors=_INK)
    else:
        upper.text(0.5, 0.5, "this sampler measures no importance", transform=upper.transAxes, ha="center")

    share = selected[:, probe_end:].mean(axis=1) if steps > probe_end else np.zeros(num_layers)
    lower.set_title("Selection: steps in which a layer was trained", loc="left", fontsize=10)
    lower.pcolormesh(
        np.arange(steps + 1),
        np.arange(num_layers + 1) - 0.5,
        np.ma.masked_equal(selected.astype(float), 0),
        cmap=_one_colour(_ACTIVE),
        vmin=0,
        vmax=1,
    )
    shares = lower.secondary_yaxis("right")
    shares.set_yticks(_tick_layers(num_layers), labels=[f"{share[i]:.0%}" for i in _tick_layers(num_layers)])
    shares.set_ylabel("share of steps", fontsize=9, color=_INK)
    shares.tick_params(length=0, labelsize=8, colors=_INK)
    lower.set_xlabel("step", color=_INK)
    for axes in (upper, lower):
        axes.set_ylim(-0.5, num_layers - 0.5)
        axes.set_xlim(0, steps)
        axes.set_yticks(_tick_layers(num_layers))
        axes.set_ylabel("layer", color=_INK)
        axes.tick_params(labelsize=8, colors=_INK)
        axes.spines[["top", "right"]].set_visible(False)
        if probe_end:
            axes.axvspan(0, probe_end, color=_PROBE, lw=0, zorder=0)
            axes.axvline(probe_end, color=_INK, lw=0.8, ls=(0, (4, 3)))
    if probe_end:
        lower.annotate(
            f"probe, {probe_end} steps",
            (probe_end, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=8,
            color=_INK,
        )
        lower.set_title(lower.get_title(loc="left"), loc="left", fontsize=10, pad=16)
    figure.savefig(path, dpi=150, format="png", metadata={"Software": None})


def _tick_layers(num_layers: int) -> list[int]:
    """At most about sixteen labels."""
    return list(range(0, num_layers, -(-num_layers // 16)))


def _one_colour(colour: str) -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap([colour])
