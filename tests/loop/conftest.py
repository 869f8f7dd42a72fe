"""What tests of the loop share."""

from __future__ import annotations

import json

import pytest

from rayalign.api import run_training


@pytest.fixture
def train(make):
    return lambda **changes: run_training(make(**changes))


def records(run_dir, name="metrics"):
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().split("\n")[:-1]]


def timeless(record):
    """A metrics record without what depends on the machine's speed."""
    return {k: v for k, v in record.items() if not k.startswith(("time/", "memory/")) and k != "rollout/tokens_per_s"}
