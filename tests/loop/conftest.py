"""One tiny model for all tests of the loop in this process."""

from __future__ import annotations

import json

import pytest

from rayalign.api import run_training
from rayalign.config import parse_config
from tests.parts import tiny_config
from tests.tiny_models import build_tiny_llama


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return build_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def make(tmp_path, model):
    """A checked config of the tiny model, with changes."""
    return lambda **changes: parse_config(tiny_config(tmp_path, model, **changes))


@pytest.fixture
def train(make):
    return lambda **changes: run_training(make(**changes))


def records(run_dir, name="metrics"):
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().split("\n")[:-1]]


def timeless(record):
    """A metrics record without what depends on the machine's speed."""
    return {k: v for k, v in record.items() if not k.startswith(("time/", "memory/")) and k != "rollout/tokens_per_s"}
