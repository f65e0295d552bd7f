"""GRASS: full-rank fine-tuning by gradient-based adaptive layer-wise importance sampling."""

import grass.integrations.transformers  # noqa: F401 - makes the submodule available as an attribute
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
