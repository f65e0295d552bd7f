"""AdamW: `torch.optim.AdamW` with one fused pass over parameters, gradients and moments.

What a swapper sees differs in one thing: moments of bfloat16 and float16 parameters are float32, and
stay float32 through `load_state_dict` (torch casts them to the parameter's dtype).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw
from torch.optim.optimizer import ParamsT, _device_dtype_check_for_fused

import grass_kernels

_LOW_PRECISION = (torch.bfloat16, torch.float16)


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
        capturable: float32 parameters take torch's own capturable path.
        differentiable: handed to torch's own path, with moments of the parameter's dtype.
        state_dtype: dtype of the moments of bfloat16 and float16 parameters; None and ``torch.float32``
            mean float32. Other parameters' moments have the parameter's dtype.

    Complex and float64 parameters, and tensor betas, take torch's own functional AdamW. Gradients are
    read-only: with a GradScaler they are unscaled inside the step, not rewritten.

    Raises:
        ValueError, RuntimeError, TypeError: as `torch.optim.AdamW` does for the same mistake.
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
    ) -> None:
        if state_dtype not in (None, torch.float32):
            raise ValueError(
                f"state_dtype must be None or torch.float32, not {state_dtype}: the kernels keep float32 moments"
            )
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

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """GradScaler's question whether `step` reads ``grad_scale`` and ``found_inf`` itself."""
        return all(_takes_kernel(group, p) for group in self.param_groups for p in group["params"])

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
        _refuse_uncapturable(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        refuse_sparse(self.param_groups)
        for group in self.param_groups:
            self._update(group, [p for p in group["params"] if p.grad is not None])
        return loss

    def _update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        layer_index: list[int] | None = None,
        sq_norms: Tensor | None = None,
    ) -> None:
        """Update parameters of one group that have gradients, each by the path its dtype takes.

        Args:
            group: hyperparameters.
            params: parameters of the group, each with a gradient.
            layer_index: the layer of each parameter, for ``sq_norms``.
            sq_norms: float32 [layers], to which the gradients' squared norms by layer are added.
        """
        for p in params:
            self._allocate(group, p)
        layers = layer_index or [0] * len(params)
        for takes_kernel in (True, False):
            rows = [i for i, p in enumerate(params) if _takes_kernel(group, p) == takes_kernel]
            if not rows:
                continue
            bucket, bucket_layers = [params[i] for i in rows], [layers[i] for i in rows]
            if not takes_kernel:
                self._update_by_torch(group, bucket)
                if sq_norms is not None:
                    _add_sq_norms(sq_norms, bucket, bucket_layers)
                continue
            for members in _by_device(bucket):
                self._update_by_kernel(
                    group,
                    [bucket[i] for i in members],
                    [bucket_layers[i] for i in members],
                    sq_norms,
                )

    def _update_by_kernel(
        self, group: dict[str, Any], params: list[Tensor], layers: list[int], sq_norms: Tensor | None
    ) -> None:
        device = params[0].device
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        measured = None if sq_norms is None else torch.empty(sq_norms.shape, device=device)
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        with torch.no_grad():
            grass_kernels.masked_adamw_(
                params,
                [p.grad for p in params],  # type: ignore[misc]
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
                layer_index=layers,
                sq_norms=measured,
                lr=group["lr"],
                betas=(float(beta1), float(beta2)),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                maximize=group["maximize"],
                max_exp_avg_sqs=[s["max_exp_avg_sq"] for s in states] if group["amsgrad"] else None,
                grad_scale=None if grad_scale is None else grad_scale.to(device, non_blocking=True),
                found_inf=None if found_inf is None else found_inf.to(device, non_blocking=True),
            )
            if sq_norms is not None and measured is not None:
                sq_norms += measured.to(sq_norms.device, non_blocking=True)

    def _update_by_torch(self, group: dict[str, Any], params: list[Tensor]) -> None:
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        with torch.set_grad_enabled(group["differentiable"]):
            torch_adamw(
                params,
                [p.grad for p in params],  # type: ignore[misc]
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
                [state["step"] for state in states],
                foreach=group["foreach"],
                capturable=group["capturable"],
                differentiable=group["differentiable"],
                fused=group["fused"],
                has_complex=any(torch.is_complex(p) for p in params),
                amsgrad=group["amsgrad"],
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
            )

    def _allocate(self, group: dict[str, Any], p: Tensor) -> None:
        """Give a parameter its state, in torch's layout, if it has none."""
        state = self.state[p]
        if state:
            return
        if group["fused"]:
            _device_dtype_check_for_fused(p)
        state["step"] = torch.zeros((), dtype=torch.float32, device=_step_device(group, p))
        for key in moment_keys(group):
            dtype = moment_dtype(p, group["differentiable"])
            state[key] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this optimizer's or `torch.optim.AdamW`'s `state_dict` gave.

        Moments are taken from the dict in their own precision: torch would first round float32 moments of a
        bfloat16 parameter to bfloat16.
        """
        # The user's hooks may replace the dict, and look at what was loaded: ours runs after all that come
        # before loading, and before all that come after it.
        seen: list[dict[str, Any]] = []
        handles = [
            self.register_load_state_dict_pre_hook(lambda _, given: seen.append(given)),
            self.register_load_state_dict_post_hook(lambda _: self._restore(seen[-1]), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _restore(self, saved: dict[str, Any]) -> None:
        """Put moments and counters of a state dict, as they were saved, in place of what torch made of them."""
        saved_ids = [key for group in saved["param_groups"] for key in group["params"]]
        for key, (group, p) in zip(saved_ids, self._members(), strict=True):
            loaded = saved["state"].get(key)
            if not loaded:
                continue
            state = self.state[p]
            for name in moment_keys(group):
                if name in loaded:
                    dtype = moment_dtype(p, group["differentiable"])
                    state[name] = loaded[name].to(device=p.device, dtype=dtype)
            if "step" in state:
                step = torch.as_tensor(loaded["step"], dtype=torch.float32)
                state["step"] = step.to(_step_device(group, p), copy=True).reshape(())

    def _members(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Each parameter with its group, in the order of `state_dict`'s indices."""
        for group in self.param_groups:
            for p in group["params"]:
                yield group, p


def _takes_kernel(group: dict[str, Any], p: Tensor) -> bool:
    """Whether a parameter is updated by our kernels or by torch's own functional AdamW."""
    if group["differentiable"] or not grass_kernels.is_supported(p.dtype, p.dtype, moment_dtype(p)):
        return False
    # Both are torch's to do where torch can; it has no path for float32 moments of low precision.
    torchs_own = group["capturable"] or isinstance(group["betas"][0], Tensor)
    return p.dtype in _LOW_PRECISION or not torchs_own


def moment_keys(group: dict[str, Any]) -> tuple[str, ...]:
    """Names of a parameter's moments in its state."""
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")


def moment_dtype(p: Tensor, differentiable: bool = False) -> torch.dtype:
    """float32 for parameters of low precision, else the parameter's own, as torch's differentiable path needs."""
    return torch.float32 if p.dtype in _LOW_PRECISION and not differentiable else p.dtype


def _step_device(group: dict[str, Any], p: Tensor) -> torch.device:
    """Where the step counter lives: beside the parameter for kernels, else where torch wants it."""
    on_device = _takes_kernel(group, p) or group["capturable"] or group["fused"]
    return p.device if on_device else torch.device("cpu")


def _by_device(params: list[Tensor]) -> list[list[int]]:
    """Positions of the parameters, one list a device."""
    places: dict[torch.device, list[int]] = {}
    for i, p in enumerate(params):
        places.setdefault(p.device, []).append(i)
    return list(places.values())


def _refuse_uncapturable(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a step in a graph capture without ``capturable``, as torch does. Its check has two names."""
    names = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))()


def refuse_sparse(groups: list[dict[str, Any]]) -> None:
    """Refuse sparse gradients as torch does, before anything is changed."""
    for group in groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(
                    "Adam does not support sparse gradients, please consider SparseAdam instead"
                )


def _add_sq_norms(sq_norms: Tensor, params: list[Tensor], layers: list[int]) -> None:
    """Squared gradient norms of parameters that torch updates, added to their layers."""
    for p, layer in zip(params, layers, strict=True):
        assert p.grad is not None
        sq_norms[layer] += sq_norm(p.grad).to(sq_norms.device, non_blocking=True)


@torch.no_grad()
def sq_norm(grad: Tensor) -> Tensor:
    """Squared norm of one gradient: float32, shape (), on its device; the kernels' own where they can."""
    if grass_kernels.is_supported(grad.dtype, grad.dtype, torch.float32):
        return grass_kernels.layer_sq_norms([grad], [0], 1)[0]
    return torch.linalg.vector_norm(grad).square().float()
