"""``python -m bench host``: host time of a step, and whole steps on the CPU (`bench.cpu_step`).

The work of the host is to check that the plan of the last step is valid, and to prepare launches. Neither needs a
device, so both can be measured anywhere, with the calls at the boundary to the device mocked
(`grass_kernels._triton.launch`, and the copies and events of `grass_kernels.inputs`), and torch's fused kernel too. The
target is half the time of torch's fused AdamW in the same process, in each of four situations: gradients in place and
nothing changed; a learning rate that changes every step; gradients at other addresses every step; new gradients from a
backward, whose first access from Python is slower.
"""

import argparse
import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch

import grass
import grass_kernels
from bench import cpu_step
from bench.cpu_step import FUSED, rows_beside_fused
from bench.kernels.rows import describe_environment
from bench.kernels.timing import interleaved
from bench.output import Row, add_output_options, output_of
from bench.targets import at_most
from grass.cli.values import count, positive
from grass_kernels import _triton, inputs

TENSORS = (291, 5000)
"""Number of parameters of a Llama-7B, and of a model with many small ones."""
SHAPE = (4, 4)
SITUATIONS = ("in place", "lr changes", "gradients move", "after backward")
MOST = 0.5
"""Target: the maximum ratio to the time of torch fused, for each of our variants in each situation."""
REPEATS = 20
"""Steps per sample if nothing happens between them."""

_EXAMPLES = """\
examples:
  python -m bench host
  python -m bench host --seconds 120 --out bench/results/CPU/rows.jsonl
"""


@contextlib.contextmanager
def no_device() -> Iterator[None]:
    """Use the Triton backend on CPU tensors, with launches, copies and events that do nothing."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(_triton, "launch", nothing))
        for name in ("copy_to_device", "record_event", "wait_for_event"):
            patches.enter_context(mock.patch.object(inputs, name, nothing))
        for module in (grass_kernels, _triton):
            patches.enter_context(mock.patch.object(module, "runs_triton", return_value=True))
        patches.enter_context(mock.patch.object(torch, "_fused_adamw_", nothing))
        yield


class Subject:
    """An optimizer with its own parameters.

    Args:
        make: function from parameter groups to an optimizer.
        tensors: number of parameters.
        dtype: dtype of parameters and gradients.
    """

    def __init__(
        self,
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        tensors: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.params = [torch.nn.Parameter(torch.zeros(SHAPE, dtype=dtype)) for _ in range(tensors)]
        self._grads = [[torch.zeros(SHAPE, dtype=dtype) for _ in self.params] for _ in range(2)]
        self._turn = 0
        half = tensors // 2  # with and without weight decay
        self.optimizer = make(
            [{"params": self.params[:half]}, {"params": self.params[half:], "weight_decay": 0.0}]
        )
        self.prepare("gradients move")
        self.optimizer.step()

    def prepare(self, situation: str) -> None:
        """Set up a situation, untimed."""
        if situation == "lr changes":
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.999
        elif situation == "gradients move":
            self._turn = 1 - self._turn
            for p, g in zip(self.params, self._grads[self._turn], strict=True):
                p.grad = g
        elif situation == "after backward":
            for p in self.params:
                p.grad = None
            torch.stack([p.sum() for p in self.params]).sum().backward()


VARIANTS: dict[str, Callable[[int], Subject]] = {
    "grass": lambda n: Subject(grass.AdamW, n),
    "grass clipping": lambda n: Subject(lambda groups: grass.AdamW(groups, max_grad_norm=1.0), n),
    "grass exact bf16": lambda n: Subject(
        lambda groups: grass.AdamW(groups, master_weights=True), n, torch.bfloat16
    ),
    FUSED: lambda n: Subject(lambda groups: torch.optim.AdamW(groups, fused=True), n),
}


def measure(tensors: int, seconds: float, environment: Mapping[str, Any]) -> Iterator[Row]:
    """Time every variant in every situation, interleaved.

    Args:
        tensors: number of parameters of each variant.
        seconds: approximate total time.
        environment: columns of machine and commit.

    Yields:
        Rows from `rows_beside_fused`.
    """
    with no_device():
        subjects = {name: make(tensors) for name, make in VARIANTS.items()}
        for situation in SITUATIONS:

            def prepare(name: str, situation: str = situation) -> None:
                subjects[name].prepare(situation)

            steps = {name: subject.optimizer.step for name, subject in subjects.items()}
            repeats = REPEATS if situation == "in place" else 1
            times = interleaved(steps, seconds / len(SITUATIONS), prepare=prepare, repeats=repeats)
            shared = {"suite": "host", "tensors": tensors, "situation": situation, **environment}
            yield from rows_beside_fused(times, MOST, shared)


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "host",
        help="host time of a step, and steps on the CPU, compared with torch fused",
        description=__doc__.split("\n\n")[1],
        epilog=_EXAMPLES,
    )
    parser.add_argument("--seconds", type=positive, default=60.0, metavar="N", help="for the whole run [60]")
    parser.add_argument(
        "--tensors",
        type=_tensors,
        nargs="+",
        default=list(TENSORS),
        metavar="N",
        help="parameters [291 5000]",
    )
    add_output_options(parser)
    parser.set_defaults(run=run)


def _tensors(text: str) -> int:
    if count(text) < 2:
        raise argparse.ArgumentTypeError(
            "must be at least 2: one parameter with and one without weight decay"
        )
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table, and write rows."""
    environment = describe_environment(torch.device("cpu"))
    parts = len(arguments.tensors) * len(SITUATIONS) + 2 * len(cpu_step.CASES)
    seconds = arguments.seconds / parts
    with output_of(arguments) as output, quiet_process():
        output.say(f"{'tensors':>7}  {'situation':<15} {'variant':<17} {'us':>9}  x torch fused's")
        for tensors in arguments.tensors:
            for row in measure(tensors, seconds * len(SITUATIONS), environment):
                output.write(row)
                output.say(
                    f"{tensors:>7}  {row['situation']:<15} {row['variant']:<17} "
                    f"{1e6 * row['seconds_median']:>9.1f}  {_beside_target(row)}"
                )
        output.say("", f"{'step on the CPU':<41} {'clip':<5} {'variant':<12} {'ms':>8}  x torch fused's")
        for case in cpu_step.CASES:
            for row in cpu_step.measure(case, 2 * seconds, environment):
                output.write(row)
                output.say(
                    f"{case.name:<41} {'yes' if row['clip'] else 'no':<5} {row['variant']:<12} "
                    f"{1e3 * row['seconds_median']:>8.2f}  {_beside_target(row)}"
                )
    return 0


@contextlib.contextmanager
def quiet_process() -> Iterator[None]:
    """One thread, and no garbage collection in the middle of a step."""
    threads, collects = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(1)
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if collects:
            gc.enable()


def _beside_target(row: Row) -> str:
    if row["most"] is None:
        return "1"
    shown, met = at_most(row["ratio_to_fused"], row["most"])
    return f"{shown:<8} <= {row['most']:g}x: {'met' if met else 'missed'}"
