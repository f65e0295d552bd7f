"""StepPlan: how the parameters of a step are updated, found once and valid while nothing but gradients moves.

A plan is a backend for each set of parameters (`grass_kernels.AdamWPlan` for Triton, `grass_kernels.TorchPlan`
without it, `grass.optim.fallback` for what only torch's functional AdamW can update) and a residency: where states are
while they are updated. If a plan is still valid is asked in every step by comparing plain values: addresses, dtypes,
shapes and strides of all that is read or written. None of the tensors is kept.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import compress
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import grass_kernels
from grass.optim.fallback import Fallback
from grass.optim.hyperparameters import are_plain, hyperparameters_of, settings_of
from grass.optim.param_entry import ParamEntry
from grass.optim.states import Options, takes_kernel
from grass_kernels import AdamWPlan, Hyperparameters, Part, TensorLists, TorchPlan, layout

_structure = itemgetter(
    "amsgrad", "differentiable", "capturable", "foreach", "fused", "decoupled_weight_decay"
)
_moments = itemgetter("exp_avg", "exp_avg_sq", "step")
_grad, _dtype, _nbytes = map(attrgetter, ("grad", "dtype", "nbytes"))


class Reading(NamedTuple):
    """Tensors of a step, and what a plan is compared by."""

    params: Sequence[Tensor]  # those that have gradients
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor | None]
    remainders: list[Tensor | None]
    steps: list[Tensor]
    addresses: list[int]  # of the gradients
    key: tuple[Any, ...]


def read_step(
    params: Sequence[Tensor], state: Mapping[Tensor, dict[str, Any]], kinds: Sequence[str]
) -> Reading:
    """Read what a step updates.

    Args:
        params: of the optimizer, or of a bucket; with or without gradients.
        state: of the optimizer.
        kinds: states that some parameters have beside ``exp_avg``, ``exp_avg_sq`` and ``step``.

    Raises:
        KeyError, TypeError: a state is missing or is no tensor.
        RuntimeError, AttributeError: a tensor has no address, such as a fake or sparse one.
    """
    present: list[bool] | None = None
    rows, grads = params, list(map(_grad, params))
    try:
        addresses = list(map(Tensor.data_ptr, grads))
    except TypeError:  # of None
        present = [g is not None for g in grads]
        rows, grads = list(compress(params, present)), list(compress(grads, present))
        addresses = list(map(Tensor.data_ptr, grads))
    states: Any = list(map(state.get, rows))
    exp_avgs, exp_avg_sqs, steps = (
        map(list, zip(*map(_moments, states), strict=True)) if rows else ([], [], [])
    )
    others = {kind: [s.get(kind) for s in states] for kind in kinds}
    moments = [*exp_avgs, *exp_avg_sqs, *(t for column in others.values() for t in column if t is not None)]
    key = (
        present,
        list(map(Tensor.data_ptr, [*rows, *moments, *steps])),
        list(map(Tensor.stride, [*rows, *grads, *moments])),
        list(map(_dtype, [*rows, *grads])),
        list(map(_nbytes, [*rows, *grads, *moments])),
    )
    return Reading(
        rows,
        grads,
        exp_avgs,
        exp_avg_sqs,
        others.get("max_exp_avg_sq") or [None] * len(rows),
        others.get("remainder") or [None] * len(rows),
        steps,
        addresses,
        key,
    )


class Scaler(NamedTuple):
    """Tensors that a GradScaler leaves for the step; on a device, or None."""

    grad_scale: Tensor | None
    found_inf: Tensor | None


class Residency(Protocol):
    """Where states are while they are updated: in place, or in buffers of the device (`grass.offload`)."""

    def updating(self) -> AbstractContextManager[None]:
        """Context in which a step is launched."""

    def units(self, bucket: int) -> Sequence[Any]:
        """Units of a bucket (`grass.offload.units.Unit`), in the order of updates."""

    def run(self, bucket: int, update: Callable[[Any, dict[str, Tensor]], None]) -> None:
        """Call ``update(unit, views)`` for every unit of a bucket, with its states in `views`."""


class InPlace:
    """States beside their parameters: everything is one unit."""

    def updating(self) -> AbstractContextManager[None]:
        """See `Residency`."""
        return nullcontext()

    def units(self, bucket: int) -> Sequence[Any]:
        """See `Residency`."""
        return ()

    def run(self, bucket: int, update: Callable[[Any, Any], None]) -> None:
        """See `Residency`."""
        update(None, None)


class StepPlan:
    """The division of a step's parameters among backends.

    Args:
        reading: of the step, with complete states.
        entries: records of ``reading.params``.
        groups: of the optimizer.
        options: of the optimizer.
        num_layers: layers of the entries.
        residency: where states are while they are updated.
        buckets: that pass through it, in the order of updates; one, of any number, for `InPlace`.
    """

    def __init__(
        self,
        reading: Reading,
        entries: Sequence[ParamEntry],
        groups: Sequence[dict[str, Any]],
        options: Options,
        num_layers: int,
        residency: Residency,
        buckets: Sequence[int],
    ) -> None:
        self._key, self._addresses = reading.key, reading.addresses
        self._lengths = [len(group["params"]) for group in groups]
        self._structures = list(map(_structure, groups))
        self._options, self._num_layers = options, num_layers
        self._residency, self._buckets = residency, buckets
        units = [unit for bucket in buckets for unit in residency.units(bucket)]
        self._unit_numbers = {unit: number for number, unit in enumerate(units)}
        self.layers = {entry.layer for entry in entries}
        """Layers that have parameters in the step."""

        by_device: dict[torch.device, list[int]] = {}
        by_group: dict[int, list[int]] = {}
        for place, entry in enumerate(entries):
            if takes_kernel(groups[entry.group], entry.param, options):
                by_device.setdefault(entry.param.device, []).append(place)
            else:
                by_group.setdefault(entry.group, []).append(place)
        self._kernels = [
            _Kernels(places, device, reading, entries, groups, options, num_layers, self._unit_numbers)
            for device, places in by_device.items()
        ]
        fallbacks = [
            Fallback(
                places, [entries[i].layer for i in places], index, num_layers, entries[places[0]].param.device
            )
            for index, places in by_group.items()
        ]
        self._backends: list[_Kernels | Fallback] = [*self._kernels, *fallbacks]

    def is_valid(self, reading: Reading, groups: Sequence[dict[str, Any]]) -> bool:
        """Return if the step of a reading is the plan's, but for where gradients are and for hyperparameters."""
        if reading.key != self._key or [len(group["params"]) for group in groups] != self._lengths:
            return False
        if list(map(_structure, groups)) != self._structures:
            return False
        if reading.addresses != self._addresses:
            moved = list(compress(reading.grads, map(int.__ne__, reading.addresses, self._addresses)))
            if any(map(Tensor.is_neg, moved)) or (
                0 in reading.addresses and not all(map(Tensor.data_ptr, moved))
            ):
                return False
            self._addresses = reading.addresses
        return True

    def check(self, groups: Sequence[dict[str, Any]]) -> None:
        """Refuse hyperparameters that kernels cannot be given, for all groups before any is updated."""
        for backend in self._backends:
            backend.prepare(groups)

    def run(
        self, reading: Reading, groups: Sequence[dict[str, Any]], scaler: Scaler
    ) -> tuple[Tensor, list[object]]:
        """Update all parameters, without a device sync unless torch's functional AdamW needs one.

        Args:
            reading: for which the plan is valid.
            groups: of the optimizer.
            scaler: of a GradScaler.

        Returns:
            float32 [layers], squared norms of the gradients by layer; and in a graph capture what must live as long as
            the graph.
        """
        self.check(groups)
        with self._residency.updating():
            kept = [backend.upload(reading, groups) for backend in self._backends]
            measured = None
            if self._options.max_grad_norm is not None:
                measured = _total(backend.measure(scaler.grad_scale) for backend in self._backends)
            for backend in self._backends:
                device = backend.device
                scales = (_to(t, device) for t in (measured, *scaler))
                backend.begin(measured is None, self._options.max_grad_norm, *scales)
            for bucket in self._buckets:
                self._residency.run(bucket, self._run_unit)
            taken = [backend.finish() for backend in self._backends]
            sq_norms = measured if measured is not None else _total(taken)  # type: ignore[arg-type]
        for kernels in self._kernels:
            kernels.increment_versions(reading)
        return sq_norms, [entry for entry in kept if entry is not None]

    def _run_unit(self, unit: Any, views: dict[str, Tensor] | None) -> None:
        for kernels in self._kernels:
            kernels.run(0 if unit is None else self._unit_numbers[unit], views)


class _Kernels:
    """Parameters of one device that a plan of `grass_kernels` updates."""

    def __init__(
        self,
        places: list[int],
        device: torch.device,
        reading: Reading,
        entries: Sequence[ParamEntry],
        groups: Sequence[dict[str, Any]],
        options: Options,
        num_layers: int,
        unit_numbers: Mapping[Any, int],
    ) -> None:
        self.device = device
        self._places = None if len(places) == len(entries) else places
        mine = [entries[i] for i in places]
        self._layers = [entry.layer for entry in mine]
        self._seeds = [entry.index if options.stochastic_rounding else None for entry in mine]
        self._groups = [entry.group for entry in mine]
        self._used = sorted(set(self._groups))
        self._amsgrad = [bool(groups[index]["amsgrad"]) for index in self._groups]
        self._any_amsgrad = any(self._amsgrad)
        self._max_grad_norm = math.inf if options.max_grad_norm is None else options.max_grad_norm
        self._settings: list[Any] | None = None
        self.sq_norms = torch.empty(num_layers, dtype=torch.float32, device=device)

        indices = {entry.param: i for i, entry in enumerate(mine)}
        units = [
            grass_kernels.Unit(
                [
                    Part(indices[piece.param], piece.first_chunk, piece.num_chunks, piece.start - unit.start)
                    for piece in unit.pieces
                    if piece.param in indices
                ],
                unit.host,
            )
            for unit in unit_numbers
        ]
        capturable = any(group["capturable"] for group in groups)

        def make(lists: TensorLists) -> AdamWPlan | TorchPlan:
            plan = grass_kernels.make_plan(
                lists, num_layers, device, self._groups, len(groups), capturable, units or None
            )
            if isinstance(plan, AdamWPlan):
                plan.buffers.append(self.sq_norms)
            return plan

        lists = self._lists(reading)
        self._has_inference_tensors = any(
            t.is_inference() for column in lists.tensors() for t in column if t is not None
        )
        # Tensors that cannot be walked in storage order together go through copies, made anew in every step.
        self._is_regular = lists.is_regular()
        self._make = make
        self._plan: AdamWPlan | TorchPlan | None = make(lists) if self._is_regular else None

    def _select(self, column: Any) -> Any:
        return column if self._places is None else [column[place] for place in self._places]

    def _lists(self, reading: Reading) -> TensorLists:
        maxima: list[Tensor | None] = [None] * len(self._groups)
        if self._any_amsgrad:
            found = self._select(reading.max_exp_avg_sqs)
            maxima = [t if used else None for t, used in zip(found, self._amsgrad, strict=True)]
        return TensorLists(
            params=self._select(reading.params),
            grads=self._select(reading.grads),
            exp_avgs=self._select(reading.exp_avgs),
            exp_avg_sqs=self._select(reading.exp_avg_sqs),
            max_exp_avg_sqs=maxima,
            remainders=self._select(reading.remainders),
            steps=self._select(reading.steps),
            layers=self._layers,
            seeds=self._seeds,
        )

    def increment_versions(self, reading: Reading) -> None:
        """Tell autograd what was written through addresses."""
        written = [*self._select(reading.params), *self._select(reading.exp_avgs)]
        written += [*self._select(reading.exp_avg_sqs), *self._select(reading.steps)]
        for column in (reading.max_exp_avg_sqs, reading.remainders):
            written += [t for t in self._select(column) if t is not None]
        if self._has_inference_tensors:
            written = [t for t in written if not t.is_inference()]
        torch.autograd.graph.increment_version(written)

    def prepare(self, groups: Sequence[dict[str, Any]]) -> None:
        """Take the hyperparameters of the groups, checked."""
        settings = [settings_of(groups[index]) for index in self._used]
        plain = all(map(are_plain, settings))
        if plain and settings == self._settings:
            return
        unused = Hyperparameters(0.0, 0, False, (0.0, 0.0), 0.0, 0.0)
        hyperparameters = [unused] * len(groups)
        for index in self._used:
            hyperparameters[index] = hyperparameters_of(groups[index], self.device, self._max_grad_norm)
        # A tensor may be written to: it is no value to compare with.
        self._settings, self._hyperparameters = settings if plain else None, hyperparameters

    def upload(self, reading: Reading, groups: Sequence[dict[str, Any]]) -> object:
        """Prepare the launches of a step; see `AdamWPlan.upload`."""
        lists, addresses = self._lists(reading), self._select(reading.addresses)
        if not self._is_regular:
            copies = layout.Layout(lists.params)
            lists = lists.in_layout(copies)
            self._copied = copies, lists  # alive until the step has been launched
            self._plan, addresses = self._make(lists), None
        assert self._plan is not None
        return self._plan.upload(lists, self._hyperparameters, addresses)

    def measure(self, grad_scale: Tensor | None) -> Tensor:
        """Squared norms by layer, from a pass that only reads gradients."""
        assert self._plan is not None
        self._plan.measure(self.sq_norms, _to(grad_scale, self.device))
        return self.sq_norms

    def begin(
        self,
        norms: bool,
        max_grad_norm: float | None,
        clip_by: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """See `AdamWPlan.begin`."""
        assert self._plan is not None
        self._norms, self._grad_scale = norms, grad_scale
        self._plan.begin(norms=norms, clip_by=clip_by, grad_scale=grad_scale, found_inf=found_inf)

    def run(self, unit: int, views: dict[str, Tensor] | None) -> None:
        """See `AdamWPlan.run`."""
        assert self._plan is not None
        self._plan.run(unit, views)

    def finish(self) -> Tensor | None:
        """See `AdamWPlan.finish`; returns the squared norms if `begin` was asked for them."""
        assert self._plan is not None
        self._plan.finish(self.sq_norms if self._norms else None, self._grad_scale)
        if not self._is_regular:
            self._copied[0].write_back()
            del self._copied
            self._plan = None
        return self.sq_norms if self._norms else None


def _to(t: Tensor | None, device: torch.device) -> Tensor | None:
    return t if t is None or t.device == device else t.to(device, non_blocking=True)


def _total(parts: Iterator[Tensor] | Sequence[Tensor]) -> Tensor:
    """The sum on the first part's device; of one part that part itself."""
    first, *others = parts
    for part in others:
        first = first + part.to(first.device, non_blocking=True)
    return first
