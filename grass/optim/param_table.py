"""ParamTable: the records of an optimizer's parameters, and which of them require grad."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from grass.errors import ParameterError
from grass.optim.param_entry import count_elements, make_entries, params_by_layer
from grass.optim.requires_grad import RequiresGradLease


class ParamTable:
    """Records of all parameters of an optimizer, in the order of its groups, and the lease on their ``requires_grad``.

    Args:
        groups: the optimizer's parameter groups.
        layer_of, trainable: as for `make_entries`.
        num_layers: L.

    Attributes:
        entries: the records, as of the last `sync`.
        lease: control of ``requires_grad``, once `take_lease` has been called.
        removed: parameters that were removed from the groups since the caller has last cleared it.
    """

    lease: RequiresGradLease

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        layer_of: dict[Tensor, int],
        trainable: dict[Tensor, bool],
        num_layers: int,
    ) -> None:
        self.num_layers = num_layers
        self.removed: set[Tensor] = set()
        self.entries = make_entries(groups, layer_of, trainable, num_layers)

    def take_lease(self, owner: object, trainable: dict[Tensor, bool]) -> None:
        """Take control of ``requires_grad`` from other optimizers, until the owner is collected."""
        self.lease = RequiresGradLease(list(trainable), list(trainable.values()))
        self.lease.bind(owner)

    def sync(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Follow the order of the groups, and drop parameters that were removed from them.

        Returns:
            False, with nothing changed, if the groups have parameters without a record.
        """
        members = [(index, p) for index, group in enumerate(groups) for p in group["params"]]
        if len(members) == len(self.entries) and all(
            entry.param is p and entry.group == index
            for entry, (index, p) in zip(self.entries, members, strict=True)
        ):
            return True
        by_param = {entry.param: entry for entry in self.entries}
        if not all(p in by_param for _, p in members):
            return False
        self.entries = []
        for position, (index, p) in enumerate(members):
            entry = by_param[p]
            entry.group, entry.index = index, position
            self.entries.append(entry)
        removed = by_param.keys() - {p for _, p in members}
        self.lease.drop(removed)
        self.removed |= removed
        return True

    def successors(self, groups: Sequence[dict[str, Any]]) -> dict[Tensor, Tensor]:
        """Return the new parameter of each, if they were replaced one by one, as `accelerate` does to shard a model.

        Raises:
            ParameterError: the parameters are others.
        """
        members = [(index, p) for index, group in enumerate(groups) for p in group["params"]]
        if len(members) != len(self.entries) or any(
            (entry.group, entry.param.shape) != (group, p.shape)
            for entry, (group, p) in zip(self.entries, members, strict=True)
        ):
            raise ParameterError(
                "the parameter groups contain parameters unknown to this optimizer: add them with add_param_group, "
                "or construct the optimizer anew"
            )
        return {entry.param: p for entry, (_, p) in zip(self.entries, members, strict=True)}

    @property
    def layer_of(self) -> dict[Tensor, int]:
        """Layer of each parameter, as from `assign_layers`."""
        return {entry.param: entry.layer for entry in self.entries}

    @property
    def trainable(self) -> dict[Tensor, bool]:
        """``requires_grad`` of each parameter as the user set it."""
        return {entry.param: self.lease.is_trainable(entry.param) for entry in self.entries}

    @property
    def by_layer(self) -> list[list[Tensor]]:
        """Trainable parameters of each layer."""
        return params_by_layer(self.entries, self.num_layers)

    @property
    def sizes(self) -> list[int]:
        """Number of trainable elements of each layer."""
        return count_elements(self.by_layer)

    def update_trainable(self) -> None:
        """Adopt which parameters the user trains."""
        for entry in self.entries:
            entry.can_train = self.lease.is_trainable(entry.param) and entry.layer <= self.num_layers

    def activate(self, layers: Sequence[int]) -> None:
        """Set which layers the next step trains, with what is outside of them."""
        active = {*layers, self.num_layers}
        for entry in self.entries:
            entry.is_active = entry.layer in active

    def switch(self, *, all_on: bool) -> None:
        """Set ``requires_grad`` for what is active, or for all that is ever trained."""
        on = {entry.param for entry in self.entries if entry.is_active or (all_on and entry.can_train)}
        self.lease.switch(on.__contains__)
