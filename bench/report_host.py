"""What a step costs the host, variant by variant: a table of the page."""

from collections.abc import Iterator

from bench.gpu.figures import HOST_MOST, Row, Rows, beside
from bench.host import SITUATIONS, TENSORS

VARIANTS = ("grass", "grass clipping", "grass exact bf16", "torch fused")


def host_note(label: str) -> str:
    """What stands above the table of a run.

    Args:
        label: the run's.
    """
    return (
        f"Run {label}, by the unit: the time to read the addresses of the gradients, in the same situation.\n"
        "`grass` is `grass.AdamW` as it is by default, `grass clipping` has `max_grad_norm`, and `grass exact bf16`\n"
        f"`master_weights`. The target of {HOST_MOST:g}x is held against `grass`, each situation by itself; the other\n"
        "variants have none. Of more tensors one may take longer, and so does reading its address, in colder caches:\n"
        "the target is the same multiple."
    )


def host_lines(rows: Rows) -> Iterator[tuple[str, ...]]:
    """The table: its head, then a line for each number of tensors and situation that has a unit.

    Args:
        rows: of one run.
    """
    yield ("tensors", "situation", "unit", *VARIANTS, f"grass: <= {HOST_MOST:g}x")
    for tensors in TENSORS:
        for situation in SITUATIONS:
            found = {
                variant: rows.find(suite="host", tensors=tensors, situation=situation, variant=variant)
                for variant in ("addresses", *VARIANTS)
            }
            unit = found["addresses"]
            if unit is None:
                continue
            yield (
                str(tensors),
                situation,
                f"{1e6 * unit['seconds_median']:.0f} us",
                *(_ratio(found[variant], unit) for variant in VARIANTS),
                _verdict(found["grass"], unit),
            )


def _ratio(row: Row | None, unit: Row) -> str:
    return "-" if row is None else f"{beside(_by_unit(row, unit), HOST_MOST)}x"


def _verdict(row: Row | None, unit: Row) -> str:
    if row is None:
        return "-"
    return "met" if _by_unit(row, unit) <= HOST_MOST else "**missed**"


def _by_unit(row: Row, unit: Row) -> float:
    return row["seconds_median"] / unit["seconds_median"]
