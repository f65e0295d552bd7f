"""Noise of the gradient norms of layers, and agreement of the orders of layers that a few of them give.

A run of GRASS is measured from beside: at some steps the norms of all layers on many batches of several sizes, and at
every step the norms of all layers on the step's own batch, with the importance that the optimizer has of them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from bench.quality.methods import CONFIG, View, make
from bench.quality.study import problems
from bench.quality.training import LAYERS, Budget, base_model, digest, fine_tune, root_mean_squares
from grass import GrassConfig
from grass.reproduce.study import Row
from grass.sampling import make_sampler

SIZES = (4, 16, 64)
BATCHES = 40
REFERENCE = 1024  # problems of the mean gradient
Array = NDArray[np.float64]


def measure(base: int, lr: float, budget: Budget, folder: Path) -> list[Row]:
    """Return rows of a run of GRASS on arithmetic.

    Args:
        base: seed of the base model.
        lr: maximum learning rate.
        budget: size of the run.
        folder: keeps the base models.
    """
    torch.set_num_threads(1)
    model = base_model(base, folder)
    base_digest = digest(model)
    train, heldout = problems("arithmetic", budget, base, is_search=False)
    optimizer = make("grass", model, train, seed=base)
    view = View(model, optimizer, train, torch.Generator().manual_seed(base))
    stages = (0, budget.steps // 2, budget.steps - 1)
    rows: list[Row] = []
    norms, importance, active = [], [], []

    def observe(step: int, batch: tuple[Tensor, Tensor]) -> None:
        if step in stages:
            rows.extend(_stage(view, base, step))
        norms.append(_norms(view, batch))
        importance.append(optimizer.importance.tolist())
        active.append(list(optimizer.active_layers))

    fine_tune(model, optimizer, train, heldout, lr, base, budget, observe)
    trace = {"norms": _short(norms), "importance": _short(importance), "active": active}
    rows.append({"kind": "trace", "base": base, "lr": lr, **trace})
    return [row | {"base_digest": base_digest} for row in rows]


def _stage(view: View, base: int, step: int) -> Iterator[Row]:
    for size in SIZES:
        norms = [_norms(view, view.batch(size)) for _ in range(BATCHES)]
        yield {"kind": "norms", "base": base, "step": step, "size": size, "norms": _short(norms)}
    signal = _norms(view, view.batch(REFERENCE))
    yield {"kind": "signal", "base": base, "step": step, "size": REFERENCE, "norms": _short([signal])}


def _norms(view: View, batch: tuple[Tensor, Tensor]) -> list[float]:
    norms: list[float] = root_mean_squares(view.gradients(batch)).tolist()
    return norms


def _short(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[float(f"{value:.4g}") for value in row] for row in rows]


# -- what rows say ---------------------------------------------------------------------------------------


def variation(rows: Sequence[Row], size: int, step: int) -> float:
    """Return the standard deviation of a layer's norm between batches over its mean, a mean over layers and bases."""
    of = [np.array(row["norms"]) for row in _select(rows, "norms", size=size, step=step)]
    return float(np.mean([norms.std(axis=0, ddof=1) / norms.mean(axis=0) for norms in of]))


def noise_share(rows: Sequence[Row], size: int, step: int) -> float:
    """Return the share of the mean squared norm that is noise.

    With b problems in a batch the mean squared norm is |G|^2 + s^2 / b, where G is the mean gradient; norms of two
    sizes give both terms.
    """
    shares = []
    for row in _select(rows, "norms", size=size, step=step):
        (large,) = _select(rows, "signal", base=row["base"], step=step)
        squares, large_squares = (
            np.square(np.array(row["norms"])).mean(axis=0),
            np.square(np.array(large["norms"][0])),
        )
        signal = (large["size"] * large_squares - size * squares) / (large["size"] - size)
        shares.append(1 - np.maximum(signal, 0) / squares)
    return float(np.mean(shares))


def agreement(rows: Sequence[Row], size: int, step: int, window: int) -> float:
    """Return the rank correlation of MGN over a window of batches with the norms of the mean gradient."""
    found = []
    for row in _select(rows, "norms", size=size, step=step):
        (signal,) = _select(rows, "signal", base=row["base"], step=step)
        found += [_rank_correlation(m, np.array(signal["norms"][0])) for m in _windows(row, window)]
    return float(np.mean(found))


def repeatability(rows: Sequence[Row], size: int, step: int, window: int) -> float:
    """Return the rank correlation of MGN between windows of different batches at the same weights."""
    found = []
    for row in _select(rows, "norms", size=size, step=step):
        windows = _windows(row, window)
        found += [_rank_correlation(a, b) for a, b in zip(windows[::2], windows[1::2], strict=False)]
    return float(np.mean(found))


def drift(rows: Sequence[Row], size: int, step: int, later: int) -> float:
    """Return the rank correlation of MGN at one step with MGN at a later one, over all batches."""
    found = []
    for row in _select(rows, "norms", size=size, step=step):
        (other,) = _select(rows, "norms", base=row["base"], size=size, step=later)
        found.append(
            _rank_correlation(np.array(row["norms"]).mean(axis=0), np.array(other["norms"]).mean(axis=0))
        )
    return float(np.mean(found))


def probability_noise(
    rows: Sequence[Row], size: int, step: int, window: int, config: GrassConfig, averaged: int = 1
) -> tuple[float, float]:
    """Return how much probabilities differ by chance, and by layer.

    Args:
        rows: rows of norms.
        size, step: size of the batches, and the step at whose weights they were measured.
        window: number of batches of a window.
        config: how importance becomes probabilities.
        averaged: number of windows in a moving average, each newest one with the weight ``config.ema``.

    Returns:
        The mean total variation distance between the probabilities of two chains of windows at the same weights, and
        that between the probabilities of all batches and uniform ones.
    """
    noise, contrast = [], []
    sampler = make_sampler(config, [True] * LAYERS)

    def probabilities(windows: Sequence[Array]) -> Array:
        importance = windows[0]
        for mean in windows[1:]:
            importance = config.ema * mean + (1 - config.ema) * importance
        sampler.refresh(torch.from_numpy(importance))
        return sampler.probabilities.numpy().copy()

    for row in _select(rows, "norms", size=size, step=step):
        windows = _windows(row, window)
        chains = [windows[i : i + averaged] for i in range(0, len(windows) - averaged + 1, averaged)]
        of = [probabilities(chain) for chain in chains]
        noise += [np.abs(a - b).sum() / 2 for a, b in zip(of[::2], of[1::2], strict=False)]
        everything = probabilities([np.array(row["norms"]).mean(axis=0)])
        contrast.append(np.abs(everything - 1 / LAYERS).sum() / 2)
    return float(np.mean(noise)), float(np.mean(contrast))


def autocorrelation(rows: Sequence[Row], lag: int, smooth: int = 50) -> float:
    """Return the autocorrelation of norms between steps, without their trend (a moving mean); a mean over layers."""
    found = []
    for row in _select(rows, "trace"):
        norms = np.log(np.array(row["norms"]))
        kernel = np.ones(smooth) / smooth
        trend = np.stack([np.convolve(column, kernel, mode="same") for column in norms.T], axis=1)
        rest = (norms - trend)[smooth:-smooth]  # a trend that contains the step itself: biased by -1 / smooth
        found += [np.corrcoef(column[:-lag], column[lag:])[0, 1] + 1 / smooth for column in rest.T]
    return float(np.mean(found))


def bias(rows: Sequence[Row], window: int = 20) -> tuple[float, float]:
    """Return the mean of ln(importance / MGN of the last `window` steps) of layers in training, and of frozen ones.

    Only the importance of layers in training is updated, while the norms of all layers fall or rise.
    """
    active, frozen = list[float](), list[float]()
    for row in _select(rows, "trace"):
        norms, importance = np.array(row["norms"]), np.array(row["importance"])
        for step in range(CONFIG.probe_steps + window, len(norms), window):
            ratio = np.log(importance[step] / norms[step - window : step].mean(axis=0))
            trained = {layer for layers in row["active"][step - window : step] for layer in layers}
            for layer in range(LAYERS):
                (active if layer in trained else frozen).append(ratio[layer])
    return float(np.mean(active)), float(np.mean(frozen))


def selection(rows: Sequence[Row], of: str = "norms") -> float:
    """Return the norms, or the importance, of the layers in training over the mean of all layers, a mean over steps."""
    ratios = []
    for row in _select(rows, "trace"):
        for values, active in zip(np.array(row[of]), row["active"], strict=True):
            if active:
                ratios.append(values[active].mean() / values.mean())
    return float(np.mean(ratios))


def _select(rows: Sequence[Row], kind: str, **values: int) -> list[Row]:
    return [row for row in rows if row["kind"] == kind and all(row[k] == v for k, v in values.items())]


def _windows(row: Row, window: int) -> list[Array]:
    norms = np.array(row["norms"])
    return [norms[i : i + window].mean(axis=0) for i in range(0, len(norms) - window + 1, window)]


def _rank_correlation(a: Array, b: Array) -> float:
    return float(stats.spearmanr(a, b).statistic)
