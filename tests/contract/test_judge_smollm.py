"""A judge that can read, where the demo's model is on this machine: it tells praise from blame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rayalign.scorers.base import LocalScorer
from rayalign.scorers.judge import Judge
from tests.judges import group

MODEL = Path("~/.cache/rayalign/models/SmolLM2-135M-Instruct").expanduser()
PRAISE = (
    "A wonderful film, full of warmth and joy.",
    "The acting is brilliant and I loved every scene.",
    "An excellent story, beautifully told.",
    "One of the best films of the year, a true delight.",
)
BLAME = (
    "A terrible film, boring from start to finish.",
    "The acting is awful and I hated every scene.",
    "A stupid story, badly told.",
    "One of the worst films of the year, a complete waste of time.",
)


@pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="launch/demo.sh makes this model")
def test_a_real_judge_rates_praise_above_blame_and_is_measured_against_a_rule() -> None:
    engine = {"name": "vllm", "max_context": 640, "max_running": 16, "kv_cache_gib": 0.25, "dtype": "float32"}
    ask = {"name": "engine", "model": str(MODEL), "engine": engine}
    config = Judge.model_validate(
        {
            "name": "judge",
            "mode": "direct",
            "template": "positive_score",
            "ask": ask,
            "min_mass": 0.02,
            "report_agreement": "vader",
        }
    )
    config.check(str(MODEL))
    scorer = LocalScorer(config)
    try:
        scorer.submit(
            [group(index, *pair, prompt="Review a film.") for index, pair in enumerate(zip(PRAISE, BLAME, strict=True))]
        )
        found = scorer.poll()
        assert scorer.memory_gib() > 0.3
    finally:
        scorer.close()
    praise, blame = np.array([each.scores for each in found]).T
    assert praise.mean() > blame.mean() + 0.01
    assert np.mean([each.metrics["judge/agreement"] for each in found]) >= 0.5
    assert all(each.metrics["judge/refused"] == 0.0 and min(each.scores) >= -1 for each in found)
