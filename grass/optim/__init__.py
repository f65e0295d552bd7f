"""Optimizers: `AdamW`, a drop-in replacement of torch's, and `GrassAdamW`, which trains few layers at a time."""

from grass.optim.adamw import AdamW
from grass.optim.grass_adamw import GrassAdamW

__all__ = ["AdamW", "GrassAdamW"]
