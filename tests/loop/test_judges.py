"""Judges in the training loop: with an engine of their own, and with the policy's and the reference's weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayalign.api import run_evaluation
from rayalign.errors import ConfigError, ScoreError
from rayalign.scorers.mix import Mix
from tests.judges import build_steady_judge
from tests.loop.conftest import records, timeless

TEMPLATE = 'mode: {mode}\nprompt: "{prompt}"\nask: "say:"\nthink: "think:"\nanswers: {{"1": 1, "2": 0}}\n'
PROMPTS = {"pairwise": "{first} or {second}", "direct": "{answer}"}


@pytest.fixture
def judge(tmp_path, model):
    """The section `scorer`, with a template that is short enough for a tiny context."""

    def made(ask, mode="pairwise", **keys):
        path = tmp_path / f"{mode}.yaml"
        path.write_text(TEMPLATE.format(mode=mode, prompt=PROMPTS[mode]))
        asked = {"name": "engine", "model": str(model), "engine": {"name": "transformers", "max_context": 200}}
        ask = asked if ask == "engine" else {"name": ask} if isinstance(ask, str) else ask
        usual = {"name": "judge", "mode": mode, "template": str(path), "min_mass": 0.0, "tie_margin": 0.0}
        return {**usual, "ask": ask, **keys}

    return made


LONGER = {"engine__max_context": 200, "evaluation__prompts": 2, "evaluation__every": 2}


@pytest.mark.parametrize(
    ("scorer", "changes"),
    [
        ({}, {"algorithm__loss": {"name": "psi_po", "tau": 0.5}}),
        ({"mode": "direct", "reasoning": 3}, {}),
        ({"schedule": "tournament"}, {"model__lora": {"rank": 4}}),
        ({}, {"rollout__resample_every": 2}),
    ],
    ids=["pairwise", "direct", "lora", "resampled"],
)
def test_the_policy_as_it_was_judges_as_a_judge_with_the_same_weights(train, judge, tmp_path, scorer, changes):
    """The same samples, scores and losses to the last bit: the reference's weights came, and the policy's came back."""
    runs = {
        ask: train(run_dir=str(tmp_path / ask), scorer=judge(ask, **scorer), **LONGER, **changes).run_dir
        for ask in ("engine", "policy")
    }
    for name in ("metrics", "samples", "evaluations"):
        own, lent = (records(run_dir, name) for run_dir in runs.values())
        assert [timeless(record) for record in own] == [timeless(record) for record in lent], name
    steps = records(runs["policy"])
    assert len({record["reward/std"] for record in steps}) > 1 and any(record.get("kl/k3", 0) > 0 for record in steps)


def test_a_judge_follows_the_reference(train, judge, tmp_path):
    """A reference that is replaced after every step judges differently from the second step on."""
    runs = {}
    for update in ("fixed", "replace"):
        reference = {"update": update} if update == "fixed" else {"update": update, "every": 1}
        changes = {"scorer": judge("policy", mode="direct"), "algorithm__reference": reference, "optimizer__lr": 1e-2}
        runs[update] = records(train(run_dir=str(tmp_path / update), **LONGER | changes).run_dir, "samples")
    same = [a["score"] == b["score"] for a, b in zip(*runs.values(), strict=True)]
    assert all(same[:16]) and not any(same[16:])


def test_what_a_judge_says_is_recorded(train, judge):
    run_dir = train(scorer=judge("engine", report_agreement="brevity"), **LONGER).run_dir
    for record in records(run_dir):
        assert record["judge/refused"] == 0.0 and record["judge/order_dependent"] >= 0.0
        assert "judge/ties" in record and record["scores/brevity"] < 0
        assert record["reward/mean"] == pytest.approx(0.5)  # of pairwise comparisons with one another, always
    for evaluation in records(run_dir, "evaluations"):
        assert evaluation["metrics"]["judge/refused"] == 0.0 and evaluation["metrics"]["scores/brevity"] < 0


def test_a_checkpoint_is_judged_by_the_model_it_began_as(train, make, judge, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {"scorer": judge("policy", mode="direct"), **LONGER}
    result = train(**changes)
    path = result.run_dir / "checkpoints" / "step-4"
    again = run_evaluation(make(**changes), model=str(path))
    assert again.metrics == pytest.approx(result.evaluations[4].metrics, abs=1e-5)


def test_a_run_goes_on_with_the_template_that_it_began_with(train, judge, tmp_path):
    scorer, run = judge("policy"), {"run_dir": str(tmp_path / "run"), **LONGER}
    train(scorer=scorer, **run, train__steps=1, checkpoint__every=1)
    path = Path(scorer["template"])
    path.write_text(path.read_text().replace("answers:", "system: be strict\nanswers:"))
    with pytest.raises(ConfigError, match="this file is not the one") as raised:
        train(scorer=scorer, **run, train__steps=2, resume=True)
    assert raised.value.where == "key scorer.template"
    mixed = Mix.model_validate({"scorers": [{"scorer": scorer}]})
    assert mixed.contents()["scorers.0.scorer.template"] != raised.value.rule.partition(",")[0]


def test_a_judge_that_never_answers_stops_the_run(train, judge, tmp_path):
    model = build_steady_judge(tmp_path / "silent", {})
    ask = {"name": "engine", "model": str(model), "engine": {"name": "transformers", "max_context": 200}}
    with pytest.raises(ScoreError, match="the judge does not answer"):
        train(scorer=judge(ask, min_mass=0.02))


def test_a_judge_that_always_says_the_first_leaves_nothing_to_learn(train, judge, tmp_path):
    model = build_steady_judge(tmp_path / "first", {"1": 0.9, "2": 0.05})
    ask = {"name": "engine", "model": str(model), "engine": {"name": "transformers", "max_context": 200}}
    run_dir = train(scorer=judge(ask)).run_dir
    steps = records(run_dir)
    assert len(steps) == 4 and all(record["judge/order_dependent"] == 1.0 for record in steps)
    assert all("loss" not in record and record["pairs/dropped"] > 0 for record in steps)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rollout__depth": 1}, ["key rollout.depth", "cannot sample ahead while it judges"]),
        ({"algorithm__loss": {"name": "simpo"}}, ["key scorer.ask", "no reference whose weights could judge"]),
    ],
)
def test_the_policys_engine_is_lent_only_where_it_can_be(make, judge, changes, expected):
    with pytest.raises(ConfigError) as error:
        make(scorer=judge("policy"), **changes)
    for part in expected:
        assert part in str(error.value), str(error.value)


def test_one_judge_asks_the_policys_engines(make, judge):
    with pytest.raises(ConfigError, match="key scorer.count"):
        make(scorer=judge("policy", count=2))


def test_answers_that_the_policy_splits_are_refused_before_anything_starts(train, judge, tmp_path):
    scorer = judge("policy")
    path = tmp_path / "pairwise.yaml"
    path.write_text(path.read_text().replace('"1": 1', '"10": 1'))
    with pytest.raises(ConfigError, match="not one token of the judge"):
        train(scorer=scorer)
    assert not (tmp_path / "run").exists()
