"""What tests of the loop share."""

from __future__ import annotations

import copy
import json

import pytest

from rayalign.api import run_training
from rayalign.config import parse_job
from rayalign.rounds import run_rounds
from tests.parts import tiny_config


@pytest.fixture
def train(make):
    return lambda **changes: run_training(make(**changes))


def records(run_dir, name="metrics"):
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().split("\n")[:-1]]


def timeless(record):
    """A metrics record without what depends on the machine's speed."""
    return {k: v for k, v in record.items() if not k.startswith(("time/", "memory/")) and k != "rollout/tokens_per_s"}


STAGES = [
    {"name": "answers", "algorithm": {"name": "label", "samples": 4, "shard": 8}},
    {"name": "sft", "algorithm": "sft", "data": {"examples": "stage:answers", "prompts": None}},
    {"name": "dpo", "algorithm": "preference", "data": {"examples": "stage:answers", "prompts": None}},
]


@pytest.fixture
def job(tmp_path, model):
    """The data of a job of three stages on a tiny model, two steps each."""

    def build(stages=STAGES, **changes):
        base = tiny_config(tmp_path, model, train__steps=2, checkpoint__every=1, run_dir=str(tmp_path / "rounds"))
        del base["algorithm"]
        return {**base, "rounds": copy.deepcopy(stages), **changes}

    return build


@pytest.fixture
def rounds(job):
    return lambda stages=STAGES, **changes: run_rounds(parse_job(job(stages, **changes)))
