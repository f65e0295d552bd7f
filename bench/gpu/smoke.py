"""``python -m bench smoke``: whether the kernels are right on this device, and what its memory and link can do.

Rows are of suite "smoke", one for each mixture of dtypes, whose bits are compared with those of the reference on the
CPU; and of suite "link" with bytes a second.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import grass_kernels
from bench.kernels.cases import MIXTURES, Mixture
from bench.kernels.rows import describe_environment
from bench.offload.measure import measure_hbm, measure_link
from bench.output import Row, add_output_options, output_of
from grass.errors import GrassError
from grass.offload.store import Bucket, Store
from grass_kernels import reference

SIZES = (1, 2047, 16_384 + 77)
HYPERPARAMETERS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
_PINNED = 2**30 // 8  # elements with two float32 moments: 1 GiB


def differing(mixture: Mixture, device: torch.device) -> int:
    """Return how many elements of a step on a device differ from the reference on the CPU, by their bits."""
    results = []
    for where, update in (
        (device, grass_kernels.masked_adamw_),
        (torch.device("cpu"), reference.masked_adamw_),
    ):
        results.append(_updated(mixture, where, update))
    return sum(int((a.cpu() != b).sum()) for a, b in zip(*results, strict=True))


def _updated(mixture: Mixture, device: torch.device, update: Callable[..., None]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def made(dtype: torch.dtype, low: float = -1.0) -> list[Tensor]:
        return [torch.empty(n).uniform_(low, 1.0, generator=generator).to(device, dtype) for n in SIZES]

    params, grads, exp_avgs = made(mixture.param), made(mixture.grad), made(mixture.state)
    exp_avg_sqs = made(mixture.state, low=0.0)
    steps = [torch.tensor(3.0, device=device) for _ in SIZES]
    norms = torch.zeros(len(SIZES), device=device)
    extra: dict[str, Any] = {}
    if mixture.rounding == "master":
        extra["remainders"] = [torch.zeros(n, dtype=torch.int16, device=device) for n in SIZES]
    elif mixture.rounding == "stochastic":
        extra["rounding_seeds"] = list(range(len(SIZES)))
    layers = list(range(len(SIZES)))
    lists = params, grads, exp_avgs, exp_avg_sqs, steps
    update(*lists, layer_index=layers, sq_norms=norms, **HYPERPARAMETERS, **extra)
    return [*itertools.chain(params, exp_avgs, exp_avg_sqs, extra.get("remainders", ())), norms]


def rates(device: torch.device) -> Iterator[Row]:
    """Yield rows with the rates of a CUDA device."""
    measurements: dict[str, Callable[[], Row]] = {
        "copies between host and device": lambda: _link(device),
        "copies on the device": lambda: {"hbm_bytes_per_second": measure_hbm(device)},
        "mapping and pinning host memory": lambda: {"pinning_bytes_per_second": _pinning()},
    }
    for name, measure in measurements.items():
        row: Row = {"suite": "link", "what": name, "measured": True, "reason": None}
        try:
            row.update(measure())
        except Exception as error:  # others may go well
            row.update(measured=False, reason=first_line(error))
        yield row


def first_line(error: Exception) -> str:
    """Return an error as one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _link(device: torch.device) -> Row:
    link = measure_link(device)
    return {
        "h2d_bytes_per_second": link.h2d,
        "d2h_bytes_per_second": link.d2h,
        "duplex_factor": link.duplex_factor,
    }


def _pinning() -> float:
    """Return the bytes a second that a layer's first draw takes for its slab."""
    member = torch.empty(_PINNED, device="meta")
    store = Store([Bucket([member], {"exp_avg": torch.float32, "exp_avg_sq": torch.float32})], pinned=True)
    start = time.perf_counter()
    store.slab(0)
    return store.num_bytes / (time.perf_counter() - start)


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "smoke",
        help="a step of every mixture beside the reference; rates of link, memory and pinning",
        description=__doc__.split("\n\n")[0],
    )
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run it; 1 if a mixture differs from the reference, or fails."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not grass_kernels.runs_triton(device):
        raise GrassError("the kernels cannot run here: they need a GPU, or TRITON_INTERPRET=1")
    environment = describe_environment(device)
    failures = []
    with output_of(arguments) as output:
        for rate in rates(device) if device.type == "cuda" else ():
            output.write({**rate, **environment})
            output.say(", ".join(f"{key} {value}" for key, value in rate.items() if value is not None))
        for mixture in MIXTURES:
            row: Row = {"suite": "smoke", "mixture": str(mixture), "measured": True, "reason": None}
            try:
                row["differing"] = differing(mixture, device)
                found = f"{row['differing']} elements differ"
            except Exception as error:  # others may go well
                found = first_line(error)
                row.update(measured=False, reason=found, differing=None)
            if row["differing"] != 0:
                failures.append(f"{mixture}: {found}")
            output.write({**row, **environment})
            output.say(f"{mixture!s:<28} {found}")
    for failure in failures:
        print(f"{arguments.prog}: failed: {failure}", file=sys.stderr)
    return 1 if failures else 0
