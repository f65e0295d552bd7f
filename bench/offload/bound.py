"""The bound: a lower bound on the time of a step through the ring, given when gradients are complete.

The floor assumes only that every queue does its own work. But states of the buckets that backward completes last cannot
be fetched before the ring has room, and the next forward waits for their updates: this time comes after backward, and
no schedule hides it. It is longest if the lowest layers train.
"""

import torch

from bench.offload.recording import RecordingEngine
from bench.offload.steps import UPDATE_TRAFFIC, Task, make_pipeline, parts
from bench.offload.timeline import Link
from grass.offload.store import allocating


def bound_seconds(task: Task, link: Link, hbm: float) -> float:
    """Return the minimum time of a steady step, from the beginning of its forward to that of the next.

    It is the maximum of the time of copies, the time that buffers are in use, and, for each bucket, the time of
    backward until its gradients are complete plus the remaining work.

    Args:
        task: model, active layers and ring.
        link: link to the host.
        hbm: bandwidth of device memory in bytes per second, of which updates make full use.
    """
    sizes = _unit_sizes(task)
    complete = []  # buckets, with the seconds after which their gradients are complete
    now = 0.0
    for part in parts(task):
        now += part.seconds
        if part.bucket is not None:
            complete.append((part.bucket, now))
    everything = sorted(size for bucket, _ in complete for size in sizes[bucket])
    found = [
        now,
        link.least_seconds(sum(everything), sum(everything)),
        (_updates(everything, hbm) + _both_ways(everything, link)) / task.buffer_count,
    ]
    for number, (_, seconds) in enumerate(complete):
        rest = sorted(size for bucket, _ in complete[number:] for size in sizes[bucket])
        found.append(seconds + _rest_seconds(rest, task.buffer_count, link, hbm))
    return max(found)


def _rest_seconds(sizes: list[int], buffer_count: int, link: Link, hbm: float) -> float:
    """Return the time from the state in which none of these units, in sorted order, is updated to the last update.

    The largest units, as many as there are buffers, may have been fetched before. Each of the others needs a buffer
    whose unit has been written back. So an update and a write-back come before the first of those fetches, the
    last one comes after all of their write-backs, and after it an update.
    """
    updates = _updates(sizes, hbm)
    moved = sizes[: max(0, len(sizes) - buffer_count)]
    if not moved:
        return updates
    least = moved[0]
    between = link.least_seconds(sum(moved) - least, sum(moved) - least)
    one_by_one = 2 * _updates([least], hbm) + _both_ways([least], link) + between
    in_buffers = (updates + _both_ways(moved, link)) / buffer_count
    return max(updates, one_by_one, in_buffers)


def _updates(sizes: list[int], hbm: float) -> float:
    return UPDATE_TRAFFIC * sum(sizes) / hbm


def _both_ways(sizes: list[int], link: Link) -> float:
    return sum(sizes) / link.h2d + sum(sizes) / link.d2h


def _unit_sizes(task: Task) -> dict[int, list[int]]:
    """Bytes of the units of each bucket."""
    with allocating(lambda num_bytes, pinned: torch.empty(num_bytes, dtype=torch.uint8, device="meta")):
        pipeline = make_pipeline(task, RecordingEngine(None), torch.device("meta"))
        return {bucket: [unit.num_bytes for unit in pipeline.units(bucket)] for bucket in task.order()}
