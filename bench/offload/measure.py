"""Measurements on a CUDA device: the link, and steady steps through the pipeline with every operation timed.

Matrix products stand in for forward and backward, for as long as they would take; copies and updates are real. So
copies and updates contend with the products for the device's memory, as in training.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.offload.steps import Part, Task, drive, make_pipeline
from bench.offload.timeline import Link, Span
from grass.offload.streams import COMPUTE, HOST, UPDATE, CudaEngine, Operation
from grass.offload.units import Unit
from grass_kernels import Hyperparameters, TensorLists, make_plan

_LINK_BYTES, _HBM_BYTES, _COPIES = 256 * 2**20, 2**30, 8  # of each measurement
_HOPS, _SLEEP_CYCLES = 200, 100_000_000  # 50 ms at 2 GHz


class TracingEngine(CudaEngine):
    """Record when every operation begins and ends on the device.

    Args:
        device: a CUDA device.
        serial: the host waits for every operation, so that nothing overlaps.
        update_priority: see `CudaEngine`.
    """

    def __init__(self, device: torch.device, serial: bool = False, update_priority: int = -1) -> None:
        super().__init__(device, update_priority)
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
        """See `CopyEngine`. What follows on the queue begins when its waits are over."""
        super().wait(queue, event, hazard)
        if queue in (COMPUTE, UPDATE):
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


def measure_hop(device: torch.device) -> float:
    """Seconds from an operation on a stream to one on another stream that waits for it, less what they take alone."""
    cell = torch.zeros(1, device=device)
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    between = torch.cuda.Event()
    seconds = []
    for stream in streams:  # load the kernel
        with torch.cuda.stream(stream):
            cell.add_(1)
    for changes in (False, True):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        with torch.cuda.stream(streams[0]):
            torch.cuda._sleep(_SLEEP_CYCLES)  # while it lasts, the host queues all that follows
            start.record()
        for n in range(_HOPS):
            stream = streams[n % 2 if changes else 0]
            stream.wait_event(between)
            with torch.cuda.stream(stream):
                cell.add_(1)
            between.record(stream)
        streams[0].wait_event(between)
        end.record(streams[0])
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / _HOPS)
    return max(0.0, seconds[1] - seconds[0])


class Products:
    """Matrix products of a model's width, and the time of one while nothing else runs.

    Args:
        task: what to train.
        device: a CUDA device.
    """

    _WARM, _TIMED = 2000, 500  # long enough for the clocks of a device that is limited by power

    def __init__(self, task: Task, device: torch.device) -> None:
        tokens, hidden = task.compute.tokens, task.shape.hidden
        made = torch.randn(tokens + hidden, hidden, dtype=torch.bfloat16, device=device)
        self._inputs, self._weight = made.split([tokens, hidden])
        self._outputs = torch.empty_like(self._inputs)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._run(self._WARM)
        start.record()
        self._run(self._TIMED)
        end.record()
        end.synchronize()
        self._seconds = start.elapsed_time(end) / 1e3 / self._TIMED
        self.flops_per_second = 2 * tokens * hidden**2 / self._seconds

    def run(self, seconds: float) -> None:
        """Queue as many as take this long alone."""
        self._run(round(seconds / self._seconds))

    def _run(self, count: int) -> None:
        for _ in range(count):
            torch.mm(self._inputs, self._weight, out=self._outputs)


class Updates:
    """Updates of units, each with a plan that is made when a unit is first seen at its place in the ring.

    Args:
        numel: elements of the largest unit.
        device: device of the buffers.
    """

    _HYPERPARAMETERS = (Hyperparameters(1e-5, 0, False, (0.9, 0.999), 1e-8, 0.0),)

    def __init__(self, numel: int, device: torch.device) -> None:
        self._device = device
        # no zeros: a root or a division of zero takes another path
        self.param, self.grad = (torch.randn(numel, dtype=torch.bfloat16, device=device) for _ in range(2))
        self._step = torch.zeros((), device=device)
        self.plans: dict[tuple[int, int], tuple[Any, TensorLists]] = {}

    def __call__(self, unit: Unit, views: dict[str, Tensor]) -> None:
        """Update a unit whose moments are in these views."""
        exp_avg, exp_avg_sq = views["exp_avg"], views["exp_avg_sq"]
        key = exp_avg.data_ptr(), exp_avg.numel()
        if key not in self.plans:
            param, grad = (t[: exp_avg.numel()] for t in (self.param, self.grad))
            lists = TensorLists(
                [param], [grad], [exp_avg], [exp_avg_sq], [None], [None], [self._step], [0], [None]
            )
            self.plans[key] = make_plan(lists, 1, self._device), lists
        plan, lists = self.plans[key]
        plan.upload(lists, self._HYPERPARAMETERS)
        plan.begin(norms=True)
        plan.run()
        plan.finish()


def measure_steps(task: Task, device: torch.device, *, vanilla: bool) -> list[Span]:
    """Take steps and say what was done when.

    Args:
        task: what to train.
        device: a CUDA device.
        vanilla: wait for every operation.
    """
    engine = TracingEngine(device, serial=vanilla, update_priority=task.update_priority)
    pipeline = make_pipeline(task, engine, device)
    products = Products(task, device)
    most = max(
        p.start - unit.start + p.numel for s in task.order() for unit in pipeline.units(s) for p in unit.parts
    )

    def compute(part: Part) -> None:
        engine.begin(COMPUTE)
        if part.seconds > 0:
            products.run(part.seconds)
        engine.note(COMPUTE, part.operation)

    drive(task, pipeline, compute, Updates(most, device), ahead=not vanilla)
    pipeline.drain()
    return engine.spans()
