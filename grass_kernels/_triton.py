"""The only import of Triton: availability, the choice of backend by device, and launches.

Backends by device (:func:`runs_triton`):

==================  ==============================================================================
CUDA, ROCm          Triton, on the tensors' device and its current stream
CPU, interpreting   Triton's interpreter (``TRITON_INTERPRET=1`` when this package is imported): the
                    same kernels, tables and launchers as on a GPU, for tests on any machine
everything else     torch: its fused AdamW on the CPU where it computes the same, otherwise the
                    reference
==================  ==============================================================================

Without Triton the package can still be imported: kernels are then plain functions that are never called.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform
    triton = None
    tl = SimpleNamespace(constexpr=lambda value: value)

INSTALLED = triton is not None
INTERPRETING = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"

THREADS = 256
"""Threads per program. A block of 2048 gives each thread 8 elements: two 128-bit accesses in 32-bit dtypes, one in
16-bit dtypes, or two 64-bit accesses beside 32-bit dtypes."""

constexpr = tl.constexpr


def jit(do_not_specialize: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Return the decorator `triton.jit`, or an identity without Triton.

    `do_not_specialize` names integers that change between calls: Triton would compile the kernel again for special
    values (1, or multiples of 16).
    """
    if not INSTALLED:
        return lambda function: function
    return lambda function: triton.jit(function, do_not_specialize=list(do_not_specialize))


def runs_triton(device: torch.device) -> bool:
    """Return if tensors on `device` are updated by the Triton kernels (see the table above)."""
    return INSTALLED and (device.type == "cuda" or (INTERPRETING and device.type == "cpu"))


@functools.cache
def tl_dtype(dtype: torch.dtype) -> Any:
    """Return the Triton dtype of a torch dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))


@functools.cache
def _warp_size(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).warp_size)


@contextlib.contextmanager
def _ignore_float_errors() -> Iterator[None]:
    """Silence numpy, with which the interpreter computes: unlike a GPU, it warns about operations such as inf - inf."""
    import numpy as np

    with np.errstate(all="ignore"):
        yield


def compile_options(backend: str, warp_size: int, threads: int, max_registers: int | None) -> dict[str, Any]:
    """Return the options that every kernel is compiled with, at a launch and ahead of time.

    Multiplications and additions are not fused (`enable_fp_fusion`): fusion differs between Triton versions, and the
    interpreter does not fuse. With it a kernel and its reference, or the norms of two kernels, would differ in the
    last bit.

    Args:
        backend: "cuda" or "hip".
        warp_size: Threads per warp.
        threads: Threads per program.
        max_registers: Registers per thread, on CUDA. Near a threshold of occupancy ptxas may spill to stay below it,
            for kernels that differ between versions; an explicit limit avoids this.
    """
    options = {"num_warps": max(1, threads // warp_size), "enable_fp_fusion": False}
    return {**options, "maxnreg": max_registers} if backend == "cuda" and max_registers else options


def launch(
    kernel: Any,
    programs: int,
    device: torch.device,
    threads: int = THREADS,
    max_registers: int | None = None,
    **arguments: Any,
) -> None:
    """Run `programs` programs of `kernel` on `device`, on its current stream (see `compile_options`)."""
    if programs == 0:
        return
    if device.type == "cpu":
        with _ignore_float_errors():
            kernel[(programs,)](**arguments)
        return
    options = compile_options(
        "hip" if torch.version.hip else "cuda", _warp_size(device), threads, max_registers
    )
    # Triton launches on the current device, which may differ from that of the tensors.
    with torch.cuda.device(device):
        kernel[(programs,)](**arguments, **options)
