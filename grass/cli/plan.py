"""`grass plan`: how much memory fine-tuning will take, method by method, from fake tensors."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grass.cli.values import count, model_name, positive, require_matplotlib, writable
from grass.config import GrassConfig

if TYPE_CHECKING:
    from grass.plan.losses import Loss
    from grass.plan.prediction import Case, Row

DTYPES = ("bfloat16", "float16", "float32")

_DESCRIPTION = """\
Predict the peak device memory of fine-tuning, method by method: a real training step runs on fake tensors. No GPU is
needed and no weights are loaded. Figures are sizes of tensors in GiB; CUDA needs about 0.5 GiB in addition, and
fragmentation of the allocator is not included.

Rows: full is torch's fused AdamW with moments in the weights' dtype; lora-r128 is peft's on all linear layers; lisa
draws layers uniformly and drops their moments, in the weights' dtype. grass keeps the moments of all layers on the
device once they have been drawn, grass-resident those of the layers that train and of the next ones, grass-streamed
a ring of buffers; -fused updates inside backward. While -probing nothing is updated. The active layers are the last
ones, the worst case; with -fused, the layers before the last one if these need more.
"""

_EXAMPLES = """\
examples:
  grass plan --model llama2-7b --batch 4 --seq 1024
  grass plan --model llama3-8b --gpu-gib 40 --host-gib 64 --state-dtype bfloat16
  grass plan --model ./checkpoint --seq 2048 --loss full --plot memory.png
  grass plan --model qwen2.5-7b --json

Host memory is that of the store when every layer has been drawn. The lower bound of a step is the longest of compute at
--tflops and the copies to and from the device at --pcie-gbs; resident states are copied once in --sample-interval
steps.
"""


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "plan",
        help="predict the memory of fine-tuning, without a GPU and without weights",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "--model",
        required=True,
        type=lambda name: model_name(name, _presets()),
        metavar="MODEL",
        help=f"one of {', '.join(_presets())}; or a folder with a config.json, or a name on the hub",
    )
    step = parser.add_argument_group("the step")
    step.add_argument("--batch", type=count, default=4, metavar="N", help="sequences [4]")
    step.add_argument("--seq", type=count, default=1024, metavar="N", help="tokens of a sequence [1024]")
    step.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the weights [bfloat16]")
    step.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep only the layers' inputs for backward [on]",
    )
    step.add_argument(
        "--loss",
        choices=("chunked", "full"),
        help="whether the logits of all tokens exist at once [chunked, unless the model caps its logits]",
    )
    grass = parser.add_argument_group("GRASS")
    grass.add_argument(
        "--active-layers", type=count, default=GrassConfig.active_layers, metavar="N",
        help=f"layers that train at a time [{GrassConfig.active_layers}]",
    )  # fmt: skip
    grass.add_argument(
        "--state-dtype", choices=("float32", "bfloat16"), default="float32",
        help="dtype of the moments in the grass rows [float32]",
    )  # fmt: skip
    grass.add_argument(
        "--master-weights", action=argparse.BooleanOptionalAction, default=True,
        help="16 more bits of each bfloat16 weight with the states in the grass rows [on]",
    )  # fmt: skip
    grass.add_argument(
        "--sample-interval", type=count, default=GrassConfig.sample_interval, metavar="N",
        help=f"steps with one set of layers [{GrassConfig.sample_interval}]",
    )  # fmt: skip
    grass.add_argument(
        "--buffer-mb", type=positive, default=GrassConfig.buffer_mb, metavar="X",
        help=f"MiB of a buffer of streamed states [{GrassConfig.buffer_mb:g}]",
    )  # fmt: skip
    grass.add_argument(
        "--buffer-count", type=count, default=GrassConfig.buffer_count, metavar="N",
        help=f"number of buffers of streamed states [{GrassConfig.buffer_count}]",
    )  # fmt: skip
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--gpu-gib", type=positive, default=24.0, metavar="GIB", help="device memory [24]")
    machine.add_argument(
        "--host-gib", type=positive, metavar="GIB", help="host memory for states [unlimited]"
    )
    machine.add_argument(
        "--pcie-gbs",
        type=positive,
        default=25.0,
        metavar="X",
        help="1e9 bytes per second, in each direction [25]",
    )
    machine.add_argument(
        "--tflops",
        type=positive,
        default=150.0,
        metavar="X",
        help="1e12 operations per second, sustained [150]",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw peak against sequence length (PNG); takes longer"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of the rows, without advice")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `grass plan`; the exit code."""
    from grass.plan.advice import advise
    from grass.plan.prediction import predict

    plot = None
    if args.plot is not None:
        plot = writable(args.plot, "--plot")
        require_matplotlib()
    case = _case(args)
    rows: list[Row] = []
    for row in predict(case, _names()):
        if not args.json:
            if not rows:
                print(_head(case))
            print(_line(row, case.host_gib), flush=True)
        rows.append(row)
    if args.json:
        print(json.dumps([row.as_dict() for row in rows], indent=1, allow_nan=False))
    else:
        print(f"\n{advise(rows, case.gpu_gib, case.host_gib)}")
    if plot is not None:
        _draw(case, rows, plot)
    return 0


def _names() -> list[str]:
    from grass.plan.methods import has_peft
    from grass.plan.prediction import METHODS

    if has_peft():
        return list(METHODS)
    print("grass plan: peft is not installed, and LoRA is left out", file=sys.stderr)
    return [name for name in METHODS if not name.startswith("lora")]


def _case(args: argparse.Namespace) -> Case:
    import torch

    from grass.plan.prediction import Case

    return Case(
        model=args.model,
        batch=args.batch,
        seq=args.seq,
        dtype=getattr(torch, args.dtype),
        checkpointing=args.checkpointing,
        loss=args.loss or _default_loss(args.model),
        active_layers=args.active_layers,
        state_dtype=getattr(torch, args.state_dtype),
        master_weights=args.master_weights,
        sample_interval=args.sample_interval,
        buffer_mb=args.buffer_mb,
        buffer_count=args.buffer_count,
        gpu_gib=args.gpu_gib,
        host_gib=args.host_gib,
        pcie_gbs=args.pcie_gbs,
        tflops=args.tflops,
    )


def _default_loss(model: str) -> Loss:
    from grass.plan.losses import can_be_chunked

    if can_be_chunked(model):
        return "chunked"
    print(
        "grass plan: the model caps its logits, which cannot be chunked: the full loss is planned",
        file=sys.stderr,
    )
    return "full"


def _draw(case: Case, rows: list[Row], path: Path) -> None:
    from grass.plan.chart import draw_chart, lengths
    from grass.plan.prediction import PROBING, positions, predict

    names = [row.method for row in rows if not row.method.endswith(PROBING)]
    by_length = {case.seq: rows}
    for seq in lengths(case.seq, positions(case)):
        if seq != case.seq:
            by_length[seq] = list(predict(replace(case, seq=seq), names))
    title = f"{case.model}, batch {case.batch}, {case.active_layers} active layers"
    draw_chart(by_length, case.gpu_gib, title, path)


_COLUMNS = (
    "peak", "weights", "gradients", "states", "on host", "activations", "h2d/step", "d2h/step", "floor ms",
)  # fmt: skip


def _head(case: Case) -> str:
    what = "checkpointed" if case.checkpointing else "all activations"
    title = (
        f"{case.model}: batch {case.batch} x {case.seq}, {str(case.dtype).removeprefix('torch.')}, {what}, "
        f"{case.loss} loss, {case.active_layers} active layers; GiB; floor at {case.tflops:g} TFLOP/s and "
        f"{case.pcie_gbs:g} GB/s"
    )
    return f"{title}\n\n{'':28}" + "".join(f"{column:>12}" for column in _COLUMNS) + "  fits"


def _line(row: Row, host_gib: float | None) -> str:
    values = list(row.as_dict().values())[1:-1]
    cells = [f"{value:12.2f}" for value in values[:-1]] + [f"{values[-1]:12.0f}"]
    note = "" if host_gib is None or row.states_host_gib <= host_gib else ", not the host"
    return f"{row.method:28}" + "".join(cells) + f"  {'yes' if row.fits else 'no'}{note}"


def _presets() -> list[str]:
    from grass.plan import preset_names

    return preset_names()
