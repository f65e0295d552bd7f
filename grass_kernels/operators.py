"""The kernels as torch operators, for compilers and planners; eager calls do not use them.

Dispatching a thousand tensors costs more than launching their update, so `masked_adamw_` and `layer_sq_norms` use the
operators only in a compiler, which must know the tensors that are written, and with fake tensors, whose allocations
are counted.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from grass_kernels.arguments import is_fake
from grass_kernels.inputs import WORDS
from grass_kernels.table import CHUNK, COEFFICIENTS, COLUMNS

_LIBRARY = torch.library.Library("grass_kernels", "DEF")

_LIBRARY.define(
    "layer_sq_norms(Tensor[] grads, SymInt[] layer_index, int num_layers, *, Tensor? grad_scale=None) -> Tensor"
)
# Only parameters that have a remainder are in `remainders`; `remainder_places` has their indices.
_LIBRARY.define(
    "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, *, SymInt[]? layer_index, bool[]? active, Tensor? active_mask, Tensor(e!)? sq_norms, "
    "float lr, Tensor? lr_tensor, float beta1, float beta2, float eps, float weight_decay, bool maximize, "
    "Tensor(f!)[] max_exp_avg_sqs, Tensor(g!)[] remainders, int[] remainder_places, int[]? rounding_seeds, "
    "Tensor? grad_scale, Tensor? found_inf, Tensor? clip_coef) -> ()"
)


def is_needed(tensors: Sequence[Tensor]) -> bool:
    """Return if a call must go through the dispatcher."""
    return torch.compiler.is_compiling() or any(map(is_fake, tensors[:1]))


def implement(layer_sq_norms: Callable[..., Tensor], masked_adamw_: Callable[..., None]) -> None:
    """Register the eager functions as implementations of the operators."""

    def masked_adamw(params, grads, exp_avgs, exp_avg_sqs, steps, **options):  # type: ignore[no-untyped-def]
        masked_adamw_(params, grads, exp_avgs, exp_avg_sqs, steps, **unpack(len(params), options))

    _LIBRARY.impl("layer_sq_norms", layer_sq_norms, "CompositeExplicitAutograd")
    _LIBRARY.impl("masked_adamw_", masked_adamw, "CompositeExplicitAutograd")


def pack(options: dict) -> dict:
    """Convert keyword arguments of `masked_adamw_` to types that operators support."""
    lr, active, (beta1, beta2) = options.pop("lr"), options.pop("active"), options.pop("betas")
    remainders = options.pop("remainders") or []
    layers = options.pop("layer_index")
    return {
        **options,
        "layer_index": layers.tolist() if isinstance(layers, Tensor) else layers,
        "lr": 0.0 if isinstance(lr, Tensor) else lr,
        "lr_tensor": lr if isinstance(lr, Tensor) else None,
        "active": None if isinstance(active, Tensor) else active,
        "active_mask": active if isinstance(active, Tensor) else None,
        "beta1": beta1,
        "beta2": beta2,
        "max_exp_avg_sqs": options["max_exp_avg_sqs"] or [],
        "remainders": [r for r in remainders if r is not None],
        "remainder_places": [place for place, r in enumerate(remainders) if r is not None],
    }


def unpack(count: int, options: dict) -> dict:
    """Invert `pack`."""
    lr, lr_tensor = options.pop("lr"), options.pop("lr_tensor")
    active, active_mask = options.pop("active"), options.pop("active_mask")
    given = dict(zip(options.pop("remainder_places"), options.pop("remainders"), strict=True))
    betas = options.pop("beta1"), options.pop("beta2")
    maxima = options.pop("max_exp_avg_sqs") or None
    return {
        **options,
        "lr": lr if lr_tensor is None else lr_tensor,
        "active": active if active_mask is None else active_mask,
        "betas": betas,
        "max_exp_avg_sqs": maxima,
        "remainders": [given.get(place) for place in range(count)] if given else None,
    }


def workspace(tensors: Sequence[Tensor], num_layers: int, num_groups: int) -> list[Tensor]:
    """Allocate the tensors that a launch needs on the device besides its result."""
    count, chunks = len(tensors), sum(-(-t.numel() // CHUNK) for t in tensors)
    like = tensors[0] if tensors else torch.empty(0)
    words = [count * len(COLUMNS) + num_layers + 1 + chunks, count + len(WORDS) * num_groups]
    coefficients = COEFFICIENTS.value * count if num_groups else 0
    return [
        *(like.new_empty(n, dtype=torch.int64) for n in words),
        *(like.new_empty(n, dtype=torch.float32) for n in (coefficients, chunks)),
    ]


@torch.library.register_fake("grass_kernels::layer_sq_norms", lib=_LIBRARY)
def _fake_layer_sq_norms(grads, layer_index, num_layers, *, grad_scale=None):  # type: ignore[no-untyped-def]
    workspace(grads, num_layers, 0)
    like = grads[0] if grads else torch.empty(0)
    return like.new_empty(num_layers, dtype=torch.float32)


@torch.library.register_fake("grass_kernels::masked_adamw_", lib=_LIBRARY)
def _fake_masked_adamw(params, grads, exp_avgs, exp_avg_sqs, steps, *, sq_norms, **options):  # type: ignore[no-untyped-def]
    workspace(params, 1 if sq_norms is None else sq_norms.numel(), 1)
