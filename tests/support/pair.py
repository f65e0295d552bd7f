"""Our optimizer and torch's on twins: every event is done to both, every step compared."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import grass

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = ((4, 4), (2, 3, 2, 2), (33,))
HYPER = {"lr": 0.01, "weight_decay": 0.1}
MOMENTS = ("exp_avg", "exp_avg_sq")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def misaligned(g: Tensor) -> Tensor:
    return torch.cat((torch.full((1,), torch.nan, dtype=g.dtype), g.flatten()))[1:].view(g.shape)


class Pair:
    """Our optimizer and torch's for-loop, on twins. Every event is done to both, every step compared.

    Args:
        dtype: of our parameters; torch's are float32.
        ours: options of ours alone.
        options: of both.
    """

    def __init__(self, dtype: torch.dtype = F32, ours: dict | None = None, **options) -> None:
        self.params = [nn.Parameter(normal(*s, seed=i).to(dtype)) for i, s in enumerate(SHAPES)]
        self.twins = [nn.Parameter(p.detach().float().clone()) for p in self.params]
        self.ours = grass.AdamW(self._groups(self.params), **{**HYPER, **options, **(ours or {})})
        self.torchs = torch.optim.AdamW(self._groups(self.twins), **{**HYPER, **options}, foreach=False)
        self.count = 0

    @staticmethod
    def _groups(params: list[nn.Parameter]) -> list[dict]:
        return [{"params": params[:2], "lr": 0.02}, {"params": params[2:], "betas": (0.7, 0.9)}]

    def both(self, event: Callable) -> None:
        """An event, given an optimizer and its parameters."""
        event(self.ours, self.params)
        event(self.torchs, self.twins)

    def set_grads(self, make: Callable[[Tensor], Tensor] = torch.clone) -> None:
        """New gradients; `make` lays out ours."""
        self.count += 1
        for i, (p, q) in enumerate(zip(self.params, self.twins, strict=True)):
            value = normal(*p.shape, seed=1000 * self.count + i).to(p.dtype)
            p.grad, q.grad = make(value), value.to(q.dtype)

    def step(self) -> None:
        self.ours.step()
        self.torchs.step()
        self.compare()

    def compare(self) -> None:
        for i, (p, q) in enumerate(zip(self.params, self.twins, strict=True)):
            units = torch.finfo(p.dtype).eps
            torch.testing.assert_close(
                p.detach().to(q.dtype),
                q.detach(),
                rtol=20 * units,
                atol=2 * units,
                msg=lambda m, n=i: f"{n}: {m}",
            )
            state, expected = self.ours.state.get(p, {}), self.torchs.state.get(q, {})
            assert state.keys() == expected.keys(), i
            for key, value in expected.items():
                found = state[key].to(value.dtype)
                torch.testing.assert_close(
                    found, value, rtol=1e-5, atol=1e-6, msg=lambda m, n=i, k=key: f"{n}, {k}: {m}"
                )
            if p.dtype != F32:  # rounded apart: go on from the same
                with torch.no_grad():
                    q.copy_(p)

    def go(self, steps: int = 1, make: Callable[[Tensor], Tensor] = torch.clone) -> None:
        for _ in range(steps):
            self.set_grads(make)
            self.step()
