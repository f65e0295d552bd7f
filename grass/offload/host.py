"""Available host memory, compared with the size of the store before training."""

import os
from pathlib import Path

from grass.errors import OffloadError

_GROUPS = "sys/fs/cgroup"  # cgroup v2; in v1 each controller has a folder there
_FILES = {  # limit and usage, by controller
    "": ("memory.max", "memory.current"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the available host memory in bytes, within the limits of containers and jobs; None if unknown.

    Processes of one run on one machine (``LOCAL_WORLD_SIZE``, as `torchrun` sets it) have equal shares.

    Args:
        root: root of the file system.
    """
    found = []
    for line in _read(str(root / "proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for controller, files in _FILES.items():
        for folder in _groups(root, controller):
            limit, used = (_read(str(folder / name)).strip() for name in files)
            if limit.isdigit() and used.isdigit():  # "max": no limit
                # Cached files count as used, but are evicted on demand.
                found.append(max(0, int(limit) - int(used) + _cached_bytes(folder)))
    return min(found) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if found else None


def _groups(root: Path, controller: str) -> list[Path]:
    """Return the folders of this process's control group and its parents: each has a limit of its own.

    In a container the path may be that of the host, which does not exist there; the outermost folder is then the
    container's group.
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
    """Check that a store fits into host memory.

    Args:
        num_bytes: size of the store once every layer has been drawn.

    Raises:
        OffloadError: it does not fit; the message has both sizes.
    """
    available = available_bytes()
    if available is not None and num_bytes > available:
        raise OffloadError(
            f"the optimizer's states will take {num_bytes:,} bytes ({num_bytes / 2**30:.1f} GiB) of host memory once "
            f"every layer has been drawn, and {available:,} ({available / 2**30:.1f} GiB) are available: use "
            "state_dtype=torch.bfloat16, which halves them, always_active='none', or a machine with more memory"
        )
