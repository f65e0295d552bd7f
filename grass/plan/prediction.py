"""Prediction: a training step with fake tensors for each method, as a row of figures."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from grass.activation_checkpointing import checkpoint_activations
from grass.config import GrassConfig, check_choices
from grass.errors import GrassError, first_line
from grass.layers import LayerMap
from grass.offload.units import elements_in
from grass.plan import methods
from grass.plan.cluster import GATHER, REDUCE, SCATTER, Cluster, shard
from grass.plan.losses import Loss, loss_of
from grass.plan.methods import Method, Setting
from grass.plan.models import (
    FakeTensorMode,
    MisfitError,
    PlanError,
    build,
    copy_as_fake,
    positions,
)
from grass.plan.tracker import ACTIVATIONS, DEVICE_STATES, GRADIENTS, WEIGHTS, MemoryTracker
from grass_kernels import operators

GIBIBYTE, MEBIBYTE = 2**30, 2**20
MOMENTS = ("exp_avg", "exp_avg_sq")
PROBING, FUSED, ADAMW = "-probing", "-fused", "grass-adamw"

METHODS: dict[str, Method] = {
    "grass-resident": methods.grass("resident"),
    "grass-streamed": methods.grass("streamed"),
    "grass-streamed-fused": methods.grass("streamed", fused=True),
    "grass": methods.grass(),
    ADAMW: methods.grass_adamw,
    "lisa": methods.lisa,
    f"lora-r{methods.LORA_RANK}": methods.lora,
    "full": methods.full,
    "grass-probing": methods.grass(probing=True),
    "grass-resident-probing": methods.grass("resident", probing=True),
    "grass-streamed-probing": methods.grass("streamed", probing=True),
    "grass-streamed-fused-probing": methods.grass("streamed", fused=True, probing=True),
}


@dataclass(frozen=True)
class Case:
    """Training step to predict.

    Args:
        model: preset, folder or hub name.
        batch: number of sequences.
        seq: number of tokens of a sequence.
        dtype: dtype of the weights.
        checkpointing: use activation checkpointing.
        loss: ``"chunked"`` or ``"full"``; see `grass.plan.losses.loss_of`.
        active_layers: number of active layers in the GRASS and LISA rows.
        state_dtype: dtype of the moments in the GRASS rows; other rows have the dtype of the weights.
        master_weights: keep 16 more bits of each bfloat16 weight with the states in the GRASS rows, as
            `grass finetune` does.
        sample_interval: number of steps in a period; resident states are copied once per period.
        buffer_mb, buffer_count: size in MiB, and number, of the device buffers of streamed states.
        gpu_gib: device memory, GiB.
        host_gib: host memory for states, GiB; None for no limit.
        pcie_gbs: bandwidth between host and device in each direction, 1e9 bytes per second.
        tflops: throughput of the device in the dtype of the weights, 1e12 floating-point operations per second.
        cluster: GPUs that train together, each on `batch` sequences; None for one.

    Raises:
        ConfigError: `loss` is not one of the choices.
    """

    model: str
    batch: int = 4
    seq: int = 1024
    dtype: torch.dtype = torch.bfloat16
    checkpointing: bool = True
    loss: Loss = "chunked"
    active_layers: int = GrassConfig.active_layers
    state_dtype: torch.dtype = torch.float32
    master_weights: bool = True
    sample_interval: int = GrassConfig.sample_interval
    buffer_mb: float = GrassConfig.buffer_mb
    buffer_count: int = GrassConfig.buffer_count
    gpu_gib: float = 24.0
    host_gib: float | None = None
    pcie_gbs: float = 25.0
    tflops: float = 150.0
    cluster: Cluster | None = None

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True)
class Row:
    """Predicted step of a method: device memory at its peak, and copies per step on average.

    Attributes:
        method: name of the method.
        peak_gib: peak device memory of tensors; the sum of weights, gradients, device states and activations.
        weights_gib: parameters, adapters and buffers.
        gradients_gib: complete gradients.
        states_device_gib: moments, step counters, and the device buffers of streamed and resident states.
        states_host_gib: states in host memory when every layer has been drawn.
        activations_gib: all other memory: activations, temporaries, inputs.
        h2d_gib_per_step: states copied to the device.
        d2h_gib_per_step: states copied to the host.
        step_floor_ms: lower bound of the step time: the longest of arithmetic, copies to the device and back, and
            collectives.
        fits: True if the peak is at most the device memory.
        gathered_gib_per_step: weights that each of several GPUs sends, for forward and backward.
        reduced_gib_per_step: gradients that each of several GPUs sends.
        compute_ms: lower bound of the arithmetic alone.
        collectives_ms: lower bound of the collectives alone.
    """

    method: str
    peak_gib: float
    weights_gib: float
    gradients_gib: float
    states_device_gib: float
    states_host_gib: float
    activations_gib: float
    h2d_gib_per_step: float
    d2h_gib_per_step: float
    step_floor_ms: float
    fits: bool
    gathered_gib_per_step: float = 0.0
    reduced_gib_per_step: float = 0.0
    compute_ms: float = 0.0
    collectives_ms: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the values by name, in the order of the columns."""
        return asdict(self)


def predict(case: Case, names: Sequence[str] = tuple(METHODS)) -> Iterator[Row]:
    """Yield the row of each method as soon as it is known.

    Args:
        case: the training step.
        names: names of the methods.

    Raises:
        PlanError: the model cannot be built, or a method cannot train it.
        ConfigError: settings do not fit the model; raised before the first row.
    """
    if case.cluster is not None and case.loss == "chunked":
        raise MisfitError(
            "the chunked loss reads the head outside of the model, where it is sharded: pass --loss full"
        )
    model = build(case.model, case.dtype)
    _check(case, names, model)
    probing: dict[bool, Row] = {}
    for name in names:
        if name.endswith(PROBING):  # there are no states yet, so the row does not depend on the offload mode
            fused = FUSED in name
            probing[fused] = probing.get(fused) or _predict(case, name, model)
            yield replace(probing[fused], method=name)
        elif FUSED in name:
            # Active layers recompute more activations than frozen ones, so the peak may be higher if the last layer is
            # frozen, while the head's gradient is held, or the last but one, while that of the last layer is.
            has_more = len(LayerMap.from_model(model)) > case.active_layers
            rows = [
                _predict(case, name, model, frozen) for frozen in ((), (0,), (1,)) if has_more or not frozen
            ]
            yield max(rows, key=lambda row: row.peak_gib)
        else:
            yield _predict(case, name, model)


def _check(case: Case, names: Sequence[str], model: nn.Module) -> None:
    """Check settings against the model before the first method runs."""
    most = positions(case.model)
    if most is not None and case.seq > most:
        raise MisfitError(f"{case.model} has {most} positions: --context can be at most that, not {case.seq}")
    if (
        case.master_weights
        and case.dtype == torch.float16
        and any(name.startswith("grass") for name in names)
    ):
        raise MisfitError(
            "master weights are for bfloat16, and the weights are float16: pass --dtype bfloat16, or --rounding nearest"
        )
    if any(name.startswith(("lisa", "grass")) and name != ADAMW for name in names):
        GrassConfig(active_layers=case.active_layers).check_layers(len(LayerMap.from_model(model)))
    if any("streamed" in name for name in names):
        dtypes = dict.fromkeys(MOMENTS, case.state_dtype)
        if case.master_weights and case.dtype == torch.bfloat16:
            dtypes["remainder"] = torch.int16
        elements_in(int(case.buffer_mb * MEBIBYTE), dtypes)


def _predict(case: Case, name: str, meta: nn.Module, frozen: tuple[int, ...] = ()) -> Row:
    with nullcontext() if case.cluster is None else case.cluster.simulated() as mesh:
        return _predict_on(mesh, case, name, meta, frozen)


def _predict_on(mesh: Any, case: Case, name: str, meta: nn.Module, frozen: tuple[int, ...]) -> Row:
    mode, tracker = FakeTensorMode(), _tracker()
    if METHODS[name] is methods.lora:
        meta = methods.wrap_in_lora(meta)
    model: Any = copy_as_fake(meta, mode)
    if case.checkpointing:  # as `grass finetune` does
        checkpoint_activations(model, LayerMap.from_model(model) if FUSED in name else None)
    if mesh is not None:
        with mode:
            shard(model, mesh)
    for t in (*model.parameters(), *model.buffers()):
        tracker.mark(t, WEIGHTS)
    for p in model.parameters():  # before any hook of an optimizer, which may free the gradient
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: tracker.mark(p.grad, GRADIENTS))
    setting = Setting(
        case.active_layers,
        case.buffer_mb,
        case.buffer_count,
        case.state_dtype,
        case.sample_interval,
        case.master_weights,
        frozen,
    )
    with warnings.catch_warnings():
        # the optimizer reads the addresses of fake tensors, which are 0
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        prepared = METHODS[name](model, mode, tracker, setting)
        tracker.restart()
        tracker.flops = 0
        tracker.sent.clear()
        try:
            with mode, tracker, tracker.following_resizes():
                ids = torch.zeros(case.batch, case.seq, dtype=torch.int64)
                loss_of(prepared.model, ids, case.loss).backward()
                prepared.step()
        except GrassError:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            raise PlanError(f"{case.model} cannot be trained on fake tensors ({name}): {what}") from error
    peak, traffic = tracker.peak(), prepared.traffic()
    parts = [peak[label] / GIBIBYTE for label in (WEIGHTS, GRADIENTS, DEVICE_STATES, ACTIVATIONS)]
    sent: dict[str, float] = {}
    between = 0.0
    if case.cluster is not None:
        sent = {op: case.cluster.sent(op, size) for op, size in tracker.sent.items()}
        between = case.cluster.seconds(sent.get(GATHER, 0.0) + sent.get(SCATTER, 0.0), sent.get(REDUCE, 0.0))
    compute = tracker.flops / (case.tflops * 1e12)
    seconds = max(
        compute,
        between,
        traffic.h2d / (case.pcie_gbs * 1e9),
        traffic.d2h / (case.pcie_gbs * 1e9),
    )
    return Row(
        method=name,
        peak_gib=sum(parts),
        weights_gib=parts[0],
        gradients_gib=parts[1],
        states_device_gib=parts[2],
        states_host_gib=traffic.host / GIBIBYTE,
        activations_gib=parts[3],
        h2d_gib_per_step=traffic.h2d / GIBIBYTE,
        d2h_gib_per_step=traffic.d2h / GIBIBYTE,
        step_floor_ms=seconds * 1e3,
        fits=sum(parts) <= case.gpu_gib,
        gathered_gib_per_step=sent.get(GATHER, 0.0) / GIBIBYTE,
        reduced_gib_per_step=(sent.get(SCATTER, 0.0) + sent.get(REDUCE, 0.0)) / GIBIBYTE,
        compute_ms=compute * 1e3,
        collectives_ms=between * 1e3,
    )


def _tracker() -> MemoryTracker:
    """Return a tracker that counts the workspaces of the kernels of `grass_kernels`."""

    def of_norms(grads: list[Tensor], layer_index: list[int], num_layers: int, **options: Any) -> int:
        return _num_bytes(operators.workspace(grads, num_layers, 0))

    return MemoryTracker({"grass_kernels::layer_sq_norms": of_norms})


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)
