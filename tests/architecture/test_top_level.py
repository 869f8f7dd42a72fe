"""What is at the top of the repository, that nothing large is in it, and that every shipped config loads."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from rayalign.config import load_config, load_job
from rayalign.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TOP_LEVEL = {
    ".ci", ".gitignore", ".ruff.toml", "LICENSE", "README.md", "configs", "docker", "launch", "rayalign", "setup.py",
    "tests",
}  # fmt: skip
LARGEST = 1 << 20  # bytes
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def tracked(root: Path) -> list[str]:
    """Paths that git tracks under `root`, and that are there."""
    if not (root / ".git").exists():
        pytest.skip("this is not a git checkout, so nothing says what is tracked")
    listing = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], check=True, capture_output=True, text=True)
    return [name for name in listing.stdout.split("\0") if name and (root / name).is_file()]


def too_large(root: Path) -> list[str]:
    return [name for name in tracked(root) if (root / name).stat().st_size > LARGEST]


def unexpected(root: Path) -> set[str]:
    return {name.split("/")[0] for name in tracked(root)} - TOP_LEVEL


def git_tree(root: Path, files: dict[str, bytes]) -> Path:
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    subprocess.run(["git", "-C", str(root), "add", "-A"], check=True)
    return root


def test_the_top_level_is_what_it_should_be() -> None:
    assert unexpected(ROOT) == set()


def test_no_large_file_is_tracked() -> None:
    assert too_large(ROOT) == []


def test_a_large_file_and_a_stray_one_are_found(tmp_path: Path) -> None:
    root = git_tree(tmp_path, {"rayalign/a.bin": b"0" * (LARGEST + 1), "tests/b.bin": b"0" * LARGEST, "notes.txt": b""})
    assert too_large(root) == ["rayalign/a.bin"]
    assert unexpected(root) == {"notes.txt"}


def test_scripts_start_with_a_shebang_where_they_are_executable() -> None:
    scripts = [ROOT / name for name in tracked(ROOT) if name.startswith(("launch/", ".ci/", "docker/"))]
    executable = [path for path in scripts if os.access(path, os.X_OK)]
    assert executable and all(path.read_bytes().startswith(b"#!") for path in executable)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert load_job(path).to_dict()


def test_a_config_with_an_unknown_key_does_not_load(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(CONFIGS[0].read_text() + "\nno_such_key: 1\n")
    with pytest.raises(ConfigError, match="no_such_key"):
        load_config(broken)
