"""Names of models and data sets on the Hugging Face hub."""

from pathlib import Path
from typing import Literal

from grass.errors import DataError, ModelError, first_line

_SECONDS = 10.0


def check_hub(name: str, kind: Literal["model", "dataset"] = "model") -> None:
    """Check that the hub can be reached, with one question: the libraries go on asking for half a minute.

    Nothing is asked for a folder, for what has been downloaded before, or offline; what the hub answers is left
    to the libraries.

    Args:
        name: a folder, or a name on the hub.
        kind: of the repository.

    Raises:
        ModelError, DataError: the hub cannot be reached.
    """
    import huggingface_hub as hub

    if Path(name).exists() or hub.constants.HF_HUB_OFFLINE:
        return
    file = "config.json" if kind == "model" else "README.md"
    try:
        if hub.try_to_load_from_cache(name, file, repo_type=kind) is None:
            hub.get_hf_file_metadata(hub.hf_hub_url(name, file, repo_type=kind), timeout=_SECONDS)
    except hub.errors.HfHubHTTPError:
        return
    except Exception as error:  # of the HTTP library, which is another one in each version
        error_type = ModelError if kind == "model" else DataError
        raise error_type(
            f"{kind} {name!r}: no such folder, and the hub cannot be reached: {first_line(error)}; check the name, "
            "or the connection"
        ) from error
