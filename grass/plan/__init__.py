"""Plan: what a training step will take, from fake tensors; no GPU and no weights are needed."""

from pathlib import Path

PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Models whose configurations come with the library."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))
