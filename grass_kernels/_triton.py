"""The one door to Triton: what is installed, which device runs what, and how a kernel is launched.

What runs where (:func:`runs_triton`):

==================  ==============================================================================
CUDA, ROCm          Triton, on the tensors' device and its current stream
CPU, interpreting   Triton's interpreter (``TRITON_INTERPRET=1`` when this package is imported): the
                    kernels, tables and launchers a GPU runs, for tests on any machine
everything else     torch: its own fused AdamW on the CPU where that is the same function, otherwise
                    the reference
==================  ==============================================================================

Without Triton the package still imports: kernels are then plain functions that nobody calls.
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
"""Threads of every program. A block of 2048 then gives each thread 8 elements: one 128-bit access in
16 bits, two in 32."""

constexpr = tl.constexpr


def jit(do_not_specialize: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit`, or nothing at all where Triton is not installed.

    `do_not_specialize` names integers that change between calls: a kernel compiled for one value of
    theirs (1, or a multiple of 16) would be compiled again for the next.
    """
    if not INSTALLED:
        return lambda function: function
    return lambda function: triton.jit(function, do_not_specialize=list(do_not_specialize))


def runs_triton(device: torch.device) -> bool:
    """Whether tensors on `device` are updated by the Triton kernels (see the table above)."""
    return INSTALLED and (device.type == "cuda" or (INTERPRETING and device.type == "cpu"))


@functools.cache
def tl_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of a torch dtype."""
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


@functools.cache
def _warp_size(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).warp_size)


@contextlib.contextmanager
def _interpreter_as_silent_as_a_gpu() -> Iterator[None]:
    """A GPU computes inf - inf without a word; numpy, which the interpreter computes with, would warn."""
    import numpy as np

    with np.errstate(all="ignore"):
        yield


def compile_options(backend: str, warp_size: int, threads: int, max_registers: int | None) -> dict[str, Any]:
    """What every kernel is compiled with, at a launch and ahead of time.

    No multiplication and addition are fused (`enable_fp_fusion`): whether they would be differs between
    Triton versions, and the interpreter does not. With it a kernel, its reference and the norms of two
    kernels would differ in the last bit.

    Args:
        backend: "cuda" or "hip".
        warp_size: Threads of a warp.
        threads: Threads of a program.
        max_registers: Registers of a thread, on CUDA. Near a step of occupancy ptxas would rather spill
            than take one more, and which kernels it hits changes with every version; a stated limit ends that.
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
        with _interpreter_as_silent_as_a_gpu():
            kernel[(programs,)](**arguments)
        return
    options = compile_options(
        "hip" if torch.version.hip else "cuda", _warp_size(device), threads, max_registers
    )
    # Triton launches on torch's current device, which need not be the tensors' own.
    with torch.cuda.device(device):
        kernel[(programs,)](**arguments, **options)
