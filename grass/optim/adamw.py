"""AdamW: `torch.optim.AdamW` with one fused pass over parameters, gradients and moments.

One difference is visible in the state: moments of bfloat16 and float16 parameters are float32, and stay float32
through `load_state_dict` (torch casts them to the parameter's dtype).
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from grass.errors import GrassError, StateMismatchError
from grass.optim.checks import check_entries, check_states, refuse_in_capture, refuse_sparse
from grass.optim.hyperparameters import settings_of
from grass.optim.param_entry import ParamEntry
from grass.optim.sharding import Ranks, as_shard_of, is_sharded, local, ranks_of, shard_for
from grass.optim.states import HYPERPARAMETERS, Options, StateMaker, own_keys
from grass.optim.step_plan import InPlace, Reading, Scaler, Scope, StepPlan, read_step

_logger = logging.getLogger(__name__)


class AdamW(torch.optim.AdamW):
    """Drop-in replacement of `torch.optim.AdamW`.

    With parameter p, gradient g, moments m (``exp_avg``) and v (``exp_avg_sq``) and counter t (``step``)::

        p = p (1 - lr weight_decay)
        m = m + (1 - beta1) (g - m)
        v = beta2 v + (1 - beta2) g^2
        p = p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Args:
        params: parameters or parameter groups, as for every torch optimizer.
        lr, betas, eps, weight_decay, amsgrad, maximize: as for `torch.optim.AdamW`.
        foreach, fused: accepted and checked as in torch; they do not select the implementation: float32, bfloat16
            and float16 parameters are updated by the kernels of `grass_kernels`.
        capturable: allow steps to be captured in a CUDA graph, after a first step outside of it. A replay reads
            gradients and parameters at the captured addresses; ``lr`` is the captured number, or the current value
            if it is a tensor on the device.
        differentiable: let autograd run through the step, by torch's functional AdamW, with moments of the
            parameter's dtype.
        state_dtype: dtype of the moments of float32, bfloat16 and float16 parameters: ``torch.float32`` (None) or
            ``torch.bfloat16``. Moments of other parameters have the parameter's dtype.
        master_weights: store the 16 bits that a bfloat16 parameter lacks of its float32 value, as int16
            ``remainder`` in its state: updates are bitwise those of float32 parameters. The parameter itself is
            the nearest bfloat16. A write to it from outside is respected to within half a unit in the last place.
        stochastic_rounding: round bfloat16 parameters stochastically, without bias. Random bits depend only on the
            parameter's position among all parameters, its step and the element, so runs are reproducible.
        max_grad_norm: clip the norm of all gradients to this value inside the step. Gradients are only read. A
            norm that is not finite (also if squares overflow float32) skips the step, step counters included.

    Between steps parameters, gradients and states may be moved, replaced, loaded or dropped.

    Complex and float64 parameters, betas in tensors on a device and groups with ``decoupled_weight_decay=False`` are
    updated by torch's functional AdamW. Gradients are read-only: with ``fused=True`` and a GradScaler they are unscaled
    inside the step, and not rewritten.

    Raises:
        ValueError, RuntimeError, TypeError: as from `torch.optim.AdamW` for the same mistake; ValueError for
            options that exclude each other, and for float16 parameters with options for bfloat16.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
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
        self._options = Options(state_dtype, master_weights, stochastic_rounding, max_grad_norm)
        self._options.check()
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._graphs: list[object] = []  # buffers that captured steps read
        self._reset_caches()

    def __repr__(self) -> str:
        defaults = Options._field_defaults
        options = {key: v for key, v in self._options._asdict().items() if v != defaults[key]}
        text = super().__repr__()
        if options:
            lines = "".join(f"    {key}: {value}\n" for key, value in options.items())
            text = f"{text[:-1]}Options\n{lines})"
        return text

    def _reset_caches(self) -> None:
        """Drop what one step caches for the next."""
        self._states = StateMaker(self._options)
        self._plans: dict[object, StepPlan] = {}  # by the name of the parameters that are updated together
        self._sq_norms: Tensor | None = None
        self._is_sharded = self._norms_are_local = False
        self._ranks: Ranks | None = None  # processes over which norms are summed

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch reads the step counter of every entry; entries with only a remainder or keys of the user have none
        entries = state["state"]
        stepped = {p: entry for p, entry in entries.items() if isinstance(entry, dict) and "step" in entry}
        super().__setstate__({**state, "state": stepped})
        self.state = entries
        self.__dict__.setdefault("_graphs", [])
        self._reset_caches()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as every torch optimizer does."""
        super().add_param_group(param_group)
        try:
            self._options.check_group(self.param_groups[-1])
            for p, name in self._named(self.param_groups[-1:]):
                self._options.check_param(p, name)
        except ValueError:
            self.param_groups.pop()
            raise

    def _named(self, groups: list[dict[str, Any]]) -> list[tuple[Tensor, str]]:
        """Return the parameters of these groups with their ``param_names``, or positions among all parameters."""
        positions = {p: position for position, (_, p) in enumerate(self._members())}
        return [
            (p, name)
            for group in groups
            for p, name in zip(
                group["params"],
                group.get("param_names") or [f"parameter {positions[p]}" for p in group["params"]],
                strict=True,
            )
        ]

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients of the last step, before clipping: float32 scalar on the device; None before a step.

        Raises:
            GrassError: parameters are sharded, and nothing has summed the norms over the ranks.
        """
        sq_norms = self._sq_norms_of_all_ranks()
        return None if sq_norms is None else sq_norms.sum().sqrt()

    @property
    def layer_grad_norms(self) -> Tensor | None:
        """Gradient norm of each parameter in the last step: float32 [parameters] on the device, 0 without gradient.

        Without layers each parameter tensor counts as one, in the order of ``param_groups``.

        Raises:
            GrassError: as for `grad_norm`.
        """
        sq_norms = self._sq_norms_of_all_ranks()
        return None if sq_norms is None else sq_norms.sqrt()

    def _sq_norms_of_all_ranks(self) -> Tensor | None:
        if self._sq_norms is not None and self._norms_are_local:
            raise GrassError(
                "gradient norms of sharded parameters are not summed over the ranks, since no part of the optimizer "
                "needs them: pass max_grad_norm, which may be as large as you like"
            )
        return self._sq_norms

    # Any: torch declares closures that return a float, but they return tensors
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: clears gradients, computes the loss, calls backward and returns the loss.

        Returns:
            The result of the closure, or None.
        """
        if torch.compiler.is_compiling():
            return self._step_outside_graph(closure)
        return self._step(closure)

    @torch._disable_dynamo  # torch.compiler.disable would import the compiler with this module
    def _step_outside_graph(self, closure: Callable[[], Any] | None) -> Any:
        """`step` in a compiled function: it runs outside of the graph, which cannot use memory addresses."""
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        """`step` without its hooks."""
        self._check_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._sq_norms = self._update()
        self._norms_are_local = self._is_sharded and self._ranks is None
        return loss

    def _check_capture(self) -> None:
        """Raise for a step in a graph capture without ``capturable``, by torch's check, which was renamed."""
        check = getattr(self, "_accelerator_graph_capture_health_check", None)
        (check or self._cuda_graph_capture_health_check)()

    # -- one update ---------------------------------------------------------------------------------------

    def _update(self) -> Tensor | None:
        """Update all parameters that have gradients; see `_update_together`."""
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        return self._update_together("all", params, self._scope)

    def _scope(self) -> Scope:
        """Return the scope of a plan: all parameters with gradients, each as a layer of its own."""
        members = [(index, p) for index, group in enumerate(self.param_groups) for p in group["params"]]
        entries = [ParamEntry(p, group, i, i) for i, (group, p) in enumerate(members) if p.grad is not None]
        return Scope(entries, len(members), InPlace(), [0])

    def _update_together(
        self, name: object, params: Sequence[Tensor], scope: Callable[[], Scope]
    ) -> Tensor | None:
        """Update those of some parameters that have gradients, by the plan that is kept under a name while it is valid.

        Args:
            name: name of the plan.
            params: the parameters.
            scope: function that returns the scope of a new plan: those of `params` that have gradients.

        Returns:
            float32 [layers], squared norms of the gradients by layer; None without any gradient.
        """
        plan, reading = self._plans.get(name), None
        if plan is not None:
            # what cannot be read is checked, and refused by name, when the plan is built
            with contextlib.suppress(KeyError, TypeError, RuntimeError, AttributeError):
                reading = read_step(params, self.state, self._optional_kinds())
        if plan is None or reading is None or not plan.is_valid(reading, self.param_groups):
            self._plans.pop(name, None)
            built = self._build_plan(params, scope)
            if built is None:
                return None
            plan, reading = built
            self._plans[name] = plan
        scaler = Scaler(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        sq_norms, kept = plan.run(reading, self.param_groups, scaler, self._ranks)
        self._graphs += kept
        return sq_norms

    def _build_plan(
        self, params: Sequence[Tensor], scope_of: Callable[[], Scope]
    ) -> tuple[StepPlan, Reading] | None:
        """Check the tensors of a step, create missing states, and build the plan; None without any gradient."""
        refuse_in_capture()
        refuse_sparse(self.param_groups)
        for group in self.param_groups:
            settings_of(group)  # raises unless there are two betas
            self._options.check_group(group)
        scope = scope_of()
        if not scope.entries:
            return None
        check_entries(scope.entries, self.param_groups, self._options)
        check_states(scope.entries, self.param_groups, self.state, self._options)
        params_in_scope = [entry.param for entry in scope.entries]
        self._is_sharded = any(is_sharded(p) and p.device_mesh.size() > 1 for p in params_in_scope)  # type: ignore[attr-defined]
        self._ranks = self._find_ranks(params_in_scope)
        for entry in scope.entries:
            group, state = self.param_groups[entry.group], self.state[entry.param]
            self._states.allocate(state, group, entry.shard)
            self._states.move_to_param(state, group, entry.shard)
        try:
            reading = read_step(params, self.state, self._optional_kinds())
        except (
            RuntimeError
        ):  # no addresses, as in transformations of torch.func: the plan is for this step only
            reading = read_step(params, self.state, self._optional_kinds(), with_key=False)
        _logger.debug("new plan for %d parameters", len(scope.entries))
        return StepPlan(reading, scope, self.param_groups, self._options), reading

    def _find_ranks(self, params: Sequence[Tensor]) -> Ranks | None:
        """Return the processes over which norms are summed, which only clipping needs."""
        return ranks_of(params) if self._is_sharded and self._options.max_grad_norm is not None else None

    def _optional_kinds(self) -> list[str]:
        """Return the kinds of states that some parameters have beside two moments and a step counter."""
        kinds = ["remainder"] if self._options.master_weights else []
        if any(group["amsgrad"] for group in self.param_groups):
            kinds.append("max_exp_avg_sq")
        return kinds

    # -- state dicts ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's layout. States of sharded parameters are DTensors, as in torch."""
        state_dict = super().state_dict()
        for index, (group, p) in enumerate(self._members()):
            if is_sharded(p) and index in state_dict["state"]:
                state = state_dict["state"][index]
                own = own_keys(state, group, local(p), self._options)
                state_dict["state"][index] = {
                    key: as_shard_of(p, value) if key in own else value for key, value in state.items()
                }
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer or of `torch.optim.AdamW`.

        Moments keep the precision they have in the dict: torch would round float32 moments of a bfloat16 parameter
        to bfloat16.
        """
        # The user's hooks may replace the dict, and read what was loaded: ours runs last of the pre-hooks, and first
        # of the post-hooks.
        seen: list[dict[str, Any]] = []
        handles = [
            self.register_load_state_dict_pre_hook(lambda _, given: self._strip_states(given, seen)),
            self.register_load_state_dict_post_hook(lambda _: self._restore(seen[-1]), prepend=True),
        ]
        state, groups = self.state, self.param_groups
        try:
            super().load_state_dict(state_dict)
        except Exception:  # leave the optimizer as it was
            self.state, self.param_groups = state, groups
            self._reset_caches()
            raise
        finally:
            for handle in handles:
                handle.remove()

    def _strip_states(self, given: dict[str, Any], seen: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the dict without our states, which torch would cast and share; `_restore` copies them."""
        seen.append(given)
        for number, group in enumerate(given["param_groups"]):
            missing = [key for key in HYPERPARAMETERS if key not in group]
            if missing:
                raise StateMismatchError(
                    f"group {number} of the state dict has no {missing[0]}: it is of another optimizer; load the state "
                    "dict of an AdamW"
                )
        keys = [key for group in given["param_groups"] for key in group["params"]]
        known = set(keys)
        kept = dict(given["state"])
        for key, (group, p) in zip(keys, self._members(), strict=False):  # torch refuses other lengths
            entry = kept.get(key)
            if isinstance(entry, dict):
                own = ("step", *own_keys(entry, group, p, self._options))
                kept[key] = {name: value for name, value in entry.items() if name not in own}
        return {
            **given,
            "state": {key: entry for key, entry in kept.items() if key not in known or entry},
        }

    @torch.inference_mode(False)  # tensors created in inference mode cannot be written to outside of it
    def _restore(self, saved: dict[str, Any]) -> None:
        """Copy the states of a state dict in their saved precision."""
        saved_ids = [key for group in saved["param_groups"] for key in group["params"]]
        found = []
        for key, (group, p) in zip(saved_ids, self._members(), strict=True):
            loaded = saved["state"].get(key)
            if loaded:
                found.append((group, p, {name: shard_for(p, value, name) for name, value in loaded.items()}))
        for group, p, loaded in found:  # after all have been checked
            self._states.restore(self.state[p], group, local(p), loaded)

    def _members(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Iterate over (group, parameter), in the order of the indices in `state_dict`."""
        for group in self.param_groups:
            for p in group["params"]:
                yield group, p
