"""Engine records: light to import, strict about what they take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from rayalign.engines import ENGINES
from rayalign.registry import resolve

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_records_have_what_a_pool_needs(name: str) -> None:
    record = resolve(ENGINES[name])
    config = record(name=name, count=2)
    assert (config.name, config.count, config.dtype) == (name, 2, None)
    assert config.deadline_s > 0 and config.max_replacements >= 0 and callable(config.build)
    assert all(field.description for key, field in record.model_fields.items() if key != "name")
    for wrong in ({"count": 0}, {"max_context": 1}, {"max_running": 0}, {"threads": 0}, {"kount": 1}):
        with pytest.raises(ValidationError):
            record(name=name, **wrong)


def test_records_are_light_to_import() -> None:
    modules = [path.partition(":")[0] for path in ENGINES.values()]
    script = (
        f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; "
        "print([m for m in ('vllm', 'transformers', 'ray', 'deepspeed') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
