"""Files that are not what they should be: kept, under another name."""

from __future__ import annotations

from pathlib import Path


def set_aside(path: Path) -> Path:
    """Moved beside its place, to a name that is free. Gives the new path."""
    target, number = path.with_name(f"{path.name}.set-aside"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.set-aside-{number}")
    return path.replace(target)
