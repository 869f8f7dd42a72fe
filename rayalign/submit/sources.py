"""Which of a user's modules travel with a job, and which files of their packages do not, and why."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

DATA = set(".yaml .yml .json .jsonl .txt .csv .tsv .md .toml .xml .jinja .jinja2 .j2 .html .css .js".split())
DATA_MIB = 1.0  # of one file
OUTPUTS = ("runs", "outputs", "checkpoints", "wandb", "mlruns", "node_modules", "venv")
SECRETS = ("*credential*", "*secret*")
SECRET_FILES = ("*.pem", "*.key", "*.p12", "*.pfx", "*.env", "*.env.*", "id_*", "*netrc", "*.token", "token.*") + (
    "*passw*",
    "*private*key*",
    "*api*key*",
    "*service*account*",
)


def may_be_secret(path: Path) -> bool:
    """Whether a file or folder is called as keys, tokens and passwords are. Sources and folders may be called
    id_map or token, but not secrets."""
    patterns = SECRETS if path.suffix == ".py" or path.is_dir() else SECRETS + SECRET_FILES
    return any(fnmatchcase(path.name.lower(), pattern) for pattern in patterns)


def size_in_words(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 / 10 else f"{size / 2**10:.1f} KiB"


def sources(names: Iterable[str]) -> tuple[dict[str, Path], list[str]]:
    """The files of these top-level modules as far as they are not installed, and of what they import from the
    folder in which they lie.

    Returns:
        place in the job's folder → file, and for each module a line about the files that stay, if any.
    """
    queue: list[tuple[str, Path | None]] = [(name, None) for name in names]
    seen = set()
    files: dict[str, Path] = {}
    left_out = []
    while queue:
        name, beside = queue.pop()
        found = None if name in seen or name in sys.stdlib_module_names else _located(name)
        if found is None or beside not in (None, found.parent):
            continue
        seen.add(name)
        travel, stay = _divided(found, by_name=beside is None)
        files |= {path.relative_to(found.parent).as_posix(): path for path in travel}
        if stay:
            left_out.append(f"{name}: {_in_words(stay, found if found.is_dir() else found.parent)}")
        for path in travel:
            if path.suffix == ".py":
                queue += [(imported, found.parent) for imported in _imported(path)]
    return files, left_out


def _located(name: str) -> Path | None:
    """The folder of a top-level package or the file of a module; none when it is installed or not there."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a module without a spec, as __main__
        return None
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or ())
    path = Path(folders[0] if folders else spec.origin or "").absolute()
    return path if (folders or path.suffix == ".py") and not _is_installed(path) else None


def _is_installed(path: Path) -> bool:
    """Whether this is a release that a cluster has of its own, or Python itself."""
    standard = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    return bool({"site-packages", "dist-packages"} & set(path.parts)) or any(path.is_relative_to(s) for s in standard)


def _divided(found: Path, *, by_name: bool) -> tuple[list[Path], Mapping[str, list[Path]]]:
    """What travels of a package or module, and what stays, by reason. A single file that the config names
    travels whatever it is called."""
    travel: list[Path] = []
    stay: dict[str, list[Path]] = defaultdict(list)
    if by_name and found.is_file():
        return [found], stay
    ignored = _ignored_by_git(found)
    for path in _walk(found) if found.is_dir() else [found]:
        reason = _reason(path, found, ignored)
        (stay[reason] if reason else travel).append(path)
    return travel, stay


def _walk(package: Path) -> Iterator[Path]:
    """Its files, and its folders of outputs or secrets as a whole. What is hidden is passed by, but for secrets."""
    for here, folders, names in os.walk(package):
        below = [Path(here, name) for name in sorted(folders)]
        below = [
            path for path in below if not path.name.startswith((".", "__pycache__")) and path.suffix != ".egg-info"
        ]
        whole = [path for path in below if _is_output(path) or may_be_secret(path)]
        folders[:] = [path.name for path in below if path not in whole]
        yield from whole
        for path in (Path(here, name) for name in sorted(names)):
            if path.is_file() and path.suffix != ".pyc" and (not path.name.startswith(".") or may_be_secret(path)):
                yield path


def _is_output(folder: Path) -> bool:
    return folder.name in OUTPUTS and not (folder / "__init__.py").exists()


def _reason(path: Path, top: Path, ignored: set[Path]) -> str:
    """Why a file or folder stays; "" when it travels."""
    if may_be_secret(path):
        return "as possible secrets"
    if path in ignored:
        return "that git ignores"
    if path.suffix == ".py" or path.name == "py.typed":
        return ""
    if set(OUTPUTS) & set(path.relative_to(top).parts):
        return "as outputs"
    if path.suffix.lower() not in DATA:
        return "neither sources nor small data"
    return f"above {DATA_MIB:g} MiB" if path.stat().st_size > DATA_MIB * 2**20 else ""


def _ignored_by_git(found: Path) -> set[Path]:
    """What git ignores of a package or module; nothing where it is not in a checkout."""
    command = ["git", "-c", "safe.directory=*", "-C", str(found.parent), "ls-files", "-z"]
    command += ["--others", "--ignored", "--exclude-standard", "--", found.name]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return set()
    return {found.parent / os.fsdecode(name) for name in listed.split(b"\0") if name}


def _in_words(stay: Mapping[str, list[Path]], top: Path) -> str:
    """'2 as possible secrets (id_rsa, keys/server.pem), 1 above 1 MiB (big.json 20.0 MiB)': largest first."""
    parts = []
    for reason, paths in stay.items():
        sizes = {path: path.stat().st_size if path.is_file() else 0 for path in paths}
        names = [
            path.relative_to(top).as_posix()
            + ("/" if path.is_dir() else f" {size_in_words(sizes[path])}" if sizes[path] >= 2**20 else "")
            for path in sorted(paths, key=lambda path: (-sizes[path], path))
        ]
        parts.append(f"{len(names)} {reason} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})")
    return ", ".join(parts)


def _imported(path: Path) -> set[str]:
    """Top-level names of what a file imports, wherever in it."""
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError):  # a template, or a file for another Python: not one that the job imports
        return set()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found
