"""Files and folders: what is in them, and what is kept under another name as it is not what it should be."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
WHOLE = 16 * 2**20  # bytes of weights that are read to know them; of larger ones the beginning and the end
EDGE = 2**20


def set_aside(path: Path) -> Path:
    """Moved beside its place, to a name that is free. Gives the new path."""
    target, number = path.with_name(f"{path.name}.set-aside"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.set-aside-{number}")
    return path.replace(target)


def content(path: Path) -> str:
    """Fingerprint of a file, or of all files below a folder, whatever their times and wherever it lies; "" where there
    is none. Of large weights the size, the beginning and the end are looked at."""
    try:
        if path.is_file():
            return _of_file(path)
        if not path.is_dir() or not path.name:
            return ""
        files = sorted(each for each in path.rglob("*") if each.is_file())
        return hashlib.blake2b(
            json.dumps([(str(each.relative_to(path)), _of_file(each)) for each in files]).encode(), digest_size=16
        ).hexdigest()
    except OSError:  # a text that is no path at all, or one that may not be read
        return ""


def _of_file(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE or path.suffix not in WEIGHTS:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        found = hashlib.blake2b(f"{size}".encode(), digest_size=16)
        found.update(file.read(EDGE))
        file.seek(-EDGE, 2)
        found.update(file.read(EDGE))
        return found.hexdigest()
