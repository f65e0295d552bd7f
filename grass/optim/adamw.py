"""AdamW: `torch.optim.AdamW` with one fused pass over parameters, gradients and moments.

What a swapper sees differs in one thing: moments of bfloat16 and float16 parameters are float32, and
stay float32 through `load_state_dict` (torch casts them to the parameter's dtype).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from grass.offload.pipeline import Pipeline
from grass.optim.checks import check_rows, check_states, refuse_in_capture, refuse_sparse
from grass.optim.exact_weights import OutsideWrites, refuse_shared_counters
from grass.optim.states import Options, StateMaker, has_remainder, takes_kernel
from grass.optim.update import Scaler, update
from grass.optim.watching import CountedStates
from grass.optim.work import Row, Work, settings_of


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
            ``remainder`` in its state: updates are float32's to the bit. The parameter itself is the nearest
            bfloat16. Whoever writes to it in place starts anew from what was written. Not noticed are writes
            through ``.data`` of the parameter (a new ``.data`` is), and those around `load_state_dict` or to a copy,
            before the next step, which are taken for the loading of the model. Views of one buffer share a
            version counter, so parameters of several optimizers must not be such views.
        stochastic_rounding: round bfloat16 parameters up or down by chance, right on average; what is drawn
            depends on the parameter's place among all, its step and the element, so runs can be repeated.
        max_grad_norm: scale gradients down to this norm of them all, inside the step: gradients are only read,
            and a norm that is not finite (also by squares that overflow float32) skips the step, counters included.

    A step compares with the last by address, dtype, shape and strides: parameters, gradients and states may be moved,
    replaced, loaded or dropped between steps. Taken on trust is that what lies at the address of its last is no
    negative view unless that was one (autograd makes none there); and that who replaces tensors inside ``state[p]``
    by hand, or moves the memory below one (by resizing its storage), does so for the first parameter too or lets go of
    the old ones: to swap states that are kept, replace ``state[p]`` or use `load_state_dict`.

    Complex and float64 parameters, and tensor betas, take torch's own functional AdamW. Gradients are
    read-only: with a GradScaler they are unscaled inside the step, not rewritten.

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
        self.state = CountedStates(dict, self.state)
        self._graphs: list[object] = []  # what captured steps read
        self._forget()

    def _forget(self) -> None:
        """Begin without what steps find out and keep for the next."""
        self._states = StateMaker(self._options)
        self._works: dict[int | None, Work] = {}  # by what is updated at a time: None is all
        self._sq_norms: Tensor | None = None
        self._outside_writes = OutsideWrites()

    def __getstate__(self) -> dict[str, Any]:
        self._drop_stale_remainders()
        return {**super().__getstate__(), "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch asks every entry for its counter: one that keeps what it lacks of its exact value has none
        entries = state["state"]
        counted = {p: entry for p, entry in entries.items() if not isinstance(entry, dict) or "step" in entry}
        super().__setstate__({**state, "state": counted})
        self.state = CountedStates(dict, entries)
        self.__dict__.setdefault("_graphs", [])
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as every torch optimizer does."""
        super().add_param_group(param_group)
        try:
            for p, name in self._named(self.param_groups[-1:]):
                self._options.check_param(p, name)
            self._check_counters()
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

    def _check_counters(self) -> None:
        if self._options.master_weights:
            named = [
                (p, name) for p, name in self._named(self.param_groups) if has_remainder(p, self._options)
            ]
            refuse_shared_counters([p for p, _ in named], [name for _, name in named])

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

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """GradScaler's question whether `step` reads ``grad_scale`` and ``found_inf`` itself."""
        return all(
            takes_kernel(group, p, self._options) for group in self.param_groups for p in group["params"]
        )

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Ignored: torch's constructor sets it for fused=True, the answer depends on the parameters."""

    # torch's own signature has a closure that returns a float; a tensor is what everybody returns
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: clears gradients, computes the loss, calls backward and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        if torch.compiler.is_compiling():
            return self._step_beside_the_graph(closure)
        if self._is_watched():
            return self._watched_step(closure)
        return self._step(closure)

    # torch wraps every step in what only a profiler and hooks need, a tenth of what this one costs the host
    step.hooked = True  # type: ignore[attr-defined]

    def _is_watched(self) -> bool:
        """Whether there are hooks, or a profiler that wants to know where a step begins and ends."""
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()
        )

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        self._refuse_uncapturable()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._sq_norms = self._update()
        return loss

    _watched_step = torch.optim.Optimizer.profile_hook_step(_step)

    @torch._disable_dynamo  # torch.compiler.disable would import the compiler with this module
    def _step_beside_the_graph(self, closure: Callable[[], Any] | None) -> Any:
        """`step` in a compiled function: addresses are no matter of graphs."""
        return self.step(closure)

    def _refuse_uncapturable(self) -> None:
        """Refuse a step in a graph capture without ``capturable``, as torch does. Its check has two names."""
        check = getattr(self, "_accelerator_graph_capture_health_check", None)
        (check or self._cuda_graph_capture_health_check)()

    # -- one update ---------------------------------------------------------------------------------------

    _pipeline: Pipeline | None = None  # if states live in a store

    def _update(self, slot: int | None = None) -> Tensor | None:
        """Update all parameters that have gradients.

        Args:
            slot: only those of a slot, for subclasses that have such.

        Returns:
            float32 [layers], the squared norms of their gradients by layer; None if there were none.
        """
        groups = self._groups_of(slot)
        work = self._works.get(slot)
        if work is None or not work.holds(groups, self.state):
            self._leave_work(slot)
            work = self._works[slot] = self._arrange(groups, slot)
        if not work.rows:
            return None
        if self._options.master_weights:
            self._outside_writes.drop_stale(work, self.state, self._states)
        scaler = Scaler(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        sq_norms, kept = update(work, groups, self.state, scaler, self._pipeline)
        self._graphs += kept
        torch.autograd.graph.increment_version(work.written)
        if self._options.master_weights:
            work.versions_written = work.versions()
        return sq_norms

    def _arrange(self, groups: list[dict[str, Any]], slot: int | None) -> Work:
        """Find the parameters with gradients, complete their states, and divide them."""
        refuse_in_capture()
        refuse_sparse(groups)
        for group in groups:
            settings_of(group)  # two betas?
        rows, num_layers = self._rows(slot)
        check_rows(rows)
        if self._options.master_weights:
            self._outside_writes.begin(p for _, p in self._members() if "remainder" in self.state.get(p, ()))
        for row in rows:
            group, state = self.param_groups[row.group], self.state[row.param]
            self._states.allocate(state, group, row.param)
            self._states.follow(state, group, row.param)
        check_states(rows, self.param_groups, self.state, self._options)
        return Work(
            groups, self.state, rows, num_layers, self._states, self._pipeline, self._slots_of_states(rows)
        )

    def _slots_of_states(self, rows: list[Row]) -> list[int]:
        """Where in a store, for subclasses that have one, the states of rows are; in the order of updates."""
        return []

    def _groups_of(self, slot: int | None) -> list[dict[str, Any]]:
        """The groups as they are; in subclasses that have slots, with the parameters of one only."""
        return self.param_groups

    def _rows(self, slot: int | None = None) -> tuple[list[Row], int]:
        """The parameters with gradients, and how many layers there are: each parameter is one."""
        members = [(index, p) for index, group in enumerate(self.param_groups) for p in group["params"]]
        rows = [Row(index, p, seed, seed) for seed, (index, p) in enumerate(members) if p.grad is not None]
        return rows, len(members)

    def _leave_work(self, slot: int | None = None) -> None:
        """Forget how a step was divided, but not which versions of parameters it left."""
        work = self._works.pop(slot, None)
        if work is not None and work.versions_written is not None:
            self._outside_writes.leave(work)
            self._outside_writes.keep_only({p for _, p in self._members()})

    def _drop_stale_remainders(self) -> None:
        """Let states agree with what others have written to parameters since the last step."""
        self._outside_writes.drop_all(self._works.values(), self.state, self._states)

    # -- checkpoints ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state in torch's layout, as of what the parameters are now."""
        self._drop_stale_remainders()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this optimizer's or `torch.optim.AdamW`'s `state_dict` gave.

        Moments are taken from the dict in their own precision: torch would first round float32 moments of a
        bfloat16 parameter to bfloat16.
        """
        # The user's hooks may replace the dict, and look at what was loaded: ours runs after all that come
        # before loading, and before all that come after it.
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
            self._forget()
            raise
        finally:
            for handle in handles:
                handle.remove()

    def _without_states(self, given: dict[str, Any], seen: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Keep the dict; torch is not to bring states to the device that do not live there."""
        seen.append(given)
        return None if self._states.home is None else {**given, "state": {}}

    def _restore(self, saved: dict[str, Any]) -> None:
        """Put moments and counters of a state dict, as they were saved, in place of what torch made of them."""
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
