"""Predict memory and communication of llama2-70b on many GPUs; write the table and the chart of docs/scale.md."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.kernels.rows import describe_environment
from bench.output import add_output_options, output_of, replace_between
from grass.finetune.run_folder import read_rows

ROOT = Path(__file__).parents[1]
ROWS, PAGE, CHART = ROOT / "bench/results/scale.jsonl", ROOT / "docs/scale.md", ROOT / "docs/scale.png"
BEGIN, END = "<!-- simulated: generated -->", "<!-- end of simulated -->"
MODEL, BATCH, SEQ, TFLOPS, NETWORK = "llama2-70b", 1, 2048, 400.0, 50.0
METHODS = {"full": "full fine-tuning", "grass-resident": "GRASS, 2 of 80 layers"}


@dataclass(frozen=True)
class Layout:
    """A number of GPUs, and how many of them share a copy of the model."""

    gpus: int
    shard: int


LAYOUTS = [Layout(n, shard) for n in (8, 32, 128, 512) for shard in dict.fromkeys((n, 8))]


def predictions() -> Iterator[dict[str, Any]]:
    """Yield a row for each layout and method; half a minute each."""
    import torch

    from grass.plan.cluster import Cluster
    from grass.plan.prediction import Case, predict

    environment = describe_environment(torch.device("cpu"))
    for layout in LAYOUTS:
        case = Case(
            MODEL,
            batch=BATCH,
            seq=SEQ,
            loss="full",
            gpu_gib=80.0,
            tflops=TFLOPS,
            master_weights=False,
            cluster=Cluster(layout.gpus, layout.shard, network_gbs=NETWORK),
        )
        for row in predict(case, tuple(METHODS)):
            yield asdict(layout) | row.as_dict() | {key: environment[key] for key in ("commit", "torch")}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    first = rows[0]
    lines = [
        f"Simulated by `python -m bench scale` with torch {first['torch']}: {MODEL} in bfloat16, {BATCH} x {SEQ}",
        f"tokens on each GPU, activation checkpointing, {TFLOPS:g} TFLOP/s, 450 GB/s between the 8 GPUs of a machine,",
        f"{NETWORK:g} GB/s for each GPU between machines. Moments of full fine-tuning are bfloat16, those of GRASS",
        "float32. All columns are for one GPU; traffic and times are those of a step after the probe.",
        "",
        "- *device*: peak memory of the GPU. *host*: states of this GPU in host memory.",
        "- *gathered*: weights received for forward and backward. *reduced*: gradients sent.",
        "- *links*: least time of the collectives. *compute*: least time of the matrix products. A step takes at least",
        "  as long as the longer one.",
        "",
        "| GPUs | copies | method | device, GiB | host, GiB | gathered, GiB | reduced, GiB | links, ms | compute, ms |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {row['gpus']} | {row['gpus'] // row['shard']} | {METHODS[row['method']]} | {row['peak_gib']:.1f} | "
            f"{row['states_host_gib']:.1f} | {row['gathered_gib_per_step']:.1f} | {row['reduced_gib_per_step']:.1f} | "
            f"{row['collectives_ms']:,.0f} | {row['compute_ms']:,.0f} |"
            for row in rows
            if row["gpus"] in (8, 128, 512)
        ),
        "",
        *(
            [
                "Compute takes longer than the links in every row: a step of GRASS is shorter here because fewer",
                "gradients are computed, not because fewer are sent. Less traffic shortens a step where links are",
                "slower, or batches smaller.",
                "",
            ]
            if all(row["compute_ms"] > row["collectives_ms"] for row in rows)
            else []
        ),
        "![Time of collectives and of compute by number of GPUs](scale.png)",
    ]
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the time of the collectives against the number of GPUs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for number, (method, title) in enumerate(METHODS.items()):
        for style, kind, is_hybrid in (("-", "one copy", False), ("--", "copies on 8 GPUs", True)):
            points = [
                (row["gpus"], row["collectives_ms"] / 1e3)
                for row in rows
                if row["method"] == method
                and (row["shard"] == 8 if is_hybrid else row["shard"] == row["gpus"])
            ]
            axes.plot(
                *zip(*points, strict=True),
                style,
                color=f"C{number}",
                marker="o",
                ms=3,
                label=f"{title}, {kind}",
            )
    compute = {row["method"]: row["compute_ms"] / 1e3 for row in rows}
    for number, (method, title) in enumerate(METHODS.items()):
        axes.axhline(compute[method], color=f"C{number}", lw=0.8, ls=":", label=f"{title}: compute")
    axes.set_xscale("log", base=2)
    gpus = sorted({row["gpus"] for row in rows})
    axes.set_xticks(gpus, labels=[str(count) for count in gpus])
    axes.set_xlabel("GPUs")
    axes.set_ylabel("seconds a step")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{MODEL}: collectives and compute of a step, simulated", fontsize=10)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=150)


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "scale",
        help="simulate llama2-70b on 8 to 512 GPUs (ten minutes, without a GPU), and write docs/scale.md",
    )
    parser.add_argument("--redraw", action="store_true", help="write page and chart from the stored rows")
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    arguments.out = arguments.out or (None if arguments.redraw else str(ROWS))
    with output_of(arguments) as output:
        for row in read_rows(ROWS) if arguments.redraw else predictions():
            output.write(row)
            output.say(
                f"{row['gpus']:>4} GPUs, {row['gpus'] // row['shard']:>2} copies, {row['method']:<15}"
                f"{row['peak_gib']:8.1f} GiB {row['collectives_ms']:8,.0f} ms of collectives"
            )
    PAGE.write_text(replace_between(PAGE, BEGIN, END, table(output.rows)), encoding="utf-8")
    draw(output.rows, CHART)
    return 0
