"""Figures with targets, and the rows that they are read from.

A figure is read from the rows of one run on one device, never across two.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench import cpu_step, integration
from bench.host import FUSED, MOST, SITUATIONS, TENSORS, VARIANTS
from bench.kernels.cases import BASE, BF16, F32, Case, Mixture, size_name
from bench.kernels.variants import our_bytes
from bench.targets import at_most, beside
from grass.config import GrassConfig

Row = dict[str, Any]

LARGE = Case(10**9)
"""The case that counts most: bf16 parameters, fp32 moments, norms by layer."""
SHARES = (1 / 16, 1 / 2)
OF_ONE_DTYPE = {"all bf16": Mixture(BF16, BF16, BF16), "all fp32": Mixture(F32, F32, F32)}
PARTS = ("mixed", *(name.replace(" ", "-") for name in OF_ONE_DTYPE))
"""Parts of the figures, a process each: bf16 with fp32 moments, and mixtures that torch supports too."""
SIZES = (10**9, 10**8)


@dataclass(frozen=True)
class Reading:
    """A figure as read from a run.

    Args:
        value: value, as printed.
        passed: whether the target is met.
        bytes: byte ratio of the rows, for a ratio of times, as printed; "" if there is none.
    """

    value: str
    passed: bool
    bytes: str = ""


class Rows:
    """The rows of one run on one device."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def find(self, **wanted: Any) -> Row | None:
        """Return the first measured row with these values: that of the figures' own stage, if several measure it."""
        for row in self._rows:
            if row.get("measured", True) and all(row.get(key) == value for key, value in wanted.items()):
                return row
        return None

    def step(self, case: Case, variant: str) -> Row | None:
        """The row of a variant in a case of the kernels' suite."""
        return self.find(suite="kernels", case=str(case), variant=variant)


@dataclass(frozen=True)
class Figure:
    """A figure with its target.

    Args:
        part: heading on the page.
        name: quantity that is measured.
        target: target, as printed.
        read: function from the rows of a run to a reading; None if the rows lack the figure.
        bytes: byte ratio computed from the cases, measured or not; "" if there is none.
    """

    part: str
    name: str
    target: str
    read: Callable[[Rows], Reading | None]
    bytes: str = ""


def figures() -> list[Figure]:
    """All of them, the most important first."""
    return [
        *_bandwidth(),
        *_against_torch(),
        *_frozen(),
        *_offload(),
        *_training(),
        *_host(),
        *_cpu_step(),
        *_integration(),
        *_memory(),
    ]


def figure_cases(part: str, largest: int = LARGE.numel) -> list[Case]:
    """The cases of a part that figures are read from, the most important first.

    Args:
        part: one of `PARTS`.
        largest: parameters of the largest case; greater ones are cut down to it.
    """
    if part == "mixed":
        cases = [
            LARGE,
            replace(LARGE, norms=False),
            *(replace(LARGE, active_share=share) for share in SHARES),
            replace(LARGE, zeros=True),
        ]
    else:
        mixture = OF_ONE_DTYPE[part.replace("-", " ")]
        cases = [case for size in SIZES for case, _, _ in _works(size, mixture)]
    return list(dict.fromkeys(replace(case, numel=min(case.numel, largest)) for case in cases))


# -- one step on the device -------------------------------------------------------------------------------


def _bandwidth() -> Iterator[Figure]:
    part = f"{size_name(LARGE.numel)} parameters, bf16 with fp32 moments"

    def share_of_copy(rows: Rows) -> Reading | None:
        row = rows.step(LARGE, "grass")
        if row is None:
            return None
        percent = row["percent_of_copy"]
        shown = beside(percent, 92, digits=1)
        return Reading(f"{shown} % ({row['gb_per_s']:.0f} GB/s)", percent >= 92, _bytes_beside(row))

    def price_of_norms(rows: Rows) -> Reading | None:
        with_norms = rows.step(LARGE, "grass_kernels")
        without = rows.step(replace(LARGE, norms=False), "grass_kernels")
        if with_norms is None or without is None:
            return None
        more = 100 * (with_norms["seconds_median"] / without["seconds_median"] - 1)
        return Reading(
            f"{beside(more, 1, sign='+')} %", more <= 1, f"{with_norms['bytes'] / without['bytes']:.3f}x"
        )

    yield Figure(part, "share of the copy bandwidth, norms by layer included", ">= 92 %", share_of_copy)
    yield Figure(part, "what the norms cost, of the time without", "<= 1 %", price_of_norms, "1.000x")


def _bytes_beside(row: Row) -> str:
    """Torch's bytes by ours, and that torch ran in other dtypes where it did."""
    ratio = row["byte_ratio_to_torch"]
    if ratio is None:
        return ""
    return f"{ratio:.3f}x" + ("" if _same_dtypes(row) else " (torch in other dtypes)")


def _same_dtypes(row: Row) -> bool:
    return row["baseline"] == "torch_fused, same dtypes"


def _works(size: int, mixture: Mixture) -> list[tuple[Case, str, float]]:
    """The three comparisons with torch's fused AdamW: case, what torch does in it, least ratio of times."""
    case = Case(size, mixture=mixture)
    return [
        (replace(case, norms=False), "torch fused, without norms", 1.0),
        (case, "torch fused and norms by layer", 1.10),
        (replace(case, norms=False, clip=True), "clip_grad_norm_ and torch fused, both clipping", 1.20),
    ]


def _against_torch() -> Iterator[Figure]:
    for label, mixture in OF_ONE_DTYPE.items():
        for size in SIZES:
            for case, other, least in _works(size, mixture):
                part = f"{label}: torch's time by ours"
                name = f"{other}, {size_name(size)} parameters"
                yield Figure(
                    part, name, f">= {least:.2f}x", _time_ratio(case, least), f"{_byte_ratio(case):.3f}x"
                )


def _byte_ratio(case: Case) -> float:
    """Torch's bytes by ours, of a mixture that torch takes."""
    torchs = case.mixture.update_bytes + case.extra_bytes(case.mixture.grad)
    return case.active_numel * torchs / our_bytes(case)


def _time_ratio(case: Case, least: float) -> Callable[[Rows], Reading | None]:
    def read(rows: Rows) -> Reading | None:
        row = rows.step(case, "grass")
        if row is None or row["time_ratio_to_torch"] is None or not _same_dtypes(row):
            return None
        ratio = row["time_ratio_to_torch"]
        return Reading(f"{beside(ratio, least, digits=3)}x", ratio >= least, _bytes_beside(row))

    return read


def _frozen() -> Iterator[Figure]:
    part = f"Frozen layers, {size_name(LARGE.numel)} parameters: time by the active share"
    for share in SHARES:
        name = f"1/{round(1 / share)} active: share of the time by share of the bytes"
        byte_share = our_bytes(replace(LARGE, active_share=share)) / our_bytes(LARGE)
        yield Figure(part, name, "0.95 to 1.05", _time_of_share(share), f"{byte_share:.4f}")


def _time_of_share(share: float) -> Callable[[Rows], Reading | None]:
    def read(rows: Rows) -> Reading | None:
        some, everything = rows.step(replace(LARGE, active_share=share), "grass"), rows.step(LARGE, "grass")
        if some is None or everything is None:
            return None
        time_share = some["seconds_median"] / everything["seconds_median"]
        byte_share = some["bytes"] / everything["bytes"]
        ratio = time_share / byte_share
        shown = beside(ratio, 0.95, 1.05, digits=3)
        return Reading(f"{shown} ({time_share:.4f} of the time)", 0.95 <= ratio <= 1.05, f"{byte_share:.4f}")

    return read


# -- host and memory --------------------------------------------------------------------------------------


def _host() -> Iterator[Figure]:
    part = "The host's time of a step, by torch fused's"
    for tensors in TENSORS:
        for situation in SITUATIONS:
            for variant in VARIANTS:
                if variant != FUSED:
                    keys = {"suite": "host", "tensors": tensors, "situation": situation}
                    name = f"{variant}, {tensors:,} tensors, {situation}"
                    yield Figure(part, name, f"<= {MOST:g}x", _by_fused(keys, variant, MOST))


def _cpu_step() -> Iterator[Figure]:
    part = "A step on the CPU, by torch fused's"
    for case in cpu_step.CASES:
        for clip in (False, True):
            keys = {"suite": "cpu step", "case": case.name, "clip": clip}
            name = f"{case.name}, {'both clipping' if clip else 'without clipping'}"
            yield Figure(part, name, f"<= {case.most:g}x", _by_fused(keys, cpu_step.GRASS, case.most))


def _integration() -> Iterator[Figure]:
    part = "A step in Trainer with every layer active and no probe, by torch fused's"
    for size in integration.CASES:
        keys = {"suite": "integration", "case": str(size)}
        read = _by_fused(keys, cpu_step.GRASS, integration.MOST)
        yield Figure(part, str(size), f"<= {integration.MOST:g}x", _with_spread(keys, read))


def _with_spread(keys: Row, read: Callable[[Rows], Reading | None]) -> Callable[[Rows], Reading | None]:
    """With the quantiles of the ratio over pairs of turns."""

    def read_all(rows: Rows) -> Reading | None:
        reading = read(rows)
        row = rows.find(**keys, variant=cpu_step.GRASS)
        if reading is None or row is None:
            return None
        spread = f"{row['ratio_p20']:.3f} to {row['ratio_p80']:.3f} in {row['turns']} turns"
        return replace(reading, value=f"{reading.value}; {spread}")

    return read_all


def _by_fused(keys: Row, variant: str, most: float) -> Callable[[Rows], Reading | None]:
    """By the ratio of a variant's time to torch fused's, of the rows with these keys."""

    def read(rows: Rows) -> Reading | None:
        ours, fused = rows.find(**keys, variant=variant), rows.find(**keys, variant=FUSED)
        if ours is None or fused is None:
            return None
        seconds, theirs = ours["seconds_median"], fused["seconds_median"]
        shown, met = at_most(seconds / theirs, most)
        return Reading(f"{shown} ({1e3 * seconds:.3g} of {1e3 * theirs:.3g} ms)", met)

    return read


def _memory() -> Iterator[Figure]:
    part = "Memory"

    def beside_moments(rows: Rows) -> Reading | None:
        row = rows.find(suite="memory")
        if row is None:
            return None
        percent = 100 * row["extra_bytes"] / row["state_bytes"]
        shown = beside(percent, 0.1, digits=4)
        return Reading(f"{shown} % ({row['extra_bytes'] / 1e6:.2f} MB)", percent <= 0.1)

    def in_a_step(rows: Rows) -> Reading | None:
        row = rows.step(LARGE, "grass")
        if row is None or row["peak_bytes"] is None:
            return None
        percent = 100 * row["peak_bytes"] / (row["numel"] * 2 * BASE.state.itemsize)
        shown = beside(percent, 0.1, digits=4)
        return Reading(f"{shown} % ({row['peak_bytes'] / 1e6:.2f} MB)", percent <= 0.1)

    yield Figure(part, "kept beside the moments, of them", "<= 0.1 %", beside_moments)
    yield Figure(part, "needed on top during a step, of the moments", "<= 0.1 %", in_a_step)


# -- states in host memory --------------------------------------------------------------------------------


def _offload() -> Iterator[Figure]:
    part = "States in host memory"

    def step_by_floor(source: str) -> Callable[[Rows], Reading | None]:
        def read(rows: Rows) -> Reading | None:
            ring = {"buffer_count": GrassConfig.buffer_count, "update_priority": -1}
            row = rows.find(suite="offload", variant="overlapped", source=source, **ring)
            if row is None or row["seconds"] is None:
                return None
            ratio = row["seconds"] / row["floor_seconds"]
            shown = beside(ratio, 1.05, digits=3)
            return Reading(f"{shown}x ({1e3 * row['seconds']:.0f} ms)", ratio <= 1.05)

        return read

    def resident(rows: Rows) -> Reading | None:
        ours, none = (_trained(rows, name) for name in ("grass-resident", "grass"))
        if ours is None or none is None:
            return None
        ratio = ours["seconds_median"] / none["seconds_median"]
        return Reading(f"{beside(ratio, 1.02, digits=3)}x", ratio <= 1.02)

    name = "a streamed step, by the larger of compute and transfer"
    yield Figure(part, name, "<= 1.05x", step_by_floor("device"))
    yield Figure(part, "a resident step, by one without offload", "<= 1.02x", resident)


def _training() -> Iterator[Figure]:
    part = "A 7B at batch 4 x 1024"

    def peak(method: str) -> Callable[[Rows], Reading | None]:
        def read(rows: Rows) -> Reading | None:
            row = _trained(rows, method)
            if row is None or row["peak_active_gib"] is None or row["predicted_peak_gib"] is None:
                return None
            ratio = row["peak_active_gib"] / row["predicted_peak_gib"]
            shown = f"{beside(ratio, 0.95, 1.05, digits=3)}x; {row['tokens_per_second']:.0f} tokens/s"
            return Reading(f"{row['peak_active_gib']:.2f} GiB ({shown})", 0.95 <= ratio <= 1.05)

        return read

    def least_memory(rows: Rows) -> Reading | None:
        row = _trained(rows, "grass-streamed-fused")
        if row is None or row["peak_active_gib"] is None:
            return None
        peak = row["peak_active_gib"]
        return Reading(f"{beside(peak, 14.5)} GiB", peak <= 14.5)

    def hidden(rows: Rows) -> Reading | None:
        ours, none = (_trained(rows, name) for name in ("grass-streamed-fused", "grass"))
        if ours is None or none is None:
            return None
        shown, met = at_most(ours["seconds_median"] / none["seconds_median"], 1.05)
        return Reading(shown, met)

    yield Figure(part, "grass-streamed-fused: memory in use at the peak", "<= 14.5 GiB", least_memory)
    yield Figure(part, "grass-streamed-fused: a step, by one without offload", "<= 1.05x", hidden)

    for method in (
        "grass-streamed-fused",
        "grass-streamed",
        "grass-resident",
        "grass",
        "lisa",
        "lora-r128",
        "full",
    ):
        yield Figure(part, f"{method}: peak by the predicted one", "within 5 %", peak(method))


def _trained(rows: Rows, method: str) -> Row | None:
    return rows.find(suite="training", method=method, seq=1024)
