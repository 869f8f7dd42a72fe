"""Real Ray clusters on this machine. Each test starts and ends its own."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from rayalign.build import load_tokenizer, start_parts
from rayalign.console import Console

RAY = {
    "placement": {"name": "ray", "object_store_gib": 0.2},
    "learner": {"name": "deepspeed", "zero_stage": 0, "deadline_s": 120},
    "engine": {"name": "vllm", "max_context": 64, "max_running": 16, "kv_cache_gib": 0.1, "deadline_s": 120},
}
LIGHT = {**RAY, "engine": {"name": "transformers", "max_context": 64, "deadline_s": 60}}


@pytest.fixture
def start(tmp_path):
    """The parts of a config, running: `with start(config) as parts`."""

    @contextmanager
    def running(config, name="parts"):
        with start_parts(config, load_tokenizer(config), tmp_path / name, Console()) as parts:
            yield parts

    return running
