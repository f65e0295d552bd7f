"""The bound: the time that no order of copies through the ring could beat, given when gradients come.

The floor asks only that every queue does its own work. But the states of what backward completes last cannot come
earlier than the ring has room, and the next forward waits for their updates: that stands after backward, and no
schedule hides it. It is most where the lowest layers train.
"""

import torch

from bench.offload.recording import RecordingEngine
from bench.offload.steps import UPDATE_TRAFFIC, Task, make_pipeline, parts
from bench.offload.timeline import Link
from grass.offload.store import allocating


def bound_seconds(task: Task, link: Link, hbm: float) -> float:
    """The least time of a steady step, from the beginning of its forward to that of the next.

    It is the longest of the copies, of what the buffers are taken for, and of backward up to each bucket with what is
    still to be done then.

    Args:
        task: what is trained, with which ring.
        link: to the host.
        hbm: bytes a second of the device's memory, of which updates make full use.
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
    """From the moment when none of these units has been updated, in sorted order, to the last one's update.

    As many as there are buffers may have come before: the largest. Each of the others needs a buffer from which another
    has gone home. So an update and a write-back come before the first of those fetches, the last one comes after all
    of their write-backs, and after it an update.
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
