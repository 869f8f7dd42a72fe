"""Cores, memory, shared memory, disk and open files of this machine, or of the container that it is."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import tempfile
from pathlib import Path

from rayalign.cpu import bfloat16_flags
from rayalign.doctor.finding import Finding, gib
from rayalign.memory import cgroup_folders, host_bytes, read_text

GIB = 2**30
DEMO_GIB = 9  # resident memory of launch/demo.sh
RAY_STORE_SHARE = 0.3  # of memory, which Ray takes for its object store, and at most the larger of
RAY_STORE_CAP = 10**10  # this and 95 % of /dev/shm
DISK_FULL = 0.95  # of the disk: beyond it Ray refuses to write
OPEN_FILES = 4096  # below it Ray warns of failing connections


def machine_findings() -> list[Finding]:
    """Everything about this machine, GPUs apart."""
    total, available = host_bytes()
    findings = core_findings(len(os.sched_getaffinity(0)), cgroup_cores())
    findings += bfloat16_findings(Path("/proc/cpuinfo").read_text())
    findings += memory_findings(total, available, machine=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    findings += shm_findings(*shm_sizes(), memory=total)
    for what, folder in (("disk of runs/", existing(Path("runs"))), ("temporary folder", Path(tempfile.gettempdir()))):
        usage = shutil.disk_usage(folder)
        findings += disk_findings(what, str(folder.resolve()), usage.free, usage.total)
    return findings + open_file_findings(*resource.getrlimit(resource.RLIMIT_NOFILE))


def core_findings(allowed: int, quota: float | None) -> list[Finding]:
    """`allowed`: of the affinity mask; `quota`: cores' worth of time that a cgroup grants."""
    if quota is not None and quota < allowed:
        found = f"{quota:g} cores' worth of time on {allowed} cores (a cgroup's quota)"
        remedy = f"set engine.threads and learner.threads to {max(1, int(quota))}, or raise the container's --cpus"
        return [Finding("note", "CPU cores", found, remedy)]
    if allowed < 2:
        return [Finding("note", "CPU cores", "1", "two or more: Ray, engine and learner share this one")]
    return [Finding("ok", "CPU cores", str(allowed))]


def bfloat16_findings(cpuinfo: str) -> list[Finding]:
    """`cpuinfo`: the text of /proc/cpuinfo."""
    known = bfloat16_flags(cpuinfo)
    if known:
        return [Finding("ok", "bfloat16 on the CPU", f"in hardware ({', '.join(known)})")]
    found = f"not in hardware ({platform.machine()}), so it is many times slower than float32"
    return [Finding("note", "bfloat16 on the CPU", found, "model.dtype=float32 when the model runs on the CPU")]


def memory_findings(total: int, available: int, *, machine: int) -> list[Finding]:
    """Bytes; `total` and `available`: to this process; `machine`: of the machine, which a cgroup may limit."""
    limited = total < 0.95 * machine
    found = f"{gib(available)} available of {gib(total)}" + (f", a cgroup's limit on {gib(machine)}" * limited)
    more = (
        "raise the container's or the job's memory (--memory, --mem)"
        if limited
        else "end other programs, or use a larger machine"
    )
    if available < 3 * GIB:
        return [Finding("problem", "memory", f"{found}: too little for an engine and a learner", more)]
    if available < DEMO_GIB * GIB:
        return [Finding("note", "memory", f"{found}; launch/demo.sh needs {DEMO_GIB} GiB", more)]
    return [Finding("ok", "memory", found)]


def shm_findings(free: int | None, total: int | None, *, memory: int) -> list[Finding]:
    """Bytes of /dev/shm (None: there is none) against what Ray's object store takes of `memory` by default."""
    if free is None or total is None:
        found = "there is none: Ray's object store and tensor parallel engines share memory through it"
        return [Finding("problem", "/dev/shm", found, "mount -t tmpfs tmpfs /dev/shm")]
    found = f"{gib(free)} free of {gib(total)}"
    wanted = min(RAY_STORE_SHARE * memory, max(RAY_STORE_CAP, 0.95 * free))
    size = f"docker run --shm-size={max(1, round(wanted * 1.1 / GIB))}g (mount -o remount,size=… outside a container)"
    if free < GIB:
        return [Finding("problem", "/dev/shm", f"{found}: weights travel through it", size)]
    if free < wanted:
        found += f"; Ray's object store would be {gib(wanted)} and go to the disk, which is slow"
        return [
            Finding("note", "/dev/shm", found, f"{size}; or placement.object_store_gib={int(free * 0.8 / GIB) or 0.5}")
        ]
    return [Finding("ok", "/dev/shm", found)]


def disk_findings(what: str, folder: str, free: int, total: int) -> list[Finding]:
    """Bytes of the file system that `folder` lies on."""
    found = f"{gib(free)} free of {gib(total)} at {folder}"
    if free < (1 - DISK_FULL) * total:
        remedy = "free some, or RAY_local_fs_capacity_threshold=0.99 if the rest is enough"
        return [Finding("problem", what, f"{found}: Ray stops writing to a disk that is 95 % full", remedy)]
    if free < 5 * GIB:
        return [
            Finding(
                "note", what, found, "a checkpoint takes 8 to 16 bytes a parameter: free some, or lower checkpoint.keep"
            )
        ]
    return [Finding("ok", what, found)]


def open_file_findings(soft: int, hard: int) -> list[Finding]:
    """Ray raises the soft limit by itself, as far as the hard one."""
    reached = hard if hard != resource.RLIM_INFINITY else 65536
    if soft == resource.RLIM_INFINITY or max(soft, reached) >= OPEN_FILES:
        return [Finding("ok", "open files", f"at most {max(soft, reached)}")]
    remedy = "raise the hard limit: docker run --ulimit nofile=65536, or /etc/security/limits.conf"
    return [Finding("problem", "open files", f"at most {hard}; Ray needs {OPEN_FILES}", remedy)]


def shm_sizes() -> tuple[int | None, int | None]:
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return None, None
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def cgroup_cores(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that this process's cgroups (versions 1 and 2) grant, None without a limit."""
    grants = []
    for folder in cgroup_folders("cpu", root):
        quota, period, *_ = (read_text(folder / "cpu.max").split() or ["", ""]) + ["", ""]
        quota = quota or read_text(folder / "cpu.cfs_quota_us")
        period = period or read_text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():  # "max" and -1 are none
            grants.append(int(quota) / int(period))
    return min(grants, default=None)
