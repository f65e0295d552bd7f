"""GrassAdamW: gradient-based adaptive layer-wise importance sampling, as an optimizer.

Combines the parts of the method, none of which knows the optimizer: the scheduler selects the active layers, the lease
sets ``requires_grad``, the probe measures gradients, the fused backward calls an update when the gradients of a bucket
are complete, the offload manager keeps states in host memory.
"""

import contextlib
import functools
import logging
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT
from torch.utils._pytree import tree_map

from grass.choices import Offload
from grass.config import GrassConfig
from grass.errors import ConfigError, GrassError, ParameterError
from grass.layer_scheduler import Change, LayerScheduler
from grass.layers import LayerMap, Pattern
from grass.optim import state_dict as state_dicts
from grass.optim.adamw import AdamW
from grass.optim.checks import (
    check_groups,
    check_state_shapes,
    refuse_scaler,
    refuse_sparse,
    refuse_without_memory,
)
from grass.optim.embeddings import keep_graph_through_frozen_embeddings
from grass.optim.fused_backward import FusedBackward, tied_parameters
from grass.optim.offload_manager import OffloadManager, TransferStats, buckets_of, choose_offload
from grass.optim.param_entry import ParamEntry, assign_layers, weight_norms
from grass.optim.param_table import ParamTable
from grass.optim.probe import Measured, Probe
from grass.optim.requires_grad import RequiresGradLease, trainable_flags
from grass.optim.sharding import (
    Ranks,
    as_shard_of,
    is_distributed,
    is_sharded,
    local,
    num_ranks,
    ranks_of,
    refuse_sharded_later,
    refuse_wrapper,
)
from grass.optim.states import HYPERPARAMETERS, takes_kernel
from grass.optim.step_plan import InPlace, Residency, Scope
from grass.schedule import Schedule

_logger = logging.getLogger(__name__)


class GrassAdamW(AdamW):
    """AdamW that trains few layers at a time, sampled by their gradient norms.

    The first ``probe_steps`` steps measure the gradients of all layers and update nothing. Then ``active_layers``
    layers are drawn for each period of ``sample_interval`` steps. All other layers are frozen: ``requires_grad`` is
    False, they get no gradients, and their weights, moments and step counters are bitwise unchanged. Every
    ``update_interval`` steps the importance, and with it the probabilities, is updated from the measured norms. With
    ``sampler="remeasured"`` the last step before that measures frozen layers too, which require grad in it.

    Args:
        params: a model, or its parameters or parameter groups together with ``model``.
        lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused, state_dtype,
            master_weights, stochastic_rounding, max_grad_norm: as for `AdamW`; ``differentiable`` and
            ``capturable`` are not supported.
        model: the model of the parameters, if ``params`` is not a model.
        config: settings of the method.
        pattern: selects the modules that are layers, if they cannot be discovered: as for `LayerMap.from_model`,
            or a `LayerMap`.

    Works with any training loop, gradient accumulation, activation checkpointing, autocast, GradScaler, accelerate and
    Trainer, and on several GPUs with FSDP2 (docs/scale.md). While probing, ``step`` changes no weights but counts as a
    step: a learning-rate schedule advances, and a logged gradient norm is near zero, since gradients are freed once
    measured.

    With ``offload`` states are in host memory: read them by `state_dict`, which waits for copies in flight, and
    change them by `load_state_dict`; direct writes are not detected. A copy of an optimizer (`copy`, pickle) sets
    ``requires_grad`` of its own parameters; it has no model, so it does not accept new parameter groups.

    Raises:
        OffloadError: host memory too small for the states of all layers, or parameters on several devices.
        ParameterError: no parameters, parameters that do not belong to the model, or trainable ones without memory of
            their own (quantized).
        ConfigError: a configuration that does not fit the model, or a wrapper of data parallelism other than FSDP2.
        LayerDiscoveryError: the layers of the model cannot be discovered.

    Source: paper, "the method". Moments are kept when a layer is frozen; each parameter has its own step counter.
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
        if not isinstance(params, Tensor):  # a TypeError from torch
            params = cast(ParamsT, list(params))
            if not params:
                raise ParameterError(
                    "no parameters to train: pass a model with parameters, or a list that is not empty"
                )
        if differentiable or capturable:
            raise ConfigError(
                "GrassAdamW does not support differentiable or capturable: its schedule runs on the host"
            )
        self._config = config if config is not None else GrassConfig()
        self._config.check_options(max_grad_norm)
        refuse_wrapper(model)
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
        layer_of = dict(zip(members, self._assign_layers(members), strict=True))
        self._tied_params = tied_parameters(model)
        flags = trainable_flags(members)
        refuse_without_memory([p for p, on in zip(members, flags, strict=True) if on])
        self._start(layer_of, dict(zip(members, flags, strict=True)))
        frozen = [layer for layer, count in enumerate(self._scheduler.num_params) if not count]
        if frozen:  # a copy does not tell again
            what = "%d of %d layers have no trainable parameter and are not drawn: %s"
            _logger.warning(what, len(frozen), len(self._layers), frozen)
        self._lease.handles.extend(keep_graph_through_frozen_embeddings(model))
        if self._config.fused_backward:  # the last backward may have failed, or have ended in checkpoints
            self._lease.handles.append(model.register_forward_pre_hook(_Call(self, "_join_updates")))
        if is_distributed():
            self._lease.handles.append(model.register_forward_pre_hook(_Call(self, "_prepare_ranks")))
        if hasattr(model, "_orig_mod"):
            warnings.warn(
                "the whole model is compiled, and is recompiled for every new set of active layers: compile its blocks "
                "one by one instead (two graphs each)",
                stacklevel=2,
            )

    def _assign_layers(self, params: Sequence[Tensor]) -> list[int]:
        model = None if self._model_ref is None else self._model_ref()
        if model is None:
            raise ParameterError(
                "a copied or unpickled optimizer knows no model: construct a new GrassAdamW to add parameters"
            )
        return assign_layers(params, model, self._layers, self._config)

    def _start(
        self, layer_of: dict[Tensor, int], trainable: dict[Tensor, bool], *, reads_weights: bool = True
    ) -> None:
        """Create the parts; the lease last, since it is the first to change the model.

        Args:
            layer_of, trainable: as for `make_entries`.
            reads_weights: False for a copy, which gets the importance of the original.
        """
        if any(map(is_sharded, layer_of)):  # refuses meshes that are not supported
            ranks_of([p for p, on in trainable.items() if on and layer_of[p] <= len(self._layers)])
        self._table = ParamTable(self.param_groups, layer_of, trainable, len(self._layers))
        by_layer = self._table.by_layer
        if not any(by_layer):  # all layers are frozen; the user may unfreeze some later
            self._config.check_layers(len(set(layer_of.values()) & set(range(len(self._layers)))))
        weights = None
        if self._config.sampler == "weight_norm" and reads_weights:
            sharded = [p for layer in by_layer for p in layer if is_sharded(p)]
            weights = weight_norms(by_layer, ranks_of(sharded))
        device = next((p.device for p, on in trainable.items() if on), next(iter(trainable)).device)
        self._scheduler = LayerScheduler(self._config, self._layers.names, self._table.sizes, device, weights)
        self._are_ranks_known = False
        # Until the first forward pass of a run of several processes no layer is frozen: a model may be sharded before
        # it, and FSDP2 chooses the dtype in which it reduces a layer's gradients by what requires grad then.
        self._is_waiting = num_ranks() > 1
        self._offload: OffloadManager | None = None
        self._mode: Offload = "none" if self._config.offload == "auto" else self._config.offload
        self._observed_order: list[int] = []
        self._rebuild_store()
        self._table.take_lease(self, trainable)
        weakref.finalize(self, _tell_if_untrained, self._scheduler.schedule)
        self._probe: Probe | None = None
        self._fused: FusedBackward | None = None
        self._has_told_of_changes = False
        self._switch_parameters()
        if self._config.fused_backward or num_ranks() > 1:
            self._step_supports_amp_scaling = True  # a GradScaler then calls `step`, which raises

    @property
    def _lease(self) -> RequiresGradLease:
        return self._table.lease

    # -- properties -----------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}{self._layers}\n{self._config}\n)"

    @property
    def config(self) -> GrassConfig:
        """Settings of the method."""
        return self._config

    @property
    def layers(self) -> LayerMap:
        """The layers of the model and their parameters."""
        return self._layers

    @property
    def phase(self) -> Literal["probe", "adapt"]:
        """Phase of the next step: ``"probe"`` or ``"adapt"``."""
        return self._scheduler.schedule.phase  # type: ignore[return-value]

    @property
    def active_layers(self) -> tuple[int, ...]:
        """Layers that the next step trains; () while probing."""
        return self._scheduler.active

    @property
    def next_active_layers(self) -> tuple[int, ...] | None:
        """Layers of the next period; None until they are drawn."""
        return self._scheduler.next_active

    @property
    def importance(self) -> Tensor:
        """Mean gradient norm of each layer at the last refresh, which the sampler uses: float32 [L]."""
        return self._scheduler.importance.importance.clone()

    @property
    def probabilities(self) -> Tensor:
        """Probabilities of the sampler: float32 [L], sums to 1."""
        return self._scheduler.sampler.probabilities.float()

    @property
    def step_count(self) -> int:
        """Number of steps taken, including the probe."""
        return self._scheduler.schedule.step_count

    @property
    def num_draws(self) -> int:
        """Number of draws so far."""
        return self._scheduler.sampler.num_draws

    @property
    def num_refreshes(self) -> int:
        """Number of refreshes of the importance so far."""
        return self._scheduler.importance.num_refreshes

    @property
    def draw_counts(self) -> list[int]:
        """For each layer, number of draws after which it has trained; a set that is drawn ahead does not count yet."""
        return self._scheduler.trained_draws

    @property
    def nonfinite_norms(self) -> int:
        """Number of norms that were NaN or inf, which the importance ignores. Reading it is a device sync."""
        return self._scheduler.importance.nonfinite_norms

    @property
    def layer_grad_norms(self) -> Tensor | None:
        """Gradient norm of each layer in the last step: float32 [L] on the device, 0 for frozen layers.

        Raises:
            GrassError: as for `grad_norm`.
        """
        sq_norms = self._sq_norms_of_all_ranks()
        return None if sq_norms is None else sq_norms[:-1].sqrt()

    @property
    def transfer_stats(self) -> TransferStats:
        """Bytes copied since construction, and bytes allocated for states on the host and the device."""
        return TransferStats(0, 0, 0, 0) if self._offload is None else self._offload.stats

    @property
    def torn_layers(self) -> tuple[int, ...]:
        """Torn layers: those that ``fused_backward`` has updated in a step that has not ended; L is the outside.

        Between backward and `step` this is normal. After a backward that failed these layers have one update more than
        the others; weights, moments and step counters of each are consistent, and can be saved.
        """
        if self._fused is None:
            return ()
        return tuple(dict.fromkeys(min(bucket, len(self._layers)) for bucket in self._fused.done))

    # -- steps ------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of the current phase. A step without any gradient does nothing and is not counted.

        Args:
            closure: clears gradients, computes the loss, calls backward and returns the loss.

        Returns:
            The result of the closure, or None.
        """
        self._refuse_if_ended()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        refuse_sparse(self.param_groups)
        if not self.step_count:
            self._current_entries()  # accelerate may have replaced the parameters
        with torch.no_grad():
            if self._is_dcp_init_step():
                self._init_state_for_dcp()
            elif self._probe is not None and self._scheduler.probing:
                self._take_probe_step(self._probe)
            else:
                self._take_adapt_step()
        self._drop_removed_params()
        if self._adopt_requires_grad():
            self._switch_parameters()
        return loss

    def _refuse_if_ended(self) -> None:
        if self._lease.ended:
            raise GrassError(
                "this GrassAdamW has been released, or a newer one controls the model: use the newer one"
            )

    def _take_probe_step(self, probe: Probe) -> None:
        probe.discard_if_cleared()
        if not probe.fired and not state_dicts.has_zero_gradients(self.param_groups):
            probe.measure_assigned()
        if not probe.fired:
            self._refuse_replaced_model()
            if num_ranks() > 1:
                self._meet_ranks()  # raises if an engine has taken the place of the parameters
            return
        self._current_entries()
        self._meet_ranks()
        if self._ranks is not None:
            refuse_scaler(self, updates_in_backward=False)
        accumulated = probe.accumulated
        sq_norms, observed = probe.finish_step(getattr(self, "grad_scale", None))
        self._finish_step(sq_norms, observed, accumulated)

    def _take_adapt_step(self) -> None:
        self._meet_ranks()
        if self._fused is not None or self._ranks is not None:
            refuse_scaler(self, updates_in_backward=self._fused is not None)
        measured = self._measure_all()
        if self._fused is not None:
            parts, self._observed_order = self._fused.finish_step(self._update_order(self._scheduler.active))
            self._join_updates()
            sq_norms = torch.stack(parts).sum(0) if parts else None
            layers = {min(bucket, len(self._layers)) for bucket in self._observed_order}
        else:
            sq_norms = self._update()
            plan = self._plans.get("all")
            layers = set() if plan is None else plan.layers
        if sq_norms is None:
            self._refuse_replaced_model()
        else:
            observed = [layer in layers for layer in range(len(self._layers) + 1)]
            self._finish_step(sq_norms, observed, accumulated=False, measured=measured)

    def _measure_all(self) -> Measured | None:
        """Return what the probe has measured in a step that trains; None if it measures nothing else."""
        if self._probe is None:
            return None
        self._probe.discard_if_cleared()
        if not self._probe.fired:
            self._probe.measure_assigned()
        return self._probe.finish_step(getattr(self, "grad_scale", None)) if self._probe.fired else None

    def _meet_ranks(self) -> None:
        """Find the processes that train this model, and check that they agree, before the first update."""
        if self._are_ranks_known:
            return
        entries = self._current_entries()
        ranks = ranks_of([entry.param for entry in entries if entry.can_train])
        if ranks is not None:
            self._check_agreement(ranks)
        self._ranks = ranks
        self._are_ranks_known = True
        if self._is_waiting:
            self._is_waiting = False
            self._table.switch(all_on=self._scheduler.remeasuring)

    def _check_agreement(self, ranks: Ranks) -> None:
        keys = (*HYPERPARAMETERS, "amsgrad", "maximize")
        groups = [{key: group[key] for key in keys} for group in self.param_groups]
        ranks.check_equal(
            {
                "its GrassConfig": asdict(self._config),
                "the layers of its model": [self._layers.names, self._scheduler.num_params],
                "the parameters that are trained": [entry.can_train for entry in self._table.entries],
                "its options": self._options,
                "its parameter groups": [len(group["params"]) for group in self.param_groups],
                "lr, betas, eps, weight_decay, amsgrad or maximize": tree_map(float, groups),
                "its state": self._scheduler.fingerprint(),
            }
        )

    def _find_ranks(self, params: Sequence[Tensor]) -> Ranks | None:
        return self._ranks

    def _prepare_ranks(self) -> None:
        """Adopt parameters that were sharded since construction, and meet the ranks, before a forward pass.

        Ranks that train different layers would wait for each other in backward. Without gradients, as in evaluations,
        nothing is done: one rank may be alone there.
        """
        if not torch.is_grad_enabled():
            return
        if any(is_sharded(entry.param) for entry in self._current_entries()):
            self._meet_ranks()
        else:
            self._refuse_replaced_model()

    def _refuse_replaced_model(self) -> None:
        model = None if self._model_ref is None else self._model_ref()
        if model is not None:
            refuse_sharded_later(model, [entry.param for entry in self._table.entries])

    def _finish_step(
        self, sq_norms: Tensor, observed: list[bool], accumulated: bool, measured: Measured | None = None
    ) -> None:
        """End a step: keep its norms, and change the layers.

        Args:
            sq_norms, observed, accumulated: as for `LayerScheduler.finish_step`, but of L + 1 layers.
            measured: norms and layers that the importance observes instead, if a probe has measured all of them.
        """
        scheduler = self._scheduler
        is_local = self._ranks is not None and (scheduler.probing or self._options.max_grad_norm is None)
        if is_local and scheduler.reads_norms and measured is None:
            assert self._ranks is not None
            sq_norms, is_local = self._ranks.sum(sq_norms), False
        if is_local:
            observed = [False] * len(observed)
        self._sq_norms, self._norms_are_local = sq_norms, is_local
        if measured is not None:
            sq_norms, observed = measured
            if self._ranks is not None:
                sq_norms = self._ranks.sum(sq_norms)
        found_inf = getattr(self, "found_inf", None)
        changed, was_remeasuring = self._adopt_requires_grad(), scheduler.remeasuring
        change = scheduler.finish_step(sq_norms[:-1], observed[:-1], found_inf, accumulated)
        self._apply_change(change)
        if change.left is None and (changed or scheduler.remeasuring != was_remeasuring):
            self._switch_parameters()

    def _adopt_requires_grad(self) -> bool:
        """Adopt what the user has set as ``requires_grad`` since the last switch; return if anything has changed."""
        changed = self._lease.adopt_changes()
        if not changed:
            return False
        self._update_trainable()
        if not self._has_told_of_changes:
            self._has_told_of_changes = True
            warnings.warn(
                f"requires_grad of {len(changed)} parameters was set outside of the optimizer, and is kept: layers are "
                "drawn accordingly from the next draw on. To freeze a layer that is not active, whose requires_grad is "
                "False already, call optimizer.set_trainable(layer.parameters(), False)",
                stacklevel=4,
            )
        return True

    def set_trainable(self, params: Iterable[Tensor], trainable: bool) -> None:
        """Freeze or unfreeze parameters, from the next draw on.

        Setting ``requires_grad`` is enough for parameters that train now. A layer that is not active has False already,
        so the optimizer could not notice.

        Args:
            params: parameters of this optimizer, as from ``module.parameters()``.
            trainable: whether they are trained.

        Raises:
            ParameterError: a parameter does not belong to this optimizer.
        """
        self._refuse_if_ended()
        params = list(params)
        if not set(params) <= {entry.param for entry in self._current_entries()}:
            raise ParameterError(
                "set_trainable got parameters that this optimizer does not have: pass its own"
            )
        self._lease.adopt_changes()
        self._lease.set_trainable(params, trainable)
        self._update_trainable()
        self._switch_parameters()

    def _update_trainable(self) -> None:
        """Update records, layer sizes and store to the parameters that are trainable."""
        self._are_ranks_known = False
        self._current_entries()
        self._table.update_trainable()
        self._scheduler.recount(self._table.sizes)
        self._rebuild_store()
        if not (self._scheduler.probing or self._scheduler.active):
            self._apply_change(self._scheduler.draw_at_once())

    def _apply_change(self, change: Change) -> None:
        """Allocate and reset states, and switch parameters, for a change of active layers."""
        if change.drawn is not None:
            if self._ranks is not None:
                self._check_agreement(self._ranks)
            if self._config.offload == "auto" and self._mode == "none" and not self.state:
                self._rebuild_store()  # the model may have been moved to a GPU after construction
            _logger.debug("step %d: drew layers %s", self.step_count, list(change.drawn))
            for entry in () if self._may_be_sharded else self._table.entries:
                if entry.can_train and entry.layer in (*change.drawn, len(self._layers)):
                    group = self.param_groups[entry.group]
                    self._states.allocate(self.state[entry.param], group, entry.shard)
        if change.left is not None:
            if self._config.moments == "reset":
                for entry in self._table.entries:
                    if entry.layer in change.left and entry.param in self.state:
                        self._states.reset(self.state[entry.param])
                        if not self.state[entry.param]:
                            del self.state[entry.param]
            self._switch_parameters()
        if self._offload is not None and not self._scheduler.probing:
            coming = self._scheduler.next_active
            later = None if coming is None else self._update_order(coming)
            self._offload.prefetch(self._update_order(self._scheduler.active), later)

    def _switch_parameters(self) -> None:
        """Set ``requires_grad`` and hooks for the active layers."""
        self._plans.clear()
        scheduler, num_layers = self._scheduler, len(self._layers)
        self._current_entries()
        self._table.activate(range(num_layers) if scheduler.probing else scheduler.active)
        self._table.switch(all_on=self._is_waiting or scheduler.remeasuring)
        for hooks in (self._probe, self._fused):
            if hooks is not None:
                own = set(hooks.handles)
                self._lease.handles = [handle for handle in self._lease.handles if handle not in own]
                hooks.remove()
        self._probe = self._fused = None
        if self._lease.ended:
            return
        training = [entry for entry in self._table.entries if entry.param.requires_grad and entry.is_active]
        measured = training
        if scheduler.remeasuring:
            measured = [e for e in self._table.entries if e.param.requires_grad and e.layer < num_layers]
        if scheduler.probing or any(not entry.is_active for entry in measured):
            # Its hooks run before those of the fused backward, which frees gradients.
            self._probe = Probe(measured, num_layers + 1, trains=not scheduler.probing)
            self._lease.handles.extend(self._probe.handles)
        if not scheduler.probing:
            _logger.debug("step %d: training layers %s", self.step_count, list(scheduler.active))
            if self._config.fused_backward:
                by_bucket: dict[int, list[Tensor]] = {}
                for entry in training:
                    by_bucket.setdefault(entry.bucket, []).append(entry.param)
                self._fused = FusedBackward(
                    by_bucket, self._tied_params, self._update_in_backward, self._model_ref
                )
                self._fused.at_end = _Call(self, "_join_updates")
                self._lease.handles.extend(self._fused.handles)

    @property
    def _may_be_sharded(self) -> bool:
        """True while parameters are whole that may be sharded before the first step: states would be too large."""
        return self._is_waiting and not any(is_sharded(entry.param) for entry in self._table.entries)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and the measurements of a probe since the last step."""
        self._join_updates()  # a backward may have failed behind updates that read these gradients
        super().zero_grad(set_to_none)
        if self._probe is not None:
            self._probe.discard()
        if self._fused is not None:
            self._fused.discard()

    # -- one update ---------------------------------------------------------------------------------------

    def _update(self) -> Tensor | None:
        if self._offload is not None:
            self._offload.update_device()
        sq_norms = super()._update()
        self._join_updates()
        return sq_norms

    def _update_in_backward(self, bucket: int) -> Tensor | None:
        """Update a bucket whose gradients are complete, and are freed afterwards."""
        self._refuse_if_ended()
        if self._fused is not None and not self._fused.done:
            self._meet_ranks()
            check_groups(self.param_groups, self._options)
        if self._offload is not None:
            self._offload.update_device()
        params = [entry.param for entry in self._current_entries() if entry.bucket == bucket]
        try:
            return self._update_together(bucket, params, functools.partial(self._scope, bucket))
        finally:
            if self._offload is not None:
                self._offload.hold(bucket, [local(p.grad) for p in params if p.grad is not None])

    def _join_updates(self) -> None:
        """Make the current stream wait for updates of states in host memory, before weights are read."""
        if self._offload is not None:
            self._offload.join()

    def accumulate(self) -> contextlib.AbstractContextManager[None]:
        """Accumulate gradients inside this context: its backwards are not the last of a step.

        ::

            with optimizer.accumulate():
                model(first_half).loss.backward()
            model(second_half).loss.backward()
            optimizer.step()

        Needed with ``fused_backward`` only. Otherwise, and while probing, it does nothing.
        """
        return contextlib.nullcontext() if self._fused is None else self._fused.accumulate()

    def _current_entries(self) -> list[ParamEntry]:
        """Return the records of all parameters, in the current order of the groups."""
        if not self._table.sync(self.param_groups):
            self._adopt_replaced()
        return self._table.entries

    def _adopt_replaced(self) -> None:
        """Begin anew with parameters that were replaced one by one, as `accelerate` does when it shards a model.

        Raises:
            ParameterError: the parameters are others, or the optimizer has taken steps.
        """
        old = self._table
        new = old.successors(self.param_groups)
        if self.step_count:
            raise ParameterError(
                "the parameters of this optimizer were replaced after its first step: construct the optimizer anew"
            )
        layer_of = {new[p]: layer for p, layer in old.layer_of.items()}
        trainable = {new[p]: on for p, on in old.trainable.items()}
        self._tied_params = {new[p] for p in self._tied_params if p in new}
        self._start(layer_of, trainable)
        self.state.clear()
        self._lease.handles.extend(old.lease.handles)
        old.lease.handles = []  # hooks of the model stay
        old.lease.end()

    def _drop_removed_params(self) -> None:
        """Adapt the parts to parameters that the user has removed from the groups since the last step."""
        self._current_entries()
        if not self._table.removed:
            return
        self._tied_params -= self._table.removed
        self._table.removed = set()
        self._scheduler.recount(self._table.sizes)
        self._rebuild_store()
        self._switch_parameters()

    def _scope(self, bucket: int | None = None) -> Scope:
        """Return the scope of a plan: active parameters with gradients, of a bucket or of all."""
        self._ensure_capacity()
        self._prepare_states_for_offload()
        entries = []
        for entry in self._current_entries():
            if entry.param.grad is None or bucket not in (None, entry.bucket):
                continue
            if entry.is_active and entry.can_train:
                entries.append(entry)
            else:
                # Set by the user, or before a checkpoint was loaded; or of a parameter that the user has just unfrozen,
                # which the store does not have yet: in every mode it trains from the next step on.
                entry.param.grad = None
        residency: Residency = InPlace()
        buckets = [0]
        if self._offload is not None:
            stored = {entry.bucket for entry in entries if entry.shard in self._offload}
            residency = self._offload
            buckets = [b for b in self._update_order(range(len(self._layers))) if b in stored]
        return Scope(entries, len(self._layers) + 1, residency, buckets)

    # -- states in host memory ------------------------------------------------------------------------------

    def _rebuild_store(self) -> None:
        """Create a store for the states of all trainable parameters, and move states there; atomic."""
        if self._may_be_sharded:
            return
        buckets = buckets_of(self._table.entries, self.param_groups, self.state, self._options)
        if self._offload is None and self._config.offload == "auto":
            self._mode = choose_offload(
                buckets, all(self._takes_kernel(entry) for entry in self._table.entries if entry.can_train)
            )
        if self._mode != "none":
            before = self._offload
            if before is not None:
                before.drain()
            config = replace(self._config, offload=self._mode)
            self._offload = self._states.storage = OffloadManager(buckets, config, before)
            if before is not None:
                before.close()
        self._observed_order = []
        self._plans.clear()
        for group, p in self._members():
            if "step" in self.state.get(p, ()):
                self._states.move_to_param(self.state[p], group, local(p))

    def _ensure_capacity(self) -> None:
        """Rebuild the store if it lacks room for a state, after a change of groups or dtypes."""
        if self._offload is None:
            return
        buckets = buckets_of(self._current_entries(), self.param_groups, self.state, self._options)
        if not self._offload.store.has_room_for(buckets):
            for entry in self._table.entries:
                check_state_shapes(self.state.get(entry.param, {}), entry.shard, entry.index)
            self._rebuild_store()

    def _prepare_states_for_offload(self) -> None:
        """Check that all states in the store can be updated there, and clone those that are in another's place."""
        if self._offload is None:
            return
        for entry in self._table.entries:
            if entry.shard in self._offload and not self._takes_kernel(entry):
                raise ConfigError(
                    f"parameter {entry.index} is in a group with settings that the kernels do not support "
                    "(differentiable, capturable, decoupled_weight_decay=False, or betas in tensors on a device), "
                    "and states in host memory need the kernels: use offload='none', or other settings"
                )
        self._offload.clone_misplaced(
            {local(p): self.state[p] for _, p in self._members() if p in self.state}
        )

    def _takes_kernel(self, entry: ParamEntry) -> bool:
        return takes_kernel(self.param_groups[entry.group], entry.param, self._options)

    def _restore(self, saved: dict[str, Any]) -> None:
        self._ensure_capacity()
        super()._restore(saved)

    def _reset_caches(self) -> None:
        ranks = self.__dict__.get("_ranks")  # a load, also one that is refused, changes no parameters
        super()._reset_caches()
        self._ranks = ranks
        self._states.storage = self.__dict__.get("_offload")

    def _update_order(self, active: Sequence[int]) -> list[int]:
        """Return the active buckets in the order of updates: as last observed, or as expected of backward."""
        training = {
            entry.bucket
            for entry in self._table.entries
            if entry.can_train and (entry.layer in active or entry.layer == len(self._layers))
        }
        outside = sorted((bucket for bucket in training if bucket >= len(self._layers)), reverse=True)
        order = [*outside[:-1], *sorted(training.intersection(active), reverse=True), *outside[-1:]]
        return self._observed_order if sorted(self._observed_order) == sorted(order) else order

    # -- parameters -----------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters of the model.

        Raises:
            ParameterError: parameters that do not belong to the model, or the optimizer is a copy.
            ConfigError: ``min_probability`` too high for the new number of layers.
        """
        if "_table" not in self.__dict__:  # torch's constructor adds the first groups
            super().add_param_group(param_group)
            return
        self._refuse_if_ended()
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        params = [entry[1] if isinstance(entry, tuple) else entry for entry in given]
        self._current_entries()
        known, num_groups = self._table, len(self.param_groups)
        layer_of = {**known.layer_of, **dict(zip(params, self._assign_layers(params), strict=True))}
        trainable = {**known.trainable, **dict(zip(params, trainable_flags(params), strict=True))}
        try:
            super().add_param_group({**param_group, "params": given})
            self._table = ParamTable(self.param_groups, layer_of, trainable, len(self._layers))
            self._config.check_layers(sum(size > 0 for size in self._table.sizes))
            self._rebuild_store()
        except Exception:
            self._table = known
            del self.param_groups[num_groups:]
            raise
        self._table.removed = known.removed
        self._scheduler.recount(self._table.sizes)
        self._are_ranks_known = False
        handles = known.lease.handles
        known.lease.handles = []  # the new lease ends the old one, and takes over its hooks
        self._table.take_lease(self, trainable)
        self._lease.handles = handles
        self._switch_parameters()

    def restart(self) -> None:
        """Begin again, as a new optimizer: with the probe, and without moments. Weights stay as they are.

        For a training that starts again with the same optimizer, as after a batch size that was too large.
        """
        self._refuse_if_ended()
        self.zero_grad()
        self.state.clear()
        self._sq_norms = None
        self._scheduler.load_state_dict(self._scheduler.beginning)
        self._rebuild_store()
        self._switch_parameters()

    def release(self) -> None:
        """Restore ``requires_grad`` as the user has set it, and remove all hooks."""
        self._join_updates()
        if self._probe is not None:
            self._probe.discard()
        self._lease.end()
        self._probe = None

    # -- state dicts and copies -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's AdamW layout, with the state of the method in ``param_groups[0]["grass"]``.

        Parameters that were never stepped have an empty state, so `torch.optim.AdamW` can load the dict too, and
        initializes them at their first step. In `torch.distributed.checkpoint`, which needs the state of every
        parameter, they have zeros on the CPU.
        """
        if self._offload is not None:
            self._offload.drain()
        state_dict = super().state_dict()
        state_dict["param_groups"][0]["grass"] = self._method_state()
        needs_zeros = state_dicts.is_for_distributed_checkpoint()
        for index, entry in enumerate(self._current_entries()):
            if entry.can_train:
                state = state_dicts.drop_zero_state(state_dict["state"].get(index, {}))
                if needs_zeros and "step" not in state:
                    group = self.param_groups[entry.group]
                    zeros = state_dicts.zero_state(group, entry.shard, self._options)
                    state = {
                        **{key: as_shard_of(entry.param, value) for key, value in zeros.items()},
                        **state,
                    }
                state_dict["state"][index] = state
        return state_dict

    def _method_state(self) -> dict[str, Any]:
        method = self._scheduler.state_dict()
        if self._fused is not None:
            # of a constant shape, like the rest of the method's state
            torn = [*self.torn_layers, *[-1] * (self._config.active_layers + 1)]
            method["torn"] = torch.tensor(torn[: self._config.active_layers + 1], device="cpu")
        return method

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, and continue exactly where it was taken, in any phase.

        From a state dict of `torch.optim.AdamW` moments are loaded, and the method starts with the probe, with a
        warning.

        Raises:
            StateMismatchError: the state dict is of another model, layer map or `GrassConfig`. Nothing has been
                changed then.
        """
        self._join_updates()
        given = state_dict
        state_dict, method = state_dicts.split_method(given)
        state_dicts.check_structure(state_dict, self.param_groups, self._options)
        entries = self._current_entries()
        self._adopt_requires_grad()
        if method is not None:
            self._scheduler.check(method)
            expected = {entry.param for entry in entries if entry.can_train}
            state_dicts.check_complete(given, self.param_groups, expected)
        super().load_state_dict(state_dict)
        if method is None:
            warnings.warn(
                "the state dict is of a plain AdamW: moments are loaded, the method starts at its beginning",
                stacklevel=2,
            )
            self._scheduler.load_state_dict(self._scheduler.beginning)
        else:
            self._load_method(method)
        self._are_ranks_known = False  # they may have loaded different states
        self._switch_parameters()

    def _load_method(self, method: dict[str, Any]) -> None:
        self._scheduler.load_state_dict(method)
        torn = [layer for layer in method["torn"].tolist() if layer >= 0] if "torn" in method else []
        if torn:
            warnings.warn(
                f"the state was saved inside a step that did not end: layers {torn} are one update ahead of the "
                "others; weights, moments and step counters of each are consistent",
                stacklevel=4,
            )

    def __getstate__(self) -> dict[str, Any]:
        if self._offload is not None:
            self._offload.drain()
        entries = self._current_entries()
        return {
            **super().__getstate__(),
            "grass_copy": {
                "config": self._config,
                "layers": self._layers,
                "layer_of": [entry.layer for entry in entries],
                "trainable": [self._lease.is_trainable(entry.param) for entry in entries],
                "tied": [entry.param in self._tied_params for entry in entries],
                "method": self._method_state(),
            },
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        copied = state.get("grass_copy")
        super().__setstate__({key: value for key, value in state.items() if key != "grass_copy"})
        if copied is None:  # called by torch's load_state_dict
            return
        self._config, self._layers, self._model_ref = copied["config"], copied["layers"], None
        members = [p for _, p in self._members()]
        self._tied_params = {p for p, tied in zip(members, copied["tied"], strict=True) if tied}
        layer_of = dict(zip(members, copied["layer_of"], strict=True))
        trainable = dict(zip(members, copied["trainable"], strict=True))
        self._start(layer_of, trainable, reads_weights=False)
        self._load_method(copied["method"])
        self._switch_parameters()

    # -- torch.distributed.checkpoint -----------------------------------------------------------------------

    def _is_dcp_init_step(self) -> bool:
        """Return if this is the step by which `torch.distributed.checkpoint` initializes the state of an optimizer.

        It sets zero gradients and a learning rate of 0, steps once, and then loads the state of all parameters that
        require grad.
        """
        if self.step_count or (self._probe is not None and self._probe.fired):
            return False
        return state_dicts.has_zero_gradients(self.param_groups)

    def _init_state_for_dcp(self) -> None:
        """Create the state of all trainable parameters, which then require grad until the next switch."""
        trainable = [entry for entry in self._current_entries() if entry.can_train]
        for entry in trainable:
            self._states.allocate(self.state[entry.param], self.param_groups[entry.group], entry.shard)
        params = {entry.param for entry in trainable}
        self._lease.switch(params.__contains__)


def _tell_if_untrained(schedule: Schedule) -> None:
    """Warn about an optimizer that has taken steps, but none that updates weights."""
    if 0 < schedule.step_count <= schedule.probe_steps:
        _logger.warning(
            "GrassAdamW has updated no weights: all %d steps belonged to the probe, which takes %d; take more steps, "
            "or pass a config with fewer probe_steps, as GrassConfig.for_run(num_steps) returns",
            schedule.step_count,
            schedule.probe_steps,
        )


class _Call:
    """Hook that calls a method of an optimizer, which it does not keep alive; a copy of it does nothing."""

    def __init__(self, optimizer: GrassAdamW | None = None, method: str = "") -> None:
        self._optimizer_ref = None if optimizer is None else weakref.ref(optimizer)
        self._method = method

    def __call__(self, *args: Any) -> None:
        optimizer = None if self._optimizer_ref is None else self._optimizer_ref()
        if optimizer is not None:
            getattr(optimizer, self._method)()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Call, ()
