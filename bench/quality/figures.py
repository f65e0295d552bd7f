"""The paper's figures from stored rows and from what can be computed without a GPU, and our own of the differences."""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bench.__main__ import main as bench
from bench.kernels.rows import describe_environment
from bench.quality.comparison import MEMORY, NORMS, PAPER_GB, across, results, summarize
from bench.quality.methods import CONFIG
from bench.quality.study import ALTERNATIVES, BUDGETS, KEY, STUDY
from grass.cli import main as grass
from grass.errors import GrassError
from grass.finetune.run_folder import read_rows, write_rows
from grass.reproduce.study import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MANIFEST = "figures.json"
SOURCES = {
    "losses.png": "study.jsonl",
    "differences.png": "study.jsonl",
    "norms-small.png": "stability.jsonl",
    "norms.png": NORMS,
    "memory.png": MEMORY,
}
"""Rows of each figure that is drawn from some."""
_INK, _PALE = "#333333", "#e6e6e6"
COLORS = {  # of Okabe and Ito's palette for colour-blind readers
    "full": "#777777",
    "uniform": "#d55e00",
    "static": "#009e73",
    "grass": "#0072b2",
    "shuffled": "#cc79a7",
    "remeasured": "#e69f00",
    "static-top": "#56b4e9",
}


def draw_all(results_folder: Path, output: Path) -> list[Path]:
    """Draw every figure for which there are rows, and write `MANIFEST` beside them; return the paths.

    Args:
        results_folder: folder of the rows.
        output: folder of the PNGs.
    """
    output.mkdir(parents=True, exist_ok=True)
    rows = STUDY.matching(read_rows(results_folder / "study.jsonl"))
    stability = read_rows(results_folder / "stability.jsonl")
    norms = read_rows(results_folder / NORMS)
    figures: dict[str, Callable[[Path], Any]] = {
        "timeline.png": _timeline,
        "memory.png": lambda path: _memory(path, results_folder / MEMORY),
    }
    if summarize(rows, STUDY.parts["key"], "uniform"):
        figures["losses.png"] = lambda path: draw_losses(rows, path)
        figures["differences.png"] = lambda path: draw_differences(rows, path)
    if stability:
        figures["norms-small.png"] = lambda path: draw_norms(
            _small_norms(stability), "models of 0.77 million parameters, arithmetic", path
        )
    if norms:
        figures["norms.png"] = lambda path: draw_norms(_real_norms(norms), "SmolLM2-135M-Instruct", path)
    for name, draw in figures.items():
        draw(output / name)
    manifest = {name: _digests(results_folder, output, name) for name in figures}
    (output / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return [output / name for name in figures]


def check_figures(results_folder: Path, output: Path) -> None:
    """Compare figures, and the rows that they were drawn from, with `MANIFEST`.

    Raises:
        GrassError: a figure or its rows have changed since it was drawn, or there is no manifest.
    """
    path = output / MANIFEST
    if not path.exists():
        raise GrassError(f"there is no {path}: run python -m bench.quality figures")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    unknown = sorted(png.name for png in output.glob("*.png") if png.name not in manifest)
    if unknown:
        raise GrassError(f"{path} does not list {', '.join(unknown)}: run python -m bench.quality figures")
    for name, digests in manifest.items():
        if digests != _digests(results_folder, output, name):
            raise GrassError(
                f"{name} is not as it was drawn, or its rows have changed: run python -m bench.quality figures"
            )


def _digests(results_folder: Path, output: Path, name: str) -> list[str]:
    """Return checksums of the rows of a figure, if it has some, and of its PNG."""
    paths = [output / name] if name not in SOURCES else [results_folder / SOURCES[name], output / name]
    return [hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else "" for path in paths]


def _timeline(path: Path) -> None:
    """Figure 3: copies and compute in a step of a 7B, one after another and overlapped (simulated without a GPU)."""
    _run(bench, ["offload", "--plot", str(path)])


def _memory(path: Path, rows: Path) -> None:
    """Figure 4: predicted peak memory of LLaMA2-7B against sequence length, by method; rows of the paper's longest."""
    step = ["--model", "llama2-7b", "--batch-size", "4", "--context", "1792", "--activation-checkpointing"]
    step += ["--gpu-gib", f"{PAPER_GB * 1e9 / 2**30:.2f}"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        _run(grass, ["plan", *step, "--json", "--plot", str(path), "--plot-points", "5"])
    origin = {"arguments": " ".join(step), "commit": describe_environment(torch.device("cpu"))["commit"]}
    write_rows(rows, [row | origin for row in json.loads(printed.getvalue())])


def _run(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> None:
    code = command(arguments)
    if code:
        raise GrassError(f"{' '.join(arguments)} failed with exit code {code}")


def draw_losses(rows: Sequence[Row], path: Path) -> None:
    """Figure 7: training loss by method, and its difference from uniform sampling in the same pairs.

    Bands are one standard deviation over orders of the data, within bases. The difference leaves out the first point,
    which has the probe.
    """
    figure, (left, right) = _figure(2, (11, 4.2), share_y=False)
    part = STUDY.parts["key"]
    runs = {
        method: {
            pair: row["curve"]
            for pair, row in results(rows, part, method).items()
            if row["log_loss"] is not None
        }
        for method in (*KEY, *ALTERNATIVES)
    }
    runs = {method: of for method, of in runs.items() if len(of) > 1}
    common = [pair for pair in part.pairs if all(pair in of for of in runs.values())]
    curves = {method: np.array([of[pair] for pair in common]) for method, of in runs.items()}
    bases = np.array([base for base, _ in common])
    for method, of in curves.items():
        steps = (np.arange(of.shape[1]) + 0.5) * BUDGETS[part.task].steps / of.shape[1]
        for axes, values in ((left, of), (right, (of - curves["uniform"])[:, 1:])):
            within = np.sqrt(np.mean([values[bases == base].var(axis=0) for base in set(bases)], axis=0))
            mean = values.mean(axis=0)
            at = steps[-len(mean) :]
            axes.plot(at, mean, color=COLORS[method], lw=1.6, label=method)
            axes.fill_between(at, mean - within, mean + within, color=COLORS[method], alpha=0.15, lw=0)
    for axes in (left, right):
        axes.axvspan(
            0, CONFIG.probe_steps, color=_PALE, lw=0, zorder=0, label="probe, of those that have one"
        )
        axes.set_xlabel("step")
    left.set(ylabel="training loss, nats a token", yscale="log")
    left.set_yticks([0.5, 0.7, 1.0, 1.5, 2.0, 3.0], labels=["0.5", "0.7", "1", "1.5", "2", "3"])
    left.minorticks_off()
    right.set_ylabel("minus that of uniform, same pairs")
    left.legend(frameon=False, fontsize=8, labelcolor=_INK)
    _save(figure, path, f"Arithmetic, 0.77 million parameters: training loss, mean of {len(common)} runs")


def draw_differences(rows: Sequence[Row], path: Path) -> None:
    """Draw the comparisons on all bases with their intervals; those that are decided are filled."""
    lines = sorted(across(rows).items(), key=lambda line: line[1].log_loss.difference.mean)
    figure, grid = _figure(2, (11, 1.2 + 0.28 * max(1, len(lines))))
    for place, (_, of) in enumerate(lines):
        for axes, tested in zip(grid, of, strict=True):
            decided = tested.verdict != "undecided"
            axes.plot([tested.difference.low, tested.difference.high], [place, place], color=_INK, lw=1.4)
            face = _INK if decided else "white"
            axes.plot([tested.difference.mean], [place], color=_INK, marker="o", ms=5, mfc=face)
    labels = [f"{a} - {b} ({of.log_loss.difference.size} bases)" for (a, b), of in lines]
    for axes in grid:
        axes.axvline(0, color=_INK, lw=0.8, ls=(0, (4, 3)))
    grid[0].set_yticks(range(len(lines)), labels=labels)
    grid[0].invert_yaxis()
    grid[0].set_xlabel("held-out log-loss, nats a token (left is better)", color=_INK)
    grid[1].set_xlabel("exact match, points (right is better)", color=_INK)
    _save(figure, path, "Arithmetic: differences and 95 % intervals; filled if decided")


def draw_norms(panels: Mapping[str, Mapping[str, np.ndarray]], model: str, path: Path) -> None:
    """Figures 1 and 6: norms of the layers over their mean, a panel of lines each.

    Args:
        panels: title of a panel -> name of a line -> norms, [L].
        model: what the layers are of.
        path: of the PNG.
    """
    figure, grid = _figure(len(panels), (4.2 * len(panels), 3.8))
    palette = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#777777")
    for axes, (title, lines) in zip(grid, panels.items(), strict=True):
        for index, (name, norms) in enumerate(lines.items()):
            style = "-" if index < len(palette) else "--"
            axes.plot(norms / norms.mean(), style, color=palette[index % len(palette)], lw=1.4, label=name)
        axes.set_title(title, loc="left", fontsize=10, color=_INK)
        axes.set(xlabel="layer", yscale="log")
        axes.axhline(1, color=_PALE, lw=0.8, zorder=0)
        axes.legend(frameon=False, fontsize=7, labelcolor=_INK)
        ticks = [
            tick
            for tick in (0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10)
            if axes.get_ylim()[0] < tick < axes.get_ylim()[1]
        ]
        axes.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    grid[0].set_ylabel("mean gradient norm / mean over layers", color=_INK)
    _save(figure, path, f"Mean gradient norm by layer: {model}")


def _small_norms(rows: Sequence[Row]) -> dict[str, dict[str, np.ndarray]]:
    steps = sorted({row["step"] for row in rows if row["kind"] == "norms"})
    return {
        f"base {base}": {
            f"step {step}": np.array(row["norms"]).mean(axis=0)
            for step in steps
            for row in rows
            if row["kind"] == "norms" and (row["base"], row["step"], row["size"]) == (base, step, 16)
        }
        for base in sorted({row["base"] for row in rows})
    }


def _real_norms(rows: Sequence[Row]) -> dict[str, dict[str, np.ndarray]]:
    panels: dict[str, dict[str, np.ndarray]] = {}
    for row in rows:
        panels.setdefault(row["panel"], {})[row["name"]] = np.array(row["norms"])
    return panels


def _figure(columns: int, size: tuple[float, float], *, share_y: bool = True) -> tuple[Any, "list[Axes]"]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(1, columns, squeeze=False, sharey=share_y)[0])
    for axes in grid:
        axes.tick_params(labelsize=8, colors=_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=_PALE, lw=0.6)
        axes.set_axisbelow(True)
    return figure, grid


def _save(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, color=_INK, fontsize=11)
    figure.savefig(path, dpi=130, format="png", metadata={"Software": None})
