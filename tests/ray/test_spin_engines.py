"""Self-play over several vLLM engines and DeepSpeed, as Ray actors."""

from __future__ import annotations

import numpy as np
import pytest

from rayalign.api import run_training
from tests.loop.conftest import records
from tests.loop.spin_parts import generated, sft_rows, write
from tests.ray.conftest import RAY


def test_two_engines_answer_for_the_previous_iterate(make, tmp_path, shared):
    changes = {
        "algorithm": {"name": "spin", "iterations": 2, "steps": 2, "lam": 1.0, "shard": 6},
        "data": {"examples": write(tmp_path / "sft.jsonl", sft_rows()), "chat_template": False, "max_tokens": 48},
        "train": {},
        "rollout__prompts": 6,
        "evaluation": {"prompts": 2, "samples": 2},
        **RAY,
        "engine": {**RAY["engine"], "count": 2},
    }
    result = run_training(make(**changes))
    assert result.step == 4 and sorted(result.evaluations) == [0, 2, 4]
    answers = [generated(result.run_dir, t) for t in range(2)]
    for iteration in answers:
        assert sorted(iteration) == list(range(16))
        served = [answer["engine"] for answer in iteration.values()]
        assert {served.count(name) for name in ("engine-0", "engine-1")} <= {*range(5, 12)}
    assert [a["token_ids"] for a in answers[0].values()] != [a["token_ids"] for a in answers[1].values()]
    steps = records(result.run_dir)
    for first in (steps[0], steps[2]):  # the reference is the policy, and was given to both engines
        assert first["spin/gap"] == pytest.approx(0.0, abs=1e-4) and first["loss"] == pytest.approx(np.log(2), abs=1e-4)
        assert first["generation/answers"] == 16.0
    assert steps[1]["spin/gap"] > 0.1 and steps[2]["spin/previous"] > 0
    assert steps[1]["sync/version"] == 2.0 and steps[1]["sync/logp_gap_max"] < 1e-3
    assert "win_rate" in result.evaluations[4].metrics
