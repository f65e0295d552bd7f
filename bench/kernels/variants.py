"""Variants: our optimizers, torch's, and a copy; `peers` has those of other libraries.

Torch does the same work as our kernels: with norms, it computes the norm of each gradient and sums them by layer on the
device; with clipping, it scales the gradients.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

import grass
import grass_kernels
from bench.kernels.cases import DTYPE_NAMES, Case, Mixture
from bench.kernels.problem import BETAS, EPS, LR, STEPS_BEFORE, WEIGHT_DECAY, Problem

Step = Callable[[], object]
HYPERPARAMETERS = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}


class CannotDoError(Exception):
    """Raised by a variant that does not support a case; the message has the reason."""


@dataclass(frozen=True)
class Built:
    """A variant prepared for a problem.

    Args:
        step: function that takes one step.
        num_bytes: bytes that a step must move.
        grad_dtype: dtype of the gradients that it reads.
        state: dtype of the moments, or a description if they are not plain tensors.
        rounding: rounding of the parameters, as in a `Mixture`.
        state_is_shared: whether the moments are those of the problem; otherwise its own, which start from zero.
    """

    step: Step
    num_bytes: int
    grad_dtype: torch.dtype
    state: torch.dtype | str
    rounding: str = "nearest"
    state_is_shared: bool = True

    @property
    def shared_dtype(self) -> torch.dtype | None:
        """Dtype of shared moments, or None."""
        return self.state if self.state_is_shared and isinstance(self.state, torch.dtype) else None

    @property
    def state_name(self) -> str:
        """Return the moments, for reading."""
        return DTYPE_NAMES[self.state] if isinstance(self.state, torch.dtype) else self.state


@dataclass(frozen=True)
class Variant:
    """A named way to run a case.

    Args:
        name: name in rows.
        build: function that prepares it for a problem; raises CannotDoError.
        is_ours: whether an error in it is a failure of the run.
    """

    name: str
    build: Callable[[Problem], Built]
    is_ours: bool = False


def parameters(problem: Problem, grad_dtype: torch.dtype) -> list[nn.Parameter]:
    """Parameters over the problem's memory, those of active layers with gradients."""
    # By way of .data each has a version counter of its own: what other variants write goes by unnoticed, as it
    # must; an optimizer that looks for writes from outside would find one before every step.
    params = [nn.Parameter(t.data) for t in problem.params]
    grads = problem.grads(grad_dtype)
    for i in problem.active_tensors:
        if grad_dtype != params[i].dtype:
            if not hasattr(params[i], "grad_dtype"):
                raise CannotDoError("this torch requires gradients of their parameter's dtype")
            params[i].grad_dtype = grad_dtype
        params[i].grad = grads[i]
    return params


def with_norms_and_clipping(problem: Problem, params: Sequence[nn.Parameter], step: Step) -> Step:
    """Return `step` preceded by norms and clipping of the case, as torch provides them.

    Args:
        problem: problem with the case.
        params: parameters, with gradients in the active layers.
        step: function for the update only.
    """
    case = problem.case
    if not (case.norms or case.clip):
        return step
    active = [params[i] for i in problem.active_tensors]
    grads = [p.grad for p in active]
    layers = torch.tensor([case.layer_index[i] for i in problem.active_tensors], device=problem.device)

    def whole_step() -> None:
        if case.norms:
            norms = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32))  # type: ignore[arg-type]
            sq_norms = torch.zeros(case.num_layers, device=problem.device)
            sq_norms.index_add_(0, layers, norms.square())
            if case.clip:  # the total follows from the layers: torch's own clipping would take it again
                total = sq_norms.sum().sqrt()
                nn.utils.clip_grads_with_norm_(active, problem.max_grad_norm, total, foreach=True)
        else:
            nn.utils.clip_grad_norm_(active, problem.max_grad_norm, foreach=True)
        step()

    return whole_step


@functools.cache
def torch_takes(device: torch.device, mixture: Mixture, **path: bool) -> bool:
    """Return if torch's AdamW supports these dtypes with these arguments, by a trial on a few elements."""
    param = nn.Parameter(torch.ones(8, dtype=mixture.param, device=device))
    try:
        if mixture.grad != mixture.param:
            param.grad_dtype = mixture.grad
        param.grad = torch.ones(8, dtype=mixture.grad, device=device)
        optimizer = torch.optim.AdamW([param], **HYPERPARAMETERS, **path)  # type: ignore[arg-type]
        exp_avg, exp_avg_sq = (torch.ones(8, dtype=mixture.state, device=device) for _ in range(2))
        optimizer.state[param] = _state(exp_avg, exp_avg_sq, **path)
        optimizer.step()
    except (RuntimeError, TypeError):
        return False
    return bool(torch.isfinite(param).all())


def _state(exp_avg: Tensor, exp_avg_sq: Tensor, **path: bool) -> dict[str, Tensor]:
    device = exp_avg.device if path.get("fused") else torch.device("cpu")
    step = torch.tensor(float(STEPS_BEFORE), device=device)
    return {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def _build_torch(problem: Problem, **path: bool) -> Built:
    """Build torch.optim.AdamW in the dtypes of the case, or in the parameter's if it does not support them."""
    case = problem.case
    wanted = Mixture(case.mixture.param, case.mixture.grad, case.mixture.state)
    mixture = wanted if torch_takes(problem.device, wanted, **path) else wanted.of_one_dtype()
    params = parameters(problem, mixture.grad)
    optimizer = torch.optim.AdamW(params, **HYPERPARAMETERS, **path)  # type: ignore[arg-type]
    exp_avgs, exp_avg_sqs = problem.moments(mixture.state)
    for i in problem.active_tensors:
        optimizer.state[params[i]] = _state(exp_avgs[i], exp_avg_sqs[i], **path)
    return Built(
        step=with_norms_and_clipping(problem, params, optimizer.step),
        num_bytes=case.active_numel * (mixture.update_bytes + case.extra_bytes(mixture.grad)),
        grad_dtype=mixture.grad,
        state=mixture.state,
    )


def our_bytes(case: Case) -> int:
    """Return the bytes of a case with our kernels: the update including norms, and a pass before it for clipping."""
    mixture = case.mixture
    extra = {"remainders": True} if mixture.rounding == "master" else {}
    update = grass_kernels.masked_adamw_bytes(
        case.active_numel, mixture.param, grad_dtype=mixture.grad, state_dtype=mixture.state, **extra
    )
    return update + (grass_kernels.layer_sq_norms_bytes(case.active_numel, mixture.grad) if case.clip else 0)


def _check_ours(case: Case) -> None:
    mixture = case.mixture
    if not grass_kernels.is_supported(mixture.param, mixture.grad, mixture.state):
        raise CannotDoError(f"grass_kernels does not take {mixture}")


def _build_grass(problem: Problem) -> Built:
    """Build grass.AdamW, which always computes norms."""
    case = problem.case
    mixture = case.mixture
    _check_ours(case)
    params = parameters(problem, mixture.grad)
    options: dict[str, object] = {}
    if mixture.state != torch.float32:
        options["state_dtype"] = mixture.state
    if mixture.rounding != "nearest":
        options["master_weights" if mixture.rounding == "master" else "stochastic_rounding"] = True
    if case.clip:
        options["max_grad_norm"] = problem.max_grad_norm
    exp_avgs, exp_avg_sqs = problem.moments(mixture.state)
    optimizer = grass.AdamW(params, **HYPERPARAMETERS, **options)  # type: ignore[arg-type]
    problem.fill()
    optimizer.step()  # makes its state, whose layout is its own affair
    for i in problem.active_tensors:
        state = optimizer.state[params[i]]
        if state["exp_avg"].dtype != mixture.state:
            raise CannotDoError(f"grass.AdamW keeps {state['exp_avg'].dtype} moments for {mixture}")
        # In place: the optimizer may know its tensors by more than their addresses.
        state["exp_avg"].data, state["exp_avg_sq"].data = exp_avgs[i], exp_avg_sqs[i]
        state["step"].fill_(STEPS_BEFORE)
        for value in state.values():
            if isinstance(value, Tensor) and value.dtype == torch.int16:
                value.zero_()  # the remainders of other weights
    return Built(optimizer.step, our_bytes(case), mixture.grad, mixture.state, mixture.rounding)


def build_grass_kernels(problem: Problem, kernels: ModuleType = grass_kernels) -> Built:
    """Build a call of `masked_adamw_`, with norms and clipping only if the case has them.

    Args:
        problem: problem with the case.
        kernels: package of the kernels: `grass_kernels`, or an edited copy of it.
    """
    case = problem.case
    mixture = case.mixture
    _check_ours(case)
    device, params, grads = problem.device, problem.params, problem.grads(mixture.grad)
    layers, active, active_tensors = case.layer_index, case.active, problem.active_tensors
    exp_avgs, exp_avg_sqs = problem.moments(mixture.state)
    steps = [torch.tensor(float(STEPS_BEFORE), device=device) for _ in params]
    sq_norms = torch.empty(case.num_layers, device=device) if case.norms and not case.clip else None
    active_grads, active_layers = [grads[i] for i in active_tensors], [layers[i] for i in active_tensors]
    extra: dict[str, object] = {}
    if mixture.rounding == "master":
        extra["remainders"] = [torch.zeros_like(p, dtype=torch.int16) for p in params]
    elif mixture.rounding == "stochastic":
        extra["rounding_seeds"] = list(range(len(params)))

    def step() -> None:
        clip_coef = None
        if case.clip:
            measured = kernels.layer_sq_norms(active_grads, active_layers, case.num_layers)
            clip_coef = (problem.max_grad_norm / (measured.sum().sqrt() + 1e-6)).clamp(max=1.0)
        kernels.masked_adamw_(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            steps,
            layer_index=layers,
            active=active,
            sq_norms=sq_norms,
            clip_coef=clip_coef,
            **HYPERPARAMETERS,
            **extra,
        )

    return Built(step, our_bytes(case), mixture.grad, mixture.state, mixture.rounding)


GRASS = Variant("grass", _build_grass, is_ours=True)
GRASS_KERNELS = Variant("grass_kernels", build_grass_kernels, is_ours=True)
TORCH_FUSED = Variant("torch_fused", functools.partial(_build_torch, fused=True))
TORCH_FOREACH = Variant("torch_foreach", functools.partial(_build_torch, foreach=True))
TORCH_SINGLE = Variant("torch_single", functools.partial(_build_torch, foreach=False))


def own_variants(device: torch.device) -> list[Variant]:
    """Return the variants that need no other library; the loop over tensors only on a CPU."""
    variants = [GRASS_KERNELS, GRASS, TORCH_FUSED, TORCH_FOREACH]
    return [*variants, TORCH_SINGLE] if device.type == "cpu" else variants
