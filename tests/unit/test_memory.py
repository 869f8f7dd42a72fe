"""What memory this process may use, read from made-up trees of /proc and /sys/fs/cgroup, and once for real."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayalign.memory import cgroup_folders, host_bytes

GIB = 2**30
UNLIMITED_V1 = 9223372036854771712
MEMINFO = f"MemTotal: {256 * 2**20} kB\nMemFree: {10 * 2**20} kB\nMemAvailable: {200 * 2**20} kB\nHugePages_Total: 0\n"


def tree(root: Path, group: str, **groups: dict[str, str | int]) -> Path:
    """`group`: text of /proc/self/cgroup; `groups`: folder under /sys/fs/cgroup → its files."""
    files: dict[str, str | int] = {"proc/meminfo": MEMINFO, "proc/self/cgroup": group}
    for folder, content in groups.items():
        files |= {f"sys/fs/cgroup/{folder}/{name}": value for name, value in content.items()}
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{value}\n")
    return root


def v2(limit: str | int, used: int, cached: int = 0) -> dict[str, str | int]:
    stat = f"anon {used - cached}\nfile {cached}\ninactive_file {cached}\n"
    return {"memory.max": limit, "memory.current": used, "memory.stat": stat}


def v1(limit: int, used: int, cached: int = 0) -> dict[str, str | int]:
    stat = f"cache {cached}\ninactive_file 0\ntotal_inactive_file {cached}\n"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


@pytest.mark.parametrize(
    ("group", "groups", "total", "available"),
    [
        ("0::/", {}, 256, 200),
        ("0::/", {".": v2(16 * GIB, 3 * GIB)}, 16, 13),  # a container that sees its own group as the root
        ("0::/", {".": v2("max", 30 * GIB)}, 256, 200),
        ("0::/", {".": v2(16 * GIB, 15 * GIB, cached=9 * GIB)}, 16, 10),  # file cache makes way
        ("0::/", {".": v2(16 * GIB, 17 * GIB)}, 16, 0),
        ("0::/a.slice/b.service", {"a.slice": v2(64 * GIB, 60 * GIB), "a.slice/b.service": v2(32 * GIB, GIB)}, 32, 4),
        ("0::/a.slice/b.service", {"a.slice/b.service/child": v2(GIB, 0)}, 256, 200),  # not on the path
        ("0::/a", {"a": v2(512 * GIB, 100 * GIB)}, 256, 200),  # more than the machine has
        ("4:memory:/slurm/uid_1/job_2\n0::/", {"memory/slurm/uid_1": v1(8 * GIB, 2 * GIB)}, 8, 6),
        ("4:cpu,memory:/a\n", {"memory/a": v1(8 * GIB, 7 * GIB, cached=3 * GIB)}, 8, 4),
        ("4:memory:/docker/0123", {"memory": v1(8 * GIB, 2 * GIB)}, 8, 6),  # mounted at its own group
        ("4:memory:/a", {"memory": v1(UNLIMITED_V1, GIB), "memory/a": v1(UNLIMITED_V1, GIB)}, 256, 200),
        ("0::/../../elsewhere", {".": v2(16 * GIB, 3 * GIB)}, 16, 13),  # outside of what is mounted here
        ("1:memory:/x\n0::/y", {"memory/x": v1(8 * GIB, GIB), "unified/y": v2(6 * GIB, GIB)}, 6, 5),  # both at once
    ],
)
def test_the_smallest_of_machine_and_groups(tmp_path: Path, group, groups, total, available) -> None:
    assert host_bytes(tree(tmp_path, group, **groups)) == (total * GIB, available * GIB)


def test_without_proc_there_is_a_total(tmp_path: Path) -> None:
    total, available = host_bytes(tmp_path)
    assert 0 < available <= total


def test_folders_of_another_controller(tmp_path: Path) -> None:
    groups = {"cpu,cpuacct/a": {"cpu.cfs_quota_us": 1}, "cpu/a": {"cpu.cfs_quota_us": 1}, "memory/a": v1(GIB, 0)}
    found = cgroup_folders("cpu", tree(tmp_path, "3:cpu,cpuacct:/a\n4:memory:/a\n", **groups))
    assert tmp_path / "sys/fs/cgroup/cpu/a" in found and not any("memory" in folder.parts for folder in found)


def test_this_machine() -> None:
    total, available = host_bytes()
    assert 0 < available <= total
