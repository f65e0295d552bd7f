"""Space on the disk for the files of a run, asked before it begins."""

import shutil
from pathlib import Path

from torch import nn

from grass.errors import SaveError

# Of a parameter in a checkpoint: the weight (bfloat16 with its remainder) and two moments in float32.
_BYTES_OF_PARAMETER = 4 + 2 * 4


def bytes_needed(model: nn.Module, save_steps: int, steps: int, kept: int = 1) -> int:
    """Return the bytes that the largest files of a run take, after all layers have been drawn.

    The checkpoints that are kept stay until the next one, or the finished model, has been saved. Without periodic
    checkpoints, Ctrl-C saves one.

    Args:
        model: the model that is trained.
        save_steps: number of steps between two checkpoints, or 0.
        steps: number of steps of the run.
        kept: number of checkpoints that are kept.
    """
    count = 1 + min(kept, (steps - 1) // save_steps if save_steps else 0)
    return count * _BYTES_OF_PARAMETER * sum(p.numel() for p in model.parameters())


def check_space(folder: Path, needed: int) -> None:
    """Check that the disk has room for the files of a run.

    Args:
        folder: the run folder, which need not exist; the checkpoints in it count as room.
        needed: number of bytes.

    Raises:
        SaveError: there is less room.
    """
    there = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file())
    free = free_bytes(folder) + there
    if free < needed:
        raise SaveError(
            f"{folder}: the run needs up to {needed:,} bytes for its checkpoints and model, but {free:,} bytes are "
            "free; make room, or pass --output on another disk, or --save-steps 0 to save one checkpoint at most"
        )


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk of a folder, which need not exist."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
