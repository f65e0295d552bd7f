"""The chart: how near to a copy's bandwidth each variant comes, over the number of parameters."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.kernels.cases import MIXTURES, make_cases
from bench.kernels.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = "#333333"
_COLORS = {  # of Okabe and Ito: told apart by everyone
    "grass": "#0072b2",
    "grass_kernels": "#56b4e9",
    "torch_fused": "#d55e00",
    "torch_foreach": "#e69f00",
    "torch_single": "#cc79a7",
    "copy": "#999999",
}
_MORE_COLORS = ("#009e73", "#000000", "#f0e442", "#8c6bb1", "#8c510a")

Points = dict[str, list[tuple[int, float]]]


def points_by_mixture(rows: Sequence[Row]) -> dict[str, Points]:
    """Measured (size, % of the copy's bandwidth) of each variant, by mixture, of cases that differ in nothing else.

    Mixtures are in the order of `cases.MIXTURES`; those without a measurement are left out.
    """
    sizes = sorted({row["numel"] for row in rows})
    panels: dict[str, Points] = {}
    for mixture in MIXTURES:
        wanted = {
            str(case)
            for size in sizes
            for case in make_cases([size])
            if case.is_default and case.mixture == mixture
        }
        points: Points = {}
        for row in rows:
            if row["measured"] and row["case"] in wanted:
                points.setdefault(row["variant"], []).append((row["numel"], row["percent_of_copy"]))
        if points:
            panels[str(mixture)] = {name: sorted(line) for name, line in points.items()}
    return panels


def draw_chart(rows: Sequence[Row], path: Path) -> None:
    """Draw a panel for each mixture as a PNG; a line for each variant, from measured rows only.

    Args:
        rows: of one run.
        path: of the PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = points_by_mixture(rows)
    columns = min(4, max(1, len(panels)))
    height = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(max(6.0, 3.2 * columns), 1.4 + 2.6 * height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(height, columns, sharex=True, sharey=True, squeeze=False)
    names = list(dict.fromkeys(name for points in panels.values() for name in points))
    colors = {name: _color(name, names) for name in names}
    for axes, (mixture, points) in zip(grid.flat, panels.items(), strict=False):
        _draw_panel(axes, mixture, points, colors)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    measured = next((row for row in rows if row["measured"]), None)
    if measured is None:
        grid[0][0].set_axis_on()
        grid[0][0].text(0.5, 0.5, "nothing was measured", transform=grid[0][0].transAxes, ha="center")
    else:
        commit = (measured["commit"] or "no commit")[:10] + (" + changes" if measured["dirty"] else "")
        figure.suptitle(
            "One AdamW step, in % of a large copy's bandwidth\n"
            f"{measured['device']}, torch {measured['torch']}, {commit}",
            color=_INK,
            fontsize=10,
        )
        handles = [Line2D([], [], color=colors[name], marker="o", ms=3, label=name) for name in names]
        figure.legend(handles=handles, loc="outside lower center", ncols=max(3, 2 * columns), fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("parameters", color=_INK, fontsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel("% of copy", color=_INK, fontsize=9)
    figure.savefig(path, dpi=150, format="png", metadata={"Software": None})


def _color(name: str, names: Sequence[str]) -> str:
    others = [other for other in names if other not in _COLORS]
    return _COLORS.get(name) or _MORE_COLORS[others.index(name) % len(_MORE_COLORS)]


def _draw_panel(axes: "Axes", mixture: str, points: Points, colors: dict[str, str]) -> None:
    axes.set_title(mixture, loc="left", fontsize=9, color=_INK)
    axes.axhline(100, color=_INK, lw=0.8, ls=(0, (4, 3)))
    for name, line in points.items():
        sizes, percents = zip(*line, strict=True)
        axes.plot(sizes, percents, color=colors[name], marker="o", ms=3, lw=1.4, label=name)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
