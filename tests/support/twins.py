"""`grass.AdamW`, `grass.GrassAdamW` in each offload mode, and torch's AdamW as the oracle, on equal parameters.

Every event is done to both, every step is compared. The method has all layers active and no probe, so that it is AdamW.
"""

from collections.abc import Callable, Iterable
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

import grass

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHAPES = ((4, 4), (4, 4), (33,))
HYPER = {"lr": 0.01, "weight_decay": 0.1}
KINDS = {"AdamW": None, "none": "none", "resident": "resident", "streamed": "streamed"}
"""`grass.AdamW`, and the method by its offload mode."""
METHODS = [kind for kind in KINDS if kind != "AdamW"]
MAXIMA = "max_exp_avg_sq"
KEYS = ("step", "exp_avg", "exp_avg_sq", MAXIMA)
REFUSALS = (ValueError, TypeError, RuntimeError, AssertionError)


def in_turn(names: Iterable[Any]) -> list[tuple[Any, str]]:
    """Each name beside one mode of the method."""
    return list(zip(names, cycle(METHODS), strict=False))


def spread(names: Iterable[Any]) -> list[tuple[Any, str]]:
    """Each name for `grass.AdamW`, and in one mode of the method."""
    names = list(names)
    return [*((name, "AdamW") for name in names), *in_turn(names)]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Model(nn.Module):
    """Two layers of one tensor each, and a head."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        values = [nn.Parameter(normal(*shape, seed=i).to(dtype)) for i, shape in enumerate(SHAPES)]
        self.blocks = nn.ModuleList(nn.Module() for _ in range(2))
        for block, value in zip(self.blocks, values[:2], strict=True):
            block.weight = value
        self.head = values[2]

    def ordered(self) -> list[nn.Parameter]:
        """In the order of `SHAPES`; torch's own order has the head first."""
        return [*(block.weight for block in self.blocks), self.head]


def method(model: Model, params: Any, offload: str = "none", **options: Any) -> grass.GrassAdamW:
    """GrassAdamW that trains every layer in every step."""
    config = grass.GrassConfig(
        active_layers=2, probe_steps=0, sample_interval=3, update_interval=6, offload=offload, buffer_mb=0.25
    )
    return grass.GrassAdamW(params, model=model, config=config, pattern="blocks.*", **options)


class Twins:
    """Our optimizer and torch's for-loop on equal parameters.

    Args:
        kind: of `KINDS`.
        dtype: of our parameters; torch's are float32 or wider.
        ours: options of ours alone.
        grouped: two groups with settings of their own, or one.
        options: of both.
    """

    def __init__(
        self,
        kind: str = "AdamW",
        dtype: torch.dtype = F32,
        ours: dict[str, Any] | None = None,
        grouped: bool = True,
        **options: Any,
    ) -> None:
        self.stored = kind in ("resident", "streamed")
        self.model = Model(dtype)
        self.params = self.model.ordered()
        wide = F32 if dtype in (BF16, F16) else dtype
        self.twins = [nn.Parameter(p.detach().to(wide).clone()) for p in self.params]
        options = {**HYPER, **options}
        own = {**options, **(ours or {})}
        given = self.groups(self.params) if grouped else self.params
        if KINDS[kind] is None:
            self.ours: torch.optim.AdamW = grass.AdamW(given, **own)
        else:
            self.ours = method(self.model, given, KINDS[kind], **own)
        given = self.groups(self.twins) if grouped else self.twins
        loop = {} if options.get("fused") or options.get("foreach") else {"foreach": False}
        self.torchs = torch.optim.AdamW(given, **options, **loop)
        self.count = 0

    @staticmethod
    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[:2], "lr": 0.02}, {"params": params[2:], "betas": (0.7, 0.9)}]

    def both(self, event: Callable[[torch.optim.Optimizer, list[nn.Parameter]], Any]) -> None:
        """An event, given an optimizer and its parameters."""
        event(self.ours, self.params)
        event(self.torchs, self.twins)

    def set_grads(self, scale: float = 1.0) -> None:
        self.count += 1
        for i, (p, q) in enumerate(zip(self.params, self.twins, strict=True)):
            value = normal(*p.shape, seed=1000 * self.count + i).to(p.dtype)
            p.grad, q.grad = value * scale, value.to(q.dtype) * scale

    def step(self) -> None:
        self.ours.step()
        self.torchs.step()
        self.compare()

    def go(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.set_grads()
            self.step()

    def settle(self) -> None:
        """Wait for what a store writes back: it may be newer than the tensors in the state."""
        if self.stored:
            self.ours.state_dict()

    def compare(self) -> None:
        """Parameters; and states, unless they live in a store, which may have newer ones on the device."""
        if not self.stored:
            self.compare_states()
        for i, (p, q) in enumerate(zip(self.params, self.twins, strict=True)):
            units = torch.finfo(p.dtype).eps
            close(p.detach().to(q.dtype), q.detach(), f"parameter {i}", rtol=20 * units, atol=2 * units)
            if p.dtype != q.dtype:  # rounded apart: go on from the same
                with torch.no_grad():
                    q.copy_(p)

    def compare_states(self) -> None:
        self.settle()
        for i, (p, q) in enumerate(zip(self.params, self.twins, strict=True)):
            state, expected = self.ours.state.get(p, {}), self.torchs.state.get(q, {})
            for key in KEYS:
                assert (key in state) == (key in expected), f"{key} of parameter {i}"
                if key in expected:
                    theirs = torch.as_tensor(expected[key])
                    found = torch.as_tensor(state[key]).to(theirs.dtype)
                    found = found.reshape(()) if key == "step" else found
                    close(found, theirs, f"{key} of parameter {i}", rtol=1e-5, atol=1e-6)

    def steps_or_refuses(self, *names: str) -> bool:
        """Step both and compare; or find ours refused by one of these names, with nothing changed.

        Returns:
            Whether the step was taken.
        """
        before = snapshot(self.ours)
        error = refusal(self.ours.step)
        if error is not None:
            assert any(name in str(error) for name in names), f"{error!r} names none of {names}"
            assert_unchanged(self.ours, before)
            return False
        self.torchs.step()
        self.compare()
        return True


def close(found: Tensor, expected: Tensor, name: str, **tolerance: float) -> None:
    torch.testing.assert_close(
        found, expected, equal_nan=True, msg=lambda text: f"{name}: {text}", **tolerance
    )


def refusal(call: Callable[[], Any]) -> Exception | None:
    """The error of a call that may be refused."""
    try:
        call()
    except REFUSALS as error:
        return error
    return None


def members(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def snapshot(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
    """Parameters and states with copies of them; a state that is all zeros is as good as none."""
    own = members(optimizer)
    states = [t for p in own for t in optimizer.state.get(p, {}).values() if isinstance(t, Tensor)]
    tensors = [p.detach() for p in own] + [t for t in states if t.device.type == "cpu" and readable(t)]
    return [(t, t.clone()) for t in tensors if t.any()]


def readable(t: Tensor) -> bool:
    return t.layout == torch.strided and t.untyped_storage().nbytes() > 0


def assert_unchanged(optimizer: torch.optim.Optimizer, before: list[tuple[Tensor, Tensor]]) -> None:
    for t, copy in before:
        torch.testing.assert_close(t, copy, rtol=0, atol=0, equal_nan=True)
    kept = {id(t) for t, _ in before}
    for p in members(optimizer):
        for key, t in optimizer.state.get(p, {}).items():
            if isinstance(t, Tensor) and t.device.type == "cpu" and readable(t) and id(t) not in kept:
                assert not t.any(), f"{key} was replaced or made"
