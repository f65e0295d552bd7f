"""A few steps of every mixture, for compute-sanitizer.

``compute-sanitizer --tool memcheck python -m bench.gpu.sanitized``.

Sizes with tails, aligned and misaligned, at the ends of their allocations: run it with
``PYTORCH_NO_CUDA_MEMORY_CACHING=1``, so that each tensor is an allocation of its own, and what lies behind is not
ours. Random numbers are drawn on the CPU: only our kernels are to be watched.
"""

import sys

import torch

import grass_kernels
from bench.kernels.cases import F32, MIXTURES, Mixture

SIZES = (1, 7, 2047, 2049, 16_384 + 77)
HYPERPARAMETERS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def make(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device, shift: int) -> list[torch.Tensor]:
    """Tensors that end where their allocation does, `shift` elements after its beginning."""
    return [torch.rand(shift + size).to(device, dtype)[shift:] for size in sizes]


def step(mixture: Mixture, device: torch.device, *, shift: int, amsgrad: bool) -> None:
    """One masked update with norms and clipping."""
    sizes = SIZES
    params = make(sizes, mixture.param, device, shift)
    grads = make(sizes, mixture.grad, device, shift)
    moments = [make(sizes, mixture.state, device, shift) for _ in range(3 if amsgrad else 2)]
    steps = [torch.zeros((), device=device) for _ in sizes]
    layers = [i % 3 for i in range(len(sizes))]
    norms = grass_kernels.layer_sq_norms(grads, layers, 3)
    extra: dict[str, object] = {}
    if mixture.rounding == "master":
        zeros = [torch.zeros(shift + size, dtype=torch.int16).to(device)[shift:] for size in sizes]
        extra["remainders"] = zeros
    elif mixture.rounding == "stochastic":
        extra["rounding_seeds"] = list(range(len(sizes)))
    if amsgrad:
        extra["max_exp_avg_sqs"] = moments[2]
    grass_kernels.masked_adamw_(
        params,
        grads,
        moments[0],
        moments[1],
        steps,
        layer_index=layers,
        active=torch.tensor([True, False, True]).to(device),
        sq_norms=torch.empty_like(norms),
        clip_coef=torch.tensor(0.5).to(device),
        found_inf=torch.tensor(0.0).to(device),
        **HYPERPARAMETERS,  # type: ignore[arg-type]
        **extra,  # type: ignore[arg-type]
    )
    if not all(bool(p.cpu().isfinite().all()) for p in params):
        raise SystemExit(f"{mixture}: a parameter is not finite")


def main() -> int:
    """Run all mixtures on the best device there is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    for mixture in MIXTURES:
        for shift in (0, 1):
            step(mixture, device, shift=shift, amsgrad=mixture.state == F32 and shift == 1)
        print(mixture, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
