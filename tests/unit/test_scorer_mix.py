"""The scorer `mix`: weights, standardised scores, what each part says, and mixes that mean nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from rayalign.api import run_training
from rayalign.config import parse_config
from rayalign.errors import ConfigError, ScoreError
from rayalign.registry import resolve
from rayalign.scorers import SCORERS
from rayalign.scorers.base import score_groups
from rayalign.scorers.engine_asker import EngineAsker
from rayalign.scorers.mix import Mix, joined, standardised
from rayalign.types import FAILED, Group
from tests.parts import tiny_config
from tests.scored import Counted, Says, group


def part(weight: float = 1.0, label: str | None = None, **said: Any) -> dict[str, Any]:
    return {"scorer": {"name": "tests.scored:Says", **said}, "weight": weight, "label": label}


def judged(*parts: dict[str, Any], **settings: Any) -> Group:
    score = Mix(scorers=parts, **settings).start()
    count = len(parts[0]["scorer"].get("scores", "ab"))
    return score_groups(score, [group(0, *"abcdef"[:count])], who="scorer-0")[0]


def test_a_pair_that_one_part_inferred_is_inferred():
    config = Mix(
        scorers=[part(1.0, "a", scores=(1, 0, 0)), part(1.0, "b", scores=(1, 0, 0)), part(0.0, "c", scores=(1, 0, 0))]
    )
    matrix = ((0.5,) * 3,) * 3
    parts = [replace(group(0, *"abc"), scores=(0.5,) * 3, preferences=matrix, inferred=pairs) for pairs in _INFERRED]
    assert joined(config, parts).inferred == ((0, 1), (1, 2))
    silent = [parts[0], replace(parts[1], preferences=None), parts[2]]
    assert joined(config, silent).inferred == ()


_INFERRED = (((1, 2),), ((0, 1), (1, 2)), ((0, 2),))


def test_scores_are_weighted_and_added_and_each_mean_is_a_metric():
    found = judged(part(2.0, "kind", scores=(1, 0, 3)), part(-0.5, "long", scores=(10, 20, 30)))
    assert found.scores == (-3.0, -10.0, -9.0)
    assert found.metrics == {"scores/kind": pytest.approx(4 / 3), "scores/long": 20.0}
    assert found.preferences is None


def test_standardised_scores_have_mean_0_and_spread_1_whatever_their_scale():
    found = judged(part(1.0, "a", scores=(1, 2, 3)), part(1.0, "b", scores=(3e6, 2e6, 1e6)), standardise="group")
    assert found.scores == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
    assert found.metrics == {"scores/a": 2.0, "scores/b": 2e6}  # as they were given
    spread = math.sqrt(2 / 3)
    assert standardised((1, 2, 3)) == pytest.approx((-1 / spread, 0, 1 / spread))
    assert standardised((0.1, 0.1, 0.1)) == (0.0, 0.0, 0.0) == standardised((5,)) * 3


def test_a_scorer_of_weight_0_is_only_reported():
    found = judged(part(1.0, "a", scores=(1, 2)), part(0.0, "b", scores=(7, 9)))
    assert found.scores == (1.0, 2.0) and found.metrics["scores/b"] == 8.0


def test_preferences_are_averaged_by_weight_where_all_that_count_give_some():
    both = [part(3.0, "a", scores=(1, 0), certainty=0.9), part(1.0, "b", scores=(1, 0), certainty=0.5)]
    found = judged(*both, part(0.0, "c", scores=(1, 0)))
    assert found.preferences[0] == (0.5, pytest.approx(0.8)) and found.preferences[1] == (pytest.approx(0.2), 0.5)
    assert judged(*both, part(0.1, "c", scores=(1, 0))).preferences is None
    assert judged(both[0], part(-1.0, "b", scores=(1, 0), certainty=0.5)).preferences is None


def test_metrics_of_the_parts_are_told_apart_by_the_config_whatever_each_says_of_a_group():
    found = judged(part(1.0, "a", scores=(1, 0)), part(1.0, "b", scores=(1, 0), metrics={"judge/ties": 1}))
    assert found.metrics["b/judge/ties"] == 1.0 and "judge/ties" not in found.metrics
    ask = {"name": "server", "url": "http://127.0.0.1:9/v1", "model": "m"}
    said = replace(group(0, "a", "b"), scores=(1.0, 0.0), metrics={"judge/ties": 0.25})
    silent = replace(said, metrics={})
    judges = [{"scorer": {"name": "judge", "ask": ask}, "label": label} for label in ("one", "two")]
    both = joined(Mix.model_validate({"scorers": judges}), [silent, said])
    assert both.metrics.keys() == {"two/judge/ties", "scores/one", "scores/two"}
    rule = {"scorer": {"name": "rules", "rule": "vader"}}
    assert joined(Mix.model_validate({"scorers": [rule, judges[0]]}), [silent, said]).metrics["judge/ties"] == 0.25


def test_what_is_known_of_a_group_before_is_said_once():
    score = Mix(scorers=(part(1.0, "a", scores=(1, 0)), part(1.0, "b", scores=(1, 0), metrics={"x": 1}))).start()
    (found,) = score_groups(score, [replace(group(0, "a", "b"), metrics={"candidates/distinct": 2.0})], who="s")
    assert found.metrics.keys() == {"candidates/distinct", "b/x", "scores/a", "scores/b"}


def test_a_part_that_is_only_reported_takes_no_answer_out():
    first, second = (
        replace(group(0, "a", "b"), scores=(1.0, 0.0), contested=c) for c in ((True, False), (False, True))
    )
    mixes = {w: Mix(scorers=(part(w, "a", scores=(1, 0)), part(1.0, "b", scores=(1, 0)))) for w in (0.0, -1.0)}
    assert joined(mixes[0.0], [first, second]).contested == (False, True)
    assert joined(mixes[-1.0], [first, second]).contested == (True, True)
    assert joined(mixes[0.0], [first, replace(second, contested=())]).contested == ()


def test_rewards_of_tokens_are_weighted_and_added_and_a_score_counts_at_the_last():
    tokens, sampled = ((1.0, -0.6), (0.25, 0.5)), group(0, "a", "b")
    table = replace(sampled, scores=(0.4, 0.75), token_scores=tokens)
    plain = replace(sampled, scores=(3.0, 5.0))
    parts = {w: Mix(scorers=(part(2.0, "table", scores=(1, 0)), part(w, "plain", scores=(1, 0)))) for w in (0.0, -1.0)}
    assert joined(parts[0.0], [table, plain]).token_scores == ((2.0, -1.2), (0.5, 1.0))
    assert joined(parts[-1.0], [table, plain]).token_scores == ((2.0, -4.2), (0.5, -4.0))
    assert joined(parts[-1.0], [table, table]).token_scores == tokens
    assert joined(parts[0.0], [plain, table]).token_scores == ()  # what is only reported gives none
    assert joined(parts[-1.0], [plain, plain]).token_scores == ()
    empty = [replace(each, completions=(replace(each.completions[0], token_ids=()),) * 2) for each in (table, plain)]
    assert joined(parts[-1.0], [replace(empty[0], token_scores=((), ())), empty[1]]).token_scores == ((), ())


def test_rewards_of_tokens_cannot_be_standardised():
    mix = Mix(scorers=(part(1.0, "table", scores=(1, 0)),), standardise="group")
    table = replace(group(0, "a", "b"), scores=(0.4, 0.75), token_scores=((1.0, -0.6), (0.25, 0.5)))
    with pytest.raises(ScoreError, match="each token its own reward") as raised:
        joined(mix, [table])
    assert raised.value.where == "scorer mix, prompt 0" and raised.value.rule and raised.value.remedy


def test_a_part_that_failed_on_a_whole_group_has_no_mean_there():
    failed = replace(group(0, "a", "b"), scores=(0.0, 0.0), metrics={FAILED: 2.0}, skipped=(True, True))
    fine = replace(group(0, "a", "b"), scores=(1.0, 3.0))
    mix = Mix(scorers=(part(1.0, "mine", scores=(1, 0)), part(1.0, "other", scores=(1, 0))))
    assert joined(mix, [failed, fine]).metrics == {f"mine/{FAILED}": 2.0, "scores/other": 2.0}


def test_a_rule_that_a_judge_reports_is_no_label_of_another():
    ask = {"name": "server", "url": "http://127.0.0.1:9/v1", "model": "m"}
    rule = {"scorer": {"name": "rules", "rule": "vader"}}
    both = [{"scorer": {"name": "judge", "ask": ask, "report_agreement": "vader"}}, rule]
    with pytest.raises(ValidationError, match="as the rule that its judge reports"):
        Mix.model_validate({"scorers": both})
    Mix.model_validate({"scorers": [both[0], {**rule, "label": "vader_2"}]})


def test_two_judges_on_engines_of_their_own_share_one_gpu():
    engine = {"name": "vllm", "max_context": 512}

    def judge(label, **keys):
        ask = {"name": "engine", "model": "m", "engine": {**engine, **keys}}
        return {"scorer": {"name": "judge", "ask": ask}, "label": label}

    with pytest.raises(ValidationError, match="share one GPU"):
        Mix.model_validate({"scorers": [judge("a"), judge("b")]})
    Mix.model_validate({"scorers": [judge("a", gpu_memory=0.4), judge("b", gpu_memory=0.5)]})


def test_the_parts_are_really_those_of_the_config():
    config = (
        {"scorer": {"name": "rules", "rule": "vader"}},
        {"scorer": {"name": "rules", "rule": "brevity"}, "weight": 0.1},
    )
    (found,) = score_groups(Mix(scorers=config).start(), [group(0, "a great film", "awful")], who="s")
    vader = found.metrics["scores/vader"] * 2
    assert found.metrics["scores/brevity"] == -2.0 and sum(found.scores) == pytest.approx(vader - 0.4)
    assert found.scores[0] > found.scores[1]


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ({"scores": (1.0, math.nan)}, "a score is not a finite number"),
        ({"scores": (1.0,)}, "the number of scores is wrong"),
        ({"scores": (1, 0), "metrics": {"x": math.inf}}, "a metric of a scorer is not a finite number"),
        ({"scores": (1, 0), "certainty": 1.5}, "preferences are no probabilities"),
    ],
    ids=["nan", "short", "metric", "preference"],
)
def test_what_a_part_must_not_give_is_said_of_that_part(said, what):
    says = {"name": "tests.scored:Says"}
    good, bad = Says(**says, scores=(1, 0)), Says.model_construct(**says, **{"certainty": None, "metrics": {}, **said})
    mix = Mix(scorers=({"scorer": good, "label": "good"}, {"scorer": bad, "label": "bad"}))
    with pytest.raises(ScoreError) as raised:
        score_groups(mix.start(), [group(3, "a", "b")], who="scorer-0")
    assert raised.value.what == what and raised.value.where.startswith("scorer bad of the mix, prompt 3")


def test_all_parts_are_closed_also_when_one_does_not_start():
    Counted.closed = 0
    counts = {"scorer": {"name": "tests.scored:Counts"}}
    score = Mix(scorers=({**counts, "label": "a"}, {**counts, "label": "b"})).start()
    assert score.memory_gib() == 4.0
    score.close()
    assert Counted.closed == 2
    broken = {"scorer": {**counts["scorer"], "fails": True}, "label": "b"}
    with pytest.raises(RuntimeError, match="cannot start"):
        Mix(scorers=({**counts, "label": "a"}, broken)).start()
    assert Counted.closed == 3


def test_every_scorer_but_a_mix_can_be_mixed():
    table = Mix.model_fields["scorers"].annotation.__args__[0].model_fields["scorer"].metadata
    names = {name for each in table if hasattr(each, "table") for name in each.table}
    assert names == set(SCORERS) - {"mix"} and resolve(SCORERS["mix"]) is Mix


@pytest.mark.parametrize(
    ("scorers", "where", "what"),
    [
        ([], "scorer.scorers", "this value cannot be used"),
        ([part(scores=(1,)), part(scores=(1,))], "scorer.scorers", "two scorers of the mix are called Says"),
        ([part(0.0, scores=(1,))], "scorer.scorers", "all weights are 0"),
        ([{"scorer": {"name": "mix", "scorers": []}}], "scorer.scorers.0.scorer.name", "no scorer is called mix"),
        ([{"scorer": {"name": "rules"}}], "scorer.scorers.0.scorer.rule", "this key is missing"),
        ([{"weight": 1.0}], "scorer.scorers.0.scorer", "this key is missing"),
        ([part(1.0, "a b", scores=(1,))], "scorer.scorers.0.label", "this value cannot be used"),
    ],
    ids=["none", "twice", "weights", "mix", "rule", "scorer", "label"],
)
def test_mixes_that_mean_nothing(tmp_path, model, scorers, where, what):
    with pytest.raises(ConfigError) as raised:
        parse_config(tiny_config(tmp_path, model, scorer={"name": "mix", "scorers": scorers}))
    error = raised.value
    assert error.where.endswith(f"key {where}") and error.what.startswith(what), str(error)
    assert error.value is not None and error.rule and error.remedy


def test_a_training_with_one_records_each_score(tmp_path, model):
    scorers = [
        {"scorer": {"name": "tests.parts:Tokens"}, "label": "tokens"},
        {"scorer": {"name": "rules", "rule": "brevity"}, "weight": 0.1},
    ]
    scorer = {"name": "mix", "scorers": scorers, "standardise": "group"}
    result = run_training(parse_config(tiny_config(tmp_path, model, scorer=scorer, train__steps=2)))
    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all({"scores/tokens", "scores/brevity"} <= record.keys() for record in records)
    assert all(0 <= record["scores/tokens"] <= 1 and record["scores/brevity"] < 0 for record in records)
    assert all(abs(record["reward/mean"]) < 1e-6 for record in records)


def test_a_judge_that_asks_the_policy_gets_what_is_lent(model):
    judge = {"name": "judge", "ask": "policy", "min_mass": 0.0}
    mix = Mix(scorers=({"scorer": judge}, {"scorer": {"name": "rules", "rule": "brevity"}, "weight": 0.1}))
    assert mix.borrows_engine and not Mix(scorers=({"scorer": {"name": "rules", "rule": "vader"}},)).borrows_engine
    with pytest.raises(ScoreError, match="no engine of its own"):
        mix.start()
    lent = EngineAsker(model=str(model), engine={"name": "transformers", "max_context": 512}).start()
    score = mix.start_with(lent)
    (found,) = score_groups(score, [group(0, "a good film", "bad")], who="scorer-0")
    score.close()
    assert found.metrics["scores/brevity"] == -2.0 and found.metrics["judge/refused"] == 0.0
    assert found.preferences is None  # the rule gives none
    with pytest.raises(ValidationError, match="engines are one pool"):
        Mix(scorers=({"scorer": judge},), count=2)


def test_an_answer_that_is_contested_keeps_its_score_when_another_fails():
    asked = group(0, "a", "b", "c")
    first = replace(asked, scores=(1.0, 2.0, 3.0), contested=(True, False, False))
    mix = Mix(scorers=(part(1.0, "mine", scores=(1, 0)), part(1.0, "other", scores=(1, 0))))
    for skipped, wanted in (((), (2.0, 4.0, 6.0)), ((False, True, False), (2.0, None, 6.0))):
        told = joined(mix, [first, replace(first, skipped=skipped, metrics={FAILED: 1.0})])
        (found,) = score_groups(lambda groups: [told], [asked], who="scorer-0")  # noqa: B023
        assert found.known_scores == wanted and found.contested == (True, any(skipped), False)


def test_parts_share_the_deadline_of_the_mix():
    """So that a function that hangs is found, and skipped, before the mix counts as lost."""
    parts = [{"scorer": {"name": "tests.scored:Hurried"}, "label": label} for label in ("first", "second")]
    score = Mix.model_validate({"scorers": parts, "deadline_s": 60.0}).start()
    assert score_groups(score, [group(0, "a")], who="scorer-0")[0].scores == (30.0 + 30.0,)
