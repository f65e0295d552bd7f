"""Tracker of the memory and arithmetic of a step with fake tensors.

A dispatch mode intercepts every operation of forward, backward and optimizer.
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

from grass.optim.sharding import local

WEIGHTS, GRADIENTS, DEVICE_STATES, HOST_STATES = "weights", "gradients", "states_device", "states_host"
ACTIVATIONS = "activations"  # all other memory: activations, temporaries, inputs

ROUNDING = 512
"""Granularity of the CUDA allocator in bytes."""

Workspace = Callable[..., int]
"""Returns the bytes that an operator allocates on the device while it runs, given its arguments."""


class Block:
    """Memory of one storage.

    Attributes:
        label: kind of memory; gradients get theirs when they are complete.
        num_bytes: allocated size.
    """

    __slots__ = ("label", "num_bytes")

    def __init__(self, label: str, num_bytes: int) -> None:
        self.label, self.num_bytes = label, num_bytes


class MemoryTracker(TorchDispatchMode):
    """Track live storages by label.

    Enter it after the `FakeTensorMode`. Allocated memory counts as activations unless `labelling` or `mark` gives it
    another label. Workspaces inside operators are counted for those in `workspaces`; others, such as those of cuBLAS
    (8 to 32 MiB), are not known.

    Args:
        workspaces: workspaces by operator name without overload, such as ``"grass_kernels::masked_adamw_"``.

    Attributes:
        flops: floating-point operations of matrix products, those of experts included, and attention so far; a
            multiply-add counts as two.
        sent: bytes of the whole tensors in collectives, by operator.
    """

    def __init__(self, workspaces: dict[str, Workspace] | None = None) -> None:
        super().__init__()
        self.flops = 0
        self.sent: Counter[str] = Counter()
        self._workspaces = workspaces or {}
        self._blocks: dict[int, tuple[weakref.ref[Any], Block]] = {}  # by id of live storages
        self._label = ACTIVATIONS
        self._before: Counter[Block] = Counter()  # blocks alive at `restart`
        self._events: list[tuple[Block, int]] = []  # since then: 1 for an allocation, -1 for a deallocation

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
        if name in self._workspaces:
            # allocated in addition to the results, and freed when the operator returns
            block = Block(ACTIVATIONS, _rounded(self._workspaces[name](*args, **kwargs)))
            self._events += [(block, 1), (block, -1)]
        if name.startswith("c10d::"):
            whole = max(
                (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), key=lambda t: t.nbytes
            )
            self.sent[name] += whole.nbytes
        count = flop_registry.get(func._overloadpacket) or _FLOPS.get(name)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        return result

    @contextmanager
    def following_resizes(self) -> Iterator[None]:
        """Follow storages that change their size inside the context, as those of whole weights in FSDP2 do."""
        original = torch.UntypedStorage.resize_

        def resize(storage: Any, size: int) -> Any:
            entry = self._blocks.get(id(storage))
            if entry is not None and entry[0]() is storage:
                block = Block(entry[1].label, _rounded(size))
                self._blocks[id(storage)] = entry[0], block
                self._events += [(entry[1], -1), (block, 1)]
            return original(storage, size)

        setattr(torch.UntypedStorage, "resize_", resize)  # noqa: B010
        try:
            yield
        finally:
            setattr(torch.UntypedStorage, "resize_", original)  # noqa: B010

    def block_of(self, t: Tensor) -> Block:
        """Return the block of a tensor, and track it if it is new."""
        storage = local(t).untyped_storage()
        key = id(storage)
        entry = self._blocks.get(key)
        if entry is not None and entry[0]() is storage:
            return entry[1]
        block = Block(self._label, _rounded(storage.nbytes()))
        self._events.append((block, 1))

        def on_free(_: object) -> None:
            self._events.append((self._blocks.pop(key)[1], -1))

        self._blocks[key] = weakref.ref(storage, on_free), block
        return block

    @contextmanager
    def labelling(self, label: str) -> Iterator[None]:
        """Set the label of memory allocated inside the context."""
        before, self._label = self._label, label
        try:
            yield
        finally:
            self._label = before

    def mark(self, t: Tensor, label: str) -> None:
        """Set the label of a tensor's memory."""
        self.block_of(t).label = label

    def restart(self) -> None:
        """Restart the measurement of the peak from the blocks alive now."""
        self._before = self._replay(len(self._events))
        self._events = []

    def peak(self) -> dict[str, int]:
        """Return the bytes by label at the peak of device memory since `restart`."""
        total = sum(block.num_bytes for block in self._before if block.label != HOST_STATES)
        peak, num_events = total, 0
        for i, (block, sign) in enumerate(self._events):
            if block.label != HOST_STATES:
                total += sign * block.num_bytes
                if total > peak:
                    peak, num_events = total, i + 1
        return _by_label(self._replay(num_events))

    def now(self) -> dict[str, int]:
        """Return the bytes by label that are alive now."""
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
    """Return the shape of keys or values repeated for each query head, as in grouped-query attention."""
    return torch.Size((t.shape[0], query.shape[1], *t.shape[2:]))


def _grouped_mm(a: Tensor, b: Tensor, *args: Any, out_val: Tensor, **kwargs: Any) -> int:
    """Return the operations of the products of a mixture of experts, in which a row belongs to one expert.

    Of the operands, those with three dimensions have one matrix for each expert. Two of two dimensions give the
    gradients of the weights, out_val [experts, inputs, outputs]: each row is in the sum of one expert only.
    """
    products = out_val.numel() * a.shape[-1]
    return 2 * (products // len(out_val) if a.dim() == b.dim() == 2 else products)


# torch registers the attention operators of CUDA; those of the CPU have other names. It does not register those of
# experts.
_FLOPS: dict[str, Callable[..., int]] = {
    "aten::_grouped_mm": _grouped_mm,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
