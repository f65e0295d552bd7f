"""Fallback backend: torch's functional AdamW, for what the kernels do not support (complex, float64, ...)."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from grass.optim.hyperparameters import check_settings
from grass_kernels import reference


class Fallback:
    """Backend of `grass.optim.step_plan.StepPlan` that updates parameters of one group by torch.

    Args:
        positions: indices of the parameters in a `Reading`.
        layers: layer of each parameter.
        group: index of the parameter group.
        num_layers: number of layers.
        device: device of the norms: that of the first parameter.
        max_grad_norm: norm that all gradients are clipped to.
    """

    def __init__(
        self,
        positions: Sequence[int],
        layers: Sequence[int],
        group: int,
        num_layers: int,
        device: torch.device,
        max_grad_norm: float | None,
    ) -> None:
        self._positions, self._layers, self._index, self._num_layers = positions, layers, group, num_layers
        self.device, self._max_grad_norm = device, max_grad_norm

    def prepare(self, groups: Sequence[dict[str, Any]]) -> None:
        """Check the hyperparameters of the group, before any group is updated."""
        self._group = group = groups[self._index]
        check_settings(group, self.device)
        if group["foreach"] and not group["capturable"]:
            tensors = {"lr": group["lr"], "betas[0]": group["betas"][0], "betas[1]": group["betas"][1]}
            for name, value in tensors.items():
                if isinstance(value, Tensor):  # torch raises this only after other groups have been updated
                    raise RuntimeError(
                        f"{name} as a Tensor is not supported for capturable=False and foreach=True: leave foreach "
                        "out, or give a number"
                    )

    def upload(self, reading: Any) -> None:
        """Hold the tensors of a step until `finish`."""
        columns = (reading.params, reading.grads, reading.exp_avgs, reading.exp_avg_sqs, reading.steps)
        self._tensors = [[column[position] for position in self._positions] for column in columns]
        self._maxima = [reading.max_exp_avg_sqs[position] for position in self._positions]

    @torch.no_grad()
    def measure(self, grad_scale: Tensor | None) -> Tensor:
        """Return the squared gradient norms by layer: float32 [layers]."""
        by_layer = [torch.zeros((), dtype=torch.float32, device=self.device)] * self._num_layers
        for grad, layer in zip(self._tensors[1], self._layers, strict=True):
            sq_norm = torch.linalg.vector_norm(grad).square().float()
            by_layer[layer] = by_layer[layer] + sq_norm.to(
                self.device
            )  # not in place: gradients may be of vmap
        sq_norms = torch.stack(by_layer)
        return sq_norms if grad_scale is None else sq_norms / grad_scale.to(self.device).square()

    def begin(
        self,
        norms: bool,
        clip_by: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Compute the factor of the gradients, and whether the step is skipped."""
        self._sq_norms = self.measure(grad_scale) if norms else None
        self._factor = None if grad_scale is None else grad_scale.double().reciprocal()
        self._found_inf = found_inf
        self._skips = False
        if clip_by is not None:
            assert self._max_grad_norm is not None
            coef, not_finite = reference.clip_coefficient(clip_by, self._max_grad_norm)
            self._factor = coef if self._factor is None else coef * self._factor
            self._skips = bool(not_finite)  # a device sync: the host decides whether to launch
        if found_inf is not None and not self._group["fused"]:
            self._skips |= bool(found_inf)

    def run(self, unit: int, views: dict[str, Tensor]) -> None:
        """Do nothing: states of these parameters are in no unit, and are updated in `finish`."""

    def increment_versions(self, reading: Any) -> None:
        """Do nothing: torch does it."""

    def finish(self) -> Tensor | None:
        """Update the parameters; returns the squared norms if `begin` was called with ``norms=True``."""
        has_inference_tensors = any(t.is_inference() for column in self._tensors for t in column)
        with torch.inference_mode() if has_inference_tensors else nullcontext():
            if not self._skips:
                self._update()
        del self._tensors, self._maxima, self._group, self._factor, self._found_inf
        return self._sq_norms

    def _update(self) -> None:
        group = self._group
        params, grads, exp_avgs, exp_avg_sqs, steps = self._tensors
        beta1, beta2 = group["betas"]
        with torch.set_grad_enabled(bool(group["differentiable"])):
            grads = [g.resolve_conj() for g in grads]
            if self._factor is not None:  # gradients are only read
                grads = [g * self._factor.to(g.device, g.dtype) for g in grads]
            adam(
                params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                self._maxima if group["amsgrad"] else [],
                steps,
                foreach=group["foreach"],
                capturable=group["capturable"],
                differentiable=group["differentiable"],
                fused=group["fused"],
                found_inf=self._found_inf if group["fused"] else None,
                has_complex=any(torch.is_complex(p) for p in params),
                decoupled_weight_decay=group.get("decoupled_weight_decay", True),
                amsgrad=group["amsgrad"],
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
            )
