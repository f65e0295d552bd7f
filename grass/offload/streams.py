"""Copy engines: what the offload pipeline does to streams, behind one small interface.

Everything that moves or uses states names the queue it runs on, what it reads and what it writes. On a GPU the queues
are streams; on a CPU all is done at once; a recording engine writes it down for tests, to prove that nothing
that conflicts is unordered.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

H2D, D2H, UPDATE, COMPUTE, HOST = "h2d", "d2h", "update", "compute", "host"
"""The queues: copies to the device, copies from it, updates, the user's current stream, and the host itself."""


class Operation(NamedTuple):
    """One thing that is done to states.

    `reads` and `writes` name memory: ``"buffer 0"`` of the ring, ``"store 3.1"`` of unit 1 of bucket 3 in the store,
    ``"slab 3"`` of a resident bucket on the device, ``"gradients 3"`` and ``"weights 3"`` of bucket 3.
    """

    kind: str  # "fetch", "update", "write-back", "host read" or "host write"
    label: str  # of the unit: "3.1"
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    num_bytes: int = 0  # that a copy moves


class CopyEngine(Protocol):
    """What the pipeline asks of the device. Each event belongs to one memory, and is used again."""

    def copy(
        self, queue: str, targets: Sequence[Tensor], sources: Sequence[Tensor], operation: Operation
    ) -> None:
        """Queue copies of 1-D tensors of equal lengths and dtypes."""

    def note(self, queue: str, operation: Operation) -> None:
        """Say that somebody has queued an operation on a stream, or done one on `HOST`."""

    def on(self, queue: str) -> AbstractContextManager[Any]:
        """Let what is queued meanwhile go to a queue."""

    def keep(self, queue: str, tensors: Iterable[Tensor]) -> None:
        """Do not give away the memory of tensors of `COMPUTE` before what a queue has been given so far is done."""

    def record(self, queue: str, event: Any) -> Any:
        """Mark this moment of a queue, in `event` if it is not None; returns the event."""

    def wait(self, queue: str, event: Any, hazard: str) -> None:
        """Let what is queued from now on wait for an event; None is no event. On `HOST` the host itself waits.

        Args:
            queue: that waits.
            event: from `record`.
            hazard: its number in docs/architecture.md, "H1" to "H10".
        """


class CudaEngine:
    """Three side streams of a device, created once.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = {queue: torch.cuda.Stream(device) for queue in (H2D, D2H, UPDATE)}

    def _stream(self, queue: str) -> torch.cuda.Stream:
        return self._streams[queue] if queue in self._streams else torch.cuda.current_stream(self._device)

    def copy(
        self, queue: str, targets: Sequence[Tensor], sources: Sequence[Tensor], operation: Operation
    ) -> None:
        """See `CopyEngine`. Host memory must be pinned: else a copy would block the host."""
        with torch.cuda.stream(self._stream(queue)):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)

    def note(self, queue: str, operation: Operation) -> None:
        """Nothing: streams keep their own order."""

    def on(self, queue: str) -> AbstractContextManager[Any]:
        """See `CopyEngine`."""
        return torch.cuda.stream(self._stream(queue))

    def keep(self, queue: str, tensors: Iterable[Tensor]) -> None:
        """See `CopyEngine`."""
        for t in tensors:
            t.record_stream(self._stream(queue))

    def record(self, queue: str, event: Any) -> Any:
        """See `CopyEngine`."""
        event = torch.cuda.Event() if event is None else event
        event.record(self._stream(queue))
        return event

    def wait(self, queue: str, event: Any, hazard: str) -> None:
        """See `CopyEngine`."""
        if event is None:
            return
        if queue == HOST:  # before states are read or written, never in a step
            event.synchronize()
        else:
            self._stream(queue).wait_event(event)


class InlineEngine:
    """Everything at once, in the order it is asked for: for a CPU, and for planning."""

    def copy(
        self, queue: str, targets: Sequence[Tensor], sources: Sequence[Tensor], operation: Operation
    ) -> None:
        """See `CopyEngine`."""
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    def note(self, queue: str, operation: Operation) -> None:
        """Nothing."""

    def on(self, queue: str) -> AbstractContextManager[Any]:
        """There is one queue."""
        return nullcontext()

    def keep(self, queue: str, tensors: Iterable[Tensor]) -> None:
        """All is done."""

    def record(self, queue: str, event: Any) -> Any:
        """There are no events where nothing is queued."""
        return None

    def wait(self, queue: str, event: Any, hazard: str) -> None:
        """Nothing is under way."""


def engine_for(device: torch.device) -> CopyEngine:
    """The engine of a device: every other kind than CUDA computes where the store is."""
    return CudaEngine(device) if device.type == "cuda" else InlineEngine()
