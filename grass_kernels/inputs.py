"""Inputs of a step that change between steps, in one small buffer on the device.

    gradients  one word per tensor          addresses
    headers    groups x HEADER words        hyperparameters, doubles

A step compares both with the last upload, and uploads those that differ through a ring of pinned staging buffers. A
staging buffer is written again once the event of its last copy has completed.
"""

import ctypes
import functools
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grass_kernels import _triton, reference
from grass_kernels._triton import constexpr
from grass_kernels.conversions import LR_DTYPES

NUM_STAGING_BUFFERS = 8
"""Number of uploads in flight: how many steps the host can be ahead of the device."""

# The words of a header, doubles: float arguments of a kernel would be fp32.
WORDS = (
    "lr",
    "lr_address",
    "lr_is_double",
    "weight_decay",
    "log_beta1",
    "log_beta2",
    "exp_avg_weight",
    "beta2",
    "one_minus_beta2",
    "eps",
    "sign",
    "max_grad_norm",
)
HEADER = constexpr(len(WORDS))
LR = constexpr(WORDS.index("lr"))
LR_ADDRESS = constexpr(WORDS.index("lr_address"))
LR_IS_DOUBLE = constexpr(WORDS.index("lr_is_double"))
WEIGHT_DECAY = constexpr(WORDS.index("weight_decay"))
LOG_BETA1 = constexpr(WORDS.index("log_beta1"))
LOG_BETA2 = constexpr(WORDS.index("log_beta2"))
EXP_AVG_WEIGHT = constexpr(WORDS.index("exp_avg_weight"))
BETA2 = constexpr(WORDS.index("beta2"))
ONE_MINUS_BETA2 = constexpr(WORDS.index("one_minus_beta2"))
EPS = constexpr(WORDS.index("eps"))
SIGN = constexpr(WORDS.index("sign"))
MAX_GRAD_NORM = constexpr(WORDS.index("max_grad_norm"))
_FORMAT = "dqq9d"

_CPU = torch.device("cpu")


class Hyperparameters(NamedTuple):
    """Hyperparameters of one parameter group: plain numbers, so that steps can be compared."""

    lr: float
    lr_address: int  # address of a tensor lr on the device, which kernels read; or 0
    lr_is_double: bool
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool = False
    max_grad_norm: float = math.inf  # used if the step clips

    def words(self) -> tuple[float, ...]:
        """Return the words of the header."""
        return (
            self.lr,
            self.lr_address,
            self.lr_is_double,
            self.weight_decay,
            *_words_of_betas(self.betas),
            self.eps,
            -1.0 if self.maximize else 1.0,
            self.max_grad_norm,
        )


@functools.lru_cache(maxsize=64)
def _words_of_betas(betas: tuple[float, float]) -> tuple[float, ...]:
    beta1, beta2 = betas
    return (
        math.log(beta1) if beta1 else -math.inf,
        math.log(beta2) if beta2 else -math.inf,
        reference.exp_avg_weight(beta1),
        beta2,
        1 - beta2,
    )


def split_lr(lr: float | Tensor, device: torch.device) -> tuple[float, int, bool]:
    """Return `lr`, `lr_address` and `lr_is_double` of `Hyperparameters`.

    A float32 or float64 tensor on a device that runs Triton is read there; any other is converted to a number.
    """
    if not isinstance(lr, Tensor):
        return float(lr), 0, False
    is_read = lr.device == device and lr.dtype in LR_DTYPES and device.type != "cpu"
    if not is_read or not _triton.runs_triton(device):
        return float(lr.detach()), 0, False
    return 0.0, lr.data_ptr(), lr.dtype == torch.float64


class Inputs:
    """The input buffer of one table, uploaded when it changes.

    Args:
        num_tensors: Number of tensors in the table.
        num_groups: Number of parameter groups; 0 without hyperparameters.
        device: Device of the table.
        capturable: Keep a spare pinned buffer for a graph: no memory can be pinned during a capture.

    Attributes:
        data: int64 buffer on the device.
        headers_start: First word of the headers.
    """

    def __init__(
        self, num_tensors: int, num_groups: int, device: torch.device, capturable: bool = False
    ) -> None:
        self.headers_start = num_tensors
        self._addresses = struct.Struct(f"{num_tensors}q")
        self._headers = struct.Struct(_FORMAT * num_groups)
        words = num_tensors + len(WORDS) * num_groups
        self.data = torch.empty(words, dtype=torch.int64, device=device)
        self._addresses_data, self._headers_data = self.data[:num_tensors], self.data[num_tensors:]
        self._grads: Sequence[int] | None = None
        self._groups: Sequence[Hyperparameters] = ()
        self._staging: list[_StagingBuffer] = []
        self._next = 0
        self._capturable = capturable
        self._spare: _StagingBuffer | None = None

    def _new_buffer(self) -> "_StagingBuffer":
        return _StagingBuffer(self.data.numel(), self.headers_start, self.data.device)

    def upload(self, grads: Sequence[int], groups: Sequence[Hyperparameters] = ()) -> None:
        """Upload values that differ from the last upload.

        Args:
            grads: Addresses of the gradients.
            groups: Hyperparameters, one per group.
        """
        if self._capturable and self._spare is None:
            self._spare = self._new_buffer()
        moved = grads != self._grads
        if not moved and groups == self._groups:
            return
        if len(self._staging) < NUM_STAGING_BUFFERS:
            buffer = self._new_buffer()
            self._staging.append(buffer)
        else:
            buffer = self._staging[self._next]
            self._next = (self._next + 1) % NUM_STAGING_BUFFERS
        buffer.wait_for_copy()
        changed = groups != self._groups
        if moved:
            self._write_addresses(buffer, grads)
        if changed:
            self._write_headers(buffer, groups)
        if moved and changed:
            copy_to_device(self.data, buffer.words)
        elif moved:
            copy_to_device(self._addresses_data, buffer.addresses)
        else:
            copy_to_device(self._headers_data, buffer.headers)
        buffer.record_copy(self.data.device)
        self._grads, self._groups = grads, groups

    def _write_addresses(self, buffer: "_StagingBuffer", grads: Sequence[int]) -> None:
        self._addresses.pack_into(buffer.bytes, 0, *grads)

    def _write_headers(self, buffer: "_StagingBuffer", groups: Sequence[Hyperparameters]) -> None:
        words = [word for group in groups for word in group.words()]
        self._headers.pack_into(buffer.bytes, 8 * self.headers_start, *words)

    def for_graph(self, grads: Sequence[int], groups: Sequence[Hyperparameters]) -> tuple[Tensor, object]:
        """Fill buffers that no other step writes, for a captured copy, which is repeated at every replay.

        Returns:
            The buffer on the device, filled by a copy on the current stream; and the objects that must be kept alive
            with the graph.

        Raises:
            RuntimeError: no step outside a capture since the last graph, so there is no spare buffer.
        """
        buffer, self._spare = self._spare, None
        if buffer is None:
            raise RuntimeError(
                "this step cannot be captured: there is no spare pinned buffer, and none can be allocated during a "
                "capture; take one step that is not captured before the capture begins, with capturable=True"
            )
        data = torch.empty_like(self.data)
        self._write_addresses(buffer, grads)
        self._write_headers(buffer, groups)
        copy_to_device(data, buffer.words)
        return data, (buffer, data, groups)


class _StagingBuffer:
    """Host buffer, pinned for a CUDA device."""

    def __init__(self, words: int, headers_start: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.words = torch.empty(words, dtype=torch.int64, device=_CPU, pin_memory=pinned)
        self.addresses, self.headers = self.words[:headers_start], self.words[headers_start:]
        self.bytes = (ctypes.c_char * (8 * words)).from_address(self.words.data_ptr())
        self._event: Any = None

    def wait_for_copy(self) -> None:
        """Wait until the last copy from this buffer has finished (H9: it would read the new values)."""
        if self._event is not None:
            wait_for_event(self._event)

    def record_copy(self, device: torch.device) -> None:
        """Record that a copy from this buffer was queued on the device's current stream."""
        self._event = record_event(device, self._event)


# Functions that touch the device: `python -m bench host` mocks them, and `_triton.launch`.


def copy_to_device(target: Tensor, source: Tensor) -> None:
    """Queue a copy from pinned memory on the current stream of the target's device."""
    target.copy_(source, non_blocking=True)


def record_event(device: torch.device, event: Any) -> Any:
    """Record an event on the device's current stream, a new one if `event` is None, and return it."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event() if event is None else event
    event.record(torch.cuda.current_stream(device))
    return event


def wait_for_event(event: Any) -> None:
    """Wait on the host until an event has completed."""
    if not event.query():
        event.synchronize()
