"""``python -m bench offload``: the command, and the task and rates it was asked for."""

import argparse
from typing import Any

from bench.offload.picture import draw
from bench.offload.rows import DEFAULT_LINK
from bench.offload.rows import run as run_task
from bench.offload.shapes import Compute, Shape, shape_of
from bench.offload.steps import MOMENTS, UPDATE_TRAFFIC, Task, spread
from bench.offload.table import lines_of
from bench.offload.timeline import Link
from bench.output import add_output_options, output_of
from grass.cli.values import UsageError, count, positive
from grass.config import GrassConfig
from grass.offload.units import elements_in

_DESCRIPTION = """\
Time a training step whose moments live in host memory, with updates inside backward: one unit of states after
the other, and overlapped. Measured where there is a CUDA device, beside a simulation of the same steps; on
other machines the simulation alone. Copies and updates are real; matrix products stand in for forward and
backward. How near a step comes to its floor depends on which layers train, on how long it computes, and on
the ring of buffers.
"""

_EXAMPLES = """\
examples:
  python -m bench offload
  python -m bench offload --layer-indices 0,1
  python -m bench offload --model llama3-8b --pcie-gbs 24 --duplex-factor 0.5 --plot step.png
  python -m bench offload --model 32x4096x11008x32000 --buffer-count 4 --buffer-mb 32 --out rows.jsonl
"""

DEFAULT_TFLOPS = 200.0


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "offload",
        help="a step with moments in host memory: measured, simulated, and what is the least",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "--model",
        default="llama2-7b",
        metavar="MODEL",
        help="tinyllama-1.1b, llama2-7b, llama3-8b, llama2-13b, or layers x hidden x intermediate x vocab, such as "
        "32x4096x11008x32000 [llama2-7b]",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--active-layers", type=count, metavar="N", help="how many layers train, evenly spread [2]"
    )
    which.add_argument(
        "--layer-indices",
        type=indices,
        metavar="I,J",
        help="which layers train; the lowest, such as 0,1, take longest: their states move when backward has ended",
    )
    parser.add_argument("--tokens", type=count, default=4096, metavar="N", help="in a step [4096]")
    parser.add_argument(
        "--tflops",
        type=positive,
        metavar="X",
        help="that forward and backward reach [measured; without a CUDA device 200]",
    )
    parser.add_argument(
        "--pcie-gbs",
        type=positive,
        metavar="X",
        help="GB/s of the link to simulate, each way [measured; without a CUDA device 50]",
    )
    parser.add_argument(
        "--duplex-factor",
        type=_share,
        metavar="X",
        help="share of it that each direction has while both copy, 0.5 if they take turns [measured; 1]",
    )
    parser.add_argument(
        "--hbm-gbs", type=positive, metavar="X", help="GB/s of the device's memory [measured; 2000]"
    )
    parser.add_argument(
        "--update-ms",
        type=positive,
        metavar="X",
        help="that an update of a full buffer takes in the simulation [what it moves, at --hbm-gbs]",
    )
    parser.add_argument(
        "--hop-us",
        type=_not_negative,
        metavar="X",
        help="from the end of an operation to the next in another stream in the simulation [measured; 10]",
    )
    parser.add_argument(
        "--buffer-mb",
        type=positive,
        default=GrassConfig.buffer_mb,
        metavar="X",
        help=f"MiB of a buffer [{GrassConfig.buffer_mb}]",
    )
    parser.add_argument(
        "--buffer-count", type=count, default=GrassConfig.buffer_count, metavar="N",
        help=f"buffers [{GrassConfig.buffer_count}]",
    )  # fmt: skip
    parser.add_argument(
        "--normal-priority",
        action="store_true",
        help="queue updates on a stream of normal priority on a CUDA device, in place of a high one",
    )
    add_output_options(parser, plot="draw a step (PNG): compute and both copies over time")
    parser.set_defaults(run=run)


def indices(text: str) -> tuple[int, ...]:
    """Return numbers of layers, in order."""
    parts = text.split(",")
    for part in parts:
        if not (part.isascii() and part.isdigit()):
            raise argparse.ArgumentTypeError(f"{part!r} is not a layer's number")
    layers = sorted(map(int, parts))
    if len(set(layers)) < len(layers):
        raise argparse.ArgumentTypeError(f"a layer is named twice: {text}")
    return tuple(layers)


def _not_negative(text: str) -> float:
    return 0.0 if text.strip("0") in ("", ".") else positive(text)


def _share(text: str) -> float:
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be at most 1, not {text}")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Measure what can be measured here, and simulate all of it."""
    task, link, hbm = read(arguments)
    hop = None if arguments.hop_us is None else arguments.hop_us * 1e-6
    with output_of(arguments) as output:
        outcome = run_task(task, link, hbm, hop, output.write, measures_flops=arguments.tflops is None)
        output.say(*lines_of(outcome.rows))
        if output.plot is not None:
            draw(outcome, output.plot)
    return 0


def read(arguments: argparse.Namespace) -> tuple[Task, Link | None, float | None]:
    """Return the task, the link and the bytes a second of the device's memory; None is what the machine has.

    Raises:
        ConfigError: an unknown model, or a buffer too small for a chunk.
        UsageError: layers that the model does not have.
    """
    shape = shape_of(arguments.model)
    task = Task(
        shape,
        Compute(arguments.tokens, (arguments.tflops or DEFAULT_TFLOPS) * 1e12),
        _active(shape, arguments),
        int(arguments.buffer_mb * 2**20),
        arguments.buffer_count,
        0 if arguments.normal_priority else -1,
    )
    elements_in(task.buffer_bytes, MOMENTS)
    link = None
    if arguments.pcie_gbs is not None or arguments.duplex_factor is not None:
        rate = DEFAULT_LINK.h2d if arguments.pcie_gbs is None else arguments.pcie_gbs * 1e9
        link = Link(rate, rate, arguments.duplex_factor or DEFAULT_LINK.duplex_factor)
    hbm = None if arguments.hbm_gbs is None else arguments.hbm_gbs * 1e9
    if arguments.update_ms is not None:
        if hbm is not None:
            raise UsageError("--update-ms and --hbm-gbs say the same: pass one of them")
        hbm = UPDATE_TRAFFIC * task.buffer_bytes / (arguments.update_ms * 1e-3)
    return task, link, hbm


def _active(shape: Shape, arguments: argparse.Namespace) -> tuple[int, ...]:
    has = f"{shape.name} has {shape.layers} layers"
    if arguments.layer_indices is not None:
        if arguments.layer_indices[-1] >= shape.layers:
            raise UsageError(f"{has}: pass --layer-indices from 0 to {shape.layers - 1}")
        return tuple(arguments.layer_indices)
    num_active = 2 if arguments.active_layers is None else arguments.active_layers
    if num_active > shape.layers:
        raise UsageError(f"{has}: pass --active-layers of at most as many")
    return spread(shape.layers, num_active)
