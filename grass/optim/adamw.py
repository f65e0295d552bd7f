"""AdamW: `torch.optim.AdamW` with one fused pass over parameters, gradients and moments.

What a swapper sees differs in one thing: moments of bfloat16 and float16 parameters are float32, and
stay float32 through `load_state_dict` (torch casts them to the parameter's dtype).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from grass.optim.checks import check_entries, check_states, refuse_in_capture, refuse_sparse
from grass.optim.hyperparameters import settings_of
from grass.optim.param_entry import ParamEntry
from grass.optim.states import STATE_KEYS, Options, StateMaker
from grass.optim.step_plan import InPlace, Reading, Residency, Scaler, StepPlan, read_step

_logger = logging.getLogger(__name__)


class AdamW(torch.optim.AdamW):
    """Drop-in replacement of `torch.optim.AdamW`.

    With parameter p, gradient g, moments m (``exp_avg``) and v (``exp_avg_sq``) and counter t (``step``)::

        p = p (1 - lr weight_decay)
        m = m + (1 - beta1) (g - m)
        v = beta2 v + (1 - beta2) g^2
        p = p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Args:
        params: parameters or groups of them, as for every torch optimizer.
        lr, betas, eps, weight_decay, amsgrad, maximize: as for `torch.optim.AdamW`.
        foreach, fused: accepted and checked as torch does; float32, bfloat16 and float16 parameters take
            this library's kernels whatever they say.
        capturable: the step can be captured in a CUDA graph, after one that was not. What a graph replays: gradients
            and parameters where they were, ``lr`` as it was, or as it is if it is a tensor on the device.
        differentiable: handed to torch's own path, with moments of the parameter's dtype.
        state_dtype: dtype of the moments of float32, bfloat16 and float16 parameters: ``torch.float32`` (None) or
            ``torch.bfloat16``. Other parameters' moments have the parameter's dtype.
        master_weights: keep the 16 bits that a bfloat16 parameter lacks of its float32 value, as int16
            ``remainder`` in its state: updates are bitwise float32's. The parameter itself is the nearest bfloat16.
            A write to it from outside is respected to within half a unit in its last place.
        stochastic_rounding: round bfloat16 parameters up or down by chance, right on average; what is drawn
            depends on the parameter's place among all, its step and the element, so runs can be repeated.
        max_grad_norm: scale gradients down to this norm of them all, inside the step: gradients are only read,
            and a norm that is not finite (also by squares that overflow float32) skips the step, counters included.

    Between steps parameters, gradients and states may be moved, replaced, loaded or dropped. Not detected: a parameter
    or state replaced by a negative view of itself.

    Complex and float64 parameters, betas in tensors on a device and groups with ``decoupled_weight_decay=False`` take
    torch's own functional AdamW. Gradients are read-only: with ``fused=True`` and a GradScaler they are unscaled
    inside the step, not rewritten.

    Raises:
        ValueError, RuntimeError, TypeError: as `torch.optim.AdamW` does for the same mistake; ValueError for
            options that exclude each other, or float16 parameters with options for bfloat16.
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
        self._graphs: list[object] = []  # read by captured steps
        self._reset_caches()

    def _reset_caches(self) -> None:
        """Start without what steps keep for the next."""
        self._states = StateMaker(self._options)
        self._plans: dict[int | None, StepPlan] = {}  # by bucket; None is all
        self._sq_norms: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch asks every entry for its counter, which those with the user's keys alone, or a remainder, lack
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
        """Parameters of these groups with the names that the user gave, or their places among all."""
        places = {p: place for place, (_, p) in enumerate(self._members())}
        return [
            (p, name)
            for group in groups
            for p, name in zip(
                group["params"],
                group.get("param_names") or [f"parameter {places[p]}" for p in group["params"]],
                strict=True,
            )
        ]

    @property
    def grad_norm(self) -> Tensor | None:
        """float32 scalar on the device: norm of all gradients of the last step, before clipping. None before one."""
        return None if self._sq_norms is None else self._sq_norms.sum().sqrt()

    @property
    def layer_grad_norms(self) -> Tensor | None:
        """float32 [parameters] on the device: gradient norms in the last step, 0 where there was none.

        An optimizer that knows no layers takes each parameter tensor for one, in the order of ``param_groups``.
        """
        return None if self._sq_norms is None else self._sq_norms.sqrt()

    # torch's own signature has a closure that returns a float; a tensor is what everybody returns
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: clears gradients, computes the loss, calls backward and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        if torch.compiler.is_compiling():
            return self._step_outside_graph(closure)
        return self._step(closure)

    @torch._disable_dynamo  # torch.compiler.disable would import the compiler with this module
    def _step_outside_graph(self, closure: Callable[[], Any] | None) -> Any:
        """`step` in a compiled function: addresses have no place in its graph."""
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        """`step` without its hooks."""
        self._check_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._sq_norms = self._update()
        return loss

    def _check_capture(self) -> None:
        """Refuse a step in a graph capture without ``capturable``, as torch does. Its check has two names."""
        check = getattr(self, "_accelerator_graph_capture_health_check", None)
        (check or self._cuda_graph_capture_health_check)()

    # -- one update ---------------------------------------------------------------------------------------

    _residency: Residency = InPlace()

    def _update(self, bucket: int | None = None) -> Tensor | None:
        """Update all parameters that have gradients, or those of a bucket.

        Returns:
            float32 [layers], squared norms of the gradients by layer; None without any gradient.
        """
        params = self._params_of(bucket)
        plan, reading = self._plans.get(bucket), None
        if plan is not None:
            try:
                reading = read_step(params, self.state, self._other_kinds())
            except (
                KeyError,
                TypeError,
                RuntimeError,
                AttributeError,
            ):  # a state or gradient that needs a closer look
                reading = None
        if plan is None or reading is None or not plan.is_valid(reading, self.param_groups):
            self._plans.pop(bucket, None)
            built = self._build_plan(params, bucket)
            if built is None:
                return None
            plan, reading = built
            self._plans[bucket] = plan
        scaler = Scaler(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        sq_norms, kept = plan.run(reading, self.param_groups, scaler)
        self._graphs += kept
        return sq_norms

    def _build_plan(self, params: Sequence[Tensor], bucket: int | None) -> tuple[StepPlan, Reading] | None:
        """Check parameters and gradients, complete states, and divide them; None without any gradient."""
        refuse_in_capture()
        refuse_sparse(self.param_groups)
        for group in self.param_groups:
            settings_of(group)  # two betas?
            self._options.check_group(group)
        entries, num_layers = self._entries_with_grads(bucket)
        if not entries:
            return None
        check_entries(entries, self.param_groups, self._options)
        check_states(entries, self.param_groups, self.state, self._options)
        for entry in entries:
            group, state = self.param_groups[entry.group], self.state[entry.param]
            self._states.allocate(state, group, entry.param)
            self._states.follow(state, group, entry.param)
        reading = read_step(params, self.state, self._other_kinds())
        buckets = self._buckets_of(entries)
        plan = StepPlan(
            reading, entries, self.param_groups, self._options, num_layers, self._residency, buckets
        )
        _logger.debug("new plan for %d parameters", len(entries))
        return plan, reading

    def _other_kinds(self) -> list[str]:
        """States that some parameters have beside the two moments and the counter."""
        kinds = ["remainder"] if self._options.master_weights else []
        if any(group["amsgrad"] for group in self.param_groups):
            kinds.append("max_exp_avg_sq")
        return kinds

    def _params_of(self, bucket: int | None) -> list[Tensor]:
        """All parameters; in subclasses that have buckets, those of one."""
        return list(chain.from_iterable(group["params"] for group in self.param_groups))

    def _entries_with_grads(self, bucket: int | None) -> tuple[list[ParamEntry], int]:
        """Records of parameters with gradients, and the number of layers: each parameter is one."""
        members = [(index, p) for index, group in enumerate(self.param_groups) for p in group["params"]]
        entries = [ParamEntry(p, group, i, i) for i, (group, p) in enumerate(members) if p.grad is not None]
        return entries, len(members)

    def _buckets_of(self, entries: Sequence[ParamEntry]) -> list[int]:
        """Buckets whose states pass through the residency, in the order of updates."""
        return [0]

    # -- checkpoints ------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this optimizer's or `torch.optim.AdamW`'s `state_dict` gave.

        Moments are taken from the dict in their own precision: torch would first round float32 moments of a
        bfloat16 parameter to bfloat16.
        """
        # The user's hooks may replace the dict, and look at what was loaded: ours runs after all that run before
        # loading, and before all that run after it.
        seen: list[dict[str, Any]] = []
        handles = [
            self.register_load_state_dict_pre_hook(lambda _, given: self._without_states(given, seen)),
            self.register_load_state_dict_post_hook(lambda _: self._restore(seen[-1]), prepend=True),
        ]
        state, groups = self.state, self.param_groups
        try:
            super().load_state_dict(state_dict)
        except Exception:  # nothing is lost
            self.state, self.param_groups = state, groups
            self._reset_caches()
            raise
        finally:
            for handle in handles:
                handle.remove()

    def _without_states(self, given: dict[str, Any], seen: list[dict[str, Any]]) -> dict[str, Any]:
        """Keep the dict, and leave to torch what is not ours: it would cast states, and share the dict's memory."""
        seen.append(given)
        params = {key for group in given["param_groups"] for key in group["params"]}
        theirs = {
            key: {k: v for k, v in entry.items() if k not in STATE_KEYS}
            if key in params and isinstance(entry, dict)
            else entry
            for key, entry in given["state"].items()
        }
        return {
            **given,
            "state": {key: entry for key, entry in theirs.items() if key not in params or entry},
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        """Copy the states of a state dict, as they were saved."""
        saved_ids = [key for group in saved["param_groups"] for key in group["params"]]
        for key, (group, p) in zip(saved_ids, self._members(), strict=True):
            loaded = saved["state"].get(key)
            if loaded:
                self._states.restore(self.state[p], group, p, loaded)

    def _members(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Each parameter with its group, in the order of `state_dict`'s indices."""
        for group in self.param_groups:
            for p in group["params"]:
                yield group, p
