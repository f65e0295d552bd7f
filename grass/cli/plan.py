"""`grass plan`: how much memory fine-tuning will take, method by method, from fake tensors."""

from __future__ import annotations

import argparse
import json
import math
import sys
from argparse import SUPPRESS
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from grass.cli.values import UsageError, count, model_name, positive, require_matplotlib, writable
from grass.config import GrassConfig
from grass.finetune.options import Dtype, FinetuneOptions, Loss, Rounding
from grass.plan import is_preset, preset_names

if TYPE_CHECKING:
    import torch

    from grass.plan.cluster import Cluster
    from grass.plan.prediction import Case, Row

_DTYPES = tuple(dict.fromkeys((*get_args(Dtype), "float16")))
_MOST_POINTS = 7

_DESCRIPTION = """\
Predict the peak device memory of fine-tuning, method by method: a real training step runs on fake tensors. No GPU is
needed and no weights are loaded. Options have the names and defaults of `grass finetune`. Figures are sizes of tensors
in GiB; CUDA needs about 0.5 GiB in addition, and fragmentation of the allocator is not included.

Rows: full is torch's fused AdamW with moments in the weights' dtype; lora-r128 is peft's on all linear layers; lisa
draws layers uniformly and drops their moments, in the weights' dtype. grass keeps the moments of all layers on the
device once they have been drawn, grass-resident those of the layers that train and of the next ones, grass-streamed
a ring of buffers; -fused updates inside backward. While -probing nothing is updated. The active layers are the last
ones, the worst case; with -fused, the layers before the last one if these need more. grass-adamw is full fine-tuning
with the states of the grass rows, as grass finetune --method full does.
"""

_EXAMPLES = """\
examples:
  grass plan --model llama2-7b --batch-size 4 --context 1024 --activation-checkpointing
  grass plan --model llama3-8b --gpu-gib 40 --host-gib 64 --state-dtype bfloat16
  grass plan --model ./checkpoint --context 2048 --loss full --plot memory.png
  grass plan --model qwen2.5-7b --json
  grass plan --model llama2-70b --world-size 64 --shard 8 --gpu-gib 80 --activation-checkpointing

Host memory is that of the store when every layer has been drawn, for each GPU. The lower bound of a step is the
longest of compute at --tflops and the copies to and from the device at --pcie-gbs; resident states are copied once in
--sample-interval steps. Compute is that of matrix products and attention, forward and backward, with what is computed
again for activation checkpointing. In a mixture of experts a token counts for the experts that it is routed to; copies
are of the states of all experts.

With --world-size a step of FSDP2 runs in a process group whose other ranks do not exist: rows are those of one GPU.
Gather is what a GPU sends of its weights for forward and backward, reduce what it sends of gradients; bounds of the
step then include both, by a ring at the full bandwidth of its slowest link, hidden behind compute.

The names --batch, --seq, --checkpointing and --master-weights are accepted too; --no-master-weights is --rounding
nearest.
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
        type=lambda name: model_name(name, preset_names()),
        metavar="MODEL",
        help=f"one of {', '.join(preset_names())}; or a folder with a config.json, or a name on the hub",
    )
    step = parser.add_argument_group("the step")
    _add(step, "batch_size", FinetuneOptions, "sequences", "--batch")
    _add(
        step, "context", FinetuneOptions, "tokens of a sequence; by default the limit of the model, at most 1024",
        "--seq", type=count, metavar="N",
    )  # fmt: skip
    _add(
        step, "dtype", FinetuneOptions,
        "dtype of the weights; auto is that in which the model was saved, and bfloat16 for a preset", choices=_DTYPES,
    )  # fmt: skip
    _add(
        step, "activation_checkpointing", FinetuneOptions, "keep only the layers' inputs for backward",
        "--checkpointing",
    )  # fmt: skip
    _add(
        step, "loss", FinetuneOptions,
        "full has the logits of all tokens at once; auto is chunked if the vocabulary is large and the model allows it",
        choices=get_args(Loss),
    )  # fmt: skip
    grass = parser.add_argument_group("GRASS")
    _add(grass, "active_layers", GrassConfig, "layers that train at a time")
    grass.add_argument(
        "--state-dtype", choices=("float32", "bfloat16"), default="float32",
        help="dtype of the moments in the grass rows [float32]",
    )  # fmt: skip
    _add(
        grass, "rounding", FinetuneOptions, "of bfloat16 weights: master keeps 16 more bits of each with the states of "
        "the grass rows, stochastic and nearest keep nothing", choices=get_args(Rounding),
    )  # fmt: skip
    for old, rounding in (("--master-weights", "master"), ("--no-master-weights", "nearest")):
        grass.add_argument(
            old, dest="rounding", action="store_const", const=rounding, default=SUPPRESS, help=SUPPRESS
        )
    _add(grass, "sample_interval", GrassConfig, "steps with one set of layers")
    _add(grass, "buffer_mb", GrassConfig, "MiB of a buffer of streamed states", type=positive, metavar="X")
    _add(grass, "buffer_count", GrassConfig, "number of buffers of streamed states")
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
    cluster = parser.add_argument_group("several GPUs, by FSDP2")
    cluster.add_argument(
        "--world-size",
        type=count,
        default=1,
        metavar="N",
        help="number of GPUs; --batch-size is that of each [1]",
    )
    cluster.add_argument(
        "--shard", type=count, metavar="M",
        help="GPUs that share one copy of the model; fewer than all is HSDP [all]",
    )  # fmt: skip
    cluster.add_argument("--node-size", type=count, default=8, metavar="N", help="GPUs in a machine [8]")
    cluster.add_argument(
        "--link-gbs", type=positive, default=450.0, metavar="X",
        help="1e9 bytes per second of a GPU to others in its machine, in each direction [450]",
    )  # fmt: skip
    cluster.add_argument(
        "--network-gbs", type=positive, default=50.0, metavar="X",
        help="1e9 bytes per second of a GPU between machines, in each direction [50]",
    )  # fmt: skip
    parser.add_argument(
        "--plot", metavar="FILE", help="draw peak against sequence length (PNG); takes longer"
    )
    parser.add_argument(
        "--plot-points",
        type=count,
        default=3,
        metavar="N",
        help=f"lengths in the chart, at most {_MOST_POINTS}; each more takes nearly as long as the table [3]",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of the rows, without advice")
    parser.set_defaults(run=run)


def _add(group: Any, name: str, cls: type, text: str, alias: str = "", **how: Any) -> None:
    """Add the option of a field of a dataclass, with its default; `alias` is another name, not shown in the help."""
    default = getattr(cls, name)
    if isinstance(default, bool):
        how["action"], shown = argparse.BooleanOptionalAction, "on" if default else "off"
    else:
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        if "choices" not in how:
            how = {"type": count, "metavar": "N", **how}
    if default is not None:
        text = f"{text} [{shown}]"
    group.add_argument(f"--{name.replace('_', '-')}", default=default, help=text, **how)
    if alias:
        group.add_argument(alias, dest=name, default=SUPPRESS, help=SUPPRESS, **how)


def run(args: argparse.Namespace) -> int:
    """Run `grass plan`; the exit code."""
    if args.plot_points > _MOST_POINTS:
        raise UsageError(f"--plot-points must be at most {_MOST_POINTS}, not {args.plot_points}")
    options, config = _finetune_options(args), _config(args)
    from grass.plan.advice import advise, choose, finetune_command
    from grass.plan.prediction import predict

    plot = None
    if args.plot is not None:
        plot = writable(args.plot, "--plot")
        require_matplotlib()
    case, notes = _case(args)
    rows: list[Row] = []
    for row in predict(case, _names(case)):
        if not rows:
            for note in notes:
                _note(note)
        if not args.json:
            if not rows:
                print(_head(case))
            print(_line(row, case), flush=True)
        rows.append(row)
    if args.json:
        print(json.dumps([row.as_dict() for row in rows], indent=1, allow_nan=False))
    else:
        print(f"\n{advise(rows, case.gpu_gib, case.host_gib)}")
        best = choose(rows, case.gpu_gib, case.host_gib)
        if case.cluster is not None:
            print(
                "\ngrass finetune uses one GPU: docs/scale.md and examples/fsdp2.py show how to use several."
            )
        elif best is not None:
            options, remarks = _as_planned(args, case, options)
            print("\n".join(("", finetune_command(best.method, options, config), *remarks)))
    if plot is not None:
        _draw(case, rows, plot, args.plot_points)
    return 0


def _names(case: Case) -> list[str]:
    from grass.plan.methods import has_peft
    from grass.plan.prediction import METHODS

    if case.cluster is not None:
        return [name for name in METHODS if not name.startswith("lora")]
    if has_peft():
        return list(METHODS)
    _note("peft is not installed, and LoRA is left out")
    return [name for name in METHODS if not name.startswith("lora")]


def _finetune_options(args: argparse.Namespace) -> FinetuneOptions:
    """Return the options of `grass finetune` that have the names of those of the plan.

    Raises:
        ConfigError: `grass finetune` does not accept a value.
    """
    names = ("batch_size", "context", "activation_checkpointing", "rounding", "loss")
    return FinetuneOptions(
        model="MODEL" if is_preset(args.model) else args.model,
        data="FILE",
        **{name: getattr(args, name) for name in names},
    )


def _config(args: argparse.Namespace) -> GrassConfig:
    """Return the configuration of the plan; the update interval follows the sample interval, if it must."""
    every = args.sample_interval
    return GrassConfig(
        active_layers=args.active_layers,
        sample_interval=every,
        update_interval=math.ceil(GrassConfig.update_interval / every) * every,
        buffer_mb=args.buffer_mb,
        buffer_count=args.buffer_count,
    )


def _as_planned(
    args: argparse.Namespace, case: Case, options: FinetuneOptions
) -> tuple[FinetuneOptions, list[str]]:
    """Return options with the dtypes of the plan, and remarks on what `grass finetune` does otherwise."""
    from grass.plan.models import saved_dtype

    remarks = []
    dtype = str(case.dtype).removeprefix("torch.")
    if saved_dtype(args.model) != case.dtype:
        if dtype in get_args(Dtype):
            options = replace(options, dtype=cast(Dtype, dtype))
        else:
            remarks.append(f"grass finetune trains in {dtype} only if the model was saved in it.")
    if args.state_dtype != "float32":
        if any(field.name == "state_dtype" for field in fields(FinetuneOptions)):
            given: dict[str, Any] = {"state_dtype": args.state_dtype}
            options = replace(options, **given)
        else:
            remarks.append("grass finetune keeps float32 moments, which need more than planned here.")
    if is_preset(args.model):
        remarks.insert(
            0, f"MODEL is a folder or hub name with the weights of {args.model}, FILE is the data."
        )
    return options, remarks


def _case(args: argparse.Namespace) -> tuple[Case, list[str]]:
    """Return the step to predict, and notes on settings that were not given and may be unexpected."""
    import torch

    from grass.finetune.model import DEFAULT_CONTEXT
    from grass.plan.losses import loss_of_run
    from grass.plan.models import positions
    from grass.plan.prediction import Case

    dtype, loss = _dtype(args), args.loss
    cluster = _cluster(args)
    notes = []
    if dtype is None:
        notes.append("config.json does not tell the dtype of the weights: bfloat16 is planned (--dtype)")
    if loss == "auto" and cluster is not None:
        loss = "full"
    elif loss == "auto":
        loss, reason = loss_of_run(args.model)
        if reason:
            notes.append(f"the full loss is planned: {reason}")
    context = args.context or min(positions(args.model) or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    case = Case(
        model=args.model,
        batch=args.batch_size,
        seq=context,
        dtype=dtype or torch.bfloat16,
        checkpointing=args.activation_checkpointing,
        loss=loss,
        active_layers=args.active_layers,
        state_dtype=getattr(torch, args.state_dtype),
        master_weights=args.rounding == "master",
        sample_interval=args.sample_interval,
        buffer_mb=args.buffer_mb,
        buffer_count=args.buffer_count,
        gpu_gib=args.gpu_gib,
        host_gib=args.host_gib,
        pcie_gbs=args.pcie_gbs,
        tflops=args.tflops,
        cluster=cluster,
    )
    return case, notes


def _cluster(args: argparse.Namespace) -> Cluster | None:
    from grass.plan.cluster import Cluster

    if args.world_size == 1 and args.shard in (None, 1):
        return None
    return Cluster(
        args.world_size, args.shard or args.world_size, args.node_size, args.link_gbs, args.network_gbs
    )


def _dtype(args: argparse.Namespace) -> torch.dtype | None:
    """Return the dtype of the weights, None if it is neither given nor known.

    Raises:
        UsageError: the model was saved in a dtype that is not planned.
    """
    import torch

    from grass.plan.models import saved_dtype

    if args.dtype != "auto":
        return cast(torch.dtype, getattr(torch, args.dtype))
    if is_preset(args.model):
        return torch.bfloat16
    saved = saved_dtype(args.model)
    if saved is not None and str(saved).removeprefix("torch.") not in _DTYPES:
        raise UsageError(f"{args.model} was saved in {saved}, which is not planned: pass --dtype bfloat16")
    return saved


def _note(text: str) -> None:
    print(f"grass plan: {text}", file=sys.stderr)


def _draw(case: Case, rows: list[Row], path: Path, points: int) -> None:
    from grass.finetune.screen import Screen
    from grass.plan.chart import draw_chart, lengths
    from grass.plan.models import positions
    from grass.plan.prediction import PROBING, predict

    names = [row.method for row in rows if not row.method.endswith(PROBING)]
    by_length = {case.seq: rows}
    others = [seq for seq in lengths(case.seq, positions(case.model), points) if seq != case.seq]
    screen = Screen()
    screen.start("chart", total=len(others) * len(names), unit="row")
    try:
        for seq in others:
            by_length[seq] = []
            for row in predict(replace(case, seq=seq), names):
                by_length[seq].append(row)
                screen.advance()
    finally:
        screen.stop()
    title = f"{case.model}, batch {case.batch}, {case.active_layers} active layers"
    draw_chart(by_length, case.gpu_gib, title, path)


_COLUMNS = (
    "peak", "weights", "gradients", "states", "on host", "activations", "h2d/step", "d2h/step", "floor ms",
)  # fmt: skip
_COLUMNS_OF_CLUSTER = ("gather/step", "reduce/step")


def _head(case: Case) -> str:
    what = "checkpointed" if case.checkpointing else "all activations"
    title = (
        f"{case.model}: batch {case.batch} x {case.seq}, {str(case.dtype).removeprefix('torch.')}, {what}, "
        f"{case.loss} loss, {case.active_layers} active layers; GiB; floor at {case.tflops:g} TFLOP/s and "
        f"{case.pcie_gbs:g} GB/s"
    )
    columns: tuple[str, ...] = _COLUMNS
    if case.cluster is not None:
        cluster = case.cluster
        title += (
            f"; each of {cluster.world_size} GPUs, {cluster.replicas} x {cluster.shard}, {cluster.link_gbs:g} GB/s in "
            f"a machine of {cluster.node_size}, {cluster.network_gbs:g} GB/s between"
        )
        columns = (*_COLUMNS, *_COLUMNS_OF_CLUSTER)
    return f"{title}\n\n{'':28}" + "".join(f"{column:>12}" for column in columns) + "  fits"


def _line(row: Row, case: Case) -> str:
    values = [row.peak_gib, row.weights_gib, row.gradients_gib, row.states_device_gib, row.states_host_gib]
    values += [row.activations_gib, row.h2d_gib_per_step, row.d2h_gib_per_step]
    cells = [*(f"{value:12.2f}" for value in values), f"{row.step_floor_ms:12.0f}"]
    if case.cluster is not None:
        cells += [f"{row.gathered_gib_per_step:12.2f}", f"{row.reduced_gib_per_step:12.2f}"]
    note = "" if case.host_gib is None or row.states_host_gib <= case.host_gib else ", not the host"
    return f"{row.method:28}" + "".join(cells) + f"  {'yes' if row.fits else 'no'}{note}"
