"""Triton kernels for optimizers: masked AdamW and gradient norms by layer, over lists of tensors in a few launches.

The kernels do not depend on a model or a schedule. `reference` has the same functions in plain torch: the
specification of the kernels. Without a GPU the functions run on torch; with ``TRITON_INTERPRET=1`` the kernels run on
CPU tensors in Triton's interpreter.
"""

from grass_kernels import operators, reference
from grass_kernels._triton import runs_triton
from grass_kernels.adamw import make_plan, masked_adamw_, masked_adamw_bytes
from grass_kernels.arguments import is_supported
from grass_kernels.errors import KernelArgumentError
from grass_kernels.inputs import Hyperparameters
from grass_kernels.plan import AdamWPlan, TensorLists, Unit
from grass_kernels.sq_norm import NormPlan, layer_sq_norms, layer_sq_norms_bytes
from grass_kernels.table import Part
from grass_kernels.torch_plan import TorchPlan

operators.implement(layer_sq_norms, masked_adamw_)

__all__ = [
    "AdamWPlan",
    "Hyperparameters",
    "KernelArgumentError",
    "NormPlan",
    "Part",
    "TensorLists",
    "TorchPlan",
    "Unit",
    "is_supported",
    "layer_sq_norms",
    "layer_sq_norms_bytes",
    "make_plan",
    "masked_adamw_",
    "masked_adamw_bytes",
    "reference",
    "runs_triton",
]
