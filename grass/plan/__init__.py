"""Prediction of the memory and traffic of a training step with fake tensors; needs no GPU and no weights."""

from pathlib import Path

PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Return the names of the models whose configurations are included."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def is_preset(name: str) -> bool:
    """Return True if a name is that of a preset; a folder of the same name comes first."""
    return name in preset_names() and not Path(name).exists()
