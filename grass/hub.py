"""Names of models on the Hugging Face hub."""

from pathlib import Path

from grass.errors import ModelError, first_line

_SECONDS = 10.0


def check_hub(name: str) -> None:
    """Check that the hub can be reached, with one question: the libraries go on asking for half a minute.

    Nothing is asked for a folder, for a model that has been downloaded before, or offline; what the hub answers is left
    to the libraries.

    Args:
        name: a folder, or a name on the hub.

    Raises:
        ModelError: the hub cannot be reached.
    """
    import huggingface_hub as hub

    if Path(name).exists() or hub.constants.HF_HUB_OFFLINE:
        return
    try:
        if hub.try_to_load_from_cache(name, "config.json") is None:
            hub.get_hf_file_metadata(hub.hf_hub_url(name, "config.json"), timeout=_SECONDS)
    except hub.errors.HfHubHTTPError:
        return
    except Exception as error:  # of the HTTP library, which is another one in each version
        raise ModelError(
            f"model {name!r}: no such folder, and the hub cannot be reached: {first_line(error)}; check the name, "
            "or the connection"
        ) from error
