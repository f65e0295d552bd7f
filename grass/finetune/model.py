"""Loading and checking of the model of a run: a causal language model and its tokenizer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from grass.config import GrassConfig
from grass.errors import ConfigError, ModelError, library_errors
from grass.finetune.options import Dtype, FinetuneOptions
from grass.hub import check_hub
from grass.layers import LayerMap

DEFAULT_CONTEXT = 1024

_MOST_BYTES_OF_POINTER = 1024
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("vocab.json", "vocab.txt", "merges.txt"),
)


def load_model(
    name: str,
    dtype: Dtype = "auto",
    revision: str = "",
    *,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        name: a folder, or a name on the hub.
        dtype: dtype of the weights; ``"auto"`` for the one in which they were saved.
        revision: branch, tag or commit on the hub; the main branch by default.
        trust_remote_code: run code that comes with the model.
        say: called with a note if the files have weights that the model does not use.

    Raises:
        ConfigError: there is no folder of that name, or no model in it.
        ModelError: it is no causal language model with a tokenizer, lacks weights or has others, or cannot be loaded.
    """
    check_model(name, revision, trust_remote_code=trust_remote_code)
    remedy = _remedy(name, trust_remote_code=trust_remote_code)
    source: dict[str, Any] = {"revision": revision or None, "trust_remote_code": trust_remote_code}
    with library_errors(ModelError, f"model {name!r}: cannot load its tokenizer", remedy):
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
    with library_errors(ModelError, f"model {name!r}: cannot load its weights", remedy):
        loaded: Any = AutoModelForCausalLM.from_pretrained(  # its annotation knows no `output_loading_info`
            name,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **source,
        )
        model, info = loaded
    _check_complete(name, model, info)
    if unused := sorted(info["unexpected_keys"]):
        say(f"model {name!r}: it has no place for {_counted(unused, 'of its files')}")
    return model, tokenizer


def check_model(name: str, revision: str = "", *, trust_remote_code: bool = False) -> None:
    """Check what can be known before the weights are loaded.

    Raises:
        ConfigError: there is no folder of that name, or no model in it.
        ModelError: its configuration cannot be loaded, is not that of a causal language model, or a file is a pointer.
    """
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise ConfigError(f"model {name!r}: not a folder with a config.json")
    if not path.exists() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise ConfigError(f"model {name!r}: no such folder")
    if path.exists() and revision:
        raise ConfigError(
            f"revision is {revision!r}, but model {name!r} is a folder: only models on the hub have one"
        )
    if path.exists() and not any((path / file).is_file() for file in _TOKENIZER_FILES):
        raise ModelError(f"model {name!r}: no tokenizer in the folder: copy the files of its tokenizer, too")
    _check_pointers(path)
    check_hub(name)
    remedy = _remedy(name, trust_remote_code=trust_remote_code)
    with library_errors(ModelError, f"model {name!r}: cannot load its configuration", remedy):
        config = AutoConfig.from_pretrained(
            name, revision=revision or None, trust_remote_code=trust_remote_code
        )
        _check_causal(name, config)


def _remedy(name: str, *, trust_remote_code: bool) -> str:
    config = Path(name) / "config.json"
    if not config.exists():
        return "check the name, and the connection to the hub"
    if not trust_remote_code and "auto_map" in config.read_text(encoding="utf-8", errors="replace"):
        return "it comes with code of its own: pass --trust-remote-code if you trust it"
    return "the files may be damaged or incomplete: download or copy them again"


def _check_pointers(folder: Path) -> None:
    """Check that no file of a folder is a pointer, which Git leaves in place of a large file without Git LFS."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        is_small = file.is_file() and file.stat().st_size < _MOST_BYTES_OF_POINTER
        if is_small and file.read_bytes().startswith(b"version https://git-lfs"):
            raise ModelError(
                f"{file} is a pointer of Git LFS, not the file itself: run `git lfs pull` in {folder}, or download "
                "the file"
            )


def _check_causal(name: str, config: PretrainedConfig) -> None:
    """Check that a model was saved as a causal language model: others would see the tokens that they predict."""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    saved_as = config.architectures or []
    reason = ""
    if saved_as and not any(a in causal or a.endswith("ForCausalLM") or "For" not in a for a in saved_as):
        reason = f"was saved as {', '.join(saved_as)}"
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", True):
        reason = "sees the tokens after the one that it predicts (is_decoder is false)"
    if reason:
        raise ModelError(
            f"model {name!r}: {reason}, so it is not a causal language model; pass one whose config.json names an "
            "architecture such as LlamaForCausalLM"
        )


def _check_complete(name: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Check that no parameter was initialized at random; tied ones are not missing, and buffers are computed."""
    parameters = {parameter for parameter, _ in model.named_parameters()}
    remedy = "the files are incomplete, or are those of another model: download or copy all of them again"
    missing = sorted(parameters.intersection(info["missing_keys"]))
    if missing:
        raise ModelError(f"model {name!r}: the weights of {_counted(missing, 'are missing')}; {remedy}")
    shapes = [
        f"{parameter} ({_shape(saved)} in the file, {_shape(wanted)} by config.json)"
        for parameter, saved, wanted in sorted(info["mismatched_keys"])
    ]
    if shapes:
        raise ModelError(f"model {name!r}: the weights of {_counted(shapes, 'have another shape')}; {remedy}")


def _counted(names: Sequence[str], state: str) -> str:
    """Return how many there are, and the first of them."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} parameter{'s' if len(names) > 1 else ''} {state}: {', '.join(names[:3])}{more}"


def _shape(size: Iterable[int]) -> str:
    return " x ".join(map(str, size))


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
