"""Tracker: follows the memory of a step on fake tensors, and counts its arithmetic.

A dispatch mode sees every operation of forward, backward and optimizer, as the device would be asked for it.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

WEIGHTS, GRADIENTS, DEVICE_STATES, HOST_STATES = "weights", "gradients", "states_device", "states_host"
ACTIVATIONS = "activations"  # all that is nothing else: what backward needs, temporaries, inputs

ROUNDING = 512
"""Bytes to which the allocator of CUDA tensors rounds every size up."""

Workspace = Callable[..., int]
"""From an operator's arguments to the bytes it holds on the device while it runs."""


class Block:
    """Memory of one storage.

    Attributes:
        label: what it is for; gradients are known as such only when they are complete.
        num_bytes: as allocated.
    """

    __slots__ = ("label", "num_bytes")

    def __init__(self, label: str, num_bytes: int) -> None:
        self.label, self.num_bytes = label, num_bytes


class MemoryTracker(TorchDispatchMode):
    """Follows live storages by what they are for.

    Enter it after the `FakeTensorMode`. What is allocated counts as activations, unless made under `labelling` or
    marked. Memory that operators use inside and free again is counted for those in `workspaces`; of others it is not
    known, such as cuBLAS's (8 to 32 MiB).

    Args:
        workspaces: of operators, by their name without overload, such as ``"grass_kernels::masked_adamw_"``.

    Attributes:
        flops: floating-point operations of matrix products and attention so far; a multiplication and an addition
            are two.
    """

    def __init__(self, workspaces: dict[str, Workspace] | None = None) -> None:
        super().__init__()
        self.flops = 0
        self._workspaces = workspaces or {}
        self._blocks: dict[int, tuple[weakref.ref[Any], Block]] = {}  # by id of storages that live
        self._label = ACTIVATIONS
        self._before: Counter[Block] = Counter()  # that were alive at `restart`
        self._events: list[tuple[Block, int]] = []  # since then: 1 came, -1 went

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        result = func(*args, **kwargs)
        for t in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(t, Tensor):
                self.block_of(t)
        if name in self._workspaces:  # held beside the results, and gone when the operator ends
            block = Block(ACTIVATIONS, _rounded(self._workspaces[name](*args, **kwargs)))
            self._events += [(block, 1), (block, -1)]
        count = flop_registry.get(func._overloadpacket) or _ATTENTION.get(name)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        return result

    def block_of(self, t: Tensor) -> Block:
        """The block of a tensor; it is followed from now on, if it was not."""
        storage = t.untyped_storage()
        key = id(storage)
        found = self._blocks.get(key)
        if found is not None and found[0]() is storage:
            return found[1]
        block = Block(self._label, _rounded(storage.nbytes()))
        self._events.append((block, 1))

        def gone(_: object) -> None:
            self._events.append((block, -1))
            del self._blocks[key]

        self._blocks[key] = weakref.ref(storage, gone), block
        return block

    @contextmanager
    def labelling(self, label: str) -> Iterator[None]:
        """Let what is allocated meanwhile be called so."""
        before, self._label = self._label, label
        try:
            yield
        finally:
            self._label = before

    def mark(self, t: Tensor, label: str) -> None:
        """Say what a tensor's memory is for."""
        self.block_of(t).label = label

    def restart(self) -> None:
        """Begin to look for the peak anew, from what is alive now."""
        self._before = self._replay(len(self._events))
        self._events = []

    def peak(self) -> dict[str, int]:
        """Bytes by label at the moment since `restart` at which most device memory was taken."""
        total = sum(block.num_bytes for block in self._before if block.label != HOST_STATES)
        most, moment = total, 0
        for i, (block, sign) in enumerate(self._events):
            if block.label != HOST_STATES:
                total += sign * block.num_bytes
                if total > most:
                    most, moment = total, i + 1
        return _by_label(self._replay(moment))

    def now(self) -> dict[str, int]:
        """Bytes by label that are alive now."""
        return _by_label(self._replay(len(self._events)))

    def _replay(self, events: int) -> Counter[Block]:
        alive = self._before.copy()
        for block, sign in self._events[:events]:
            alive[block] += sign
        return +alive


def _by_label(blocks: Iterable[Block]) -> dict[str, int]:
    sums = dict.fromkeys((WEIGHTS, GRADIENTS, DEVICE_STATES, HOST_STATES, ACTIVATIONS), 0)
    for block in blocks:
        sums[block.label] += block.num_bytes
    return sums


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // ROUNDING) * ROUNDING


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, _of_all_heads(key, query), _of_all_heads(value, query))


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(
        grad.shape, query.shape, _of_all_heads(key, query), _of_all_heads(value, query)
    )


def _of_all_heads(t: Tensor, query: Tensor) -> torch.Size:
    """The shape it has when heads that share keys and values have their own."""
    return torch.Size((t.shape[0], query.shape[1], *t.shape[2:]))


# torch counts the operators of CUDA devices; a fake CPU has names of its own for them
_ATTENTION: dict[str, Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
