"""Names of the choices of `grass.GrassConfig`. Nothing is imported, so that command lines can show them at once."""

from typing import Literal

# State dicts store a choice by its position: append new ones at the end.
ImportanceScale = Literal["mean", "log", "zscore", "none"]
SamplerName = Literal["adaptive", "static", "uniform", "weight_norm", "cyclic", "shuffled", "remeasured"]
Moments = Literal["keep", "reset"]
Offload = Literal["none", "resident", "streamed"]
"""Places of the optimizer states: no pipeline, or one of the two of `grass.offload.pipeline`."""
