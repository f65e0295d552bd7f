"""Triton kernels for optimizers that update some layers and measure all: lists of tensors in, a few launches.

The kernels know no model and no schedule. `reference` holds the same functions in plain torch: what a
kernel must equal. Without a GPU the functions run on torch; with ``TRITON_INTERPRET=1`` the kernels
themselves run on CPU tensors.
"""

from . import reference
from .adamw import masked_adamw_, masked_adamw_bytes
from .arguments import is_supported
from .errors import KernelArgumentError
from .sq_norm import layer_sq_norms, layer_sq_norms_bytes

__all__ = [
    "KernelArgumentError",
    "is_supported",
    "layer_sq_norms",
    "layer_sq_norms_bytes",
    "masked_adamw_",
    "masked_adamw_bytes",
    "reference",
]
