"""Work: how the parameters of a step are divided, found once and compared afterwards.

Parameters take one of three ways: a plan of the kernels, one a device, which is only run; the kernels' function,
which checks and arranges anew (without Triton, or where strides differ); or torch's own functional AdamW (other
dtypes). The next step takes the same ways if nothing has moved but gradients. To find that out costs a few
addresses a parameter, which is most of what a step costs the host.
"""

import math
import weakref
from array import array
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

import grass_kernels
from grass.offload.pipeline import Pipeline
from grass.offload.units import Unit
from grass.optim.states import StateMaker, has_remainder, takes_kernel
from grass.optim.watching import entries_of, watch
from grass_kernels import AdamWPlan, Hyperparameters, Part, TensorLists, layout
from grass_kernels.arguments import check_hyperparameters
from grass_kernels.inputs import split_lr

_structure = itemgetter("amsgrad", "differentiable", "capturable", "foreach", "fused")
_version = attrgetter("_version")
_params = itemgetter("params")


class Row(NamedTuple):
    """One parameter of a step."""

    group: int
    param: Tensor
    layer: int
    seed: int  # its place among all parameters


class Planned(NamedTuple):
    """The parameters of one device that a plan updates."""

    plan: AdamWPlan
    places: list[int] | None  # among the rows; None: all of them
    sq_norms: Tensor  # float32 [num_layers]

    def of(self, column: list) -> list:
        """Its part of a list with an entry a row."""
        return column if self.places is None else [column[place] for place in self.places]

    def of_bytes(self, column: bytes) -> bytes:
        """Its part of 8 bytes a row."""
        return (
            column
            if self.places is None
            else b"".join(column[8 * place : 8 * place + 8] for place in self.places)
        )


class Work:
    """What a step found.

    Args:
        groups: the optimizer's.
        state: the optimizer's, complete for all rows.
        rows: the parameters that have gradients.
        num_layers: layers of the rows.
        maker: of the states.
        pipeline: if states live in a store: what brings them to the device.
        slots: of the store, that have states of the rows, in the order of updates.

    Attributes:
        unit_numbers: the units of the rows' states, if there is a pipeline.
        planned: by plan, one a device.
        by_function: rows that take the kernels' function, by group and device.
        by_torch: rows that take torch's functional AdamW, by group.
        grads: addresses of the rows' gradients, 8 bytes each, as last compared.
        hyperparameters: of each group, as last compared.
        written: what plans write and autograd must be told of: parameters, and of their states those tensors that
            do not share the maker's version counter.
        with_remainder: parameters stored as exact fp32 in two parts; `remainder_addresses` are where they are,
            `versions_written` the version counters that the last step left.
        layers: those that have rows.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        rows: Sequence[Row],
        num_layers: int,
        maker: StateMaker,
        pipeline: Pipeline | None = None,
        slots: Sequence[int] = (),
    ) -> None:
        options = maker.options
        self.slots = slots
        self.unit_numbers: dict[Unit, int] = {}
        if pipeline is not None:
            for slot in self.slots:
                for unit in pipeline.units(slot):
                    self.unit_numbers[unit] = len(self.unit_numbers)
        self.rows, self.num_layers, self.options = rows, num_layers, options
        self.params = [row.param for row in rows]
        self.by_function: dict[tuple[int, torch.device], list[Row]] = {}
        self.by_torch: dict[int, list[Row]] = {}
        places: dict[torch.device, list[int]] = {}
        for place, row in enumerate(rows):
            group, p = groups[row.group], row.param
            if not takes_kernel(group, p, options):
                self.by_torch.setdefault(row.group, []).append(row)
            elif (
                grass_kernels.runs_triton(p.device)
                and not grass_kernels.operators.is_needed([p])
                and _is_regular(p, state[p])
                and _is_at_hand(group["lr"], p.device)
            ):
                places.setdefault(p.device, []).append(place)
            else:
                self.by_function.setdefault((row.group, p.device), []).append(row)
        self.planned = [self._plan(groups, state, device, chosen) for device, chosen in places.items()]

        kernels = [row for row in rows if takes_kernel(groups[row.group], row.param, options)]
        self._checked = {row.group: row.param.device for row in kernels}
        for index, its in self.by_torch.items():
            if not any(isinstance(beta, Tensor) for beta in groups[index]["betas"]):
                self._checked.setdefault(index, its[0].param.device)
        self._sound: dict[int, list[Any]] = {}  # what was found right beside the learning rate, by group
        self._settings = list(map(settings_of, groups))
        self._check_settings(groups)
        self.hyperparameters = self._hyperparameters(groups)
        planned = [p for part in self.planned for p in part.of(self.params)]
        states = [t for p in planned for t in state[p].values() if isinstance(t, Tensor)]
        self.written = [
            *_counted(planned),
            maker.counter,
            *_with_other_counter(_counted(states), maker.counter),
        ]
        self.with_remainder = [
            row.param
            for row in rows
            if has_remainder(row.param, options, groups[row.group]["differentiable"])
        ]
        self.remainder_addresses = [p.data_ptr() for p in self.with_remainder]
        self.versions_written: list[int] | None = None
        self.layers = {row.layer for row in rows}

        self._members = list(chain.from_iterable(map(_params, groups)))
        self._single_elements = [place for place, p in enumerate(self._members) if p.numel() == 1]
        self._lengths = list(map(len, map(_params, groups)))
        self._watch = watch()
        self.grads = array("q", [_address_or_0(p.grad) for p in self.params]).tobytes()
        try:
            self._description = self._watch.describe(self._members)
        except RuntimeError:  # some have no addresses: every step divides anew
            self._description = None
        self._structures = list(map(_structure, groups))
        self._entries = entries_of(state)
        self._sentinel = _sentinel(state)
        # Addresses and ids are kept, not tensors, so that what the user drops is freed. Then no plan may be run.
        self._alive = alive = [True]

        def end(_: object) -> None:
            alive[0] = False

        self._watched = [weakref.ref(x, end) for t in states for x in (t, t.untyped_storage())]

    def _plan(
        self,
        groups: Sequence[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        device: torch.device,
        places: list[int],
    ) -> Planned:
        rows = [self.rows[place] for place in places]
        states = [state[row.param] for row in rows]
        lists = TensorLists(
            params=[row.param for row in rows],
            grads=[row.param.grad for row in rows],  # type: ignore[misc]
            exp_avgs=[s["exp_avg"] for s in states],
            exp_avg_sqs=[s["exp_avg_sq"] for s in states],
            max_exp_avg_sqs=[
                s["max_exp_avg_sq"] if groups[row.group]["amsgrad"] else None
                for row, s in zip(rows, states, strict=True)
            ],
            remainders=[s.get("remainder") for s in states],
            steps=[s["step"] for s in states],
            layers=[row.layer for row in rows],
            seeds=[row.seed if self.options.stochastic_rounding else None for row in rows],
        )
        capturable = any(group["capturable"] for group in groups)
        parts = self.parts_of(rows) if self.unit_numbers else None
        of = [row.group for row in rows]
        plan = AdamWPlan(lists, self.num_layers, device, of, len(groups), capturable, parts)
        sq_norms = torch.empty(self.num_layers, dtype=torch.float32, device=device)
        plan.buffers.append(sq_norms)
        return Planned(plan, None if len(places) == len(self.rows) else places, sq_norms)

    def parts_of(self, rows: Sequence[Row]) -> list[Part]:
        """How the units divide these rows; a row is a tensor."""
        places = {row.param: place for place, row in enumerate(rows)}
        return [
            Part(places[piece.param], piece.first_chunk, piece.num_chunks, number)
            for unit, number in self.unit_numbers.items()
            for piece in unit.pieces
            if piece.param in places
        ]

    def versions(self) -> list[int]:
        """Version counters of the parameters with remainders: who writes to one advances it."""
        return list(map(_version, self.with_remainder))

    def holds(self, groups: Sequence[dict[str, Any]], state: dict[Tensor, dict[str, Any]]) -> bool:
        """Whether the next step can take the same ways; if so, `grads` and `hyperparameters` are those of now.

        A gradient that has moved is asked whether it is a negative view; parameters, and gradients where they were, are
        taken to have the sign they had. A parameter that has moved, or anything of another layout, ends the plan.
        """
        members = list(chain.from_iterable(map(_params, groups)))
        if list(map(len, map(_params, groups))) != self._lengths or not self._are_members(members):
            return False
        if not self._alive[0] or self._description is None:
            return False
        if entries_of(state) != self._entries or _sentinel(state) != self._sentinel:
            return False
        try:
            addresses = self._watch.addresses_if_same(members, self._description, self.grads)
        except RuntimeError:
            return False
        if addresses is None:
            return False
        self.grads = addresses
        if list(map(_structure, groups)) != self._structures:
            return False
        settings = list(map(settings_of, groups))
        if _have_tensors(settings) or settings != self._settings:
            self._check_settings(groups)
            self._settings = settings
            self.hyperparameters = self._hyperparameters(groups)
        return True

    def _are_members(self, params: list[Tensor]) -> bool:
        """Whether these are the parameters themselves. Lists compare by identity first, which is fastest."""
        try:
            same = params == self._members
        except RuntimeError:  # two that differ, of several elements: their comparison has no truth value
            return False
        return same and all(params[place] is self._members[place] for place in self._single_elements)

    def _hyperparameters(self, groups: Sequence[dict[str, Any]]) -> list[Hyperparameters]:
        """What plans take from the groups."""
        if not self.planned:
            return []
        limit = math.inf if self.options.max_grad_norm is None else self.options.max_grad_norm
        taken = []
        for group in groups:
            lr, beta1, beta2, eps, weight_decay, maximize = settings_of(group)
            betas = (float(beta1), float(beta2))
            taken.append(
                Hyperparameters(*split_lr(lr), betas, float(eps), float(weight_decay), maximize, limit)
            )
        return taken

    def _check_settings(self, groups: Sequence[dict[str, Any]]) -> None:
        """Refuse what kernels cannot be given, for all groups before any is updated."""
        for index, device in self._checked.items():
            lr, *rest = settings_of(groups[index])
            if type(lr) is float and lr == lr and rest == self._sound.get(index):
                continue  # a schedule changes the learning rate in every step
            check_settings(groups[index], device)
            if not any(isinstance(value, Tensor) for value in rest):
                self._sound[index] = rest


def check_settings(group: dict[str, Any], device: torch.device) -> None:
    """Refuse hyperparameters of a group that kernels on the device cannot be given."""
    lr, beta1, beta2, eps, weight_decay, _ = settings_of(group)
    betas = tuple(float(beta) if isinstance(beta, Tensor) else beta for beta in (beta1, beta2))
    check_hyperparameters(kernel_lr(lr, device), betas, eps, weight_decay, device)


def kernel_lr(lr: Any, device: torch.device) -> float | Tensor:
    """A learning rate as kernels read it: a tensor on their device, if they know its dtype, or a number."""
    if isinstance(lr, Tensor) and not (lr.device == device and lr.dtype in (torch.float32, torch.float64)):
        return float(lr.detach())
    return lr


def settings_of(group: dict[str, Any]) -> tuple[Any, ...]:
    """Values to be compared; a list of betas may be written in place."""
    try:
        beta1, beta2 = group["betas"]
    except (TypeError, ValueError):
        raise grass_kernels.KernelArgumentError(f"betas are {group['betas']!r}: give two numbers") from None
    return group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["maximize"]


def _have_tensors(settings: Sequence[tuple[Any, ...]]) -> bool:
    """Whether a learning rate or a beta is a tensor. Those are not compared: that would wait for the device."""
    for lr, beta1, beta2, *_ in settings:
        if type(lr) is not float and isinstance(lr, Tensor):
            return True
        if type(beta1) is not float and isinstance(beta1, Tensor):
            return True
        if type(beta2) is not float and isinstance(beta2, Tensor):
            return True
    return False


def _is_at_hand(lr: float | Tensor, device: torch.device) -> bool:
    """Whether a kernel on the device can read the learning rate, or need not."""
    return not isinstance(lr, Tensor) or lr.device.type == "cpu" or lr.device == device


def _is_regular(p: Tensor, state: dict[str, Any]) -> bool:
    """Whether a parameter, its gradient and its state can be walked in storage order together."""
    if type(p).grad is not Tensor.grad:
        return False  # a property, whose tensors may not outlive the look at them
    beside = [p.grad, *(value for key, value in state.items() if key != "step")]
    return layout.is_dense(p) and all(
        layout.is_dense(t) and layout.same_order(t, p) and not t.is_neg() for t in beside if t is not None
    )


def _address_or_0(t: Tensor | None) -> int:
    return 0 if t is None or t.layout != torch.strided else t.data_ptr()


def _counted(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that have a version counter: not what was made in inference mode."""
    return [t for t in tensors if not t.is_inference()]


def _with_other_counter(tensors: Sequence[Tensor], counter: Tensor) -> list[Tensor]:
    """Those whose version counter is not the shared one."""
    before = [t._version for t in tensors]
    torch.autograd.graph.increment_version([counter])
    return [t for t, version in zip(tensors, before, strict=True) if t._version == version]


def _sentinel(state: dict[Tensor, dict[str, Any]]) -> list[int]:
    """Addresses of one parameter's state: who moves states in place (``.data = ...``) moves them all."""
    return [t.data_ptr() for t in next(iter(state.values()), {}).values() if isinstance(t, Tensor)]
