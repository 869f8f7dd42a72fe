"""A judge as a Ray actor with vLLM, and the policy's pool of engines as the judge."""

from __future__ import annotations

from rayalign.api import run_training
from rayalign.label import run_labelling
from tests.loop.conftest import records, timeless
from tests.ray.conftest import LIGHT, RAY

TEMPLATE = 'mode: pairwise\nprompt: "{first} or {second}"\nask: "say:"\nanswers: {"1": 1, "2": 0}\n'
LABEL = {"algorithm": {"name": "label", "samples": 2}}
SMALL = {"train__steps": 2, "evaluation__prompts": 2, "evaluation__samples": 2}


def section(tmp_path, ask, **keys):
    (tmp_path / "short.yaml").write_text(TEMPLATE)
    usual = {"name": "judge", "template": str(tmp_path / "short.yaml"), "min_mass": 0.0, "tie_margin": 0.0}
    return {**usual, "ask": ask, **keys}


def test_a_pool_of_vllm_judges_says_what_a_judge_in_this_process_says(make, model, tmp_path, shared):
    vllm = {"name": "vllm", "max_context": 200, "kv_cache_gib": 0.1, "threads": 1}
    engine = {"name": "transformers", "max_context": 200}
    judge = section(tmp_path, {"name": "engine", "model": str(model), "engine": vllm}, count=2)
    there = {**LIGHT, **LABEL, "engine": engine, "scorer": judge}
    run_dir = run_labelling(make(run_dir=str(tmp_path / "ray"), **there)).run_dir
    alone = section(tmp_path, {"name": "engine", "model": str(model), "engine": engine})
    here = run_labelling(make(run_dir=str(tmp_path / "here"), **LABEL, scorer=alone, engine=engine)).run_dir
    assert len(records(run_dir, "samples")) == 32
    for one, other in zip(records(run_dir, "samples"), records(here, "samples"), strict=True):
        assert one["completion"] == other["completion"] and abs(one["score"] - other["score"]) < 1e-4
    assert records(run_dir)[0]["judge/refused"] == 0.0
    assert (run_dir / "log" / "scorer-1.log").exists()


def test_the_policys_pool_judges_and_gets_its_weights_back(make, model, tmp_path, shared):
    """Two engines as actors against one in this process: the same samples of both steps, so the same weights."""
    engine = {**RAY["engine"], "max_context": 200, "count": 2, "threads": 1}
    judge = section(tmp_path, "policy")
    there = {**RAY, "engine": engine, "scorer": judge, "learner": LIGHT["learner"]}
    run_dir = run_training(make(run_dir=str(tmp_path / "ray"), **there, **SMALL)).run_dir
    alone = {"engine": {"name": "vllm", "max_context": 200, "max_running": 16, "kv_cache_gib": 0.1}, "scorer": judge}
    here = run_training(make(run_dir=str(tmp_path / "here"), **alone, **SMALL)).run_dir
    for name in ("samples", "metrics"):
        assert len(records(run_dir, name)) == len(records(here, name))
    for one, other in zip(records(run_dir, "samples"), records(here, "samples"), strict=True):
        assert one["completion"] == other["completion"] and abs(one["score"] - other["score"]) < 1e-3
    steps = [timeless(record) for record in records(run_dir)]
    assert [step["rollout/version"] for step in steps] == [0.0, 1.0]
    assert all(step["sync/logp_gap_max"] < 1e-3 for step in steps)
    assert not (run_dir / "log" / "scorer-0.log").exists()
