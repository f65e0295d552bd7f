"""What `grass bench offload` was asked, as a task and the rates to simulate."""

import argparse

from bench.offload.rows import DEFAULT_LINK
from bench.offload.shapes import Compute, Shape, shape_of
from bench.offload.steps import MOMENTS, Task, spread
from grass.errors import ConfigError
from grass.offload.timeline import Link
from grass.offload.units import elements_in


def _active(shape: Shape, arguments: argparse.Namespace) -> tuple[int, ...]:
    has = f"{shape.name} has {shape.layers} layers"
    if arguments.layers is not None:
        if arguments.layers[-1] >= shape.layers:
            raise ConfigError(f"{has}: pass --layers from 0 to {shape.layers - 1}")
        return tuple(arguments.layers)
    num_active = 2 if arguments.active_layers is None else arguments.active_layers
    if num_active > shape.layers:
        raise ConfigError(f"{has}: pass --active-layers of at most as many")
    return spread(shape.layers, num_active)


def read(arguments: argparse.Namespace) -> tuple[Task, Link | None, float | None]:
    """The task, the link and the bytes a second of the device's memory; None is what the machine has.

    Raises:
        ConfigError: an unknown model, layers that it has not, a buffer too small for a chunk.
    """
    shape = shape_of(arguments.model)
    task = Task(
        shape,
        Compute(arguments.tokens, arguments.tflops * 1e12),
        _active(shape, arguments),
        int(arguments.buffer_mb * 2**20),
        arguments.buffer_count,
    )
    elements_in(task.buffer_bytes, MOMENTS)
    link = None
    if arguments.pcie_gbs is not None or arguments.duplex_factor is not None:
        rate = DEFAULT_LINK.h2d if arguments.pcie_gbs is None else arguments.pcie_gbs * 1e9
        link = Link(rate, rate, arguments.duplex_factor or DEFAULT_LINK.duplex_factor)
    return task, link, None if arguments.hbm_gbs is None else arguments.hbm_gbs * 1e9
