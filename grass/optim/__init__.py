"""Optimizers: `AdamW`, torch's with fused kernels, and `GrassAdamW`, which decides what trains."""

from grass.optim.adamw import AdamW
from grass.optim.grass_adamw import GrassAdamW

__all__ = ["AdamW", "GrassAdamW"]
