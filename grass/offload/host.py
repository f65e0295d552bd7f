"""Host memory: whether the store fits, asked before anything is trained."""

from pathlib import Path

from grass.errors import OffloadError

_GROUPS = "sys/fs/cgroup"  # of version 2; version 1 has a folder a controller there
_FILES = {  # limit and use
    "": ("memory.max", "memory.current"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes of host memory that can still be had, also by the limits of containers and jobs; None if unknown.

    Args:
        root: of the file system.
    """
    found = []
    for line in _read(str(root / "proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for controller, files in _FILES.items():
        for folder in _groups(root, controller):
            most, used = (_read(str(folder / name)).strip() for name in files)
            if most.isdigit() and used.isdigit():  # "max" is no limit
                # Files that are cached count as used, and make room when asked.
                found.append(max(0, int(most) - int(used) + _cached_bytes(folder)))
    return min(found) if found else None


def _groups(root: Path, controller: str) -> list[Path]:
    """Folders of this process's group and of those around it: each has a limit of its own.

    In a container the path may be the host's, which leads nowhere; what is mounted as the outermost group is then the
    container's own.
    """
    top = root / _GROUPS / controller
    groups = [top]
    for line in _read(str(root / "proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)  # 0::/a/b, or 7:hugetlb,memory:/a/b
        if controller in controllers.split(",") and ".." not in path.split("/"):
            inner = top / path.lstrip("/")
            groups += [inner, *inner.parents][: len(inner.parts) - len(top.parts)]
    return groups


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
