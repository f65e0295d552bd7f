"""The picture: compute and both copies in a step, one after another and overlapped (the paper's Figure 3)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.offload.rows import VARIANTS, Outcome, Row
from bench.offload.steps import Step
from bench.offload.timeline import Span
from grass.offload.streams import COMPUTE, D2H, H2D, UPDATE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _FORWARD, _BACKWARD = "#333333", "#e8e8e8", "#c4c4c4"
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # of Okabe and Ito
_LANES = {COMPUTE: "compute", UPDATE: "updates", H2D: "host to device", D2H: "device to host"}
_UNITS_SHOWN = 9  # in the close-up


def draw(outcome: Outcome, path: Path) -> None:
    """Draw all variants as a PNG: the step on the left, a few units of it on the right.

    Args:
        outcome: of a run; what was measured is drawn, else the simulation.
        path: of the PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    source = "device" if any(row["measured"] for row in outcome.rows) else "simulation"
    steps = {variant: outcome.steps[variant, source] for variant in VARIANTS}
    colors = _colors(steps.values())
    figure = Figure(figsize=(13.5, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(steps), 2, squeeze=False, width_ratios=[3, 2], sharex="col")
    longest = max(step.seconds for step in steps.values())
    length = min(longest, max(_close_up(step) for step in steps.values()))
    for (whole, close), (variant, step) in zip(grid, steps.items(), strict=True):
        start = _first_work(step)
        _draw_lanes(whole, step.spans, colors, 0.0, longest, labelled=False)
        whole.axvline(1e3 * step.seconds, color=_INK, lw=0.8)
        whole.axvspan(1e3 * start, 1e3 * (start + length), fill=False, edgecolor=_INK, lw=0.8, ls=(0, (2, 2)))
        _draw_lanes(close, step.spans, colors, start, length, labelled=True)
        close.tick_params(labelleft=False)
        note = f"{1e3 * step.seconds:.0f} ms, of which {1e3 * step.exposed:.0f} ms nothing is computed"
        whole.set_title(f"{variant}: {note}", loc="left", fontsize=10, color=_INK)
        close.set_title("the marked part: units by number", loc="left", fontsize=10, color=_INK)
    grid[-1][0].set_xlabel("ms since the step began", color=_INK, fontsize=9)
    grid[-1][1].set_xlabel("ms since the first unit was needed", color=_INK, fontsize=9)
    first = outcome.rows[0]
    names = names_outside(first)
    handles = [Patch(color=_FORWARD, label="forward"), Patch(color=_BACKWARD, label="backward")]
    for bucket, color in colors.items():
        handles.append(Patch(color=color, label=names.get(bucket, f"layer {bucket}")))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    figure.suptitle(_title(first, source), color=_INK, fontsize=11)
    figure.savefig(path, dpi=150, format="png", metadata={"Software": None})


def _title(row: Row, source: str) -> str:
    gb = [row[f"{way}_bytes_per_second"] / 1e9 for way in ("h2d", "d2h")]
    how = f"measured on {row['device']}" if source == "device" else "simulated"
    shared = "" if row["duplex_factor"] == 1 else f", {100 * row['duplex_factor']:.0f} % of it when both copy"
    return (
        f"One step of {row['model']} with moments in host memory, updated inside backward ({how})\n"
        f"{row['buffer_count']} buffers of {row['buffer_bytes'] / 2**20:g} MiB, link {gb[0]:.0f} GB/s in and "
        f"{gb[1]:.0f} GB/s out{shared}"
    )


def names_outside(row: Row) -> dict[int, str]:
    """Return the names of the buckets that are no layers."""
    layers = row["layers"]
    return {layers: "embedding", layers + 1: "norm", layers + 2: "head"}


def _bucket(span: Span) -> int:
    return int(span.operation.label.split(".")[0])


def _is_work(span: Span) -> bool:
    """Return True if it moves or updates states."""
    return span.operation.kind in ("fetch", "update", "write-back")


def _colors(steps: Any) -> dict[int, str]:
    """A colour for each bucket, in the order of updates."""
    buckets = dict.fromkeys(_bucket(s) for step in steps for s in step.spans if s.operation.kind == "update")
    return {bucket: _COLORS[i % len(_COLORS)] for i, bucket in enumerate(buckets)}


def _first_work(step: Step) -> float:
    """Return when states are first needed, in seconds: the beginning of the close-up."""
    updates = [span for span in step.spans if span.operation.kind == "update"]
    bucket = _bucket(updates[0])
    computed = [
        s.end for s in step.spans if s.queue == COMPUTE and s.end <= updates[0].start and not _is_work(s)
    ]
    fetched = [s.start for s in step.spans if s.operation.kind == "fetch" and _bucket(s) == bucket]
    start = max(computed, default=0.0)
    return min(start, *(f for f in fetched if f >= start), updates[0].start)


def _close_up(step: Step) -> float:
    """Seconds in which a few units come and go."""
    copies = sorted(s.end - s.start for s in step.spans if s.operation.kind == "fetch")
    return _UNITS_SHOWN * copies[len(copies) // 2]


def _draw_lanes(
    axes: "Axes",
    spans: Sequence[Span],
    colors: dict[int, str],
    start: float,
    length: float,
    *,
    labelled: bool,
) -> None:
    """Draw what happens in a stretch of time, a lane for each queue, from 0 in ms."""
    lanes = [queue for queue in _LANES if any(span.queue == queue for span in spans)]
    lanes[1:1] = sorted({span.queue for span in spans} - set(_LANES))
    width = 1e3 * length
    for span in spans:
        left, right = (min(max(1e3 * (t - start), 0.0), width) for t in (span.start, span.end))
        if right <= left:
            continue
        lane = len(lanes) - 1 - lanes.index(span.queue)
        color = _color(span, colors)
        edge, line = ("white", 0.6) if labelled else (color, 0.1 if span.operation.kind == "update" else 0.0)
        axes.barh(lane, right - left, 0.74, left, color=color, edgecolor=edge, lw=line, snap=labelled)
        name = span.operation.label.rsplit(".")[-1] if _is_work(span) else span.operation.label
        needed = 0.02 * len(name) if _is_work(span) else 0.013 * len(name)  # as a share of the width
        if labelled and right - left > needed * width:
            ink = "white" if _is_work(span) else _INK
            axes.text((left + right) / 2, lane, name, ha="center", va="center", fontsize=8, color=ink)
    axes.set_xlim(0, width)
    axes.set_ylim(-0.6, len(lanes) - 0.4)
    axes.set_yticks(range(len(lanes)), [_LANES.get(queue, queue) for queue in reversed(lanes)])
    axes.tick_params(labelsize=9, colors=_INK)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _color(span: Span, colors: dict[int, str]) -> str:
    if _is_work(span):
        return colors.get(_bucket(span), _INK)
    return _FORWARD if span.operation.kind == "forward" else _BACKWARD
