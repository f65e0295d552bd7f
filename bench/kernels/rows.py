"""Rows of a run: one for each variant of each case, with the same keys always."""

import datetime
import functools
import importlib.metadata
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.kernels.cases import DTYPE_NAMES, Case
from bench.kernels.timing import Sample, device_name, statistics
from bench.kernels.variants import Built

Row = dict[str, Any]

KEYS = (
    "suite", "case", "numel", "tensors", "param_dtype", "grad_dtype", "state_dtype", "rounding", "active_share",
    "norms", "clip", "zeros", "variant", "measured", "reason", "bytes", "seconds_median", "seconds_p20",
    "seconds_p80", "seconds_min", "samples", "gb_per_s", "percent_of_copy", "copy_gb_per_s", "baseline",
    "time_ratio_to_torch", "byte_ratio_to_torch", "error_ulps", "peak_bytes", "device", "driver", "torch",
    "triton", "python", "commit", "dirty", "timestamp",
)  # fmt: skip
"""Every row's keys, in this order.

Dtypes and rounding are those the variant ran with; `case` names those that were asked for. `bytes` is what
the step must move. Ratios are torch's number by this one's: above 1, this one is faster, or moves less.
`reason` tells why a row was not measured, or why a number in a measured one is missing.
"""


def empty_row(case: Case, variant: str, environment: Row) -> Row:
    """A row with the case and nothing measured.

    Args:
        case: that the row is about.
        variant: its name.
        environment: from :func:`describe_environment`.
    """
    mixture = case.mixture
    row = dict.fromkeys(KEYS)
    row.update(
        suite="kernels",
        case=str(case),
        numel=case.numel,
        tensors=case.tensors,
        param_dtype=DTYPE_NAMES[mixture.param],
        grad_dtype=DTYPE_NAMES[mixture.grad],
        state_dtype=DTYPE_NAMES[mixture.state],
        rounding=mixture.rounding,
        active_share=case.active_share,
        norms=case.norms,
        clip=case.clip,
        zeros=case.zeros,
        variant=variant,
        measured=False,
        timestamp=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **environment,
    )
    return row


def failed_row(case: Case, variant: str, environment: Row, reason: str) -> Row:
    """The row of what could not be measured."""
    return {**empty_row(case, variant, environment), "reason": reason}


def measured_row(
    case: Case,
    variant: str,
    environment: Row,
    built: Built,
    samples: Sequence[Sample],
    *,
    error_ulps: float | None,
    peak_bytes: int | None,
    copy_gb_per_s: float,
) -> Row:
    """The row of a measured variant, but for what compares it with torch (:func:`compare_with_torch`)."""
    seconds = statistics([sample.seconds for sample in samples])
    gb_per_s = built.num_bytes / seconds["seconds_median"] / 1e9
    notes = []
    if error_ulps is not None and not math.isfinite(error_ulps):
        error_ulps = None
        notes.append("error: a result is not finite")
    if peak_bytes is None:
        notes.append("peak memory: needs a CUDA device")
    if any(sample.host_late for sample in samples):
        notes.append("the host does not get ahead of the device: its time is in the seconds")
    row = empty_row(case, variant, environment)
    row.update(
        grad_dtype=DTYPE_NAMES[built.grad_dtype],
        state_dtype=built.state_name,
        rounding=built.rounding,
        measured=True,
        reason="; ".join(notes) or None,
        bytes=built.num_bytes,
        **seconds,
        gb_per_s=gb_per_s,
        percent_of_copy=100 * gb_per_s / copy_gb_per_s,
        copy_gb_per_s=copy_gb_per_s,
        error_ulps=error_ulps,
        peak_bytes=peak_bytes,
    )
    return row


def compare_with_torch(row: Row, torch_row: Row | None) -> None:
    """Fill a measured row's ratios and its baseline.

    Args:
        row: of any variant but a copy; changed.
        torch_row: of torch's fused AdamW in the same case; None if it was not measured.
    """
    if torch_row is None:
        row["baseline"] = "none: torch_fused was not measured"
        return
    row["time_ratio_to_torch"] = torch_row["seconds_median"] / row["seconds_median"]
    row["byte_ratio_to_torch"] = torch_row["bytes"] / row["bytes"]
    keys = ("param_dtype", "grad_dtype", "state_dtype", "rounding")
    theirs, ours = ([str(r[key]) for key in keys] for r in (torch_row, row))
    if theirs == ours:
        row["baseline"] = "torch_fused, same dtypes"
    else:
        row["baseline"] = (
            f"torch_fused, {'-'.join(theirs[:3])}: {torch_row['bytes']} bytes; this row, "
            f"{'-'.join(ours[:3])} {ours[3]}: {row['bytes']} bytes"
        )


def describe_environment(device: torch.device) -> Row:
    """Device and versions, as each row has them."""
    commit, dirty = _commit()
    return {
        "device": device_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": commit,
        "dirty": dirty,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


@functools.cache
def _driver() -> str | None:
    text = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return text.splitlines()[0] if text else None


def _commit() -> tuple[str | None, bool | None]:
    commit = _output("git", "rev-parse", "HEAD")
    if commit is None:  # a copy of the tree without its history
        return os.environ.get("GRASS_COMMIT"), None
    what = (
        ":(top)",
        ":(top,exclude)bench/results",
        ":(top,exclude)docs/performance.md",
    )  # what a run itself writes
    changes = _output("git", "status", "--porcelain", "--untracked-files=no", "--", *what)
    return commit, None if commit is None or changes is None else bool(changes)
