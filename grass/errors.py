"""Exception classes. Every message states what is wrong, where, and what to do about it."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class GrassError(Exception):
    """Base class of all exceptions that GRASS raises."""


class ConfigError(GrassError, ValueError):
    """Invalid setting, or settings that cannot be combined."""


class LayerDiscoveryError(GrassError, ValueError):
    """Layers of the model that cannot be determined unambiguously; the message lists the candidates."""


class ModelError(GrassError, ValueError):
    """A model that cannot be loaded, or built from its configuration."""


class ParameterError(GrassError, ValueError):
    """Parameters that do not belong to the model, or an empty list of parameters."""


class StateMismatchError(GrassError, ValueError):
    """State dict of a different model, layer map or configuration."""


class OffloadError(GrassError, RuntimeError):
    """Optimizer states that cannot be kept in host memory as requested."""


class BackwardError(GrassError, RuntimeError):
    """Backward pass whose gradients cannot be measured or applied inside it."""


class DataError(GrassError, ValueError):
    """Training or evaluation data that is missing, empty or malformed."""


class RunFolderError(GrassError):
    """Output folder that was not created by `grass finetune`, or a run that cannot be resumed."""


class SaveError(GrassError):
    """Files of a run that cannot be written, or for which the disk has no room."""


@contextmanager
def library_errors(error_type: type[GrassError], what: str, remedy: str) -> Iterator[None]:
    """Raise whatever a library raises inside the context as one line; the cause is kept for `--debug`.

    Args:
        error_type: type of the exception.
        what: what could not be done, the beginning of the message.
        remedy: what the user can do, the end of the message.
    """
    try:
        yield
    except GrassError:
        raise
    except Exception as error:  # a library may raise anything
        raise error_type(f"{what}: {first_line(error).rstrip('.')}; {remedy}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an exception, or the name of its type if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def did_you_mean(word: object, choices: Iterable[object]) -> str:
    """Return `` (did you mean X?)`` if one of the choices is spelt much like the word, else nothing."""
    close = difflib.get_close_matches(str(word), [str(choice) for choice in choices], n=1)
    return f" (did you mean {close[0]}?)" if close else ""
