"""``python -m bench integration``: a step in Trainer with `grass.GrassAdamW`, and with torch's fused AdamW.

What the method costs where it saves nothing: every layer is active, and there is no probe. Both sides are a whole step
of Hugging Face Trainer on the CPU, from data to optimizer, of the same model on the same data with Trainer's settings,
clipping included; the side of GRASS has its callback. They take turns of a few steps in one process, in alternating
order. Steps run in one thread, and are timed by the processor time of the process, which leaves out what other
processes take of a shared machine. The target is at most 1.03 times the median time of a step. GRASS needs a constant
time for each parameter, and reads all gradients once more for the norms: a part that is the smaller, the more tokens a
step has.
"""

import argparse
import gc
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from bench.cpu_step import FUSED, GRASS, rows_beside_fused
from bench.host import quiet_process
from bench.kernels.rows import describe_environment
from bench.kernels.timing import quantile
from bench.output import Row, add_output_options, output_of
from bench.targets import at_most
from grass.cli.values import positive

MOST = 1.03
"""Target: the maximum ratio of medians."""
STEPS = 6
"""Timed steps of a turn, after two that are not."""
_UNTIMED = 2
_EXAMPLES = """\
examples:
  python -m bench integration
  python -m bench integration --seconds 300 --out bench/results/CPU-integration/rows.jsonl
"""


class Size(NamedTuple):
    """A Llama of 1.3 million parameters in 57 tensors, and its batches."""

    layers: int = 6
    hidden: int = 128
    intermediate: int = 344
    vocabulary: int = 512
    batch: int = 4
    tokens: int = 64

    def __str__(self) -> str:
        return f"Llama of {self.layers} layers, {self.hidden} wide, {self.batch} x {self.tokens} tokens"


CASES = (Size(), Size(batch=8, tokens=128))


class Side:
    """A trainer with its own model.

    Args:
        variant: `GRASS` or `FUSED`.
        size: the model and its batches, the same for both.
        folder: output folder of the trainer.
    """

    def __init__(self, variant: str, size: Size, folder: str) -> None:
        import transformers
        from transformers import Trainer, TrainingArguments

        import grass
        from grass.integrations.transformers import GrassCallback, trainer_optimizer

        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=size.tokens,
        )
        args = TrainingArguments(
            output_dir=folder,
            max_steps=_UNTIMED + STEPS,
            per_device_train_batch_size=size.batch,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            optim="adamw_torch_fused",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        ids = torch.randint(0, size.vocabulary, ((_UNTIMED + STEPS) * size.batch, size.tokens))
        options: dict[str, Any] = {}
        if variant == GRASS:
            method = grass.GrassConfig(active_layers=size.layers, sampler="uniform")
            options["optimizer_cls_and_kwargs"] = trainer_optimizer(args=args, config=method)
        self.trainer = Trainer(
            transformers.LlamaForCausalLM(config),
            args,
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            **options,
        )
        self.trainer.remove_callback(transformers.PrinterCallback)
        if variant == GRASS:
            self.trainer.add_callback(GrassCallback(self.trainer, release=False))
        self._clock = _make_clock()
        self.trainer.add_callback(self._clock)

    def turn(self) -> list[float]:
        """Train for a turn, and return the processor seconds of its timed steps."""
        self._clock.ends.clear()
        self.trainer.train()
        ends = self._clock.ends[_UNTIMED - 1 :]
        return [end - begin for begin, end in itertools.pairwise(ends)]


def _make_clock() -> Any:
    """Return a callback with the processor times at which steps have ended."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.ends.append(time.process_time())

    return Clock()


def measure(size: Size, seconds: float, environment: Mapping[str, Any]) -> Iterator[Row]:
    """Time both sides in alternating turns.

    Args:
        size: the model and its batches.
        seconds: approximate total time; there are at least two turns of each.
        environment: columns of machine and commit.

    Yields:
        Rows from `rows_beside_fused`, with the quantiles of the ratio over pairs of turns.
    """
    with tempfile.TemporaryDirectory() as folder:
        sides = {variant: Side(variant, size, folder) for variant in (GRASS, FUSED)}
        for side in sides.values():
            side.turn()  # creates its states
        times: dict[str, list[float]] = {variant: [] for variant in sides}
        ratios: list[float] = []
        order, until = list(sides), time.perf_counter() + seconds
        while len(ratios) < 2 or time.perf_counter() < until:
            turns = {variant: sides[variant].turn() for variant in order}
            for variant, sample in turns.items():
                times[variant] += sample
            ratios.append(quantile(turns[GRASS], 0.5) / quantile(turns[FUSED], 0.5))
            order.reverse()
            gc.collect()
    spread = {"ratio_p20": quantile(ratios, 0.2), "ratio_p80": quantile(ratios, 0.8), "turns": len(ratios)}
    shared = {"suite": "integration", "case": str(size), **environment}
    for row in rows_beside_fused(times, MOST, shared):
        yield {**row, **(spread if row["variant"] == GRASS else {})}


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "integration",
        help="a step in Trainer with every layer active, compared with torch fused",
        description=__doc__.split("\n\n")[1],
        epilog=_EXAMPLES,
    )
    parser.add_argument("--seconds", type=positive, default=60.0, metavar="N", help="for the whole run [60]")
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table, and write rows."""
    environment = describe_environment(torch.device("cpu"))
    seconds = arguments.seconds / len(CASES)
    with output_of(arguments) as output, quiet_process():
        output.say(
            f"{'step in Trainer':<43} {'variant':<12} {'ms':>8} {'p20':>8} {'p80':>8}  x torch fused's"
        )
        for size in CASES:
            for row in measure(size, seconds, environment):
                output.write(row)
                times = " ".join(f"{1e3 * row[f'seconds_{key}']:>8.2f}" for key in ("median", "p20", "p80"))
                output.say(f"{row['case']:<43} {row['variant']:<12} {times}  {_beside_target(row)}")
    return 0


def _beside_target(row: Row) -> str:
    if row["most"] is None:
        return "1"
    shown, met = at_most(row["ratio_to_fused"], row["most"])
    spread = f"{row['ratio_p20']:.3f} to {row['ratio_p80']:.3f} in {row['turns']} turns"
    return f"{shown} ({spread}) <= {row['most']:g}x: {'met' if met else 'missed'}"
