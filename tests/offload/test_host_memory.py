"""Would catch: a store that is let in because only the outermost group's limit was read, where the process is in a
group of its own (systemd, Slurm, Kubernetes without a namespace); a group whose folder is not there taken for one
without memory; one version's files read in the other's tree.
"""

from pathlib import Path

import pytest

from grass.offload.host import available_bytes

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")

GROUPS = "sys/fs/cgroup"


def write(root: Path, **content: str) -> None:
    """Files by their paths, with `__` for slashes."""
    for name, text in content.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, proc__meminfo="MemTotal:  9999 kB\nMemAvailable:  1000 kB\n")
    return tmp_path


def in_group(root: Path, line: str) -> None:
    """The process is where `/proc/self/cgroup` says."""
    write(root, proc__self__cgroup=f"{line}\n")


def limit(folder: Path, most: str, used: int, cached: int = 0) -> None:
    """Version 2."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 9\ninactive_file {cached}\n")


def limit_v1(folder: Path, most: int, used: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{most}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"total_inactive_file {cached}\n")


def test_the_machine_alone(root: Path) -> None:
    assert available_bytes(root) == 1000 * 1024


def test_nothing_is_known(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None


def test_the_limit_of_the_processs_own_group(root: Path) -> None:
    in_group(root, "0::/slurm/job1")
    limit(root / GROUPS / "slurm/job1", "50000", 20000, cached=700)
    assert available_bytes(root) == 30700


def test_the_limit_of_a_group_above_it(root: Path) -> None:
    in_group(root, "0::/user.slice/user-0.slice/session-1.scope")
    limit(root / GROUPS / "user.slice/user-0.slice/session-1.scope", "max", 10)
    limit(root / GROUPS / "user.slice", "40000", 39000)
    limit(root / GROUPS, "500000", 100000)
    assert available_bytes(root) == 1000


def test_the_least_of_all_counts_each_with_its_own_use(root: Path) -> None:
    in_group(root, "0::/a/b")
    limit(root / GROUPS / "a/b", "30000", 1000)
    limit(root / GROUPS / "a", "60000", 50000)  # another child of it has most of that
    assert available_bytes(root) == 10000


def test_a_sister_group_does_not_count(root: Path) -> None:
    in_group(root, "0::/a")
    limit(root / GROUPS / "b", "10", 10)
    assert available_bytes(root) == 1000 * 1024


def test_version_1(root: Path) -> None:
    in_group(root, "5:cpu,cpuacct:/elsewhere\n7:hugetlb,memory:/docker/abc\n0::/unified")
    limit_v1(root / GROUPS / "memory/docker/abc", 50000, 20000, cached=50)
    limit_v1(root / GROUPS / "memory/docker", 2**63 - 4096, 70000)
    limit_v1(root / GROUPS / "memory/elsewhere", 10, 10)
    limit_v1(root / GROUPS / "memory", 2**63 - 4096, 90000)
    assert available_bytes(root) == 30050


@pytest.mark.parametrize("line", ["0::/docker/abc", "7:memory:/docker/abc", "0::/../../elsewhere", "0::/"])
def test_a_container_that_sees_its_own_group_as_the_root(root: Path, line: str) -> None:
    """The host's path leads nowhere in here, or out of what is mounted."""
    in_group(root, line)
    limit(root / GROUPS, "50000", 20000)
    limit_v1(root / GROUPS / "memory", 45000, 20000)
    assert available_bytes(root) == 25000


def test_a_path_that_leads_out_is_not_followed(root: Path) -> None:
    in_group(root, "0::/../../../secret")
    limit(root / "secret", "10", 10)
    assert available_bytes(root) == 1000 * 1024


def test_a_name_with_colons(root: Path) -> None:
    in_group(root, "0::/kubepods/pod:1")
    limit(root / GROUPS / "kubepods/pod:1", "7000", 0)
    assert available_bytes(root) == 7000
