"""Training steps with fused backward: the operations that they ask of the pipeline, and their time.

The driver is the same for the simulation and for a GPU. Like the optimizer it announces the next buckets, computes, and
updates each bucket as soon as its gradients are complete.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.offload.recording import Log, RecordingEngine
from bench.offload.shapes import Compute, Shape
from bench.offload.timeline import Link, Seconds, Span, busy_seconds, floor_seconds, simulate
from grass.config import GrassConfig
from grass.offload.pipeline import StreamedPipeline, Update
from grass.offload.store import Bucket, Store, allocating
from grass.offload.streams import COMPUTE, D2H, H2D, HOST, CopyEngine, Operation

MOMENTS = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
UPDATE_TRAFFIC = (2 + 2 + 2 + 4 * 4) / 8
"""Bytes of device memory an update moves for a byte of moments: bfloat16 parameter read and written and gradient
read, float32 moments read and written."""
STEPS = 4
"""The last but one is steady: it finds the buffers as it leaves them, and has neighbours."""
FIRST = ("forward", "layer 0")
"""With what a step begins."""


class Task(NamedTuple):
    """A model, the layers that train, and the ring of buffers.

    Args:
        shape: of the model.
        compute: how long it computes.
        active: the layers that train.
        buffer_bytes, buffer_count: of the ring.
        update_priority: of the stream of updates on a device, see `CudaEngine`; the simulation knows no priorities.
    """

    shape: Shape
    compute: Compute
    active: tuple[int, ...]
    buffer_bytes: int = int(GrassConfig.buffer_mb * 2**20)
    buffer_count: int = GrassConfig.buffer_count
    update_priority: int = -1

    def members(self) -> list[list[Tensor]]:
        """Parameters by bucket: layers, then embedding, norm and head, as in the optimizer."""
        shape = self.shape
        layers = [shape.layer() if layer in self.active else [] for layer in range(shape.layers)]
        return [*layers, shape.embedding(), shape.norm(), shape.head()]

    def order(self) -> list[int]:
        """Buckets in the order of updates."""
        outside = self.shape.layers
        return [outside + 2, outside + 1, *sorted(self.active, reverse=True), outside]


def spread(layers: int, count: int) -> tuple[int, ...]:
    """Return `count` layers, evenly spread."""
    return tuple((2 * i + 1) * layers // (2 * count) for i in range(count))


class Part(NamedTuple):
    """A part of a step that computes.

    Args:
        operation: forward or backward of a layer, the embedding, the norm or the head.
        seconds: it takes.
        bucket: whose gradients are complete then; None if nobody's are.
    """

    operation: Operation
    seconds: float
    bucket: int | None = None


def parts(task: Task) -> list[Part]:
    """The parts of a step, in order."""
    shape, compute, outside = task.shape, task.compute, task.shape.layers
    layer, head = shape.layer(), shape.head()

    def part(kind: str, label: str, seconds: float, bucket: int | None = None) -> Part:
        return Part(Operation(kind, label, (), ()), seconds, bucket)

    found = [part("forward", f"layer {i}", compute.forward(layer)) for i in range(outside)]
    found.append(part("forward", "head", compute.forward(head)))
    seconds = compute.backward(head, trains=True, recomputes=False)
    found.append(part("backward", "head", seconds, outside + 2))
    found.append(part("backward", "norm", 0.0, outside + 1))
    for i in reversed(range(outside)):
        trains = i in task.active
        seconds = compute.backward(layer, trains=trains, recomputes=True)
        found.append(part("backward", f"layer {i}", seconds, i if trains else None))
    found.append(part("backward", "embedding", 0.0, outside))
    return found


def drive(
    task: Task,
    pipeline: StreamedPipeline,
    compute: Callable[[Part], None],
    update: Update,
    *,
    ahead: bool = True,
) -> None:
    """Take `STEPS` steps.

    Args:
        task: what to train.
        pipeline: of its states.
        compute: queues a part, and notes it.
        update: of a unit.
        ahead: tell the pipeline what comes.
    """
    members = task.members()
    if ahead:
        pipeline.begin(task.order())
    for _ in range(STEPS):
        for part in parts(task):
            compute(part)
            if part.bucket is not None:
                with pipeline.updating():
                    pipeline.run(part.bucket, update)
                pipeline.hold(part.bucket, members[part.bucket])  # in place of their gradients
        pipeline.join()
        if ahead:
            pipeline.begin(task.order())


class OneByOne(RecordingEngine):
    """Engine without overlap: the host waits for every operation before the next."""

    def copy(
        self, queue: str, targets: Sequence[Tensor], sources: Sequence[Tensor], operation: Operation
    ) -> None:
        """See `CopyEngine`."""
        super().copy(queue, targets, sources, operation)
        self.wait(HOST, self.record(queue, None), "no overlap")

    def note(self, queue: str, operation: Operation) -> None:
        """See `CopyEngine`."""
        super().note(queue, operation)
        self.wait(HOST, self.record(queue, None), "no overlap")


def make_pipeline(task: Task, engine: CopyEngine, device: torch.device) -> StreamedPipeline:
    """The pipeline of a task; on the meta device without memory anywhere."""
    store = Store(
        [Bucket(list(members), dict(MOMENTS)) for members in task.members()], pinned=device.type == "cuda"
    )
    return StreamedPipeline(store, engine, device, task.buffer_bytes, task.buffer_count)


def log_of(task: Task, *, vanilla: bool = False) -> Log:
    """Return the operations that a task asks of queues.

    Args:
        task: what to train.
        vanilla: fetch, update and write back each unit, one after the other, while nothing else runs.
    """
    engine = OneByOne(None) if vanilla else RecordingEngine(None)
    with allocating(lambda num_bytes, pinned: torch.empty(num_bytes, dtype=torch.uint8, device="meta")):
        pipeline = make_pipeline(task, engine, torch.device("meta"))
        drive(
            task,
            pipeline,
            lambda part: engine.note(COMPUTE, part.operation),
            lambda unit, views: None,
            ahead=not vanilla,
        )
    return engine.log


def seconds_of(task: Task, log: Log, hbm: float) -> Seconds:
    """Return the time of parts and updates.

    Args:
        task: whose parts they are.
        log: whose fetches tell how large units are.
        hbm: bytes a second of the device's memory, of which updates make full use.
    """
    by_part = {part.operation: part.seconds for part in parts(task)}
    sizes = {e.operation.label: e.operation.num_bytes for e in log.entries if e.operation.kind == "fetch"}

    def seconds(operation: Operation) -> float:
        if operation.kind == "update":
            return UPDATE_TRAFFIC * sizes[operation.label] / hbm
        return by_part.get(operation, 0.0)

    return seconds


class Step(NamedTuple):
    """A steady step.

    Args:
        seconds: from the beginning of its forward to that of the next.
        floor: seconds that no schedule of the same operations could beat.
        busy: seconds in which each queue was at work.
        num_bytes: copied, by direction.
        spans: its beginning is 0; those of its neighbours that reach into it are cut off.
    """

    seconds: float
    floor: float
    busy: dict[str, float]
    num_bytes: dict[str, int]
    spans: tuple[Span, ...]

    @property
    def exposed(self) -> float:
        """Seconds in which nothing was computed: what offloading adds."""
        return self.seconds - self.busy[COMPUTE]


def steady(spans: Sequence[Span], link: Link, seconds: Seconds) -> Step:
    """The last of several steps but one.

    Args:
        spans: of all, in the order in which operations were asked for.
        link, seconds: for the floor; see `floor_seconds`.
    """
    first, last = [n for n, span in enumerate(spans) if span.operation[:2] == FIRST][-2:]
    start, end = spans[first].start, spans[last].start
    asked = [(span.queue, span.operation) for span in spans[first:last]]
    cut = tuple(
        span._replace(start=max(span.start, start) - start, end=min(span.end, end) - start)
        for span in spans
        if span.queue != HOST and span.end > start and span.start < end
    )
    num_bytes = {q: sum(op.num_bytes for queue, op in asked if queue == q) for q in (H2D, D2H)}
    return Step(end - start, floor_seconds(asked, link, seconds), busy_seconds(cut), num_bytes, cut)


def simulated(task: Task, link: Link, hbm: float, *, hop: float = 0.0, vanilla: bool = False) -> Step:
    """A steady step against the clock.

    Args:
        task: what to train.
        link: to the host.
        hbm: bytes a second of the device's memory.
        hop: see `simulate`.
        vanilla: see `log_of`.
    """
    log = log_of(task, vanilla=vanilla)
    seconds = seconds_of(task, log, hbm)
    return steady(simulate(log, link, seconds, hop).spans, link, seconds)
