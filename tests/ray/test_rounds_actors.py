"""Rounds on a real Ray cluster: stages without a learner, or without an engine, start only what they need."""

from __future__ import annotations

from rayalign.config import parse_job
from rayalign.label import run_labelling
from rayalign.rounds import run_rounds
from tests.parts import tiny_config
from tests.ray.conftest import LIGHT

OFFLINE = {"examples": "stage:answers", "prompts": None}


def test_each_stage_has_the_actors_that_it_needs(make, tmp_path, model, shared):
    base = tiny_config(tmp_path, model, train__steps=1, run_dir=str(tmp_path / "rounds"))
    del base["algorithm"]
    stages = [
        {"name": "answers", "algorithm": {"name": "label", "samples": 3, "shard": 8}, "scorer": {"count": 2}},
        {
            "name": "again",
            "algorithm": {"name": "label", "samples": 0},
            "data": OFFLINE,
            "scorer": "tests.stage_parts:Length",
        },
        {"name": "sft", "algorithm": "sft", "data": {**OFFLINE, "examples": "stage:again"}},
    ]
    found = run_rounds(parse_job({**base, **LIGHT, "rounds": stages}))
    logs = {name: {log.stem for log in (found.run_dir / "stages" / name / "log").iterdir()} for name in found.stages}
    assert logs == {
        "answers": {"driver", "engine-0", "scorer-0", "scorer-1"},
        "again": {"driver", "scorer-0"},
        "sft": {"driver", "learner-0"},
    }
    here = run_labelling(make(algorithm=stages[0]["algorithm"], run_dir=str(tmp_path / "here")))
    assert found.output("answers", "data").read_text() == here.file.read_text()
