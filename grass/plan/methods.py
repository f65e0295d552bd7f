"""Methods: each prepares an optimizer on a model of fake tensors, and takes a step as training would.

Optimizers are the real ones. What is decided by numbers that fake tensors do not have is given: which layers are
active. They are the last ones, or as near to the end as is asked, so that their gradients exist while the activations
of all other layers still do; the layers before them come next.
"""

import contextlib
import copy
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from grass.config import GrassConfig, Offload
from grass.layer_scheduler import Change
from grass.offload import store
from grass.optim import GrassAdamW
from grass.plan.models import PlanError
from grass.plan.tracker import DEVICE_STATES, HOST_STATES, MemoryTracker

LORA_RANK = 128


class Traffic(NamedTuple):
    """States that cross the bus for a step, on average, and those that stay on the host; bytes."""

    h2d: float = 0.0
    d2h: float = 0.0
    host: int = 0


class Prepared(NamedTuple):
    """A model and its optimizer, with states as they are after some steps.

    Attributes:
        model: of fake tensors; peft may have wrapped it.
        step: the optimizer's, with all that training does at the end of a step.
        traffic: of states, once `step` has run.
    """

    model: nn.Module
    step: Callable[[], None]
    traffic: Callable[[], Traffic] = Traffic


class Setting(NamedTuple):
    """What the GRASS rows have in common."""

    active_layers: int
    buffer_mb: float
    buffer_count: int
    state_dtype: torch.dtype
    sample_interval: int
    frozen_at_the_end: int = 0  # layers after those that train


Method = Callable[[nn.Module, FakeTensorMode, MemoryTracker, Setting], Prepared]
"""From a model of fake tensors; what a method allocates beside the model is labelled."""


def full(model: nn.Module, mode: FakeTensorMode, tracker: MemoryTracker, setting: Setting) -> Prepared:
    """Full fine-tuning as torch has it: fused AdamW, whose moments have the parameters' dtype."""
    return _torch_adamw(model, mode, tracker)


def lora(model: nn.Module, mode: FakeTensorMode, tracker: MemoryTracker, setting: Setting) -> Prepared:
    """LoRA by peft on a model that `wrap_in_lora` has wrapped; torch's fused AdamW."""
    return _torch_adamw(model, mode, tracker)


def has_peft() -> bool:
    """Whether LoRA can be planned."""
    try:
        importlib.import_module("peft")
    except ImportError:
        return False
    return True


def wrap_in_lora(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device with adapters of rank `LORA_RANK` on all linear layers but the head.

    The rest are peft's defaults: adapters are float32 on low-precision models. peft moves modules when it wraps, which
    fake tensors refuse; so it comes before they do.

    Raises:
        PlanError: peft cannot wrap the model.
    """
    import peft

    config = peft.LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what peft calls transformers by
            return peft.get_peft_model(copy.deepcopy(model), config).train()
    except (ValueError, TypeError, AttributeError) as error:
        raise PlanError(f"peft cannot wrap the model: {error}") from None


def _torch_adamw(model: nn.Module, mode: FakeTensorMode, tracker: MemoryTracker) -> Prepared:
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, fused=True)
    with mode, tracker, tracker.labelling(DEVICE_STATES):  # a first step makes the states
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
        optimizer.zero_grad()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Prepared(model, step)


def lisa(model: nn.Module, mode: FakeTensorMode, tracker: MemoryTracker, setting: Setting) -> Prepared:
    """LISA: layers drawn uniformly, moments of the parameters' dtype, dropped when a layer is frozen again."""
    config = GrassConfig(
        active_layers=setting.active_layers, sampler="uniform", moments="reset", draw_ahead=0
    )
    dtype = next(model.parameters()).dtype
    return _adapting(model, mode, tracker, setting._replace(state_dtype=dtype), config)


def grass(offload: Offload = "none", *, fused: bool = False, probing: bool = False) -> Method:
    """GRASS, while it adapts or while it probes, with states where `offload` says.

    Adapting, every layer has been drawn before: without offload the moments of all are on the device.
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
        way = _probing if probing else _adapting
        return way(model, mode, tracker, setting, config)

    return prepare


class _GrassAdamW(GrassAdamW):
    """GrassAdamW whose sets are given, as fake norms cannot be drawn from."""

    def force(self, active: tuple[int, ...], coming: tuple[int, ...] | None, drawn: tuple[int, ...]) -> None:
        """Be in the middle of a period, with the moments of the layers that were drawn.

        Args:
            active: the layers that train.
            coming: those of the next period, if they are known.
            drawn: those of any period so far, or of the next.
        """
        scheduler = self._scheduler
        scheduler.schedule.step_count = scheduler.schedule.probe_steps
        left = tuple(layer for layer in scheduler.active if layer not in active)
        scheduler.active, scheduler.next_active = active, coming
        self._follow(Change(drawn, left))

    def _finish_step(self, sq_norms: Tensor, observed: list[bool], accumulated: bool) -> None:
        self._sq_norms = sq_norms
        self._follow(Change(None, None))


def _make(
    model: nn.Module, mode: FakeTensorMode, tracker: MemoryTracker, setting: Setting, config: GrassConfig
) -> _GrassAdamW:
    with _host_memory(mode, tracker):
        return _GrassAdamW(model, lr=1e-5, config=config, state_dtype=setting.state_dtype)


def _adapting(
    model: nn.Module, mode: FakeTensorMode, tracker: MemoryTracker, setting: Setting, config: GrassConfig
) -> Prepared:
    optimizer = _make(model, mode, tracker, setting, config)
    layers = [layer for layer, count in enumerate(optimizer._scheduler.num_params) if count]
    last = len(layers) - setting.frozen_at_the_end
    active = tuple(layers[last - config.active_layers : last])
    rest = [layer for layer in layers if layer not in active]
    coming = tuple(rest[-config.active_layers :] or active)
    if config.moments == "reset":  # only what trains has moments
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
        host = optimizer._offload.store.most_bytes
        h2d, d2h = _moved(optimizer)
        if config.offload == "streamed":
            return Traffic(h2d - begun[0], d2h - begun[1], host)
        slabs = [optimizer._offload.store.slab(layer) for layer in coming if layer not in active]
        moved = sum(slab.num_bytes for slab in slabs) / config.sample_interval
        return Traffic(moved, moved, host)

    return Prepared(model, step, traffic)


def _probing(
    model: nn.Module, mode: FakeTensorMode, tracker: MemoryTracker, setting: Setting, config: GrassConfig
) -> Prepared:
    optimizer = _make(model, mode, tracker, setting, config)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Prepared(model, step)


def _moved(optimizer: GrassAdamW) -> tuple[int, int]:
    stats = None if optimizer._offload is None else optimizer._offload.stats
    return (0, 0) if stats is None else (stats.h2d_bytes, stats.d2h_bytes)


@contextlib.contextmanager
def _host_memory(mode: FakeTensorMode, tracker: MemoryTracker) -> Iterator[None]:
    """Let the store be of fake memory that counts as the host's, and as much as is wanted."""

    def allocate(num_bytes: int, pinned: bool) -> Tensor:
        with mode, tracker, tracker.labelling(HOST_STATES):
            return torch.empty(num_bytes, dtype=torch.uint8)

    with store.allocating(allocate):
        yield
