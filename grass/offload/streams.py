"""Copy engines: the operations of the offload pipeline on streams, behind one small interface.

Every operation on states names its queue and the memory it reads and writes. On a GPU the queues are streams; on a CPU
operations run immediately. Tests record the operations, to prove that all conflicting ones are ordered.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

H2D, D2H, UPDATE, COMPUTE, HOST = "h2d", "d2h", "update", "compute", "host"
"""Queues: copies to the device, copies from it, updates, the user's current stream, and the host."""


class Operation(NamedTuple):
    """One operation on states.

    `reads` and `writes` name memory: ``"buffer 0"`` of the ring, ``"store 3.1"`` of unit 1 of bucket 3 in the store,
    ``"slab 3"`` of a resident bucket on the device, ``"gradients 3"`` and ``"weights 3"`` of bucket 3.
    """

    kind: str  # "fetch", "update", "write-back", "free", "host read" or "host write"
    label: str  # label of the unit, such as "3.1"; of a "free", which frees gradients, the bucket
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    num_bytes: int = 0  # copied


class CopyEngine(Protocol):
    """Interface between pipeline and device. Each event belongs to one buffer or unit, and is reused."""

    def copy(
        self, queue: str, targets: Sequence[Tensor], sources: Sequence[Tensor], operation: Operation
    ) -> None:
        """Queue copies of 1-D tensors of equal lengths and dtypes."""

    def note(self, queue: str, operation: Operation) -> None:
        """Record that an operation was queued by the caller, or has run on `HOST`; for engines that keep a log."""

    def on(self, queue: str) -> AbstractContextManager[Any]:
        """Return a context in which work is queued on a queue."""

    def record(self, queue: str, event: Any) -> Any:
        """Record an event on a queue, a new one if `event` is None, and return it."""

    def wait(self, queue: str, event: Any, hazard: str) -> None:
        """Make later work of a queue wait for an event. On `HOST` the host waits.

        Args:
            queue: queue that waits.
            event: event from `record`; None is no wait.
            hazard: number of the hazard in docs/architecture.md, "H1" to "H11".
        """


class CudaEngine:
    """Copies and updates on three side streams of a CUDA device.

    Args:
        device: CUDA device.
        update_priority: priority of the stream of updates, lower first. It is high by default: updates are short, and
            copies wait for them, while backward has work queued for long.
    """

    def __init__(self, device: torch.device, update_priority: int = -1) -> None:
        self._device = device
        self._streams = {
            queue: torch.cuda.Stream(device, priority=update_priority if queue == UPDATE else 0)
            for queue in (H2D, D2H, UPDATE)
        }

    def _stream(self, queue: str) -> torch.cuda.Stream:
        return self._streams[queue] if queue in self._streams else torch.cuda.current_stream(self._device)

    def copy(
        self, queue: str, targets: Sequence[Tensor], sources: Sequence[Tensor], operation: Operation
    ) -> None:
        """See `CopyEngine`. Host memory must be pinned, otherwise copies block the host."""
        with torch.cuda.stream(self._stream(queue)):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)

    def note(self, queue: str, operation: Operation) -> None:
        """Do nothing: no log is kept."""

    def on(self, queue: str) -> AbstractContextManager[Any]:
        """See `CopyEngine`."""
        return torch.cuda.stream(self._stream(queue))

    def record(self, queue: str, event: Any) -> Any:
        """See `CopyEngine`."""
        event = torch.cuda.Event() if event is None else event
        event.record(self._stream(queue))
        return event

    def wait(self, queue: str, event: Any, hazard: str) -> None:
        """See `CopyEngine`."""
        if event is None:
            return
        if queue == HOST:  # only before the host reads or writes states, never in a step
            event.synchronize()
        else:
            self._stream(queue).wait_event(event)


class InlineEngine:
    """Run all operations immediately, in the order of the calls: for a CPU, and for planning."""

    def copy(
        self, queue: str, targets: Sequence[Tensor], sources: Sequence[Tensor], operation: Operation
    ) -> None:
        """See `CopyEngine`."""
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    def note(self, queue: str, operation: Operation) -> None:
        """Do nothing: no log is kept."""

    def on(self, queue: str) -> AbstractContextManager[Any]:
        """Return an empty context: there is only one queue."""
        return nullcontext()

    def record(self, queue: str, event: Any) -> Any:
        """Return None: there are no events."""
        return None

    def wait(self, queue: str, event: Any, hazard: str) -> None:
        """Do nothing: all operations have finished."""


def engine_for(device: torch.device) -> CopyEngine:
    """Return the copy engine of a device: streams for CUDA, otherwise immediate copies."""
    return CudaEngine(device) if device.type == "cuda" else InlineEngine()
