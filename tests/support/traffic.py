"""Counting what kernels read and write, byte by byte, in Triton's interpreter.

    with count_traffic(params=params, grads=grads) as traffic:
        masked_adamw_(params, grads, ...)
    assert traffic.bytes_read("grads") == ...

Every load and store of every program is attributed to the tensor whose memory it falls into: one of those
given, else an argument of the kernel that runs (its table, for example). An access of memory that is
neither, and an atomic, fail. On a GPU each of these accesses is one of the memory, or of a cache where the
same byte was accessed before: counts above one a byte show what relies on the cache.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from torch import Tensor

from grass_kernels import layout


class _Memory(NamedTuple):
    """One tensor's memory, and how often each byte of it was read and written."""

    start: int
    reads: np.ndarray
    writes: np.ndarray


def _memory(t: Tensor) -> _Memory:
    assert layout.is_dense(t), "bytes between a tensor's elements would count as its own"
    size = t.numel() * t.element_size()
    return _Memory(t.data_ptr(), np.zeros(size, np.int64), np.zeros(size, np.int64))


class Traffic:
    """Accesses by tensor.

    Attributes:
        arguments: Bytes read and written of kernels' arguments that are none of the given tensors, by name.
    """

    def __init__(self, tensors: dict[str, Sequence[Tensor]]) -> None:
        self._memories = {name: [_memory(t) for t in of_name] for name, of_name in tensors.items()}
        self._of_launch: dict[str, _Memory] = {}
        self.arguments: Counter[str] = Counter()
        self.failures: list[str] = []

    def reads(self, name: str) -> list[np.ndarray]:
        """How often each byte was read, of each tensor given as `name`."""
        return [memory.reads for memory in self._memories[name]]

    def writes(self, name: str) -> list[np.ndarray]:
        """How often each byte was written, of each tensor given as `name`."""
        return [memory.writes for memory in self._memories[name]]

    def bytes_read(self, name: str) -> int:
        """Bytes read of all tensors given as `name`; one that is read twice counts twice."""
        return sum(int(count.sum()) for count in self.reads(name))

    def bytes_written(self, name: str) -> int:
        """Bytes written of all tensors given as `name`."""
        return sum(int(count.sum()) for count in self.writes(name))

    def bytes_of(self, *names: str) -> int:
        """Bytes read and written of all tensors of these names; of all that were given if there are none."""
        return sum(self.bytes_read(name) + self.bytes_written(name) for name in names or self._memories)

    @contextlib.contextmanager
    def _launch(self, arguments: dict[str, Any]) -> Iterator[None]:
        """A kernel runs: its tensors are known meanwhile, and forgotten before their memory serves another."""
        self._of_launch = {
            name.removesuffix("_ptr"): _memory(t) for name, t in arguments.items() if isinstance(t, Tensor)
        }
        try:
            yield
        finally:
            for name, memory in self._of_launch.items():
                self.arguments[name] += int(memory.reads.sum() + memory.writes.sum())
            self._of_launch = {}

    def _access(self, pointers: Any, mask: Any, kind: str) -> None:
        """One load or store, of a block or of one element."""
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(
            np.int64
        )
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)  # a bool takes a byte
        given = [memory for of_name in self._memories.values() for memory in of_name]
        for memory in (*given, *self._of_launch.values()):
            count = getattr(memory, kind)
            offsets = addresses - memory.start
            inside = (offsets >= 0) & (offsets + width <= len(count))
            if inside.any():
                begin = offsets[inside].min()
                first = np.bincount(offsets[inside] - begin)
                for byte in range(begin, begin + width):
                    count[byte : byte + len(first)] += first
                addresses = addresses[~inside]
            if not len(addresses):
                return
        self.failures.append(f"{kind} of memory that belongs to no tensor, at {addresses[:4].tolist()}")


@contextlib.contextmanager
def count_traffic(**tensors: Sequence[Tensor]) -> Iterator[Traffic]:
    """Count what kernels launched inside access.

    Args:
        tensors: Lists of dense tensors that do not overlap, by the name they are asked for afterwards.

    Raises:
        AssertionError: At the end, if an access was of no known memory, or atomic.
    """
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    traffic = Traffic(tensors)
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    run = GridExecutor.__call__

    # What follows the mask differs between versions of Triton.
    def counted_load(builder: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        traffic._access(pointers, mask, "reads")
        return load(builder, pointers, mask, *rest, **named)

    def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        traffic._access(pointers, mask, "writes")
        return store(builder, pointers, value, mask, *rest, **named)

    def counted_run(executor: Any, *positional: Any, **arguments: Any) -> None:
        assert not positional, "arguments have names"
        with traffic._launch(arguments):
            run(executor, **arguments)

    def atomic(*arguments: Any) -> Any:
        raise AssertionError("an atomic")

    replaced = {"create_masked_load": counted_load, "create_masked_store": counted_store}
    replaced |= dict.fromkeys((n for n in dir(InterpreterBuilder) if n.startswith("create_atomic")), atomic)
    with (
        mock.patch.multiple(InterpreterBuilder, **replaced),
        mock.patch.object(GridExecutor, "__call__", counted_run),
    ):
        yield traffic
    assert not traffic.failures, traffic.failures[0]
