"""One program, two placements: the same recorded completions give the same first step."""

from __future__ import annotations

import pytest
import ray
from ray.cluster_utils import Cluster

from rayalign.api import run_evaluation, run_training
from rayalign.build import collector_for, load_tokenizer, prompts_for
from rayalign.protocols import UpdatePlan
from rayalign.rollouts import sample_seed
from rayalign.sync.handshake import push_weights
from tests.loop.conftest import records, timeless
from tests.ray.conftest import LIGHT, RAY


def draw(config, parts, count=4):
    """Completions as the loop draws them for its first rollout."""
    tokenizer = load_tokenizer(config)
    prompts = prompts_for(config, tokenizer).training[:count]
    sampling = config.algorithm.request(config.sampling.sampling())
    groups, _, _ = collector_for(config, parts, tokenizer).collect(
        prompts, sampling, lambda prompt, k: sample_seed(0, 0, prompt, k), label="recorded"
    )
    return groups


def first_step(config, parts, groups):
    """Metrics of one update on these groups, and the log-prob gap after the push that follows."""
    examples, _ = config.algorithm.examples(groups)
    for role, column in config.algorithm.needs:
        examples = parts.roles[role].annotate(examples, (column,))
    metrics = parts.roles.policy.update(examples, config.algorithm, UpdatePlan(0))
    again, _ = config.algorithm.examples(groups)
    again = parts.roles.reference.annotate(again, (config.algorithm.needs[0][1],))
    second = parts.roles.policy.update(again, config.algorithm, UpdatePlan(1))
    probe = [g.prompt.token_ids + g.completions[0].token_ids for g in groups]
    gap = push_weights(parts.roles.policy, parts.engine, version=2, probe=probe, max_gap=1e-3)
    return metrics, second, gap


@pytest.fixture(scope="module")
def tokens():
    """Sampled tokens by (prompt, sample), as each arrangement of engines gave them."""
    return {}


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_completions_give_the_same_loss(make, start, tokens, ranks):
    """vLLM + DeepSpeed on Ray against transformers + torch here, and 1 against 2 engines and ranks."""
    local = make(optimizer__lr=1e-3)
    remote = make(
        optimizer__lr=1e-3,
        **{**RAY, "learner": {**RAY["learner"], "ranks": ranks}, "engine": {**RAY["engine"], "count": ranks}},
    )
    with start(remote, "remote") as parts:
        groups = draw(remote, parts)
        there = first_step(remote, parts, groups)
    with start(local, "local") as parts:
        here = first_step(local, parts, groups)
    for ours, theirs in zip(here[:2], there[:2], strict=True):
        for key in ("loss", "grad_norm", "rewards/margins"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-4), key
    assert here[1]["loss"] != pytest.approx(here[0]["loss"], abs=1e-4)  # the first update did something
    assert there[2]["sync/logp_gap_max"] < 1e-3
    tokens[ranks] = [(g.prompt.index, c.token_ids) for g in groups for c in g.completions]
    served = {c.engine for g in groups for c in g.completions}
    assert len(served) == ranks
    if len(tokens) == 2:
        assert tokens[1] == tokens[2]  # whichever engine serves, whatever else is in its batch


def test_two_nodes_give_the_same_run_as_one_process(make, tmp_path, alone):
    """Two Ray nodes with an object store each: an engine and a learner rank on either, weights between them."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 150 * 2**20})
    cluster.add_node(num_cpus=1, object_store_memory=150 * 2**20)
    two = {"engine": {**LIGHT["engine"], "count": 2}, "learner": {**LIGHT["learner"], "ranks": 2, "zero_stage": 2}}
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        local = run_training(make(run_dir=str(tmp_path / "local"), train__steps=3)).run_dir
        remote = run_training(make(run_dir=str(tmp_path / "remote"), train__steps=3, **{**LIGHT, **two})).run_dir
        assert ray.is_initialized()  # a connection that was there is left there
        used = {actor["Address"]["NodeID"] for actor in ray._private.state.actors().values()}
        assert len(used) == 2
    finally:
        ray.shutdown()
        cluster.shutdown()
    for ours, theirs in zip(records(local), records(remote), strict=True):
        ours, theirs = timeless(ours), timeless(theirs)
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"padding"}:  # which depends on the split
            assert theirs[key] == pytest.approx(ours[key], abs=1e-3), key


def test_depth_one_runs_on_actors_with_sharded_learners(make, tmp_path, monkeypatch, shared):
    """And what they write is a checkpoint that vLLM loads as it is."""
    monkeypatch.chdir(tmp_path)
    remote = {**RAY, "learner": {**RAY["learner"], "ranks": 2, "zero_stage": 3}}
    changes = {"rollout__depth": 1, "algorithm__reference": {"update": "replace", "every": 2}, "evaluation__prompts": 2}
    result = run_training(make(train__steps=3, **changes, **remote))
    steps = records(result.run_dir)
    assert [r["rollout/version"] for r in steps] == [0, 0, 1]
    assert [r["sync/version"] for r in steps] == [1, 2, 3]
    assert all(r["sync/logp_gap_max"] < 1e-3 for r in steps)
    assert {p.name for p in (result.run_dir / "log").iterdir()} == {
        "driver.log",
        "engine-0.log",
        "scorer-0.log",
        "learner-0.log",
        "learner-1.log",
    }
    again = run_evaluation(make(evaluation__prompts=2, **RAY), model=str(result.run_dir / "checkpoints" / "step-3"))
    assert again.metrics["reward"] == pytest.approx(result.evaluations[3].metrics["reward"], abs=1e-6)
    assert again.metrics["kl/k3"] > 0
