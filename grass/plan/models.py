"""Models without weights, from a preset, a folder or a name on the hub, and their copies with fake tensors."""

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from grass.errors import ConfigError, GrassError, first_line
from grass.hub import check_hub
from grass.plan import PRESETS, is_preset, preset_names


class PlanError(GrassError):
    """A step of the model cannot be predicted."""


class MisfitError(PlanError, ConfigError):
    """A setting does not fit the model."""


def build(name: str, dtype: torch.dtype) -> nn.Module:
    """Build a causal language model on the meta device; only its configuration is downloaded.

    Args:
        name: a preset, a folder with a ``config.json``, or a name on the hub.
        dtype: dtype of the weights.

    Raises:
        PlanError: transformers is not installed, there is no such model, or it cannot be built.
    """
    config = configuration(name)
    import transformers

    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise PlanError(
            f"{name} is not a causal language model: transformers has none of type {config.model_type!r}"
        )
    config.use_cache = False  # as in training
    try:
        with contextlib.suppress(ValueError):  # a model without scaled dot-product attention, such as Gemma2
            return _make(config, dtype, _attention())
        return _make(config, dtype, "eager")  # the default of transformers for such models
    except Exception as error:  # the constructor of a model may raise anything
        raise PlanError(f"{name} cannot be built: {type(error).__name__}: {first_line(error)}") from error


def _make(config: Any, dtype: torch.dtype, attention: str) -> nn.Module:
    import transformers

    with torch.device("meta"):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    return model.train()


def configuration(name: str) -> Any:
    """Return the transformers configuration of a model.

    Raises:
        PlanError: transformers is not installed, or there is no such model.
        ModelError: the hub cannot be reached.
    """
    try:
        import transformers
    except ImportError:
        raise PlanError("transformers is not installed: pip install grass-optim[transformers]") from None

    if is_preset(name):
        values = json.loads((PRESETS / f"{name}.json").read_text())
        return transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    remedy = f"pass one of {', '.join(preset_names())}, the folder of a saved model, or a hub name OWNER/NAME"
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise PlanError(f"{name} has no config.json: {remedy}")
    if not path.exists() and (path.is_absolute() or name.startswith(".") or name.count("/") != 1):
        raise PlanError(f"there is no preset or folder {name!r}: {remedy}")
    check_hub(name)
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except Exception as error:  # the class of a configuration may raise anything
        raise PlanError(f"no configuration for {name!r} ({first_line(error)}): {remedy}") from error


def saved_dtype(name: str) -> torch.dtype | None:
    """Return the dtype in which a model was saved; None if it is a preset, or its configuration does not tell.

    Raises:
        PlanError: there is no such model.
    """
    config = configuration(name)
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype


def positions(name: str) -> int | None:
    """Return the maximum sequence length of a model, None if its configuration does not give it.

    Raises:
        PlanError: there is no such model.
    """
    most = getattr(configuration(name).get_text_config(), "max_position_embeddings", None)
    return None if most is None else int(most)


def _attention() -> str:
    """Register scaled dot-product attention without a mask, as for sequences of equal length, and return its name.

    With fake tensors transformers cannot check whether sequences are packed, and would create a mask for this case. It
    creates none for attention functions that it does not know.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    name = "sdpa_without_mask"
    AttentionInterface.register(name, sdpa_attention_forward)
    return name


def copy_as_fake(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Return a copy of a model on the meta device with fake CPU tensors; tied parameters stay tied.

    Fake tensors on the meta device would take the unfused path of attention, which allocates more; fake CUDA tensors
    need a GPU.
    """
    model = copy.deepcopy(model)
    fakes: dict[Tensor, Tensor] = {}

    def fake(t: Tensor) -> Tensor:
        if t not in fakes:
            made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")
            fakes[t] = nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made
        return fakes[t]

    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for key, t in list(tensors.items()):
                    if t is not None:
                        tensors[key] = fake(t)  # type: ignore[assignment]
    return model
