"""TorchPlan, the torch backend: torch's fused AdamW on the CPU; the reference on other devices and for AMSGrad.

torch's fused AdamW supports one dtype and unscaled gradients. Otherwise (moments of another dtype, clipping, a loss
scale, a remainder, stochastic rounding) it updates fp32 copies, in pieces that fit a cache.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from grass_kernels import layout, operators, reference, rounding
from grass_kernels.inputs import Hyperparameters
from grass_kernels.plan import STATE_KINDS, TensorLists, Unit
from grass_kernels.reference import Tensors
from grass_kernels.sq_norm import torch_sq_norms
from grass_kernels.table import CHUNK


class TorchPlan:
    """Masked AdamW on the same tensors in every step, by torch.

    Args:
        lists: Dense tensors; those of a parameter have equal strides. None are kept.
        num_layers: Number of layers, for norms.
        device: Device of the tensors.
        groups: Parameter group of each parameter; None is all 0.
        units: Units that the parameters are divided into; None is one unit, updated in place.

    The methods are those of :class:`AdamWPlan`.
    """

    def __init__(
        self,
        lists: TensorLists,
        num_layers: int,
        device: torch.device,
        groups: Sequence[int] | None = None,
        units: Sequence[Unit] | None = None,
    ) -> None:
        count = len(lists.params)
        self.device, self._num_layers = device, num_layers
        self._groups = list(groups) if groups is not None else [0] * count
        self._layers = lists.layers
        self._parts = [unit.parts for unit in units or [Unit.whole(lists.params)]]
        self._plain = [  # torch's fused AdamW is the same function
            device.type == "cpu" and maximum is None and remainder is None and len({p.dtype, g.dtype, m.dtype}) == 1
            and (seed is None or p.dtype != torch.bfloat16)
            for p, g, m, maximum, remainder, seed in zip(
                lists.params, lists.grads, lists.exp_avgs, lists.max_exp_avg_sqs, lists.remainders, lists.seeds,
                strict=True,
            )
        ]  # fmt: skip
        # With fake tensors nothing is computed: a planner counts the allocations of a device.
        self._workspace = (
            operators.workspace(lists.params, num_layers, 1) if operators.is_needed(lists.params) else None
        )
        self._lists: TensorLists | None = None
        self._factors: dict[tuple[bool, float], Tensor | None] = {}

    def upload(
        self,
        lists: TensorLists,
        hyperparameters: Sequence[Hyperparameters],
        addresses: Sequence[int] | None = None,
    ) -> None:
        """See :meth:`AdamWPlan.upload`; the tensors are kept until `finish`."""
        self._lists, self._hyperparameters = lists, hyperparameters

    @torch.no_grad()
    def measure(self, sq_norms: Tensor, grad_scale: Tensor | None = None) -> None:
        """See :meth:`AdamWPlan.measure`."""
        assert self._lists is not None, "upload comes first"
        if self._workspace is None:
            sq_norms.copy_(torch_sq_norms(self._lists.grads, self._layers, self._num_layers, grad_scale))

    @torch.no_grad()
    def begin(
        self,
        *,
        norms: bool = False,
        clip_by: Tensor | None = None,
        active: Tensor | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        clip_coef: Tensor | None = None,
    ) -> None:
        """See :meth:`AdamWPlan.begin`. A mask on the device is not supported."""
        assert self._lists is not None, "upload comes first"
        assert active is None
        lists = self._lists
        self._skips = self._workspace is not None or not lists.params
        if self._skips:
            return
        skip = [] if found_inf is None else [found_inf != 0]
        self._factors = {}
        for hyper in self._hyperparameters:
            kind = hyper.maximize, hyper.max_grad_norm
            if kind not in self._factors:
                coef = clip_coef
                if clip_by is not None:
                    coef, not_finite = reference.clip_coefficient(clip_by, hyper.max_grad_norm)
                    skip.append(not_finite)
                self._factors[kind] = (
                    None
                    if grad_scale is None and coef is None
                    else reference.grad_factor(hyper.maximize, grad_scale, coef)
                )
        self._skips = any(bool(flag) for flag in skip)  # a device sync: the host decides whether to launch
        if not self._skips:
            torch._foreach_add_(list(lists.steps), 1)

    @torch.no_grad()
    def run(self, unit: int = 0, views: Mapping[str, Tensor] | None = None) -> None:
        """See :meth:`AdamWPlan.run`."""
        if self._skips:
            return
        by_hyper: dict[Hyperparameters, list[_Range]] = {}
        for row, group in self._rows(unit, views or {}):
            by_hyper.setdefault(self._hyperparameters[group], []).append(row)
        scratch = torch.empty(4, reference.PIECE, dtype=torch.float32, device="cpu").unbind()
        for hyper, rows in by_hyper.items():
            _update_rows(rows, hyper, self._factors[hyper.maximize, hyper.max_grad_norm], scratch)

    def _rows(self, unit: int, views: Mapping[str, Tensor]) -> Iterator[tuple["_Range", int]]:
        lists = self._lists
        assert lists is not None
        columns: tuple = lists.tensors()
        for part in self._parts[unit]:
            i = part.tensor
            start, stop = part.first_chunk * CHUNK, (part.first_chunk + part.num_chunks) * CHUNK
            is_whole = start == 0 and stop >= lists.params[i].numel()
            if is_whole and not views and self._takes_whole(i):  # views would take as long as the norms
                tensors: list = [column[i] for column in columns]
            else:
                tensors = [None if column[i] is None else layout.flat(column[i]) for column in columns]
            if not is_whole:
                tensors = [None if t is None else t[start:stop] for t in tensors]
            if views:
                held = slice(part.start, part.start + len(tensors[0]))
                named = zip(STATE_KINDS, tensors[2:], strict=True)
                tensors[2:] = [None if t is None else views[kind][held] for kind, t in named]
            yield (
                _Range(Tensors(*tensors), lists.steps[i], lists.seeds[i], start, self._plain[i]),
                self._groups[i],
            )

    def _takes_whole(self, i: int) -> bool:
        """Return if torch's fused AdamW takes the tensors of a parameter as they are."""
        assert self._lists is not None
        hyper = self._hyperparameters[self._groups[i]]
        factor = self._factors[hyper.maximize, hyper.max_grad_norm]
        return self._plain[i] and factor is None and self._lists.params[i].is_contiguous()

    def finish(self, sq_norms: Tensor | None = None, grad_scale: Tensor | None = None) -> None:
        """See :meth:`AdamWPlan.finish`."""
        if sq_norms is not None:
            self.measure(sq_norms, grad_scale)
        self._lists = None
        self._factors = {}


class _Range(NamedTuple):
    """A parameter, or a range of its elements."""

    tensors: Tensors
    step: Tensor
    seed: int | None  # of stochastic rounding
    start: int = 0  # first element in the parameter
    plain: bool = False  # supported by torch's fused AdamW without copies

    def pieces(self) -> Iterator["_Range"]:
        start = self.start
        for piece in self.tensors.pieces():
            yield self._replace(tensors=piece, start=start)
            start += piece.param.numel()

    def random(self) -> Tensor | None:
        """Return 16 random bits per element, int64, for stochastic rounding; None without it."""
        param = self.tensors.param
        if self.seed is None or param.dtype != torch.bfloat16:
            return None
        return rounding.random_16_bits(self.seed, int(self.step), self.start, len(param), param.device)


def _update_rows(
    rows: Sequence[_Range], hyper: Hyperparameters, factor: Tensor | None, scratch: Sequence[Tensor]
) -> None:
    """Update parameters, or ranges of them, whose step counters have been incremented.

    Args:
        rows: Parameters of one group, or ranges of them.
        hyper: Hyperparameters of the group.
        factor: Factor of the gradients, fp32 scalar, including the sign; None is 1, or -1 to maximize.
        scratch: Four tensors, fp32 ``[PIECE]``, on the CPU.
    """
    whole: dict[torch.dtype, list[_Range]] = {}
    scaled: list[_Range] = []
    in_fp32: list[_Range] = []
    for row in rows:
        t = row.tensors
        if t.param.device.type != "cpu" or t.max_exp_avg_sq is not None:
            # torch's fused kernel drops a NaN in the running maximum.
            _update_by_reference(row, factor, hyper)
        elif factor is None and row.plain:
            whole.setdefault(t.param.dtype, []).append(row)
        elif row.plain and t.param.dtype != torch.float32:
            scaled.append(row)
        else:
            in_fp32.append(row)
    for members in whole.values():
        params, grads, exp_avgs, exp_avg_sqs = map(
            list, zip(*(row.tensors[:4] for row in members), strict=True)
        )
        steps = [row.step for row in members]
        _fused_adamw(params, grads, exp_avgs, exp_avg_sqs, steps, hyper, hyper.maximize)
    for piece in chain.from_iterable(row.pieces() for row in scaled):
        _update_scaled(piece, factor, hyper, scratch[0])
    batch: list[_Range] = []
    held = 0
    for piece in chain.from_iterable(row.pieces() for row in in_fp32):
        numel = piece.tensors.param.numel()
        if held + numel > reference.PIECE and batch:
            _update_in_fp32(batch, factor, hyper, scratch)
            batch, held = [], 0
        batch.append(piece)
        held += numel
    if batch:
        _update_in_fp32(batch, factor, hyper, scratch)


def _fused_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    hyper: Hyperparameters,
    maximize: bool,
    grad_scale: Tensor | None = None,
) -> None:
    """Call torch's fused AdamW for tensors of one dtype. With `grad_scale`, it divides `grads` in place."""
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=hyper.lr,
        beta1=hyper.betas[0],
        beta2=hyper.betas[1],
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        amsgrad=False,
        maximize=maximize,
        grad_scale=grad_scale,
    )


def _update_scaled(piece: _Range, factor: Tensor | None, hyper: Hyperparameters, scratch: Tensor) -> None:
    """Update low-precision tensors by torch's fused AdamW, which scales a copy of the gradient in fp32."""
    assert factor is not None
    param, grad, exp_avg, exp_avg_sq, *_ = piece.tensors
    copy = scratch.view(grad.dtype)[: len(grad)].copy_(grad)
    inverse = factor.abs().reciprocal()
    _fused_adamw([param], [copy], [exp_avg], [exp_avg_sq], [piece.step], hyper, hyper.maximize, inverse)


def _update_in_fp32(
    batch: Sequence[_Range], factor: Tensor | None, hyper: Hyperparameters, scratch: Sequence[Tensor]
) -> None:
    """Update fp32 copies, which fit a cache, and store the results."""
    params, grads, exp_avgs, exp_avg_sqs, _, remainders = map(
        list, zip(*(row.tensors for row in batch), strict=True)
    )
    wide_params = _widen(params, scratch[0])
    for param, remainder, wide in zip(params, remainders, wide_params, strict=True):
        if remainder is not None:
            wide.copy_(rounding.join_fp32(param, remainder))
    wide_grads = _widen(grads, scratch[1], factor)
    wide_exp_avgs, wide_exp_avg_sqs = _widen(exp_avgs, scratch[2]), _widen(exp_avg_sqs, scratch[3])
    steps = [row.step for row in batch]
    maximize = hyper.maximize and factor is None
    _fused_adamw(wide_params, wide_grads, wide_exp_avgs, wide_exp_avg_sqs, steps, hyper, maximize)
    stored, updated = [], []
    for row, param, wide in zip(batch, params, wide_params, strict=True):
        if row.tensors.remainder is not None or row.seed is not None:
            reference.store_param(row.tensors, wide, row.random())
        elif param is not wide:
            stored.append(param)
            updated.append(wide)
    for column, wides in ((exp_avgs, wide_exp_avgs), (exp_avg_sqs, wide_exp_avg_sqs)):
        for old, new in zip(column, wides, strict=True):
            if old is not new:
                stored.append(old)
                updated.append(new)
    layout.copy_all(stored, updated)


def _widen(tensors: list[Tensor], scratch: Tensor, factor: Tensor | None = None) -> list[Tensor]:
    """Return the tensors in fp32: themselves, or copies in `scratch`, one after another, multiplied by `factor`."""
    if factor is None and all(t.dtype == torch.float32 for t in tensors):
        return tensors
    wide, start = list(tensors), 0
    targets, sources = [], []
    for i, t in enumerate(tensors):
        if factor is None and t.dtype == torch.float32:
            continue
        wide[i] = scratch[start : start + t.numel()]
        start += t.numel()
        if factor is not None and t.dtype == torch.float32:
            torch.mul(t, factor, out=wide[i])
        else:
            targets.append(wide[i])
            sources.append(t)
    layout.copy_all(targets, sources)
    if factor is not None:
        for target in targets:
            target.mul_(factor)
    return wide


def _update_by_reference(row: _Range, factor: Tensor | None, hyper: Hyperparameters) -> None:
    if factor is None:
        factor = reference.grad_factor(hyper.maximize, None, None)
    c = reference.coefficients(
        row.step.item(), lr=hyper.lr, betas=hyper.betas, eps=hyper.eps, weight_decay=hyper.weight_decay
    )
    for piece in row.pieces():
        reference.adamw_(piece.tensors, c, factor, piece.random())
