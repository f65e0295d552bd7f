"""A few steps of every mixture, and of every offload mode, for compute-sanitizer.

``compute-sanitizer --tool memcheck python -m bench.gpu.sanitized``.

Sizes with tails, aligned and misaligned, at the ends of their allocations: run it with
``PYTORCH_NO_CUDA_MEMORY_CACHING=1``, so that each tensor, and each buffer of the ring, is an allocation of its own,
and accesses past its end are detected. Random numbers are drawn on the CPU: only our kernels are checked, and torch's
kernels of a small model.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

import grass
import grass_kernels
from bench.kernels.cases import F32, MIXTURES, Mixture

SIZES = (1, 7, 2047, 2049, 16_384 + 77)
LAYERS, STEPS = 3, 6
OFFLOADS: tuple[dict[str, Any], ...] = (
    {"offload": "streamed"},
    {"offload": "resident"},
    {"offload": "streamed", "fused_backward": True},
)
HYPERPARAMETERS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def make(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device, shift: int) -> list[Tensor]:
    """Return tensors that begin `shift` elements after the beginning of their allocation, and end with it."""
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


class Block(nn.Module):
    """Parameters whose sizes have tails; elementwise, to launch few kernels that are not ours."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        made = make(SIZES, torch.bfloat16, device, shift=1)
        self.weights = nn.ParameterList([nn.Parameter(p) for p in made])

    def forward(self, loss: Tensor) -> Tensor:
        """Add to a loss."""
        return loss + torch.stack([p.float().square().sum() for p in self.weights]).sum()


class Model(nn.Module):
    """Layers and a head."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(device) for _ in range(LAYERS)])
        self.head = Block(device)
        self.register_buffer("start", torch.zeros((), device=device))

    def forward(self) -> Tensor:
        """A loss."""
        loss = self.get_buffer("start")
        for block in (*self.layers, self.head):
            loss = block(loss)
        return loss


def trained(device: torch.device, **settings: Any) -> list[Tensor]:
    """Weights on the CPU after steps with sets that change, and with states of every kind there is."""
    torch.manual_seed(0)
    model = Model(device)
    # the ring's smallest buffers, so that every layer is cut into units
    config = grass.GrassConfig(
        probe_steps=1, active_layers=1, sample_interval=2, update_interval=2, buffer_mb=0.2, **settings
    )
    optimizer = grass.GrassAdamW(model, lr=1e-2, config=config, pattern="layers.*", master_weights=True)
    for _ in range(STEPS):
        model().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = [p.detach().cpu() for p in model.parameters()]
    optimizer.release()
    return weights


def offload(device: torch.device) -> None:
    """Steps with states in host memory, bitwise equal to steps without offload."""
    expected = trained(device, offload="none")
    for settings in OFFLOADS:
        what = ", ".join(key if value is True else f"{key} {value}" for key, value in settings.items())
        for found, weight in zip(trained(device, **settings), expected, strict=True):
            if not torch.equal(found, weight):
                raise SystemExit(f"{what}: trains otherwise than without")
        print(what, flush=True)


def main() -> int:
    """Run all of them on the best device there is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    for mixture in MIXTURES:
        for shift in (0, 1):
            step(mixture, device, shift=shift, amsgrad=mixture.state == F32 and shift == 1)
        print(mixture, flush=True)
    offload(device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
