"""Measurements on a CUDA device: the link, and steady steps through the pipeline with every operation timed.

Forward and backward are stood in for by a device that sleeps as long as they would take; copies and updates are
real.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import grass_kernels
from bench.kernels.timing import cycles_per_second
from bench.offload.steps import Part, Task, drive, make_pipeline
from bench.offload.timeline import Link, Span
from grass.offload.streams import COMPUTE, HOST, UPDATE, CudaEngine, Operation
from grass.offload.units import Unit

_LINK_BYTES, _HBM_BYTES, _COPIES = 256 * 2**20, 2**30, 8  # of each measurement


class TracingEngine(CudaEngine):
    """Record when every operation begins and ends on the device.

    Args:
        device: a CUDA device.
        serial: the host waits for every operation, so that nothing overlaps.
    """

    def __init__(self, device: torch.device, serial: bool = False) -> None:
        super().__init__(device)
        self._serial = serial
        self._marks: list[tuple[str, Operation, Any, Any]] = []
        self._begun: dict[str, Any] = {}

    def _mark(self, queue: str) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream(queue))
        return event

    def begin(self, queue: str) -> None:
        """Mark the beginning of what is noted next on a queue."""
        self._begun[queue] = self._mark(queue)

    def _end(self, queue: str, operation: Operation) -> None:
        end = self._mark(queue)
        self._marks.append((queue, operation, self._begun[queue], end))
        if self._serial:
            end.synchronize()

    def copy(
        self, queue: str, targets: Sequence[Tensor], sources: Sequence[Tensor], operation: Operation
    ) -> None:
        """See `CopyEngine`."""
        self.begin(queue)
        super().copy(queue, targets, sources, operation)
        self._end(queue, operation)

    def wait(self, queue: str, event: Any, hazard: str) -> None:
        """See `CopyEngine`. An update begins when its waits are over."""
        super().wait(queue, event, hazard)
        if queue == UPDATE:
            self.begin(queue)

    def note(self, queue: str, operation: Operation) -> None:
        """See `CopyEngine`."""
        if queue != HOST:
            self._end(queue, operation)

    def spans(self) -> list[Span]:
        """All that was done, in seconds since the first operation began."""
        torch.cuda.synchronize(self._device)
        origin = self._marks[0][2]
        return [
            Span(queue, operation, origin.elapsed_time(start) / 1e3, origin.elapsed_time(end) / 1e3)
            for queue, operation, start, end in self._marks
        ]


def measure_link(device: torch.device) -> Link:
    """Bytes a second each way, alone and both at once."""
    host = [torch.empty(_LINK_BYTES, dtype=torch.uint8).pin_memory() for _ in range(2)]
    there = [torch.empty(_LINK_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    copies = [(there[0], host[0]), (host[1], there[1])]

    def rates(directions: Sequence[int]) -> list[float]:
        marks = {i: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for i in directions}
        torch.cuda.synchronize(device)
        for repeat in range(_COPIES + 1):  # the first is not timed
            for i in directions:
                with torch.cuda.stream(streams[i]):
                    if repeat == 1:
                        marks[i][0].record()
                    copies[i][0].copy_(copies[i][1], non_blocking=True)
        for i in directions:
            marks[i][1].record(streams[i])
        torch.cuda.synchronize(device)
        return [_COPIES * _LINK_BYTES / (start.elapsed_time(end) / 1e3) for start, end in marks.values()]

    (h2d,), (d2h,), both = rates([0]), rates([1]), rates([0, 1])
    return Link(h2d, d2h, min(1.0, both[0] / h2d, both[1] / d2h))


def measure_hbm(device: torch.device) -> float:
    """Bytes a second that a copy on the device reads and writes."""
    source = torch.empty(_HBM_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    target.copy_(source)
    start.record()
    for _ in range(_COPIES):
        target.copy_(source)
    end.record()
    end.synchronize()
    return 2 * _COPIES * source.numel() / (start.elapsed_time(end) / 1e3)


def measure_steps(task: Task, device: torch.device, *, vanilla: bool) -> list[Span]:
    """Take steps and say what was done when.

    Args:
        task: what to train.
        device: a CUDA device.
        vanilla: wait for every operation.
    """
    engine = TracingEngine(device, serial=vanilla)
    pipeline = make_pipeline(task, engine, device)
    cycles = cycles_per_second()
    most = max(
        p.start - unit.start + p.numel for s in task.order() for unit in pipeline.units(s) for p in unit.parts
    )
    param, grad = (torch.zeros(most, dtype=torch.bfloat16, device=device) for _ in range(2))
    step = torch.zeros((), device=device)

    def compute(part: Part) -> None:
        engine.begin(COMPUTE)
        if part.seconds > 0:
            torch.cuda._sleep(int(part.seconds * cycles))
        engine.note(COMPUTE, part.operation)

    def update(unit: Unit, views: dict[str, Tensor]) -> None:
        n = views["exp_avg"].numel()
        moments = [views["exp_avg"]], [views["exp_avg_sq"]]
        grass_kernels.masked_adamw_(
            [param[:n]], [grad[:n]], *moments, [step], lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
        )

    drive(task, pipeline, compute, update, ahead=not vanilla)
    pipeline.drain()
    return engine.spans()
