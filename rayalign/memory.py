"""Memory: the peak of this process, and what it may use of the machine."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path, PurePosixPath


def peak_gib() -> float:
    """Highest resident set of this process so far, in GiB; on a GPU what was reserved there is added."""
    unit = 1 if sys.platform == "darwin" else 1024
    total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        total += torch.cuda.max_memory_reserved()
    return total / 2**30


def host_bytes(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes in total and available to this process: the smallest of the machine's and of every cgroup it is in.

    A group's file cache counts as available, as it does in the machine's own number: it makes way when asked.

    Args:
        root: what /proc and /sys lie under.
    """
    total, available = _machine(root)
    for folder in cgroup_folders("memory", root):
        for limit_name, used_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = read_text(folder / limit_name)
            if limit.isdigit():  # "max" is none in version 2; version 1 has a number beyond any machine
                cache = _table(read_text(folder / "memory.stat")).get(cache_name, 0)
                used = int(read_text(folder / used_name) or 0) - cache
                total, available = min(total, int(limit)), min(available, int(limit) - used)
    return total, max(0, min(available, total))


def cgroup_folders(controller: str, root: Path = Path("/")) -> list[Path]:
    """The folders of this process's cgroups, of versions 1 and 2, from the outermost that can be seen inwards.

    The outermost is always among them: where a container sees only its own group, that is mounted as the root.
    """
    folders: dict[Path, None] = {}
    mounted = root / "sys/fs/cgroup"
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            tops = [mounted, mounted / "unified"]
        elif controller in controllers.split(","):
            tops = [mounted / controller]
        else:
            continue
        inner = PurePosixPath(path.lstrip("/"))
        levels = [] if ".." in inner.parts else [inner, *inner.parents]
        for top in tops:
            folders |= dict.fromkeys([top, *(top / level for level in reversed(levels))])
    return list(folders)


def read_text(path: Path) -> str:
    """What the file holds, stripped; an empty string when it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _machine(root: Path) -> tuple[int, int]:
    table = _table(read_text(root / "proc/meminfo").replace(":", ""))
    if "MemTotal" not in table:  # no Linux
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return pages, pages
    return table["MemTotal"] * 1024, table.get("MemAvailable", table.get("MemFree", 0)) * 1024


def _table(text: str) -> dict[str, int]:
    """Lines of a name and a number."""
    return {words[0]: int(words[1]) for words in map(str.split, text.splitlines()) if len(words) > 1}
