"""TorchPlan: an update in units, as `AdamWPlan` makes it, without Triton."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grass_kernels import layout, operators
from grass_kernels.plan import Part, TensorLists
from grass_kernels.reference import Tensors
from grass_kernels.table import CHUNK
from grass_kernels.torch_path import _Row, update_rows


class States(NamedTuple):
    """Where the states of a part are while it is updated: 1-D, in storage order."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    remainder: Tensor | None


class TorchPlan:
    """Masked AdamW, unit by unit, through torch: one step.

    Args:
        lists: Of dense parameters; gradients and states of any strides. Of the states only dtypes and strides
            are looked at: where they are, `run` is told.
        groups: The group of hyperparameters of each parameter.
        parts: How the parameters are divided into units.
    """

    def __init__(self, lists: TensorLists, groups: Sequence[int], parts: Sequence[Part]) -> None:
        self._nothing_to_do = operators.is_needed(lists.params)  # planning on tensors that hold nothing
        self._lists, self._groups = lists, groups
        self._parts: dict[int, list[Part]] = {}
        for part in parts:
            self._parts.setdefault(part.unit, []).append(part)
        self._params = [layout.flat(p) for p in lists.params]
        self._grads = [layout.flat(g) for g in layout.Layout(lists.params).read(lists.grads)]
        self._skips = False

    @torch.no_grad()
    def begin(
        self,
        hyper: Sequence[dict[str, Any]],
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        clip_coef: Tensor | None = None,
    ) -> None:
        """Advance the counters, unless the step is skipped.

        Args:
            hyper: A dict a group, with ``lr``, ``betas``, ``eps``, ``weight_decay`` and ``maximize``.
            grad_scale: See :func:`grass_kernels.masked_adamw_`, as the following.
            found_inf: One element of any type.
            clip_coef: float32, one element.
        """
        self._hyper, self._grad_scale, self._clip_coef = hyper, grad_scale, clip_coef
        self._skips = (
            self._nothing_to_do or not self._params or (found_inf is not None and bool(found_inf != 0))
        )
        if not self._skips:
            torch._foreach_add_(list(self._lists.steps), 1)

    @torch.no_grad()
    def run(self, unit: int, states: Sequence[States]) -> None:
        """Update one unit.

        Args:
            unit: Of those in the parts.
            states: Of each part of the unit, in their order.
        """
        if self._skips:
            return
        rows: dict[int, list[_Row]] = {}
        for part, state in zip(self._parts.get(unit, ()), states, strict=True):
            i, start = part.tensor, part.first_chunk * CHUNK
            stop = start + part.num_chunks * CHUNK
            param = self._params[i][start:stop]
            seed = self._lists.seeds[i] if param.dtype == torch.bfloat16 else None
            tensors = Tensors(param, self._grads[i][start:stop], *state)
            rows.setdefault(self._groups[i], []).append(_Row(tensors, self._lists.steps[i], seed, start))
        for group, members in rows.items():
            hyper = dict(self._hyper[group])
            maximize = hyper.pop("maximize")
            update_rows(members, hyper, maximize, self._grad_scale, self._clip_coef)

    def parts_of(self, unit: int) -> list[Part]:
        """The parts of a unit."""
        return self._parts.get(unit, [])
