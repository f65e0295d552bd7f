"""GRASS: full-rank fine-tuning that trains a few layers at a time, chosen by their gradients."""

import grass.integrations.transformers  # noqa: F401 - reachable as an attribute, as the contract spells it
from grass.config import GrassConfig
from grass.errors import (
    ConfigError,
    DataError,
    GrassError,
    LayerDiscoveryError,
    ParameterError,
    RunFolderError,
    StateMismatchError,
)
from grass.layers import LayerMap
from grass.optim import AdamW, GrassAdamW

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "ConfigError",
    "DataError",
    "GrassAdamW",
    "GrassConfig",
    "GrassError",
    "LayerDiscoveryError",
    "LayerMap",
    "ParameterError",
    "RunFolderError",
    "StateMismatchError",
    "__version__",
]
