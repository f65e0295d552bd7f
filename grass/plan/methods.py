"""Training methods: each prepares its optimizer for a model of fake tensors and takes a step as in training.

The optimizers are the real ones, except that the active layers are given, since fake tensors have no values to draw
them from. They are the last layers, whose gradients exist while the activations of all other layers are still alive,
except those in `Setting.frozen`; the layers before them are the next ones.
"""

import contextlib
import copy
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grass.choices import Offload
from grass.config import GrassConfig
from grass.layer_scheduler import Change
from grass.offload import store
from grass.optim import AdamW, GrassAdamW
from grass.optim.probe import Measured
from grass.optim.sharding import Ranks
from grass.plan.models import FakeTensorMode, PlanError
from grass.plan.tracker import DEVICE_STATES, HOST_STATES, MemoryTracker

LORA_RANK = 128


class Traffic(NamedTuple):
    """Bytes of optimizer states that are copied per step, on average, and that are kept in host memory."""

    h2d: float = 0.0
    d2h: float = 0.0
    host: int = 0


class Prepared(NamedTuple):
    """Model and optimizer, with the states that exist after some steps.

    Attributes:
        model: model of fake tensors, possibly wrapped by peft.
        step: takes the optimizer step and resets gradients.
        traffic: returns the traffic of states after `step`.
    """

    model: nn.Module
    step: Callable[[], None]
    traffic: Callable[[], Traffic] = Traffic


class Setting(NamedTuple):
    """Settings that all GRASS rows share."""

    active_layers: int
    buffer_mb: float
    buffer_count: int
    state_dtype: torch.dtype
    sample_interval: int
    master_weights: bool = False
    frozen: tuple[int, ...] = ()  # layers to leave out of the active ones, counted from the last, which is 0


Method = Callable[[nn.Module, FakeTensorMode, MemoryTracker, Setting], Prepared]
"""Prepares an optimizer for a model of fake tensors; the memory it allocates is labelled in the tracker."""


def full(model: nn.Module, mode: FakeTensorMode, tracker: MemoryTracker, setting: Setting) -> Prepared:
    """Prepare full fine-tuning with torch's fused AdamW, whose moments have the dtype of the parameters."""
    return _torch_adamw(model, mode, tracker)


def grass_adamw(model: nn.Module, mode: FakeTensorMode, tracker: MemoryTracker, setting: Setting) -> Prepared:
    """Prepare full fine-tuning with `grass.AdamW` and the states of the GRASS rows, as ``--method full``."""
    optimizer = AdamW(
        model.parameters(), state_dtype=setting.state_dtype, master_weights=setting.master_weights
    )
    return _prepared(model, mode, tracker, optimizer)


def lora(model: nn.Module, mode: FakeTensorMode, tracker: MemoryTracker, setting: Setting) -> Prepared:
    """Prepare LoRA, for a model wrapped by `wrap_in_lora`, with torch's fused AdamW."""
    return _torch_adamw(model, mode, tracker)


def has_peft() -> bool:
    """Return True if peft is installed, which LoRA needs."""
    try:
        importlib.import_module("peft")
    except ImportError:
        return False
    return True


def wrap_in_lora(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the meta device, with adapters of rank `LORA_RANK` on all linear layers but the head.

    Other settings are peft's defaults; adapters of low-precision models are float32. peft moves modules when it wraps
    them, which fake tensors do not support, so a model is wrapped before it is made of fake tensors.

    Raises:
        PlanError: peft cannot wrap the model.
    """
    import peft

    config = peft.LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses deprecated names of transformers
            # peft names ranks of experts' weights whether it adapts them or not
            warnings.filterwarnings("ignore", "The following .*_pattern keys", RuntimeWarning)
            return peft.get_peft_model(copy.deepcopy(model), config).train()
    except (ValueError, TypeError, AttributeError) as error:
        raise PlanError(f"peft cannot wrap the model: {error}") from None


def _torch_adamw(model: nn.Module, mode: FakeTensorMode, tracker: MemoryTracker) -> Prepared:
    params = [p for p in model.parameters() if p.requires_grad]
    return _prepared(model, mode, tracker, torch.optim.AdamW(params, fused=True))


def _prepared(
    model: nn.Module, mode: FakeTensorMode, tracker: MemoryTracker, optimizer: torch.optim.Optimizer
) -> Prepared:
    params = [p for p in model.parameters() if p.requires_grad]
    with mode, tracker, tracker.labelling(DEVICE_STATES):  # the first step allocates the states
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
        optimizer.zero_grad()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Prepared(model, step)


def lisa(model: nn.Module, mode: FakeTensorMode, tracker: MemoryTracker, setting: Setting) -> Prepared:
    """Prepare LISA: uniform sampling; moments have the dtype of the parameters and are dropped with each draw."""
    config = GrassConfig(
        active_layers=setting.active_layers, sampler="uniform", moments="reset", draw_ahead=0, offload="none"
    )
    dtype = next(model.parameters()).dtype
    if dtype == torch.float16:
        dtype = torch.bfloat16  # of the same size; `GrassAdamW` has no float16 moments
    return _adapting(model, mode, tracker, setting._replace(state_dtype=dtype, master_weights=False), config)


def grass(offload: Offload = "none", *, fused: bool = False, probing: bool = False) -> Method:
    """Return a method that prepares GRASS, in the probe or after it.

    After the probe, every layer has been drawn before: without offload the moments of all layers are on the device.

    Args:
        offload, fused: as ``offload`` and ``fused_backward`` in `GrassConfig`.
        probing: True for a step of the probe.
    """

    def prepare(model: nn.Module, mode: FakeTensorMode, tracker: MemoryTracker, setting: Setting) -> Prepared:
        config = GrassConfig(
            active_layers=setting.active_layers,
            sample_interval=setting.sample_interval,
            update_interval=setting.sample_interval,
            offload=offload,
            buffer_mb=setting.buffer_mb,
            buffer_count=setting.buffer_count,
            fused_backward=fused,
        )
        prepare_step = _probing if probing else _adapting
        return prepare_step(model, mode, tracker, setting, config)

    return prepare


class _GrassAdamW(GrassAdamW):
    """GrassAdamW with given active layers, since they cannot be drawn from fake norms."""

    def force(self, active: tuple[int, ...], coming: tuple[int, ...] | None, drawn: tuple[int, ...]) -> None:
        """Enter the middle of a period.

        Args:
            active: the active layers.
            coming: the layers of the next period, None if they have not been drawn yet.
            drawn: all layers drawn so far, which have moments.
        """
        scheduler = self._scheduler
        scheduler.schedule.step_count = scheduler.schedule.probe_steps + 1  # weights have been updated before
        left = tuple(layer for layer in scheduler.active if layer not in active)
        scheduler.active, scheduler.next_active = active, coming
        self._apply_change(Change(drawn, left))

    def _check_agreement(self, ranks: Ranks) -> None:
        """Do nothing: the other ranks do not exist."""

    def _finish_step(
        self, sq_norms: Tensor, observed: list[bool], accumulated: bool, measured: Measured | None = None
    ) -> None:
        self._sq_norms = sq_norms
        self._apply_change(Change(None, None))


def _make(
    model: nn.Module, mode: FakeTensorMode, tracker: MemoryTracker, setting: Setting, config: GrassConfig
) -> _GrassAdamW:
    with _host_memory(mode, tracker):
        return _GrassAdamW(
            model,
            lr=1e-5,
            config=config,
            state_dtype=setting.state_dtype,
            master_weights=setting.master_weights,
        )


def _adapting(
    model: nn.Module, mode: FakeTensorMode, tracker: MemoryTracker, setting: Setting, config: GrassConfig
) -> Prepared:
    optimizer = _make(model, mode, tracker, setting, config)
    layers = [layer for layer, count in enumerate(optimizer._scheduler.num_params) if count]
    candidates = [layer for place, layer in enumerate(reversed(layers)) if place not in setting.frozen]
    active = tuple(sorted(candidates[: config.active_layers]))
    rest = [layer for layer in layers if layer not in active]
    coming = tuple(rest[-config.active_layers :] or active)
    if config.moments == "reset":  # only active layers have moments
        sets: tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, ...]] = active, None, active
    elif config.offload == "none":
        sets = active, coming, tuple(layers)
    else:
        sets = active, coming, (*active, *coming)
    with mode, tracker, tracker.labelling(DEVICE_STATES), _host_memory(mode, tracker):
        optimizer.force(*sets)
    begun = _moved(optimizer)

    def step() -> None:
        with _host_memory(mode, tracker):
            optimizer.step()
        optimizer.zero_grad()

    def traffic() -> Traffic:
        if config.offload == "none":
            return Traffic()
        assert optimizer._offload is not None
        host = optimizer._offload.store.max_bytes
        if config.offload == "streamed":
            moved = _moved(optimizer) - begun
            return Traffic(moved, moved, host)
        slabs = [optimizer._offload.store.slab(layer) for layer in coming if layer not in active]
        once = sum(slab.num_bytes for slab in slabs) / config.sample_interval
        return Traffic(once, once, host)

    return Prepared(model, step, traffic)


def _probing(
    model: nn.Module, mode: FakeTensorMode, tracker: MemoryTracker, setting: Setting, config: GrassConfig
) -> Prepared:
    optimizer = _make(model, mode, tracker, setting, config)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Prepared(model, step)


def _moved(optimizer: GrassAdamW) -> int:
    """Return the bytes copied to the host so far; as many are copied to the device, but some of them one step ahead."""
    return 0 if optimizer._offload is None else optimizer._offload.stats.d2h_bytes


@contextlib.contextmanager
def _host_memory(mode: FakeTensorMode, tracker: MemoryTracker) -> Iterator[None]:
    """Make the store allocate fake host memory, without limit."""

    def allocate(num_bytes: int, pinned: bool) -> Tensor:
        with mode, tracker, tracker.labelling(HOST_STATES):
            return torch.empty(num_bytes, dtype=torch.uint8)

    with store.allocating(allocate):
        yield
