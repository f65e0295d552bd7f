"""GRASS: full-rank fine-tuning by gradient-based adaptive layer-wise importance sampling."""

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    import grass.integrations.transformers  # noqa: F401 - makes the submodule available as an attribute
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

# What needs torch is imported when it is first used: torch takes seconds, and `grass --help` does without.
_LAZY = {"AdamW": "grass.optim", "GrassAdamW": "grass.optim", "LayerMap": "grass.layers"}

if not TYPE_CHECKING:  # a type checker would take every name for defined

    def __getattr__(name: str) -> Any:
        """Import the module of a name, and return the object."""
        if name in _LAZY:
            return getattr(importlib.import_module(_LAZY[name]), name)
        if name in ("integrations", "layers", "optim"):
            importlib.import_module("grass.integrations.transformers")  # which imports the other two
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """Return also the names that have not been imported yet."""
        return sorted({*globals(), *_LAZY})
