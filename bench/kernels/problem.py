"""Tensors of a case, shared by all variants, and the float64 step that every variant is compared with."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.kernels.cases import Case

LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01
STEPS_BEFORE = 9
COMPARED = 1_000_000  # elements compared with float64, at most
_COMPARED_TENSORS = 16
_PIECE = 1 << 24  # elements at a time where float64 copies are made


class Problem:
    """Parameters, gradients and moments of a case on a device.

    With 2e9 parameters a GPU has no memory for separate moments of each variant, so variants share tensors where
    possible: timings do not depend on values other than 0, and each comparison starts from the same ones
    (:meth:`fill`).
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        self.device = device
        self.params = self._empty(case.mixture.param)
        active = case.active
        self.active_tensors = [i for i, layer in enumerate(case.layer_index) if active[layer]]
        self.max_grad_norm = 0.5 * math.sqrt(case.active_numel)  # gradients are N(0, 1): half of their norm
        self._grads: dict[torch.dtype, list[Tensor]] = {}
        self._moments: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}

    def _empty(self, dtype: torch.dtype) -> list[Tensor]:
        # Allocated one by one, as a model's are: views of one buffer need not be aligned.
        return [torch.empty(size, dtype=dtype, device=self.device) for size in self.case.tensor_sizes]

    def grads(self, dtype: torch.dtype) -> list[Tensor]:
        """Return the gradients in a dtype, one per parameter."""
        if dtype not in self._grads:
            self._grads[dtype] = self._empty(dtype)
        return self._grads[dtype]

    def moments(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Return the first and second moments in a dtype, one each per parameter."""
        if dtype not in self._moments:
            self._moments[dtype] = (self._empty(dtype), self._empty(dtype))
        return self._moments[dtype]

    def fill(self) -> None:
        """Reset every tensor to its initial values: random, or 0 for gradients and moments of a case of zeros."""
        for seed, tensors in enumerate([self.params, *self._grads.values()]):
            generator = torch.Generator(self.device).manual_seed(min(seed, 1))
            for tensor in tensors:
                if self.case.zeros and tensors is not self.params:
                    tensor.zero_()
                else:
                    tensor.normal_(0.0, 0.02 if tensors is self.params else 1.0, generator=generator)
        for exp_avgs, exp_avg_sqs in self._moments.values():
            generator = torch.Generator(self.device).manual_seed(2)
            for exp_avg, exp_avg_sq in zip(exp_avgs, exp_avg_sqs, strict=True):
                if self.case.zeros:
                    exp_avg.zero_()
                    exp_avg_sq.zero_()
                else:
                    exp_avg.normal_(0.0, 0.1, generator=generator)
                    exp_avg_sq.uniform_(0.5, 1.5, generator=generator)  # no underflow, in fp16 neither


class Comparison:
    """Comparison of a variant's step with one in float64, on slices of a problem.

    Args:
        problem: problem, which is filled with its initial values.
        grad_dtype: dtype of the gradients that the variant reads.
        state_dtype: dtype of the shared moments that the variant updates; None if it has its own, which start
            from zero.
    """

    def __init__(self, problem: Problem, grad_dtype: torch.dtype, state_dtype: torch.dtype | None) -> None:
        self._problem = problem
        self._grads = problem.grads(grad_dtype)
        self._moments = None if state_dtype is None else problem.moments(state_dtype)
        problem.fill()
        self._clip_coef = self._clip() if problem.case.clip else 1.0
        self._before = [[t.double() for t in slices] for slices in self._slices()]
        self._grad_slices = [self._grads[i][where].double() for i, where in self._places()]

    def _places(self) -> Iterator[tuple[int, slice]]:
        """Yield (tensor index, range): head and tail of up to sixteen tensors, including the first and the last."""
        active = self._problem.active_tensors
        chosen = active
        if len(active) > _COMPARED_TENSORS:
            last = len(active) - 1
            chosen = [active[k * last // (_COMPARED_TENSORS - 1)] for k in range(_COMPARED_TENSORS)]
        room = COMPARED // len(chosen)
        for i in chosen:
            size = self._problem.params[i].numel()
            if size <= room:
                yield i, slice(0, size)
            else:
                yield i, slice(0, room // 2)
                yield i, slice(size - room // 2, size)

    def _slices(self) -> Iterator[list[Tensor]]:
        for i, where in self._places():
            columns = [self._problem.params, *(self._moments or ())]
            yield [column[i][where] for column in columns]

    def _clip(self) -> float:
        total = 0.0
        for i in self._problem.active_tensors:
            for piece in self._grads[i].split(_PIECE):
                total += float(piece.double().square().sum())
        return min(1.0, self._problem.max_grad_norm / (math.sqrt(total) + 1e-6))

    def worst_ulps(self) -> float:
        """Return the largest error of the stored parameters, and of moments if they are shared.

        The unit is one in the last place of the stored dtype, at the larger of old and new value. Correct rounding
        has an error of at most 0.5, stochastic rounding of at most 1; NaN if a result is not finite.
        """
        worst = 0.0
        for stored, before, grad in zip(self._slices(), self._before, self._grad_slices, strict=True):
            for result, start, exact in zip(
                stored, before, adamw(before, grad * self._clip_coef), strict=True
            ):
                error = ulps(result, exact, start)
                if not math.isfinite(error):
                    return math.nan
                worst = max(worst, error)
        return worst


def adamw(before: list[Tensor], grad: Tensor) -> list[Tensor]:
    """AdamW in float64, as in its paper: new values of param, exp_avg, exp_avg_sq, or of param alone.

    Args:
        before: param, exp_avg and exp_avg_sq after `STEPS_BEFORE` steps; or param alone before any.
        grad: the gradient, clipped.
    """
    beta1, beta2 = BETAS
    p = before[0] - LR * WEIGHT_DECAY * before[0]
    steps = STEPS_BEFORE + 1 if len(before) > 1 else 1
    m, v = before[1:] if len(before) > 1 else (torch.zeros_like(p), torch.zeros_like(p))
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad * grad
    root = (v / (1 - beta2**steps)).sqrt()
    p = p - LR * (m / (1 - beta1**steps)) / (root + EPS)
    return [p, m, v][: len(before)]


def ulps(result: Tensor, exact: Tensor, before: Tensor) -> float:
    """The largest distance of `result` from `exact` in units in the last place of its dtype."""
    if result.numel() == 0:
        return 0.0
    info = torch.finfo(result.dtype)
    scale = torch.maximum(exact.abs(), before.abs()).clamp_min(info.tiny)
    ulp = torch.exp2(torch.floor(torch.log2(scale))) * info.eps
    return float(((result.double() - exact).abs() / ulp).max())
