"""Values of options: numbers and files that several commands take."""

import argparse
import importlib
import math
from pathlib import Path

from grass.errors import GrassError


class OptionError(GrassError):
    """An option that cannot be served on this machine."""


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be more than 0, not {text}")
    return value


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isascii() and text.lstrip("-").isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def writable(name: str, option: str) -> Path:
    """The path, if a file can be written there; nothing is left behind."""
    path = Path(name)
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise OptionError(f"{option} {name} cannot be written: {error.strerror}") from None
    if not existed:
        path.unlink()
    return path


def require_matplotlib() -> None:
    """Say how to get what ``--plot`` draws with, if it is not there."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise OptionError("--plot needs matplotlib; install with: pip install 'grass-optim[plots]'") from None
