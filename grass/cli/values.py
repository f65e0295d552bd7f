"""Values of options: numbers, files and models that several commands take."""

import argparse
import importlib
import math
from collections.abc import Sequence
from pathlib import Path

from grass.errors import GrassError
from grass.plan import is_preset


class UsageError(GrassError):
    """Options that are wrong, or do not go together."""


class MissingPackageError(GrassError):
    """A package that a command needs and that is not installed."""


def positive(text: str) -> float:
    """Return a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be more than 0, not {text}")
    return value


def count(text: str) -> int:
    """Return a whole number of at least 1."""
    if not (text.isascii() and text.lstrip("-").isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def comma_list(text: str) -> list[str]:
    """Return the parts of a text between commas."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise argparse.ArgumentTypeError(f"nothing is named in {text!r}")
    return parts


def model_name(name: str, presets: Sequence[str] = ()) -> str:
    """Return the name of a preset, of a model's folder, or one that can be a name on the hub.

    Args:
        name: the name.
        presets: names of presets, for a command that needs no weights; a name without owner must then be one of them.
    """
    possible = f"one of {', '.join(presets)}, " if presets else ""
    possible += "a model's folder or a hub name"
    path = Path(name)
    if path.exists():
        if not (path / "config.json").is_file():
            raise argparse.ArgumentTypeError(f"{name} has no config.json: pass {possible}")
        return name
    if not presets and is_preset(name):
        raise argparse.ArgumentTypeError(
            f"{name} is a preset of `grass plan` and `grass layers`, and a preset has no weights: pass {possible}"
        )
    is_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name.strip()
    if is_local or (presets and name not in presets and "/" not in name):
        raise argparse.ArgumentTypeError(f"there is no model {name!r}: pass {possible}")
    return name


def model_or_preset(name: str) -> str:
    """Return the name of a preset, of a model's folder, or any that can be a name on the hub."""
    return name if is_preset(name) else model_name(name)


def writable(name: str, option: str) -> Path:
    """Return the path, if a file can be written there; nothing is left behind.

    Raises:
        UsageError: it cannot.
    """
    path = Path(name)
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise UsageError(f"{option} {name} cannot be written: {error.strerror}") from None
    if not existed:
        path.unlink()
    return path


def require_matplotlib() -> None:
    """Check that the package that ``--plot`` draws with is installed.

    Raises:
        MissingPackageError: it is not.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise MissingPackageError(
            "--plot needs matplotlib; install with: pip install 'grass-optim[plots]'"
        ) from None
