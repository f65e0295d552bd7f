"""Advice: choose a method from the rows of a plan."""

from collections.abc import Sequence

from grass.plan.prediction import PROBING, Row

ONLY_COMPARED = ("lora", "lisa")  # shown for comparison; `grass finetune` does not have them


def advise(rows: Sequence[Row], gpu_gib: float, host_gib: float | None = None) -> str:
    """Return a line with the cheapest method that fits, and the next larger one.

    The cheapest method has the lowest bound of the step time (within 1 %), then the least traffic, then the earlier
    row. A method fits if device memory holds its step and its probe, and host memory its states.

    Args:
        rows: rows of a plan, with full fine-tuning or GRASS among them.
        gpu_gib: device memory, GiB.
        host_gib: host memory for states, GiB; None for no limit.
    """
    needed = {
        row: _needed(row, rows)
        for row in rows
        if not row.method.endswith(PROBING) and not row.method.startswith(ONLY_COMPARED)
    }
    in_host = [row for row in needed if host_gib is None or row.states_host_gib <= host_gib]
    fitting = [row for row in in_host if needed[row] <= gpu_gib]
    larger = sorted((row for row in in_host if needed[row] > gpu_gib), key=lambda row: needed[row])
    if not fitting:
        if not larger:
            least = min(row.states_host_gib for row in needed)
            return f"Nothing fits {host_gib:g} GiB of host memory: states need at least {least:.1f} GiB."
        return (
            f"Nothing fits {gpu_gib:g} GiB: {larger[0].method} needs the least, {needed[larger[0]]:.1f} GiB; shorter "
            "sequences, a smaller batch or fewer active layers need less."
        )
    fastest = min(row.step_floor_ms for row in fitting)
    best = min(
        (row for row in fitting if row.step_floor_ms <= 1.01 * fastest),
        key=lambda row: row.h2d_gib_per_step + row.d2h_gib_per_step,
    )
    host = f", {best.states_host_gib:.1f} in host memory" if best.states_host_gib else ""
    memory = f"{needed[best]:.1f} of {gpu_gib:g} GiB{host}"
    chosen = f"Use {best.method}: {memory}, at least {best.step_floor_ms:.0f} ms per step."
    if not larger:
        return f"{chosen} All methods of GRASS fit."
    return f"{chosen} The next larger is {larger[0].method}, with {needed[larger[0]]:.1f} GiB."


def _needed(row: Row, rows: Sequence[Row]) -> float:
    """Return the GiB of device memory that a method needs, probe included."""
    return max(other.peak_gib for other in rows if other.method in (row.method, row.method + PROBING))
