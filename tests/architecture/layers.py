"""What may import what, read from the source with `ast`, so that nothing needs to be importable.

Every check takes the root of a tree and returns a list of sentences, one a violation: the tests run it on the
repository, and on a small tree that breaks the rule, to see that it can fail.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "rayalign"

# A module imports modules of a lower rank; those of one rank stay apart, except inside one package.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "types", "record", "interrupt"),
    ("registry", "memory", "cpu", "sharding"),
    ("maths", "decoding", "collate", "samples"),
    ("protocols",),
    ("algorithms", "sync", "trackers"),
    ("engines", "learners", "data"),
    ("scorers",),  # a judge has an engine of its own, a reward model is loaded as a learner loads it
    ("rollouts", "metrics"),
    ("evaluate", "checkpoint", "reading", "reference_cache"),
    ("report", "console", "selfplay"),
    ("run",),
    ("train",),
    ("runtime", "gradient_rules"),
    ("schema",),
    ("config", "build"),
    ("checks", "opponents"),
    ("run_dir", "plan", "submit", "listing"),
    ("api", "selftest"),
    ("label", "generate"),
    ("rounds", "compare"),
    ("doctor",),
    ("cli", "__main__"),
    ("__init__",),  # the package's own names are taken from everywhere, lazily
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Heavy libraries → the only places that may import them, as paths under the package.
CONFINED = {
    "ray": ("runtime/*.py",),
    "vllm": ("engines/vllm*.py", "sync/*.py"),
    "deepspeed": ("learners/deepspeed*.py",),
}
MOCKS = ("unittest.mock", "mock", "pytest_mock")


def sources(root: Path, *folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(path for path in (root / folder).rglob("*.py") if "__pycache__" not in path.parts)


def imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of every import in a file, wherever it stands; relative ones resolved."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text("utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:  # `from rayalign import x` and `from ray import x` may name a module
                yield node.lineno, f"{module}.{alias.name}"
        elif _is_import_call(node):
            yield node.lineno, node.args[0].value.partition(":")[0]


def _is_import_call(node: ast.AST) -> bool:
    """`importlib.import_module("…")` and `__import__("…")` with a literal count as imports."""
    if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in ("import_module", "__import__") and isinstance(node.args[0].value, str)


def component(path: Path, root: Path) -> str:
    """The name in LAYERS that a file belongs to: `rayalign/engines/vllm.py` → engines."""
    return path.relative_to(root / PACKAGE).with_suffix("").parts[0]


def turned_arrows(root: Path) -> list[str]:
    """Imports inside the package that do not point to a lower layer, and modules without a layer."""
    found = []
    for path in sources(root, PACKAGE):
        here = component(path, root)
        if here not in RANK:
            found.append(f"{path.relative_to(root)}: {here!r} has no layer; give it one in {Path(__file__).name}")
            continue
        for line, name in imports(path, root):
            parts = name.split(".")
            there = parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None
            if there in RANK and there != here and RANK[there] >= RANK[here]:
                found.append(f"{path.relative_to(root)}:{line}: {here} imports {name}, which is not below it")
    return found


def escaped_libraries(root: Path) -> list[str]:
    """Imports of ray, vllm and deepspeed outside the places where they belong."""
    found = []
    for path in sources(root, PACKAGE):
        inside = path.relative_to(root / PACKAGE)
        for line, name in imports(path, root):
            allowed = CONFINED.get(name.split(".")[0])
            if allowed and not any(inside.match(pattern) for pattern in allowed):
                found.append(f"{path.relative_to(root)}:{line}: {name} belongs in {' or '.join(allowed)}")
    return found


def mocks(root: Path) -> list[str]:
    """Imports of mocking libraries: tests use the real thing."""
    return [
        f"{path.relative_to(root)}:{line}: {name}"
        for path in sources(root, PACKAGE, "tests")
        for line, name in imports(path, root)
        if any(name == mock or name.startswith(f"{mock}.") for mock in MOCKS)
    ]
