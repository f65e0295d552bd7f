"""Host memory: whether the store fits, asked before anything is trained."""

from pathlib import Path

from grass.errors import OffloadError

_CGROUPS = (  # limit and use, of version 2 and version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_bytes() -> int | None:
    """Bytes of host memory that can still be had, also by the limits of a container; None if unknown."""
    found = []
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for limit, use in _CGROUPS:
        most, used = _read(limit).strip(), _read(use).strip()
        if most.isdigit() and used.isdigit():  # "max" is no limit
            # Files that are cached count as used, and make room when asked.
            found.append(max(0, int(most) - int(used) + _cached_bytes(Path(limit).parent)))
    return min(found) if found else None


def _cached_bytes(folder: Path) -> int:
    for line in _read(str(folder / "memory.stat")).splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def check_host_memory(num_bytes: int) -> None:
    """Refuse a store that cannot fit.

    Args:
        num_bytes: of the store when every layer has been drawn.

    Raises:
        OffloadError: with both figures and the remedy.
    """
    available = available_bytes()
    if available is not None and num_bytes > available:
        raise OffloadError(
            f"the optimizer's states will take {num_bytes:,} bytes ({num_bytes / 2**30:.1f} GiB) of host memory once "
            f"every layer has been drawn, and {available:,} ({available / 2**30:.1f} GiB) are available: use "
            "state_dtype=torch.bfloat16, which halves them, always_active='none', or a machine with more memory"
        )
