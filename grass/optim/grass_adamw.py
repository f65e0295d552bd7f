"""GrassAdamW: the one place where all parts of the method meet.

A gradient's way, in one direction: backward -> update and norm in one pass -> importance (a vector on the
device) -> at a refresh L floats to the host -> probabilities -> active set -> ``requires_grad``.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from grass.config import GrassConfig
from grass.errors import ConfigError, GrassError, ParameterError
from grass.layer_scheduler import Change, LayerScheduler
from grass.layers import LayerMap, Pattern
from grass.optim.checks import check_groups, refuse_sparse
from grass.optim.embeddings import keep_graph_through_frozen_embeddings
from grass.optim.freezing import Lease, trainable_flags
from grass.optim.fused_backward import FusedBackward, tied_parameters
from grass.optim.probe import Probe
from grass.optim.saving import Saving
from grass.optim.slots import assign_slots, count_elements, refuse_distributed, weight_norms
from grass.optim.view import MethodView
from grass.optim.work import Row


class GrassAdamW(MethodView, Saving):
    """AdamW that trains few layers at a time, chosen by their gradients; nothing but `step` is needed.

    The first ``probe_steps`` steps measure every layer's gradient and update nothing. Then
    ``active_layers`` layers are drawn for each period of ``sample_interval`` steps; all others are frozen:
    ``requires_grad`` off, no gradient, and weights, moments and step counters unchanged by one bit. Every
    ``update_interval`` steps the norms measured since move the importance, hence the probabilities.

    Args:
        params: a model, or parameters or groups of them with ``model=``.
        lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused, state_dtype,
            master_weights, stochastic_rounding, max_grad_norm: as for `AdamW`; ``differentiable`` and
            ``capturable`` are refused.
        model: the model the parameters belong to, if ``params`` is not a model.
        config: settings of the method.
        pattern: which modules are the layers, if they cannot be found: as for `LayerMap.from_model`, or a
            `LayerMap`.

    Works with any training loop, gradient accumulation, activation checkpointing, autocast, GradScaler,
    accelerate and Trainer. While probing, ``step`` changes no weight but counts as a step: a learning-rate
    schedule moves on, and a logged gradient norm is near zero, as gradients are freed once measured.

    With ``offload`` states live in host memory: read them by `state_dict`, which waits for what is under way, and
    change them by `load_state_dict`: what is written to them by hand may not be noticed.

    Raises:
        OffloadError: less host memory than all layers' states need, or parameters on several devices.
        ParameterError: no parameters, or some that are not the model's.
        ConfigError: a configuration that does not fit the model, or a distributed run.
        LayerDiscoveryError: the model's layers cannot be told.

    Source: paper, "the method". Moments are kept when a layer is frozen, with a step counter of their own.
    """

    def __init__(
        self,
        params: nn.Module | ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        model: nn.Module | None = None,
        config: GrassConfig | None = None,
        pattern: LayerMap | Pattern | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        if isinstance(params, nn.Module):
            if model is not None and model is not params:
                raise ParameterError("two models were passed: give one, as the first argument or as model=")
            model, params = params, params.parameters()
        if model is None:
            raise ParameterError(
                "GrassAdamW needs the model to find its layers: pass the model itself, or model=model"
            )
        if not isinstance(params, Tensor):  # which torch refuses by type
            params = cast(ParamsT, list(params))
            if not params:
                raise ParameterError(
                    "no parameters to train: pass a model that has some, or a list that is not empty"
                )
        if differentiable or capturable:
            raise ConfigError(
                "GrassAdamW is neither differentiable nor capturable: its schedule is the host's"
            )
        self._config = config if config is not None else GrassConfig()
        self._config.check_options(max_grad_norm)
        refuse_distributed(model)
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
            state_dtype=state_dtype,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            max_grad_norm=max_grad_norm,
        )
        self._layers = pattern if isinstance(pattern, LayerMap) else LayerMap.from_model(model, pattern)
        self._model_ref: weakref.ref[nn.Module] | None = weakref.ref(model)
        members = [p for _, p in self._members()]
        self._slots = dict(zip(members, self._slots_of(members), strict=True))
        self._late = tied_parameters(model)
        self._offloading = None
        flags = trainable_flags(members)
        if not any(flags):
            raise ParameterError("no parameter requires grad: there is nothing to train")
        self._build(flags)
        self._lease.handles.extend(keep_graph_through_frozen_embeddings(model))
        if hasattr(model, "_orig_mod"):
            warnings.warn(
                "the whole model is compiled: every new set of active layers recompiles it; compile its blocks "
                "one by one instead (two graphs each)",
                stacklevel=2,
            )

    def _slots_of(self, params: Sequence[Tensor]) -> list[int]:
        model = None if self._model_ref is None else self._model_ref()
        if model is None:
            raise ParameterError("a copied or unpickled optimizer knows no model: it takes no new parameters")
        return assign_slots(params, model, self._layers, self._config)

    def _build(self, trainable: Sequence[bool]) -> None:
        """Make the scheduler, then take the lease, the first thing that changes the model."""
        members = [p for _, p in self._members()]
        flags = dict(zip(members, trainable, strict=True))
        device = next(p.device for p, on in flags.items() if on)
        by_slot = self._by_slot(flags)
        weights = weight_norms(by_slot) if self._config.sampler == "weight_norm" else None
        self._scheduler = LayerScheduler(
            self._config, self._layers.names, count_elements(by_slot), device, weights
        )
        self._move_in(flags)
        self._lease = Lease(members, trainable)
        self._lease.bind(self)
        self._probe: Probe | None = None
        self._fused: FusedBackward | None = None
        self._sq_norms: Tensor | None = None
        self._switch_parameters()

    def _by_slot(self, flags: dict[Tensor, bool]) -> list[list[Tensor]]:
        """Trainable parameters of each layer."""
        members: list[list[Tensor]] = [[] for _ in self._layers.names]
        for p, trainable in flags.items():
            if trainable and self._slots[p] < len(members):
                members[self._slots[p]].append(p)
        return members

    # -- steps ----------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of the current phase.

        Args:
            closure: clears gradients, computes the loss, calls backward and returns the loss.

        Returns:
            What the closure returned, or None.

        A step without any gradient does nothing, and does not count.
        """
        self._refuse_if_ended()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        refuse_sparse(self.param_groups)
        with torch.no_grad():
            if self._wants_only_state():
                self._show_state()
            elif self._probe is not None:
                self._take_probe_step(self._probe)
            else:
                self._take_adapt_step()
        return loss

    def _refuse_if_ended(self) -> None:
        if self._lease.ended:
            raise GrassError(
                "this GrassAdamW has been released, or a newer one has taken over its model: use the newer one"
            )

    def _take_probe_step(self, probe: Probe) -> None:
        probe.notice_cleared()
        if not probe.fired:
            return
        accumulated = probe.accumulated
        sq_norms, observed = probe.take(getattr(self, "grad_scale", None))
        self._finish_step(sq_norms, observed, accumulated)

    def _take_adapt_step(self) -> None:
        if self._fused is not None:
            self._refuse_scaler()
            parts, self._order_seen = self._fused.take(self._order(self._scheduler.active))
            if self._offloading is not None:
                self._offloading.pipeline.join()
            sq_norms = torch.stack(parts).sum(0) if parts else None
            slots = {min(home, len(self._layers)) for home in self._order_seen}
        else:
            sq_norms = self._update()
            work = self._works.get(None)
            slots = set() if work is None else work.layers
        if sq_norms is not None:
            observed = [slot in slots for slot in range(len(self._layers) + 1)]
            self._finish_step(sq_norms, observed, accumulated=False)

    def _refuse_scaler(self) -> None:
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            # The scaler takes them away only after a step that returns.
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise GrassError(
                "fused_backward and a GradScaler exclude each other: updates were made inside backward, with gradients "
                "still scaled, and stay; load a checkpoint from before, and train in bfloat16 without a scaler, or "
                "without fused_backward"
            )

    def _update_home(self, home: int) -> Tensor | None:
        """Update what has one home, inside backward; the gradients will be freed."""
        self._refuse_if_ended()
        if self._fused is not None and not self._fused.done:
            check_groups(self.param_groups, self._options)
        sq_norms = self._update(home)
        if self._offloading is not None:
            work = self._works[home]
            self._offloading.pipeline.keep(
                [row.param.grad for row in work.rows if row.param.grad is not None]
            )
            # The stream that backward was called on goes on when the updates are done, step or no step.
            if torch._C._current_graph_task_id() != -1:  # inside backward; `step` joins by itself
                torch.autograd.Variable._execution_engine.queue_callback(self._offloading.pipeline.join)
        return sq_norms

    def accumulate(self) -> contextlib.AbstractContextManager[None]:
        """Declare that the backwards inside are micro-batches before a step's last: with ``fused_backward``.

        ::

            with optimizer.accumulate():
                model(first_half).loss.backward()
            model(second_half).loss.backward()
            optimizer.step()

        Without ``fused_backward``, and while probing, it does nothing: gradients add up anyway.
        """
        return contextlib.nullcontext() if self._fused is None else self._fused.accumulate()

    def _rows(self, home: int | None = None) -> tuple[list[Row], int]:
        """The active parameters with gradients, and how many slots they are in."""
        rows = []
        members = [(index, p) for index, group in enumerate(self.param_groups) for p in group["params"]]
        for seed, (index, p) in enumerate(members):
            if p.grad is None or (home is not None and self._homes.get(p) != home):
                continue
            if self._trains(p):
                rows.append(Row(index, p, self._slots[p], seed))
            else:
                p.grad = None  # set by hand, or before a checkpoint was loaded
        return rows, len(self._layers) + 1

    def _finish_step(self, sq_norms: Tensor, observed: list[bool], accumulated: bool) -> None:
        self._sq_norms = sq_norms
        found_inf = getattr(self, "found_inf", None)
        change = self._scheduler.finish_step(sq_norms[:-1], observed[:-1], found_inf, accumulated)
        self._follow(change)

    def _follow(self, change: Change) -> None:
        """Bring moments and parameters to what the scheduler decided."""
        if change.drawn is not None:
            for group, p in self._members():
                if self._slots[p] in (*change.drawn, len(self._layers)) and self._lease.found(p):
                    self._states.allocate(self.state[p], group, p)
        if change.left is not None:
            if self._config.moments == "reset":
                for _, p in self._members():
                    if self._slots[p] in change.left:
                        self._states.reset(self.state, p)
            self._switch_parameters()
        if self._offloading is not None and not self._scheduler.probing:
            self._offloading.pipeline.begin(self._order(self._scheduler.active))
            if self._scheduler.next_active is not None:
                self._offloading.pipeline.announce(self._order(self._scheduler.next_active))

    def _trains(self, p: Tensor) -> bool:
        """Whether a parameter takes part in the step about to be taken (if it is trainable at all)."""
        slot = self._slots[p]
        if slot >= len(self._layers):
            return slot == len(self._layers)
        return self._scheduler.probing or slot in self._scheduler.active

    def _can_train(self, p: Tensor) -> bool:
        """Whether a parameter trains in some step."""
        return self._slots[p] <= len(self._layers) and self._lease.found(p)

    def _switch_parameters(self) -> None:
        """Set ``requires_grad`` and the probe's hooks as the scheduler says."""
        for slot in list(self._works):
            self._leave_work(slot)
        self._lease.switch(self._trains)
        if self._probe is not None:
            self._probe.remove()
            self._probe = None
        if self._fused is not None:
            self._fused.remove()
            self._lease.handles = [h for h in self._lease.handles if h not in self._fused.handles]
            self._fused = None
        if self._lease.ended:
            return
        if self._config.fused_backward and not self._scheduler.probing:
            by_home: dict[int, list[Tensor]] = {}
            for _, p in self._members():
                if p.requires_grad:
                    by_home.setdefault(self._homes[p], []).append(p)
            self._fused = FusedBackward(by_home, self._late, self._update_home)
            self._lease.handles.extend(self._fused.handles)
        if self._scheduler.probing:
            measured = [p for _, p in self._members() if p.requires_grad]
            slots = [self._slots[p] for p in measured]
            self._probe = Probe(measured, slots, len(self._layers) + 1)
            self._lease.handles.extend(self._probe.handles)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and what a probe has measured since the last step."""
        super().zero_grad(set_to_none)
        if self._probe is not None:
            self._probe.discard()
        if self._fused is not None:
            self._fused.discard()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of further parameters of the model.

        Raises:
            ParameterError: parameters that are not the model's, or the optimizer is a copy.
            ConfigError: a floor ``min_probability`` too high for the layers they add.
        """
        if "_lease" not in self.__dict__:  # torch's constructor adds the first groups
            super().add_param_group(param_group)
            return
        self._refuse_if_ended()
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        params = [entry[1] if isinstance(entry, tuple) else entry for entry in given]
        members = [p for _, p in self._members()]
        flags = [self._lease.found(p) for p in members] + trainable_flags(params)
        known, groups = self._slots, len(self.param_groups)
        self._slots = {**known, **dict(zip(params, self._slots_of(params), strict=True))}
        try:
            counts = count_elements(self._by_slot(dict(zip([*members, *params], flags, strict=True))))
            self._config.check_layers(sum(count > 0 for count in counts))
            super().add_param_group({**param_group, "params": given})
            members = [p for _, p in self._members()]
            self._move_in(dict(zip(members, flags, strict=True)))
        except Exception:
            self._slots = known
            del self.param_groups[groups:]
            raise
        self._scheduler.recount(counts)
        hooks = self._lease.handles
        self._lease.handles = []  # the old lease ends with the new one's beginning, its hooks go on
        self._lease = Lease(members, flags)
        self._lease.bind(self)
        self._lease.handles = hooks
        self._switch_parameters()

    def release(self) -> None:
        """Give ``requires_grad`` back as it was at construction and remove all hooks."""
        self._lease.end()
        self._probe = None
