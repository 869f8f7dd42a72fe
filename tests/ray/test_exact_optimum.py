"""On actors a run ends at the optimum of RLHF as well: two engines, two DeepSpeed ranks, samples one step old."""

from __future__ import annotations

from tests.exact import BETA, build_model, distribution, optimum, run, variation
from tests.ray.conftest import LIGHT

RLOO = {
    "name": "policy_gradient",
    "advantage": "rloo",
    "samples": 16,
    "kl": {"in": "reward", "estimator": "k1", "coef": BETA},
    "aggregate": "sequence_sum_mean",
    "importance_cap": 5.0,
}


def test_two_engines_two_ranks_and_depth_one_end_at_the_optimum(tmp_path, shared):
    tiny = build_model(tmp_path / "model")
    policy, metrics = run(
        tmp_path,
        tiny,
        RLOO,
        length=1,
        train={"steps": 100},
        rollout={"prompts": 8, "monitor": 0, "depth": 1},
        optimizer={"lr": 0.05, "schedule": "cosine"},
        engine={"count": 2},
        learner={**LIGHT["learner"], "ranks": 2, "zero_stage": 2},
        placement=LIGHT["placement"],
    )
    wanted = optimum(distribution(tiny, (1, 2), 1), 1)
    assert variation(policy, wanted) < 0.02 < 0.2 < variation(distribution(tiny, (1, 2), 1), wanted)
    assert [record["rollout/version"] for record in metrics] == [max(0, step - 1) for step in range(len(metrics))]
