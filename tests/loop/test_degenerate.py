"""Rollouts that no loss can learn from as they are: answers without a token, all cut, all alike. Counted, never NaN."""

from __future__ import annotations

import math

import pytest

from rayalign.build import learner_specs, load_tokenizer
from rayalign.errors import TrainingStopped
from rayalign.evaluate import sequence_kl
from rayalign.protocols import Roles, UpdatePlan
from rayalign.samples import Rollout
from rayalign.types import Completion, Group, Prompt
from tests.loop.conftest import records

ALGORITHMS = {
    "dpo": {"name": "online_preference", "samples": 4},
    "all pairs": {"name": "online_preference", "samples": 4, "pairs": "all", "loss": {"name": "ipo", "tau": 0.1}},
    "kto": {"name": "kto", "samples": 4, "good_above": "mean"},
    "cringe": {"name": "cringe", "samples": 4},
    "rejection": {"name": "rejection_sampling", "samples": 4},
    "grpo": {"name": "policy_gradient", "advantage": "grpo", "samples": 4},
    "rloo": {"name": "policy_gradient", "advantage": "rloo", "samples": 4},
    "ppo": {"name": "ppo", "samples": 4},
}


def group(number: int, *answers: tuple[tuple[int, ...], str, float]) -> Group:
    completions = tuple(
        Completion(f"{number}/{k}", ids, (-1.0,) * len(ids), reason, 0) for k, (ids, reason, _) in enumerate(answers)
    )
    scores = tuple(score for *_, score in answers)
    return Group(f"g{number}", Prompt(number, "p", (4, 5, 6)), completions, ("t",) * len(answers), scores)


EMPTY = ((), "stop", 3.0)
REST = (((7, 8, 1), "stop", 1.0), ((9, 1), "stop", 0.0), ((10,), "length", 0.4))
GROUPS = {
    "one empty": [group(n, EMPTY, *REST) for n in (0, 1)],
    "all empty": [group(n, EMPTY, EMPTY, EMPTY, EMPTY) for n in (0, 1)],
    "all cut": [group(n, *[((7, 8 + k), "length", float(k)) for k in range(4)]) for n in (0, 1)],
    "all alike": [group(n, *[((7, 1), "stop", 0.5)] * 4) for n in (0, 1)],
    "no variance": [group(n, *[((7, 8 + k), "stop", 0.5) for k in range(4)]) for n in (0, 1)],
}  # fmt: skip


@pytest.fixture
def update(make):
    def one(algorithm, groups):
        config = make(algorithm=algorithm, evaluation__reference=True)
        specs = learner_specs(config, load_tokenizer(config), policy=None, train=True)
        learners = config.learner.build(specs, rank=0, world_size=1, address=("127.0.0.1", 1))
        roles, algorithm = Roles(**learners), config.algorithm
        examples, metrics = algorithm.examples(groups)
        metrics |= Rollout(0, 0, tuple(groups), 1.0, 1.0).metrics()
        if any(group.completions[0].token_ids for group in groups):
            assert all(math.isfinite(value) for pair in sequence_kl(groups, roles) for value in pair)
        if examples:
            for role, column in algorithm.needs:
                examples = roles[role].annotate(examples, (column,))
            examples, credited = algorithm.credit(examples)
            metrics |= credited
        if examples:
            if algorithm.critic_algorithm is not None:
                found = roles.critic.update(examples, algorithm.critic_algorithm, UpdatePlan(0))
                metrics |= {f"critic/{key}": value for key, value in found.items()}
            metrics |= algorithm.summarise(roles.policy.update(examples, algorithm, UpdatePlan(0)))
        return examples, metrics

    return one


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_method_learns_from_the_rest_and_says_numbers(update, name, kind):
    examples, metrics = update(ALGORITHMS[name], GROUPS[kind])
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert all(row.completion_ids for example in examples for row in example.sequences)
    if kind == "all empty":
        assert not list(examples)
        assert any(value > 0 for key, value in metrics.items() if key.endswith(("dropped", "left_out"))), metrics
    if kind == "one empty":
        assert list(examples)


def test_a_run_without_variance_stops_and_says_why(train):
    with pytest.raises(TrainingStopped, match="no training example was left") as raised:
        train(scorer={"name": "tests.parts:SameScore"}, train__steps=9, rollout__max_empty=2,
              algorithm={**ALGORITHMS["grpo"], "equal_groups": "drop"})  # fmt: skip
    assert "max_empty=2" in raised.value.rule
    assert "scored the same" in raised.value.value and "sampling.temperature" in raised.value.remedy


def test_a_run_of_which_all_answers_are_cut(train, tmp_path):
    """They are learned from, and counted; where overlong answers are dropped, the run stops and says so."""
    cut = {"sampling__max_tokens": 2, "train__steps": 2}
    steps = records(train(algorithm=ALGORITHMS["ppo"], **cut).run_dir)
    assert all(record["completion/truncated"] > 0.9 and math.isfinite(record["loss"]) for record in steps)
    for name, overlong in (("grpo", "drop"), ("ppo", "mask")):
        without = {**ALGORITHMS[name], "overlong": overlong}
        with pytest.raises(TrainingStopped, match="no training example") as raised:
            train(algorithm=without, run_dir=str(tmp_path / overlong), sampling__max_tokens=1, train__steps=9,
                  rollout__max_empty=2)  # fmt: skip
        assert (
            "2 rollouts" in raised.value.value and "16 were cut at max_tokens (answers/overlong" in raised.value.value
        )
        assert raised.value.remedy == "raise sampling.max_tokens, or set algorithm.overlong=keep"
        assert len(f"{raised.value}".splitlines()) == 4 and "…" not in f"{raised.value}"


@pytest.mark.parametrize(("name", "metric"), [("grpo", "answers/left_out"), ("dpo", "scores/failed")])
@pytest.mark.parametrize("every", [1, 6])
def test_a_run_of_which_no_answer_is_scored_says_so(train, tmp_path, monkeypatch, name, metric, every):
    """One of six that has no score is no reason."""
    (tmp_path / f"my_silence_{every}.py").write_text(
        "def score(prompts, completions):\n"
        f"    return [float('nan') if sum(map(ord, text)) % {every} == 0 else 0.5 for text in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    scorer = {"name": "python", "function": f"my_silence_{every}:score", "on_error": "skip"}
    algorithm = {**ALGORITHMS[name], **({"equal_groups": "drop"} if name == "grpo" else {})}
    with pytest.raises(TrainingStopped, match="no training example") as raised:
        train(scorer=scorer, algorithm=algorithm, train__steps=9, rollout__max_empty=2)
    said = f"16 had no score, or no token ({metric})"
    assert (said in raised.value.value, "the scorer has to score" in raised.value.remedy) == (every == 1,) * 2
    assert ("sampling.temperature" in raised.value.remedy) == (every == 6)
    assert "…" not in f"{raised.value}"


def test_a_scorer_that_fails_is_skipped_and_counted(train, tmp_path, monkeypatch):
    (tmp_path / "my_odd_rewards.py").write_text(
        "def score(prompts, completions):\n"
        "    return [float('nan') if len(text) % 3 == 0 else float(len(text)) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    scorer = {"name": "python", "function": "my_odd_rewards:score", "on_error": "skip"}
    steps = records(train(scorer=scorer, algorithm=ALGORITHMS["grpo"], train__steps=2).run_dir)
    assert sum(record["scores/failed"] for record in steps) > 0
    assert sum(record["answers/left_out"] for record in steps) == sum(record["scores/failed"] for record in steps)
