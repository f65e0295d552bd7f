"""Loading and checking of the model of a run: a causal language model and its tokenizer."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grass.config import GrassConfig
from grass.errors import ConfigError, ModelError
from grass.finetune.options import Dtype, FinetuneOptions
from grass.layers import LayerMap

DEFAULT_CONTEXT = 1024


def load_model(name: str, dtype: Dtype = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        name: a folder, or a name on the hub.
        dtype: dtype of the weights; ``"auto"`` for the one in which they were saved.

    Raises:
        ConfigError: there is no folder of that name, or no model in it.
        ModelError: it is no causal language model with a tokenizer, or cannot be loaded.
    """
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise ConfigError(f"model {name!r}: not a folder with a config.json")
    if not path.exists() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise ConfigError(f"model {name!r}: no such folder")
    part = "configuration"
    try:
        AutoConfig.from_pretrained(name)
        part = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(name)
        part = "weights"
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ModelError(f"model {name!r}: cannot load its {part}: {reason}") from None
    return model, tokenizer


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the padding token, or of the EOS token if there is none; padding is masked anyway."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def positions_of(model: PreTrainedModel) -> int | None:
    """Return the number of positions of the model, None if it has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def context_of(model: PreTrainedModel, wanted: int | None) -> int:
    """Return the maximum length of a text in tokens; by default that of the model, at most `DEFAULT_CONTEXT`.

    Raises:
        ConfigError: `wanted` is larger than the number of positions of the model.
    """
    most = positions_of(model)
    if wanted is None:
        return min(most or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if most is not None and wanted > most:
        raise ConfigError(f"context is {wanted}, but the model has {most} positions; pass at most {most}")
    return wanted


def layer_pattern(options: FinetuneOptions) -> str | Sequence[str] | None:
    """Return the user's pattern, or several; None to find the layers."""
    return options.pattern or None


def check_method(model: PreTrainedModel, options: FinetuneOptions, config: GrassConfig) -> LayerMap | None:
    """Find the layers of the model and check options and configuration; return None for full fine-tuning.

    Raises:
        LayerDiscoveryError: the layers cannot be determined.
        ConfigError: the configuration does not fit the layers, or excludes an option.
    """
    if options.method == "full":
        return None
    layers = LayerMap.from_model(model, layer_pattern(options))
    config.check_layers(len(layers))
    if config.fused_backward and options.max_grad_norm:
        raise ConfigError(
            "--fused-backward updates layers before the norm of all gradients is known, so gradients cannot be "
            "clipped: pass --max-grad-norm 0 with it"
        )
    return layers
