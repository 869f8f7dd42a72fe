"""Files of at most 400 lines and functions of at most 80: what is longer is to be taken apart."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE_LINES = 400
FUNCTION_LINES = 80


def oversized(root: Path, *folders: str) -> list[str]:
    """One sentence for each file and function over its limit."""
    found = []
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        text = path.read_text("utf-8")
        name = path.relative_to(root)
        if (count := len(text.splitlines())) > FILE_LINES:
            found.append(f"{name}: {count} lines, at most {FILE_LINES}")
        for node in ast.walk(ast.parse(text, filename=str(path))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    found.append(f"{name}:{node.lineno}: {node.name} has {lines} lines, at most {FUNCTION_LINES}")
    return found


def test_files_and_functions_stay_small() -> None:
    assert oversized(ROOT, "rayalign", "tests", "launch") == []


def test_a_long_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "at.py").write_text("x = 1\n" * FILE_LINES)
    assert oversized(tmp_path, ".") == []
    (tmp_path / "over.py").write_text("x = 1\n" * (FILE_LINES + 1))
    assert oversized(tmp_path, ".") == [f"over.py: {FILE_LINES + 1} lines, at most {FILE_LINES}"]


def test_a_long_function_is_found(tmp_path: Path) -> None:
    (tmp_path / "at.py").write_text("def f():\n" + "    x = 1\n" * (FUNCTION_LINES - 1))
    assert oversized(tmp_path, ".") == []
    (tmp_path / "over.py").write_text("class A:\n    async def f(self):\n" + "        x = 1\n" * FUNCTION_LINES)
    assert len(found := oversized(tmp_path, ".")) == 1 and found[0].startswith("over.py:2: f has 81 lines")
