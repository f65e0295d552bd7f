"""What a step costs the host: everything but launches, copies and events.

    python -m bench.host [--seconds 20] [--out rows.jsonl] [--tensors 291 5000]

A step's own work is finding out what changed since the last one, and preparing launches. Both need no device,
so they are measured anywhere: the calls at the boundary to it (`grass_kernels._triton.launch`, and the copies
and events of `grass_kernels.inputs`) do nothing meanwhile. So does torch's fused kernel, whose optimizer is
measured beside ours in the same process; its foreach and single-tensor loops run on tensors of 16 elements,
and their kernels' time is in theirs. The unit is ``[p.grad.data_ptr() for p in params]``: a step that lets gradients
move must ask at least that.

Four situations: gradients in place and nothing changed; a learning rate that changes every step; gradients at
other addresses every step; gradients that a backward has just made, whose first touch from Python costs more.
"""

import argparse
import contextlib
import gc
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch

import grass
import grass_kernels
from bench.kernels.rows import describe_environment
from bench.kernels.timing import quantile
from grass_kernels import _triton, inputs

TENSORS = (291, 5000)
"""Parameters of a Llama-7B, and of a model of many small ones."""
SHAPE = (4, 4)
SITUATIONS = ("in place", "lr changes", "gradients move", "after backward")
REPEATS = 20
"""Calls timed together where nothing must happen between them."""


@contextlib.contextmanager
def no_device() -> Iterator[None]:
    """Take the Triton path on CPU tensors, with launches, copies and events that do nothing."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(_triton, "launch", nothing))
        for name in ("copy_to_device", "record_event", "wait_for_event"):
            patches.enter_context(mock.patch.object(inputs, name, nothing))
        patches.enter_context(mock.patch.object(grass_kernels, "runs_triton", mock.Mock(return_value=True)))
        patches.enter_context(mock.patch.object(torch, "_fused_adamw_", nothing))
        yield


class Subject:
    """An optimizer, or None for the unit, with parameters of its own.

    Args:
        make: from parameters to the optimizer.
        tensors: how many parameters.
        dtype: theirs.
    """

    def __init__(
        self,
        make: Callable[[list[dict[str, Any]]], Any] | None,
        tensors: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.params = [torch.nn.Parameter(torch.zeros(SHAPE, dtype=dtype)) for _ in range(tensors)]
        self._grads = [[torch.zeros(SHAPE, dtype=dtype) for _ in self.params] for _ in range(2)]
        self._turn = 0
        half = tensors // 2  # decay, and none
        groups = [{"params": self.params[:half]}, {"params": self.params[half:], "weight_decay": 0.0}]
        self.optimizer = None if make is None else make(groups)
        self.prepare("gradients move")
        self.call()

    def prepare(self, situation: str) -> None:
        """What happens before a step, untimed."""
        if situation == "lr changes" and self.optimizer is not None:
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

    def call(self) -> None:
        """The step, or the unit of comparison."""
        if self.optimizer is None:
            [p.grad.data_ptr() for p in self.params]  # type: ignore[union-attr]
        else:
            self.optimizer.step()


def subjects(tensors: int) -> dict[str, Subject]:
    """What is measured, by name."""
    return {
        "addresses": Subject(None, tensors),
        "grass": Subject(grass.AdamW, tensors),
        "grass clipping": Subject(lambda groups: grass.AdamW(groups, max_grad_norm=1.0), tensors),
        "grass exact bf16": Subject(
            lambda groups: grass.AdamW(groups, master_weights=True), tensors, torch.bfloat16
        ),
        "torch fused": Subject(lambda groups: torch.optim.AdamW(groups, fused=True), tensors),
        "torch foreach": Subject(lambda groups: torch.optim.AdamW(groups, foreach=True), tensors),
        "torch single": Subject(lambda groups: torch.optim.AdamW(groups, foreach=False), tensors),
    }


def measure(
    tensors: int, seconds: float, environment: Mapping[str, Any], situations: Sequence[str] = SITUATIONS
) -> Iterator[dict[str, Any]]:
    """Time every subject in every situation, in turns.

    Args:
        tensors: parameters of each.
        seconds: in all, roughly.
        environment: what each row says of machine and commit.
        situations: which.

    Yields:
        One row a subject and situation. ``seconds_*`` are of one step; ``ratio_to_addresses`` is to the unit in
        the same situation and of the same turns.
    """
    order = random.Random(0)
    with no_device():
        everyone = subjects(tensors)
        for situation in situations:
            times: dict[str, list[float]] = {name: [] for name in everyone}
            end = time.perf_counter() + seconds / len(situations)
            while time.perf_counter() < end or len(times["addresses"]) < 3:
                turn = list(everyone.items())
                order.shuffle(turn)  # who comes after a long step finds colder caches
                for name, subject in turn:
                    slow = name in ("torch foreach", "torch single")
                    if slow and len(times[name]) > len(times["addresses"]) / 10:
                        continue  # they would take all the time
                    times[name].append(_time(subject, situation))
            unit = quantile(times["addresses"], 0.5)
            for name, sample in times.items():
                yield {
                    "suite": "host",
                    "tensors": tensors,
                    "situation": situation,
                    "variant": name,
                    "seconds_median": quantile(sample, 0.5),
                    "seconds_p20": quantile(sample, 0.2),
                    "seconds_p80": quantile(sample, 0.8),
                    "seconds_min": min(sample),
                    "samples": len(sample),
                    "ratio_to_addresses": quantile(sample, 0.5) / unit,
                    "nanoseconds_a_tensor": 1e9 * quantile(sample, 0.5) / tensors,
                    **environment,
                }


def _time(subject: Subject, situation: str) -> float:
    subject.prepare(situation)
    repeats = REPEATS if situation == "in place" else 1
    start = time.perf_counter()
    for _ in range(repeats):
        subject.call()
    return (time.perf_counter() - start) / repeats


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=30.0, metavar="N", help="for each number of tensors [30]"
    )
    parser.add_argument(
        "--tensors", type=int, nargs="+", default=list(TENSORS), metavar="N", help="parameters [291 5000]"
    )
    parser.add_argument("--out", metavar="FILE", help="for the rows, JSON lines; replaced if it is there")
    options = parser.parse_args(arguments)
    if options.seconds <= 0 or min(options.tensors) < 2:
        parser.error("--seconds must be positive, and --tensors at least 2")
    torch.set_num_threads(1)
    # Before --out is replaced: where that file is committed, the tree has changes from then on.
    environment = describe_environment(torch.device("cpu"))
    try:
        file = open(options.out, "w") if options.out else contextlib.nullcontext()  # noqa: SIM115 - closed below
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    gc.disable()  # a collection in one subject's turn is not its cost
    with file as out:
        print(f"{'tensors':>7}  {'situation':<15} {'variant':<17} {'us':>9} {'x addresses':>12}  ns a tensor")
        for tensors in options.tensors:
            for row in measure(tensors, options.seconds, environment):
                print(
                    f"{tensors:>7}  {row['situation']:<15} {row['variant']:<17} {1e6 * row['seconds_median']:>9.1f} "
                    f"{row['ratio_to_addresses']:>12.2f}  {row['nanoseconds_a_tensor']:.0f}",
                    flush=True,
                )
                if out is not None:
                    out.write(json.dumps(row) + "\n")
                    out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
