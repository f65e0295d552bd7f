"""Masked AdamW without Triton: torch's fused AdamW on the CPU, the reference elsewhere and for AMSGrad.

torch's wants one dtype, gradients as they are and parameters in one piece. What is neither goes through it
in pieces, by way of fp32 copies that fit a cache.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from grass_kernels import layout, reference, rounding
from grass_kernels.plan import TensorLists
from grass_kernels.reference import Tensors


def masked_adamw_torch(
    lists: TensorLists,
    *,
    num_layers: int,
    sq_norms: Tensor | None,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip_coef: Tensor | None,
) -> None:
    """Arguments as of :func:`grass_kernels.masked_adamw_`, checked."""
    if sq_norms is not None:
        sq_norms.copy_(reference.layer_sq_norms(lists.grads, lists.layers, num_layers, grad_scale=grad_scale))
    if not lists.params or (found_inf is not None and bool(found_inf != 0)):
        return
    torch._foreach_add_(list(lists.steps), 1)
    hyper = {"lr": float(lr), "betas": betas, "eps": eps, "weight_decay": weight_decay}
    update_rows([_row(lists, i) for i in range(len(lists.params))], hyper, maximize, grad_scale, clip_coef)


def update_rows(
    rows: Sequence["_Row"],
    hyper: dict,
    maximize: bool,
    grad_scale: Tensor | None,
    clip_coef: Tensor | None,
) -> None:
    """Update parameters, or pieces of them, whose counters have been advanced."""
    as_they_are = grad_scale is None and clip_coef is None
    factor = reference.grad_factor(maximize, grad_scale, clip_coef)
    whole: dict[torch.dtype, list[_Row]] = {}
    in_fp32: list[_Row] = []
    for row in rows:
        t = row.tensors
        # torch's fused kernel forgets a NaN in the running maximum.
        if t.param.device.type != "cpu" or t.max_exp_avg_sq is not None:
            _update_by_reference(row, factor, hyper)
        elif as_they_are and row.seed is None and t.remainder is None and len({x.dtype for x in t[:4]}) == 1:
            whole.setdefault(t.param.dtype, []).append(row)
        else:
            in_fp32.append(row)
    _update_in_fp32(in_fp32, factor, hyper)
    for members in whole.values():
        _fused_adamw(members, hyper, maximize)


class _Row(NamedTuple):
    """A parameter, or a piece of one."""

    tensors: Tensors
    step: Tensor
    seed: int | None  # of stochastic rounding
    start: int = 0  # of the piece

    def pieces(self) -> Iterator["_Row"]:
        start = self.start
        for piece in self.tensors.pieces():
            yield self._replace(tensors=piece, start=start)
            start += len(piece.param)

    def random(self) -> Tensor | None:
        """16 random bits an element, where the parameter is rounded stochastically."""
        if self.seed is None:
            return None
        param = self.tensors.param
        return rounding.random_16_bits(self.seed, int(self.step), self.start, len(param), param.device)


def _row(lists: TensorLists, i: int) -> _Row:
    seed = lists.seeds[i] if lists.params[i].dtype == torch.bfloat16 else None
    return _Row(_flat(lists, i), lists.steps[i], seed)


def _flat(lists: TensorLists, i: int) -> Tensors:
    columns = (
        lists.params,
        lists.grads,
        lists.exp_avgs,
        lists.exp_avg_sqs,
        lists.max_exp_avg_sqs,
        lists.remainders,
    )
    return Tensors(*(None if column[i] is None else layout.flat(column[i]) for column in columns))  # type: ignore


def _fused_adamw(rows: Sequence[_Row], hyper: dict, maximize: bool = False) -> None:
    """Run torch's fused AdamW on all rows."""
    params, grads, exp_avgs, exp_avg_sqs = (
        list(column) for column in zip(*(row.tensors[:4] for row in rows), strict=True)
    )
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [row.step for row in rows],
        lr=hyper["lr"],
        beta1=hyper["betas"][0],
        beta2=hyper["betas"][1],
        weight_decay=hyper["weight_decay"],
        eps=hyper["eps"],
        amsgrad=False,
        maximize=maximize,
    )


def _update_in_fp32(rows: Sequence[_Row], factor: Tensor, hyper: dict) -> None:
    """By way of fp32 copies of some pieces at a time, which fit a cache."""
    batch: list[_Row] = []
    held = 0
    for piece in chain.from_iterable(row.pieces() for row in rows):
        batch.append(piece)
        held += len(piece.tensors.param)
        if held >= reference.PIECE:
            _update_batch_in_fp32(batch, factor, hyper)
            batch, held = [], 0
    if batch:
        _update_batch_in_fp32(batch, factor, hyper)


def _update_batch_in_fp32(batch: Sequence[_Row], factor: Tensor, hyper: dict) -> None:
    wide = []
    for row in batch:
        t = row.tensors
        param = t.param.float() if t.remainder is None else rounding.join_fp32(t.param, t.remainder)
        tensors = Tensors(param, t.grad.float() * factor, t.exp_avg.float(), t.exp_avg_sq.float())
        wide.append(row._replace(tensors=tensors))
    _fused_adamw(wide, hyper)
    stored, updated = [], []
    for row, (new, *_) in zip(batch, wide, strict=True):
        t = row.tensors
        if t.remainder is None and row.seed is None:
            stored.append(t.param)
            updated.append(new.param)
        else:
            reference.store_param(t, new.param, row.random())
        stored += [t.exp_avg, t.exp_avg_sq]
        updated += [new.exp_avg, new.exp_avg_sq]
    changed = [(old, new) for old, new in zip(stored, updated, strict=True) if old is not new]
    if changed:
        torch._foreach_copy_([old for old, _ in changed], [new for _, new in changed])


def _update_by_reference(row: _Row, factor: Tensor, hyper: dict) -> None:
    c = reference.coefficients(row.step.item(), **hyper)
    for piece in row.pieces():
        reference.adamw_(piece.tensors, c, factor, piece.random())
