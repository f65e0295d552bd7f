"""Advice: in one line, what to take of the rows of a plan."""

from collections.abc import Sequence

from grass.plan.prediction import PROBING, Row

ONLY_COMPARED = ("lora", "lisa")  # others' methods: `grass finetune` has none of them


def advise(rows: Sequence[Row], gpu_gib: float, host_gib: float | None = None) -> str:
    """The cheapest configuration that fits, and what would fit next.

    Cheapest is the lowest floor of a step (to a hundredth of itself), then the least traffic, then the earlier row. A
    method fits if its step does, its probing too, and its states do in host memory.

    Args:
        rows: of a plan, some of them of full fine-tuning or GRASS.
        gpu_gib: device memory, GiB.
        host_gib: host memory for states, GiB; None is enough.
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
            return f"Nothing fits {host_gib:g} GiB of host memory: states take {least:.1f} there."
        return (
            f"Nothing fits {gpu_gib:g} GiB: the least is {larger[0].method} with {needed[larger[0]]:.1f}; shorter "
            "sequences, a smaller batch or fewer active layers take less."
        )
    fastest = min(row.step_floor_ms for row in fitting)
    best = min(
        (row for row in fitting if row.step_floor_ms <= 1.01 * fastest),
        key=lambda row: row.h2d_gib_per_step + row.d2h_gib_per_step,
    )
    host = f", {best.states_host_gib:.1f} in host memory" if best.states_host_gib else ""
    memory = f"{needed[best]:.1f} of {gpu_gib:g} GiB{host}"
    chosen = f"Take {best.method}: {memory}, {best.step_floor_ms:.0f} ms a step or more."
    if not larger:
        return f"{chosen} Everything that GRASS offers fits."
    return f"{chosen} Next would fit {larger[0].method}, with {needed[larger[0]]:.1f} GiB."


def _needed(row: Row, rows: Sequence[Row]) -> float:
    """GiB of device memory for all phases of a method."""
    return max(other.peak_gib for other in rows if other.method in (row.method, row.method + PROBING))
