"""Models without weights: from a preset, a folder or a name on the hub, as modules of fake tensors."""

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from grass.errors import ConfigError, GrassError
from grass.plan import PRESETS, preset_names


class PlanError(GrassError):
    """A plan that cannot be made from what the user named."""


class MisfitError(PlanError, ConfigError):
    """A setting that can never be right for the model."""


def build(name: str, dtype: torch.dtype) -> nn.Module:
    """A causal language model on the meta device; nothing is downloaded but a configuration.

    Args:
        name: of a preset; or a folder with a ``config.json``, or a name on the hub.
        dtype: of the weights.

    Raises:
        PlanError: transformers is missing, the name leads nowhere, or its configuration builds no such model.
    """
    config = configuration(name)
    import transformers

    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise PlanError(
            f"{name} is no causal language model: transformers knows none of type {config.model_type!r}"
        )
    config.use_cache = False  # as in training
    try:
        with contextlib.suppress(ValueError):  # a model without scaled dot-product attention, such as Gemma2
            return _make(config, dtype, _attention())
        return _make(config, dtype, "eager")  # as transformers trains it
    except Exception as error:  # a model's constructor may raise anything
        raise PlanError(f"{name} cannot be built: {type(error).__name__}: {first_line(error)}") from error


def _make(config: Any, dtype: torch.dtype, attention: str) -> nn.Module:
    import transformers

    with torch.device("meta"):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    return model.train()


def configuration(name: str) -> Any:
    """The configuration of a model, as transformers has it.

    Raises:
        PlanError: see `build`.
    """
    try:
        import transformers
    except ImportError:
        raise PlanError("transformers is not installed: pip install grass-optim[transformers]") from None

    if name in preset_names():
        values = json.loads((PRESETS / f"{name}.json").read_text())
        return transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    possible = (
        f"pass one of {', '.join(preset_names())}, the folder of a saved model, or a hub name OWNER/NAME"
    )
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise PlanError(f"{name} has no config.json: {possible}")
    if not path.exists() and (path.is_absolute() or name.startswith(".") or name.count("/") != 1):
        raise PlanError(f"there is no preset or folder {name!r}: {possible}")
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except Exception as error:  # a configuration's class may refuse its values by anything
        raise PlanError(f"no configuration for {name!r} ({first_line(error)}): {possible}") from error


def _attention() -> str:
    """Scaled dot-product attention without a mask, as for sequences of equal length.

    With fake tensors transformers cannot see that positions are simply counted, and would make a mask for sequences
    that may be packed. It makes none for attention that it has no masks for.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    name = "sdpa_without_mask"
    AttentionInterface.register(name, sdpa_attention_forward)
    return name


def copy_as_fake(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of a model on the meta device whose tensors are fake ones on the CPU; what is tied stays tied.

    Fake tensors on the meta device would take attention's slowest path, and count too much; fake ones on a GPU do not
    work without one.
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


def first_line(error: BaseException) -> str:
    """Of an error's message, with the next one if it ends in a colon; its type if there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
