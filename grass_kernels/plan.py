"""AdamWPlan: the Triton backend, prepared once for a list of tensors.

A step is a few launches, for any number of tensors: a prologue increments the step counters and computes the
coefficients; one main pass per combination of dtypes updates the parameters; and a last pass sums the norms. With
clipping the norms come first, from one read-only pass over the gradients. There is no device sync.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grass_kernels import _triton, layout, reference
from grass_kernels._triton import tl_dtype
from grass_kernels.adamw_kernel import (
    MASTER,
    NARROW_BLOCK,
    NEAREST,
    STOCHASTIC,
    _masked_adamw_kernel,
    max_registers,
)
from grass_kernels.conversions import access_width
from grass_kernels.inputs import Hyperparameters, Inputs
from grass_kernels.prologue import _prologue_kernel
from grass_kernels.sq_norm import launch_norms, launch_sum_layers
from grass_kernels.table import BLOCK, CHUNK, COEFFICIENTS, ChunkRun, Part, build_table, whole_parts


class Key(NamedTuple):
    """Properties that select the kernel and the launch of a parameter."""

    grad: torch.dtype
    param: torch.dtype
    state: torch.dtype
    rounding: int  # NEAREST, MASTER or STOCHASTIC
    amsgrad: bool
    unit: int = 0  # each unit is a launch of its own


STATE_KINDS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "remainder")
"""Kinds of states that have the shape of their parameter."""


class Unit(NamedTuple):
    """Parts that are updated by one call of `run`, and the memory of their states between updates.

    Without sections states are updated in place.
    """

    parts: Sequence[Part]
    sections: Mapping[str, Tensor]  # 1-D, by kind of state: the lists' states are views of them

    @classmethod
    def whole(cls, params: Sequence[Tensor]) -> "Unit":
        """Return the unit of all parameters, updated in place."""
        return cls(whole_parts([p.numel() for p in params]), {})


class TensorLists(NamedTuple):
    """Dense tensors, one per parameter in each list; those of a parameter have equal strides and one device."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    max_exp_avg_sqs: Sequence[Tensor | None]  # None without amsgrad
    remainders: Sequence[Tensor | None]  # int16; None without master weights
    steps: Sequence[Tensor]
    layers: Sequence[int]
    seeds: Sequence[int | None]  # None without stochastic rounding

    def tensors(self) -> tuple[Sequence[Tensor | None], ...]:
        """Return parameters, gradients and states, a sequence each."""
        return (self.params, self.grads, *self.states())

    def states(self) -> tuple[Sequence[Tensor | None], ...]:
        """Return the states of kinds `STATE_KINDS`, a sequence each."""
        return self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs, self.remainders

    def is_regular(self) -> bool:
        """Return if all tensors of each parameter can be processed in storage order together."""
        return all(
            layout.is_dense(p)
            and all(layout.is_dense(t) and layout.same_order(t, p) for t in others if t is not None)
            for p, *others in zip(*self.tensors(), strict=True)
            if p is not None
        )

    def in_layout(self, target: layout.Layout) -> "TensorLists":
        """Return the lists with all tensors in the layout `target`, as copies where necessary."""
        exp_avgs, exp_avg_sqs, maxima, remainders = map(target.update, self.states())
        return self._replace(
            params=target.params, grads=target.read(self.grads), exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs,
            max_exp_avg_sqs=maxima, remainders=remainders,
        )  # fmt: skip

    def keys(self) -> list[Key]:
        """Return the key of each parameter."""
        keys = []
        for p, g, m, maximum, remainder, seed in zip(
            self.params,
            self.grads,
            self.exp_avgs,
            self.max_exp_avg_sqs,
            self.remainders,
            self.seeds,
            strict=True,
        ):
            rounding = MASTER if remainder is not None else NEAREST
            if remainder is None and seed is not None and p.dtype == torch.bfloat16:
                rounding = STOCHASTIC
            keys.append(Key(g.dtype, p.dtype, m.dtype, rounding.value, maximum is not None))
        return keys


class AdamWPlan:
    """Masked AdamW on the same tensors in every step; gradients may move between steps.

    Args:
        lists: Tensors. Only their addresses are kept: the plan is valid as long as their memory.
        num_layers: Number of layers, for norms and masks.
        device: Device of the tensors.
        groups: Parameter group of each parameter; None is all 0.
        num_groups: Number of parameter groups.
        capturable: Whether a later step may be captured in a graph.
        units: Units that the parameters are divided into; None is one unit, updated in place.
    """

    def __init__(
        self,
        lists: TensorLists,
        num_layers: int,
        device: torch.device,
        groups: Sequence[int] | None = None,
        num_groups: int = 1,
        capturable: bool = False,
        units: Sequence[Unit] | None = None,
    ) -> None:
        count = len(lists.params)
        self.device = device
        keys = lists.keys()
        units = units or [Unit.whole(lists.params)]
        parts = [
            (part, keys[part.tensor]._replace(unit=number))
            for number, unit in enumerate(units)
            for part in unit.parts
        ]
        self.table = build_table(
            numels=[p.numel() for p in lists.params],
            keys=keys,
            parts=parts,
            layers=lists.layers,
            num_layers=num_layers,
            device=device,
            columns={
                "param": _addresses(lists.params),
                **{
                    kind: _addresses(states) for kind, states in zip(STATE_KINDS, lists.states(), strict=True)
                },
                "step": _addresses(lists.steps),
                "group": groups or [0] * count,
                "seed": [seed or 0 for seed in lists.seeds],
            },
        )
        self._runs: dict[int, list[ChunkRun]] = {}
        for run in self.table.runs:
            self._runs.setdefault(run.key.unit, []).append(run)  # type: ignore[attr-defined]
        self._section_addresses = [
            {kind: section.data_ptr() for kind, section in unit.sections.items()} for unit in units
        ]
        self._inputs = Inputs(count, num_groups, device, capturable)
        self._data = self._inputs.data
        self._coefficients = torch.empty(count * COEFFICIENTS.value, dtype=torch.float32, device=device)
        self._partials = torch.empty(self.table.num_partials, dtype=torch.float32, device=device)
        self._buffers = [self.table.data, self._inputs.data, self._coefficients, self._partials]
        self._stream = self._used_on = _current_stream(device)

    def upload(
        self,
        lists: TensorLists,
        hyperparameters: Sequence[Hyperparameters],
        addresses: Sequence[int] | None = None,
    ) -> object:
        """Prepare the launches that follow.

        Args:
            lists: Tensors as at construction, except for gradients, which may have moved.
            hyperparameters: Hyperparameters, one per group.
            addresses: Addresses of the gradients, if known.

        Returns:
            None; in a graph capture, an object that must be kept alive with the graph.
        """
        if addresses is None:
            addresses = [g.data_ptr() for g in lists.grads]
        self._used_on = stream = _current_stream(self.device)
        for buffer in self._buffers:
            self._record_use(buffer)
        if stream is not None and torch.cuda.is_current_stream_capturing():
            self._data, kept = self._inputs.for_graph(addresses, hyperparameters)
            return (self, kept)
        self._inputs.upload(addresses, hyperparameters)
        self._data = self._inputs.data
        return None

    def _record_use(self, buffer: Tensor) -> None:
        """Keep the allocator from reusing memory that another stream than that of the construction uses."""
        if self._used_on != self._stream:
            buffer.record_stream(self._used_on)

    def measure(self, sq_norms: Tensor, grad_scale: Tensor | None = None) -> None:
        """Write the squared gradient norms by layer, float32 ``[num_layers]``, in a pass that only reads gradients."""
        self._record_use(sq_norms)
        launch_norms(self.table, self._data, self._partials)
        launch_sum_layers(self.table, self._partials, grad_scale, sq_norms)

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
        """Increment the step counters and compute the coefficients, before the units are run.

        Args:
            norms: Compute partial sums of squares during the update, for `finish`.
            clip_by: Squared norms, float32 ``[num_layers]``, whose sum is the squared norm of all gradients: these
                are clipped to ``max_grad_norm`` of their group, and a norm that is not finite skips the step.
            active: Mask of the layers to update, bool ``[num_layers]`` on the device.
            grad_scale: Divisor of the gradients, one float32; see :func:`grass_kernels.masked_adamw_`.
            found_inf: One element of any real dtype; the step is skipped if it is not zero.
            clip_coef: Factor of the gradients, one float32.
        """
        self._norms = norms
        _triton.launch(
            _prologue_kernel,
            self.table.num_tensors,
            self.device,
            threads=1,
            table_ptr=self.table.data,
            inputs_ptr=self._data,
            coefficients_ptr=self._coefficients,
            active_ptr=active,
            found_inf_ptr=found_inf,
            grad_scale_ptr=grad_scale,
            clip_coef_ptr=clip_coef,
            sq_norms_ptr=clip_by,
            headers_start=self._inputs.headers_start,
            num_layers=0 if clip_by is None else clip_by.numel(),
            NORM_BLOCK=reference.NORM_BLOCK,
        )

    def run(self, unit: int = 0, views: Mapping[str, Tensor] | None = None) -> None:
        """Update one unit.

        Args:
            unit: Index in `units`; 0 without units.
            views: Sections of the unit in a buffer, 1-D by kind; None or empty updates the states in place.
        """
        shifts = dict.fromkeys(STATE_KINDS, 0)
        for kind, view in (views or {}).items():
            shifts[kind] = view.data_ptr() - self._section_addresses[unit][kind]
        for run in self._runs.get(unit, ()):
            key: Key = run.key  # type: ignore[assignment]
            _triton.launch(
                _masked_adamw_kernel,
                run.num_chunks,
                self.device,
                max_registers=max_registers(key.state, key.amsgrad, self._norms),
                table_ptr=self.table.data,
                inputs_ptr=self._data,
                coefficients_ptr=self._coefficients,
                partials_ptr=self._partials if self._norms else None,
                chunks_start=run.start,
                exp_avg_shift=shifts["exp_avg"],
                exp_avg_sq_shift=shifts["exp_avg_sq"],
                max_exp_avg_sq_shift=shifts["max_exp_avg_sq"],
                remainder_shift=shifts["remainder"],
                PARAM_DTYPE=tl_dtype(key.param),
                GRAD_DTYPE=tl_dtype(key.grad),
                STATE_DTYPE=tl_dtype(key.state),
                ROUNDING=key.rounding,
                AMSGRAD=key.amsgrad,
                CHUNK=CHUNK,
                BLOCK=BLOCK,
                NARROW_BLOCK=NARROW_BLOCK,
                WIDTH=access_width([key.param, key.grad, key.state]),
            )

    def finish(self, sq_norms: Tensor | None = None, grad_scale: Tensor | None = None) -> None:
        """End the step, and write the squared norms of all units to `sq_norms`, float32 ``[num_layers]``."""
        if sq_norms is not None:
            self._record_use(sq_norms)
            launch_sum_layers(self.table, self._partials, grad_scale, sq_norms)


def _current_stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]
