"""``python -m bench training``: fine-tuning a 7B on a device, method by method, beside what `grass plan` predicts.

Weights are random: memory and time do not depend on them. Peaks are predicted on a CPU, which takes longer than
steps on a GPU: ``python -m bench gpu --predict`` writes them to a file. Rows are of suite "training"; one whose method
failed tells why.
"""

import argparse
import contextlib
import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import grass
from bench.gpu.smoke import first_line
from bench.kernels.rows import describe_environment
from bench.kernels.timing import statistics
from bench.output import Row, add_output_options, output_of
from grass.activation_checkpointing import checkpoint_activations
from grass.cli.values import UsageError, count, model_name, writable
from grass.errors import GrassError
from grass.layers import LayerMap
from grass.plan import methods, preset_names
from grass.plan.losses import Loss
from grass.plan.models import build
from grass.plan.prediction import ADAMW, FUSED, METHODS, PROBING, Case, predict

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
    if name == ADAMW:
        params = [p for p in model.parameters() if p.requires_grad]
        return Trainable(model, grass.AdamW(params, lr=1e-6, state_dtype=case.state_dtype))
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


def loss_of(model: Any, ids: Tensor, kind: Loss) -> Tensor:
    """Compute the loss of `grass finetune`; that of `grass plan` only allocates as this one does.

    Args:
        model: causal language model of transformers, possibly wrapped by peft.
        ids: int64 [batch, seq]; also the labels.
        kind: see `Case`.
    """
    if kind == "full":
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss
    from grass.finetune.loss import chunked_loss

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return chunked_loss(causal, {"input_ids": ids, "labels": ids})


def measure(name: str, case: Case, device: torch.device, steps: int = 8) -> Row:
    """Measure peak memory and time of steady steps. An error is a row that is not measured.

    Args:
        name: name of the row.
        case: planned case.
        device: device to train on; memory is measured on a CUDA device only.
        steps: number of timed steps, after three untimed ones.
    """
    on_gpu = device.type == "cuda"
    row: Row = {
        "suite": "training",
        "model": case.model,
        "method": name,
        "batch": case.batch,
        "seq": case.seq,
    }
    row.update(loss=case.loss, measured=False, **describe_environment(device))
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    trained: Trainable | None = None
    start = monotonic()
    try:
        trained = make(name, case, device)
        row["seconds_before"] = monotonic() - start
        ids = torch.randint(0, 1000, (case.batch, case.seq), device=device)
        times = []
        for step in range(3 + steps):
            if step == 3 and on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
            _synchronize(device)
            start = perf_counter()
            loss_of(trained.model, ids, case.loss).backward()
            trained.optimizer.step()
            trained.optimizer.zero_grad()
            _synchronize(device)
            times.append(perf_counter() - start)
        seconds = statistics(times[3:])
        row.update(
            measured=True,
            **_peaks(device, before),
            **seconds,
            tokens_per_second=case.batch * case.seq / seconds["seconds_median"],
        )
        if isinstance(trained.optimizer, grass.GrassAdamW):
            row.update(
                {f"transfer_{key}": value for key, value in dict(trained.optimizer.transfer_stats).items()}
            )
    except Exception as error:  # whatever it is, others may go well
        row["reason"] = first_line(error)
    trained = None
    gc.collect()
    if on_gpu:
        with contextlib.suppress(RuntimeError):  # a device in error: the row must not be lost with it
            torch.cuda.empty_cache()
    return row


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peaks(device: torch.device, before: int) -> Row:
    """Return the peaks since they were reset: allocated; with blocks that a stream may still use; and reserved."""
    kinds = {"peak_gib": "allocated", "peak_active_gib": "active", "peak_reserved_gib": "reserved"}
    if device.type != "cuda":
        return dict.fromkeys(kinds)
    stats = torch.cuda.memory_stats(device)
    return {key: (stats[f"{kind}_bytes.all.peak"] - before) / GIBIBYTE for key, kind in kinds.items()}


def write_predictions(
    path: Path, names: Sequence[str], seq: int, model: str = MODEL, batch: int = BATCH
) -> None:
    """Write what is predicted of methods, a JSON object a line, with each loss that a GPU's torch may have.

    Args:
        path: file to write.
        names: names of methods.
        seq: tokens of a sequence.
        model: as for `grass plan`.
        batch: number of sequences.
    """
    losses: tuple[Loss, ...] = ("full", "chunked")
    with writable(str(path), "--predict").open("w", encoding="utf-8") as file:
        for loss in losses[: 2 if _chunks() else 1]:
            case = Case(model, batch=batch, seq=seq, loss=loss, master_weights=False)
            for row in predict(case, names):
                key = {"model": model, "batch": batch, "seq": seq, "loss": loss}
                file.write(json.dumps({**key, **row.as_dict()}) + "\n")


class Predictions:
    """Predicted peaks of a file.

    Args:
        path: file that `write_predictions` has written; None has no predictions.

    Raises:
        UsageError: it cannot be read.
    """

    def __init__(self, path: Path | None) -> None:
        try:
            lines = [] if path is None else path.read_text(encoding="utf-8").splitlines()
            self._rows = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise UsageError(f"--predictions {path} cannot be read: {error}") from None

    def peak(self, case: Case, method: str) -> float | None:
        """Return the peak in GiB; None if there is none for this case."""
        wanted = {
            "model": case.model,
            "batch": case.batch,
            "seq": case.seq,
            "loss": case.loss,
            "method": method,
        }
        for row in self._rows:
            if all(row[key] == value for key, value in wanted.items()):
                return float(row["peak_gib"])
        return None


def _chunks() -> bool:
    """Return if this torch has the chunked loss."""
    return hasattr(nn, "LinearCrossEntropyOptions")


def rows_of(
    case: Case,
    names: Sequence[str],
    sequences: Sequence[int],
    device: torch.device,
    predictions: Predictions,
) -> Iterator[Row]:
    """Yield rows with measured and predicted values, by sequence length.

    Args:
        case: case whose sequence length is replaced.
        names: names of methods.
        sequences: lengths in tokens.
        device: device to train on.
        predictions: predicted peaks.
    """
    for seq in sequences:
        at = replace(case, seq=seq)
        for name in names:
            yield {**measure(name, at, device), "predicted_peak_gib": predictions.peak(at, name)}


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
        "--predictions", type=Path, metavar="FILE", help="predicted peaks, from python -m bench gpu --predict"
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="a CPU shows that it runs, at a small size [cuda]",
    )
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, and write rows as they come."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise GrassError("no CUDA or ROCm device here: grass plan predicts without one")
    predictions = Predictions(arguments.predictions)
    case = Case(
        arguments.model, batch=arguments.batch, loss="chunked" if _chunks() else "full", master_weights=False
    )
    failed = False
    with output_of(arguments) as output:
        for row in rows_of(
            case, arguments.methods, arguments.seq, torch.device(arguments.device), predictions
        ):
            output.write(row)
            output.say(f"{row['method']:<30} {row['seq']:>6}  {_shown(row)}")
            failed = failed or not row["measured"]
    return 1 if failed else 0


def _shown(row: Row) -> str:
    if not row["measured"]:
        return str(row["reason"])
    peak = "not measured" if row["peak_gib"] is None else f"{row['peak_gib']:.2f} GiB"
    predicted = row["predicted_peak_gib"]
    beside = "not predicted" if predicted is None else f"predicted {predicted:.2f} GiB"
    return f"peak {peak}, {beside}; {row['tokens_per_second']:.0f} tokens/s"
