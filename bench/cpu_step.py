"""Steps on the CPU: `grass.AdamW` and torch's fused AdamW, in one thread, without mocks.

Clipping is ``max_grad_norm`` for `grass.AdamW`, and ``clip_grad_norm_`` before the step for torch. In cases with 300
groups each has one tensor, as in libraries with settings per parameter.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

import grass
from bench.kernels.timing import interleaved, quantile, statistics
from bench.output import Row

GRASS, FUSED = "grass", "torch fused"
MAX_NORM = 1.0


class CpuCase(NamedTuple):
    """A step on the CPU.

    Args:
        name: name in rows and figures.
        tensors: number of parameters.
        numel: elements of each parameter.
        most: target: the maximum ratio to the time of torch fused.
        dtype: dtype of parameters and gradients.
        state_dtype: argument of `grass.AdamW`; None is its default.
        groups: whether each parameter has its own group.
        own_lr: whether each group has its own learning rate.
    """

    name: str
    tensors: int
    numel: int
    most: float
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype | None = None
    groups: bool = False
    own_lr: bool = False


CASES = (
    CpuCase("40 x 100,000 float32", 40, 100_000, 1.3),
    CpuCase("40 x 100,000 bfloat16, float32 moments", 40, 100_000, 1.3, torch.bfloat16),
    CpuCase("40 x 100,000 bfloat16, bfloat16 moments", 40, 100_000, 1.3, torch.bfloat16, torch.bfloat16),
    CpuCase("300 groups, equal settings", 300, 1_000, 2.0, groups=True),
    CpuCase("300 groups, a learning rate each", 300, 1_000, 2.0, groups=True, own_lr=True),
)


def make_step(
    case: CpuCase, variant: str, *, clip: bool
) -> tuple[torch.optim.Optimizer, Callable[[], object]]:
    """Return an optimizer, and a function that takes one step of it.

    Args:
        case: case to run.
        variant: `GRASS` or `FUSED`.
        clip: whether the total norm of gradients is clipped to `MAX_NORM`.
    """
    generator = torch.Generator().manual_seed(0)
    params = []
    for _ in range(case.tensors):
        values, grad = torch.randn(2, case.numel, generator=generator).to(case.dtype)
        params.append(nn.Parameter(values.clone()))
        params[-1].grad = grad.clone()
    groups: list[dict[str, Any]] = [{"params": [p]} for p in params] if case.groups else [{"params": params}]
    if case.own_lr:
        for number, group in enumerate(groups):
            group["lr"] = 1e-3 * (1 + number / len(groups))
    if variant == GRASS:
        max_grad_norm = MAX_NORM if clip else None
        ours = grass.AdamW(groups, state_dtype=case.state_dtype, max_grad_norm=max_grad_norm)
        return ours, ours.step
    fused = torch.optim.AdamW(groups, fused=True)

    def clip_and_step() -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM)
        fused.step()

    return fused, clip_and_step if clip else fused.step


def measure(case: CpuCase, seconds: float, environment: Mapping[str, Any]) -> Iterator[Row]:
    """Time both variants interleaved, without and with clipping.

    Args:
        case: case to run.
        seconds: approximate total time.
        environment: columns of machine and commit.

    Yields:
        Rows from `rows_beside_fused`.
    """
    for clip in (False, True):
        steps = {variant: make_step(case, variant, clip=clip)[1] for variant in (GRASS, FUSED)}
        for step in steps.values():
            step()  # creates its state
        times = interleaved(steps, seconds / 2)
        shared = {"suite": "cpu step", "case": case.name, "clip": clip, **environment}
        yield from rows_beside_fused(times, case.most, shared)


def rows_beside_fused(
    times: Mapping[str, Sequence[float]], most: float, shared: Mapping[str, Any]
) -> Iterator[Row]:
    """Make a row for each variant that was timed in the same turns.

    Args:
        times: seconds of a step, by variant, including `FUSED`.
        most: target: the maximum ratio of medians, ``ratio_to_fused``.
        shared: columns that all rows have in common.
    """
    fused = quantile(times[FUSED], 0.5)
    for variant, sample in times.items():
        found = statistics(sample)
        ratio = found["seconds_median"] / fused
        target = None if variant == FUSED else most
        yield {**shared, "variant": variant, **found, "ratio_to_fused": ratio, "most": target}
