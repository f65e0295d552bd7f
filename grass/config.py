"""GrassConfig: every setting of the method, checked once, immutable after."""

import math
from dataclasses import dataclass, fields
from typing import Any

from grass.errors import ConfigError

IMPORTANCE_SCALES = ("mean", "log", "zscore", "none")
SAMPLERS = ("adaptive", "static", "uniform", "weight_norm", "cyclic", "shuffled")
MOMENTS = ("keep", "reset")
