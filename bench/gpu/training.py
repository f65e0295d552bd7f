"""``python -m bench training``: fine-tuning a 7B on a device, method by method, beside what `grass plan` predicts.

Weights are random: memory and time do not depend on them. With ``--predict`` nothing is measured, and no device is
needed. Rows are of suite "training"; one whose method ran out of memory says so.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import grass
from bench.kernels.rows import describe_environment
from bench.kernels.timing import statistics
from bench.output import Row, add_output_options, output_of
from grass.activation_checkpointing import checkpoint_activations
from grass.cli.values import count, model_name, positive
from grass.errors import GrassError
from grass.layers import LayerMap
from grass.plan import methods, preset_names
from grass.plan.losses import loss_of
from grass.plan.models import build
from grass.plan.prediction import FUSED, METHODS, PROBING, Case, predict

MODEL, BATCH, SEQUENCES = "llama2-7b", 4, (1024, 512, 2048)
PERIOD = 25
GIBIBYTE = 2**30


class Trainable(NamedTuple):
    """A model on a device, with its optimizer."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


def make(name: str, case: Case, device: torch.device) -> Trainable:
    """Build the model and optimizer of a row of the plan; with GRASS every layer has been drawn, unless it probes.

    Args:
        name: name of the row.
        case: planned case.
        device: device to train on.
    """
    meta = build(case.model, case.dtype)
    if name.startswith("lora"):
        meta = methods.wrap_in_lora(meta)
    model = materialise(meta, device)
    if case.checkpointing:
        checkpoint_activations(model, LayerMap.from_model(model) if FUSED in name else None)
    if not name.startswith(("grass", "lisa")):
        params = [p for p in model.parameters() if p.requires_grad]
        return Trainable(model, torch.optim.AdamW(params, lr=1e-6, fused=True))
    place, probing = name.removesuffix(PROBING), name.endswith(PROBING)
    config = grass.GrassConfig(
        active_layers=case.active_layers,
        probe_steps=1_000 if probing else 0,
        sampler="adaptive" if place != "lisa" else "uniform",
        moments="keep" if place != "lisa" else "reset",
        sample_interval=PERIOD,
        update_interval=PERIOD,
        offload="resident" if "resident" in place else "streamed" if "streamed" in place else "none",
        buffer_mb=case.buffer_mb,
        buffer_count=case.buffer_count,
        fused_backward="fused" in place,
    )
    dtype = case.dtype if place == "lisa" else case.state_dtype
    optimizer = grass.GrassAdamW(model, lr=1e-6, config=config, state_dtype=dtype)
    if place == "grass" and not probing:
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer._states.allocate(optimizer.state[p], group, p)
    return Trainable(model, optimizer)


def materialise(meta: nn.Module, device: torch.device) -> nn.Module:
    """Give a model on the meta device small random weights, and its buffers their values."""
    buffers = {name: None for name, _ in meta.named_buffers()}
    model = meta.to_empty(device=device)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.02)
        for module in model.modules():
            if isinstance(getattr(module, "inv_freq", None), Tensor):  # of rotary embeddings
                with device:
                    fresh = type(module)(module.config)
                for name, buffer in fresh.named_buffers():
                    module.get_buffer(name).copy_(buffer)
                    buffers = {key: 0 for key in buffers if not key.endswith(name)}  # type: ignore[misc]
    for name in buffers:
        model.get_buffer(name).zero_()
    return model


def measure(name: str, case: Case, device: torch.device, steps: int = 8) -> Row:
    """Measure peak memory and time of steady steps.

    Args:
        name: name of the row.
        case: planned case.
        device: CUDA device.
        steps: number of timed steps, after three untimed ones.
    """
    row: Row = {
        "suite": "training",
        "model": case.model,
        "method": name,
        "batch": case.batch,
        "seq": case.seq,
    }
    row.update(loss=case.loss, measured=False, **describe_environment(device))
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    trained: Trainable | None = None
    try:
        trained = make(name, case, device)
        ids = torch.randint(0, 1000, (case.batch, case.seq), device=device)
        times = []
        for step in range(3 + steps):
            if step == 3:
                torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            loss_of(trained.model, ids, case.loss).backward()
            trained.optimizer.step()
            trained.optimizer.zero_grad()
            torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        seconds = statistics(times[3:])
        row.update(
            measured=True,
            peak_gib=(torch.cuda.max_memory_allocated(device) - before) / GIBIBYTE,
            **seconds,
            tokens_per_second=case.batch * case.seq / seconds["seconds_median"],
        )
        if isinstance(trained.optimizer, grass.GrassAdamW):
            row.update(
                {f"transfer_{key}": value for key, value in dict(trained.optimizer.transfer_stats).items()}
            )
    except (torch.OutOfMemoryError, GrassError) as error:
        row["reason"] = str(error).split("\n")[0]
    del trained
    gc.collect()
    torch.cuda.empty_cache()
    return row


def rows_of(
    case: Case,
    names: Sequence[str],
    sequences: Sequence[int],
    device: torch.device | None,
    ends: Callable[[], bool],
) -> Iterator[Row]:
    """Yield rows with measured and predicted values, by sequence length.

    Args:
        case: case whose sequence length is replaced.
        names: names of methods.
        sequences: lengths in tokens.
        device: CUDA device; None only predicts.
        ends: function that returns True when the time is up.
    """
    for seq in sequences:
        at = replace(case, seq=seq)
        for name in names:
            if ends():
                return
            predicted = next(iter(predict(at, [name])))
            row: Row = {"suite": "training", "model": at.model, "method": name, "batch": at.batch, "seq": seq}
            row.update(loss=at.loss, measured=False, **describe_environment(torch.device("cpu")))
            if device is not None:
                row = measure(name, at, device)
            yield {**row, "predicted_peak_gib": predicted.peak_gib}


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "training",
        help="a 7B, method by method: peak memory and speed beside the predicted peak",
        description=__doc__.split("\n\n")[1],
    )
    parser.add_argument(
        "--model",
        type=lambda name: model_name(name, preset_names()),
        default=MODEL,
        metavar="MODEL",
        help=f"as for grass plan [{MODEL}]",
    )
    parser.add_argument("--batch", type=count, default=BATCH, metavar="N", help=f"sequences [{BATCH}]")
    parser.add_argument(
        "--seq",
        type=count,
        nargs="+",
        default=list(SEQUENCES),
        metavar="N",
        help=f"tokens of a sequence, one length after the other [{' '.join(map(str, SEQUENCES))}]",
    )
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD", help="[all]"
    )
    parser.add_argument(
        "--seconds", type=positive, default=150.0, metavar="N", help="for the whole run [150]"
    )
    parser.add_argument("--predict", action="store_true", help="only predict; needs no device")
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, and write rows as they come."""
    device = None
    if not arguments.predict:
        if not torch.cuda.is_available():
            raise GrassError("no CUDA or ROCm device here: pass --predict for what is predicted alone")
        device = torch.device("cuda", torch.cuda.current_device())
    loss: Literal["chunked", "full"] = "chunked" if hasattr(nn, "LinearCrossEntropyOptions") else "full"
    case = Case(arguments.model, batch=arguments.batch, loss=loss)
    end = time.monotonic() + arguments.seconds
    with output_of(arguments) as output:
        for row in rows_of(case, arguments.methods, arguments.seq, device, lambda: time.monotonic() > end):
            output.write(row)
            peak = f"{row['peak_gib']:.2f} GiB" if row["measured"] else row.get("reason", "not measured")
            predicted = f"{row['predicted_peak_gib']:.2f} GiB"
            output.say(f"{row['method']:<30} {row['seq']:>6}  {peak}, predicted {predicted}")
    return 0
