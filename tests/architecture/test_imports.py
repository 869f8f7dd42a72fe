"""The arrows of the architecture: what imports what, where Ray, vLLM and DeepSpeed live, and no mocks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import layers  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_imports_point_one_way() -> None:
    assert layers.turned_arrows(ROOT) == []


def test_the_package_is_really_read() -> None:
    read = {layers.component(path, ROOT) for path in layers.sources(ROOT, layers.PACKAGE)}
    assert {"errors", "maths", "engines", "learners", "runtime", "cli"} <= read


def test_heavy_libraries_stay_in_their_places() -> None:
    assert layers.escaped_libraries(ROOT) == []


def test_nothing_is_mocked() -> None:
    assert layers.mocks(ROOT) == []


@pytest.mark.parametrize(
    ("path", "text", "line"),
    [
        ("rayalign/maths/a.py", "from rayalign.engines.vllm import VLLMEngine", 1),
        ("rayalign/maths/a.py", "def f():\n    import rayalign.train", 2),
        ("rayalign/maths/a.py", "from rayalign import cli", 1),
        ("rayalign/maths/a.py", "from ..rollouts import Rollouts", 1),
        ("rayalign/maths/a.py", "from .. import runtime", 1),
        ("rayalign/engines/deep/a.py", "from ...runtime.pool import EnginePool", 1),
        ("rayalign/errors.py", "from .types import Prompt", 1),
        ("rayalign/engines/a.py", "import importlib\nimportlib.import_module('rayalign.build')", 2),
    ],
)
def test_a_turned_arrow_is_found(tmp_path: Path, path: str, text: str, line: int) -> None:
    found = layers.turned_arrows(tree(tmp_path, {path: text}))
    assert len(found) == 1 and found[0].startswith(f"{path}:{line}:")


def test_arrows_that_point_down_pass(tmp_path: Path) -> None:
    below = "from rayalign.errors import X\nfrom ..types import Y\nfrom .other import Z\nimport rayalign.engines.b\n"
    assert layers.turned_arrows(tree(tmp_path, {"rayalign/engines/a.py": below, "rayalign/__init__.py": ""})) == []


def test_a_module_without_a_layer_is_found(tmp_path: Path) -> None:
    assert "no layer" in layers.turned_arrows(tree(tmp_path, {"rayalign/utils.py": ""}))[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("rayalign/train.py", "import ray"),
        ("rayalign/train.py", "def f():\n    from ray import data"),
        ("rayalign/engines/transformers.py", "from vllm.v1 import sample"),
        ("rayalign/learners/torch.py", "import deepspeed.zero"),
        ("rayalign/scorers/ray.py", "import importlib\nimportlib.import_module('ray')"),
    ],
)
def test_a_library_outside_its_place_is_found(tmp_path: Path, path: str, text: str) -> None:
    assert len(layers.escaped_libraries(tree(tmp_path, {path: text}))) == 1


def test_libraries_in_their_places_pass(tmp_path: Path) -> None:
    files = {
        "rayalign/runtime/pool.py": "import ray\nfrom ray.util import placement_group",
        "rayalign/engines/vllm_worker.py": "import vllm",
        "rayalign/sync/ipc.py": "from vllm import LLM",
        "rayalign/learners/deepspeed.py": "import deepspeed",
        "rayalign/data/raytracing.py": "import raytracing",
    }
    assert layers.escaped_libraries(tree(tmp_path, files)) == []


@pytest.mark.parametrize("text", ["from unittest import mock", "from unittest.mock import patch", "import mock"])
def test_a_mock_is_found(tmp_path: Path, text: str) -> None:
    assert len(layers.mocks(tree(tmp_path, {"tests/unit/test_a.py": text}))) == 1
