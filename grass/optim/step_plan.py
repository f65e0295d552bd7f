"""StepPlan: one step, prepared once, and valid as long as only gradients and hyperparameters change.

A plan has backends, each with its share of the parameters (`grass_kernels.AdamWPlan` with Triton,
`grass_kernels.TorchPlan` without, `grass.optim.fallback` for what only torch's functional AdamW can update), and a
residency: where states are during an update. Every step checks that the plan is valid by comparing plain values:
addresses, dtypes, sizes and strides of all tensors that are read or written. A plan holds no tensors.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import compress
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

import grass_kernels
from grass.errors import GrassError
from grass.optim.fallback import Fallback
from grass.optim.hyperparameters import are_plain, hyperparameters_of, settings_of
from grass.optim.param_entry import ParamEntry
from grass.optim.sharding import Ranks, local
from grass.optim.states import Options, takes_kernel
from grass_kernels import AdamWPlan, TensorLists, TorchPlan, Unit, layout

_structure = itemgetter(
    "amsgrad", "differentiable", "capturable", "foreach", "fused", "decoupled_weight_decay"
)
_moments = itemgetter("exp_avg", "exp_avg_sq", "step")
_grad, _dtype, _nbytes, _shape = map(attrgetter, ("grad", "dtype", "nbytes", "shape"))
_PLAIN = {Tensor, nn.Parameter}


class Reading(NamedTuple):
    """Tensors of a step, and the validity key of its plan. Of sharded parameters all tensors are the local shards."""

    params: Sequence[Tensor]  # parameters that have gradients
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor | None]
    remainders: list[Tensor | None]
    steps: list[Tensor]
    addresses: list[int]  # addresses of the gradients
    key: tuple[Any, ...] | None  # None: the plan is for this step only


def read_step(
    params: Sequence[Tensor],
    state: Mapping[Tensor, dict[str, Any]],
    kinds: Sequence[str],
    with_key: bool = True,
) -> Reading:
    """Collect the tensors of a step.

    Args:
        params: parameters of the optimizer, or of a bucket; those without gradients are skipped.
        state: state of the optimizer.
        kinds: kinds of states that some parameters have besides ``exp_avg``, ``exp_avg_sq`` and ``step``.
        with_key: False for tensors without addresses, as in transformations of `torch.func`.

    Raises:
        KeyError, TypeError: a state is missing or is not a tensor.
        RuntimeError, AttributeError: a tensor has no address, as fake and sparse tensors.
    """
    present: list[bool] | None = None
    address = Tensor.data_ptr if with_key else Tensor.dim
    rows, grads = params, list(map(_grad, params))
    is_plain = _PLAIN.issuperset(map(type, rows))
    try:
        addresses = list(map(address, grads if is_plain else _shards(grads)))
    except TypeError:  # a gradient is None
        present = [g is not None for g in grads]
        rows, grads = list(compress(params, present)), list(compress(grads, present))
        addresses = list(map(address, grads if is_plain else _shards(grads)))
    states: Any = list(map(state.get, rows))
    if not is_plain:
        rows, grads = _shards(rows), _shards(grads)
    exp_avgs, exp_avg_sqs, steps = (
        map(list, zip(*map(_moments, states), strict=True)) if rows else ([], [], [])
    )
    others = {kind: [s.get(kind) for s in states] for kind in kinds}
    moments = [*exp_avgs, *exp_avg_sqs, *(t for column in others.values() for t in column if t is not None)]
    key = None
    if with_key:
        tensors = [*rows, *grads, *moments]
        contiguous = list(map(Tensor.is_contiguous, tensors))
        key = (
            torch.is_inference_mode_enabled(),
            present,
            contiguous,
            [] if all(contiguous) else list(map(Tensor.stride, tensors)),
            list(map(Tensor.data_ptr, [*rows, *moments, *steps])),
            list(map(_dtype, [*tensors, *steps])),
            list(map(_shape, rows)),
            list(map(_nbytes, [*grads, *moments])),
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


def _shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list(map(local, tensors))


class Scaler(NamedTuple):
    """Attributes that a GradScaler sets for the step: float32 tensors of one element on a device, or None."""

    grad_scale: Tensor | None
    found_inf: Tensor | None


class Residency(Protocol):
    """Residency of states during an update: in place, or in buffers on the device (`grass.offload`)."""

    def updating(self) -> AbstractContextManager[None]:
        """Return the context in which a step is launched."""

    def units(self, bucket: int) -> Sequence[Any]:
        """Return the units of a bucket, hashable, in the order of updates."""

    def parts(self, unit: Any, indices: Mapping[Tensor, int]) -> Unit:
        """Return a unit for the kernels: its parts that belong to parameters in `indices`."""

    def run(self, bucket: int, update: Callable[[Any, dict[str, Tensor]], None]) -> None:
        """Call ``update(unit, views)`` for every unit of a bucket; `views` are its states by kind, 1-D."""


class InPlace:
    """States on the device of their parameters: one unit, and no views."""

    def updating(self) -> AbstractContextManager[None]:
        """See `Residency`."""
        return nullcontext()

    def units(self, bucket: int) -> Sequence[int]:
        """See `Residency`."""
        return [bucket]

    def parts(self, unit: int, indices: Mapping[Tensor, int]) -> Unit:
        """See `Residency`."""
        return Unit.whole(list(indices))

    def run(self, bucket: int, update: Callable[[int, dict[str, Tensor]], None]) -> None:
        """See `Residency`."""
        update(bucket, {})


class Scope(NamedTuple):
    """Parameters that a plan covers, and how their states are brought to the device."""

    entries: Sequence[ParamEntry]
    """Records of the parameters with gradients."""
    num_layers: int
    residency: Residency
    """Residency of the states during an update."""
    buckets: Sequence[int]
    """Buckets that pass through the residency, in the order of updates."""


class Backend(Protocol):
    """Updates the parameters of a plan that are on one device, or in one group."""

    device: torch.device

    def prepare(self, groups: Sequence[dict[str, Any]]) -> None:
        """Check and convert the hyperparameters, before any parameter is updated."""

    def upload(self, reading: Reading) -> object:
        """Prepare the launches of a step; returns what a graph that is being captured must keep alive, or None."""

    def measure(self, grad_scale: Tensor | None) -> Tensor:
        """Return the squared gradient norms by layer, float32 [layers], in a pass that only reads gradients."""

    def begin(
        self, norms: bool, clip_by: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Increment the step counters; see `grass_kernels.AdamWPlan.begin`."""

    def run(self, unit: int, views: dict[str, Tensor]) -> None:
        """Update one unit."""

    def finish(self) -> Tensor | None:
        """End the step, and return the squared norms if `begin` was called with ``norms=True``."""

    def increment_versions(self, reading: Reading) -> None:
        """Increment the versions of tensors that were written by address, as autograd expects."""


class StepPlan:
    """One step, prepared: its parameters, divided among backends, and the arguments of these.

    Args:
        reading: tensors of the step, with complete states.
        scope: parameters of the plan.
        groups: parameter groups of the optimizer.
        options: options of the optimizer.
    """

    def __init__(
        self,
        reading: Reading,
        scope: Scope,
        groups: Sequence[dict[str, Any]],
        options: Options,
    ) -> None:
        self._key, self._addresses = reading.key, reading.addresses
        self._lengths = [len(group["params"]) for group in groups]
        self._structures = list(map(_structure, groups))
        self._options = options
        entries, num_layers, self._residency, self._buckets = scope
        units = [unit for bucket in self._buckets for unit in self._residency.units(bucket)]
        self._unit_numbers = {unit: number for number, unit in enumerate(units)}
        self.layers = {entry.layer for entry in entries}
        """Layers with parameters in the step."""

        by_device: dict[torch.device, list[int]] = {}
        by_group: dict[int, list[int]] = {}
        for position, entry in enumerate(entries):
            if takes_kernel(groups[entry.group], entry.param, options):
                by_device.setdefault(entry.param.device, []).append(position)
            else:
                by_group.setdefault(entry.group, []).append(position)
        self._backends: list[Backend] = [
            *(
                _KernelBackend(positions, device, reading, scope, units, groups, options)
                for device, positions in by_device.items()
            ),
            *(
                Fallback(
                    positions,
                    [entries[i].layer for i in positions],
                    index,
                    num_layers,
                    entries[positions[0]].param.device,
                    options.max_grad_norm,
                )
                for index, positions in by_group.items()
            ),
        ]

    def is_valid(self, reading: Reading, groups: Sequence[dict[str, Any]]) -> bool:
        """Return True if the plan is valid for these tensors. Gradients may have moved; hyperparameters may differ."""
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
        """Check the hyperparameters of all groups, before any is updated."""
        for backend in self._backends:
            backend.prepare(groups)

    def run(
        self,
        reading: Reading,
        groups: Sequence[dict[str, Any]],
        scaler: Scaler,
        ranks: Ranks | None = None,
    ) -> tuple[Tensor, list[object]]:
        """Update all parameters, without a device sync unless torch's functional AdamW needs one.

        Args:
            reading: tensors for which the plan is valid.
            groups: parameter groups of the optimizer.
            scaler: attributes set by a GradScaler.
            ranks: processes over which gradients are sharded, for clipping.

        Returns:
            Squared gradient norms by layer, float32 [layers]: of all ranks with clipping, otherwise of the local
            shards; and in a graph capture the objects that must be kept
            alive with the graph.
        """
        self.check(groups)
        with self._residency.updating():
            kept = [backend.upload(reading) for backend in self._backends]
            measured = None
            if self._options.max_grad_norm is not None:
                measured = _total(backend.measure(scaler.grad_scale) for backend in self._backends)
                if ranks is not None:
                    measured = ranks.sum(measured)
            for backend in self._backends:
                device = backend.device
                scales = (_to(t, device) for t in (measured, *scaler))
                backend.begin(measured is None, *scales)
            for bucket in self._buckets:
                self._residency.run(bucket, self._run_unit)
            taken = [backend.finish() for backend in self._backends]
            sq_norms = measured if measured is not None else _total(taken)  # type: ignore[arg-type]
        for backend in self._backends:
            backend.increment_versions(reading)
        return sq_norms, [entry for entry in kept if entry is not None]

    def _run_unit(self, unit: Any, views: dict[str, Tensor]) -> None:
        for backend in self._backends:
            backend.run(self._unit_numbers[unit], views)


class _KernelBackend:
    """Backend for the parameters of one device that a plan of `grass_kernels` updates."""

    def __init__(
        self,
        positions: list[int],
        device: torch.device,
        reading: Reading,
        scope: Scope,
        units: Sequence[Any],
        groups: Sequence[dict[str, Any]],
        options: Options,
    ) -> None:
        self.device = device
        entries, num_layers, residency, _ = scope
        self._positions = None if len(positions) == len(entries) else positions
        own = [entries[i] for i in positions]
        self._layers = [entry.layer for entry in own]
        self._seeds = [entry.index if options.stochastic_rounding else None for entry in own]
        self._used = sorted({entry.group for entry in own})
        """Indices of the groups with parameters here; the plan numbers them 0, 1, ..."""
        self._amsgrad = [bool(groups[entry.group]["amsgrad"]) for entry in own]
        self._any_amsgrad = any(self._amsgrad)
        self._max_grad_norm = math.inf if options.max_grad_norm is None else options.max_grad_norm
        self._settings: list[Any] | None = None
        self.sq_norms = torch.empty(num_layers, dtype=torch.float32, device=device)

        indices = {entry.shard: i for i, entry in enumerate(own)}
        own_units = [residency.parts(unit, indices) for unit in units]
        updated = {part.tensor for unit in own_units for part in unit.parts}
        missing = [p for p, i in indices.items() if i not in updated and p.numel()]
        if missing:
            raise GrassError(
                f"the store of states does not know {len(missing)} parameters, which would not be updated: "
                "please report this"
            )
        capturable = any(group["capturable"] for group in groups)
        numbers = {index: number for number, index in enumerate(self._used)}
        group_of = [numbers[entry.group] for entry in own]

        def make(lists: TensorLists) -> AdamWPlan | TorchPlan:
            return grass_kernels.make_plan(
                lists, num_layers, device, group_of, len(numbers), capturable, own_units
            )

        lists = self._lists(reading)
        self._has_inference_tensors = any(
            t.is_inference() for column in (*lists.tensors(), lists.steps) for t in column if t is not None
        )
        # Tensors that cannot be processed in storage order together are copied in every step.
        self._is_regular = lists.is_regular()
        self._make = make
        self._plan: AdamWPlan | TorchPlan | None = make(lists) if self._is_regular else None

    def _select(self, column: Any) -> Any:
        return column if self._positions is None else [column[position] for position in self._positions]

    def _lists(self, reading: Reading) -> TensorLists:
        maxima: list[Tensor | None] = [None] * len(self._layers)
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
        """Increment the versions of tensors that were written by address, as autograd expects."""
        written = [*self._select(reading.params), *self._select(reading.exp_avgs)]
        written += [*self._select(reading.exp_avg_sqs), *self._select(reading.steps)]
        for column in (reading.max_exp_avg_sqs, reading.remainders):
            written += [t for t in self._select(column) if t is not None]
        if self._has_inference_tensors:
            written = [t for t in written if not t.is_inference()]
        torch.autograd.graph.increment_version(written)

    def prepare(self, groups: Sequence[dict[str, Any]]) -> None:
        """Check and convert the hyperparameters of the groups, if they have changed."""
        settings = [settings_of(groups[index]) for index in self._used]
        plain = all(map(are_plain, settings))
        if plain and settings == self._settings:
            return
        hyperparameters = [
            hyperparameters_of(groups[index], self.device, self._max_grad_norm) for index in self._used
        ]
        # A tensor may be written to: it is no value to compare with.
        self._settings, self._hyperparameters = settings if plain else None, hyperparameters

    def upload(self, reading: Reading) -> object:
        """Prepare the launches of a step; see `AdamWPlan.upload`."""
        lists, addresses = self._lists(reading), self._select(reading.addresses)
        if not self._is_regular:
            copies = layout.Layout(lists.params)
            lists = lists.in_layout(copies)
            self._copied = copies, lists  # kept alive until `finish`
            self._plan, addresses = self._make(lists), None
        assert self._plan is not None
        return self._plan.upload(lists, self._hyperparameters, addresses)

    def measure(self, grad_scale: Tensor | None) -> Tensor:
        """Return the squared gradient norms by layer, float32 [layers], from a pass that only reads gradients."""
        assert self._plan is not None
        self._plan.measure(self.sq_norms, _to(grad_scale, self.device))
        return self.sq_norms

    def begin(
        self,
        norms: bool,
        clip_by: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """See `AdamWPlan.begin`."""
        assert self._plan is not None
        self._norms, self._grad_scale = norms, grad_scale
        with torch.inference_mode() if self._has_inference_tensors else nullcontext():
            self._plan.begin(norms=norms, clip_by=clip_by, grad_scale=grad_scale, found_inf=found_inf)

    def run(self, unit: int, views: dict[str, Tensor]) -> None:
        """See `AdamWPlan.run`."""
        assert self._plan is not None
        with torch.inference_mode() if self._has_inference_tensors else nullcontext():
            self._plan.run(unit, views)

    def finish(self) -> Tensor | None:
        """See `AdamWPlan.finish`; returns the squared norms if `begin` was called with ``norms=True``."""
        assert self._plan is not None
        self._plan.finish(self.sq_norms if self._norms else None, self._grad_scale)
        self._grad_scale = None
        if not self._is_regular:
            self._copied[0].write_back()
            del self._copied
            self._plan = None
        return self.sq_norms if self._norms else None


def _to(t: Tensor | None, device: torch.device) -> Tensor | None:
    return t if t is None or t.device == device else t.to(device, non_blocking=True)


def _total(parts: Iterable[Tensor]) -> Tensor:
    """Return the sum on the device of the first part; a single part is returned as it is."""
    first, *others = parts
    for part in others:
        first = first + part.to(first.device, non_blocking=True)
    return first
