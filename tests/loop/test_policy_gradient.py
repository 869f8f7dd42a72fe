"""Policy gradients in the whole loop: what is recorded, filled up again, stopped early, and gone on with."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from rayalign.checks import check_training
from rayalign.config import parse_config
from rayalign.errors import ConfigError, TrainingStopped
from rayalign.scorers.base import ScoreFunction, ScorerConfig
from tests.exact import EOS, TOKENS, build_model, distribution, run
from tests.loop.conftest import timeless
from tests.parts import tiny_config
from tests.tiny_models import build_tiny_llama

KL = {"in": "reward", "coef": 0.1}
PPO = {"name": "ppo", "samples": 4, "kl": KL, "critic": {"optimizer": {"lr": 0.01}}}
GROUP = {"name": "policy_gradient", "samples": 2, "kl": {"coef": 0}}
SHORT = {"train": {"steps": 3}}


class Endless(ScorerConfig):
    """Scores that float32 has no room for."""

    name: str

    def start(self) -> ScoreFunction:
        return lambda groups: [[1e300 * (k + 1) for k, _ in enumerate(group.texts)] for group in groups]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("exact") / "model")


def test_a_step_of_ppo_says_what_it_did(tiny, tmp_path):
    _, steps = run(tmp_path, tiny, PPO, length=2, train={"steps": 3, "epochs": 2, "minibatches": 2})
    wanted = (
        "loss lr grad_norm score/mean reward/kl_k1 reward/after_kl kl/coef advantage/mean advantage/std "
        "critic/loss critic/lr critic/explained_variance critic/values_mean critic/returns_mean old_logps/gap_mean "
        "old_logps/gap_max policy/clipped policy/ratio policy/old_kl_k3 groups/kept answers/kept answers/overlong"
    )
    assert all(name in record for record in steps for name in wanted.split())
    assert steps[0]["critic/lr"] == 0.01 and steps[0]["answers/kept"] == 32
    assert steps[0]["reward/kl_k1"] == 0.0 != steps[1]["reward/kl_k1"]
    assert steps[0]["old_logps/gap_max"] < 1e-4


def test_a_critic_is_warmed_up_alone(tiny, tmp_path):
    algorithm = {**PPO, "critic": {"warmup_steps": 3, "optimizer": {"lr": 1e-3}}}
    rate, often = {"lr": 0.02, "warmup_steps": 2, "schedule": "constant"}, {"every": 1, "keep": 2}
    policy, steps = run(tmp_path, tiny, algorithm, length=1, train={"steps": 4}, optimizer=rate, checkpoint=often)
    start, warm = (distribution(path, (1, 2), 1) for path in (tiny, tmp_path / "run" / "checkpoints" / "step-3"))
    assert torch.equal(warm, start) and not torch.equal(policy, start)
    assert all("critic/loss" in record for record in steps)
    assert ["loss" in record for record in steps] == [False, False, False, True]
    assert len({record["critic/values_mean"] for record in steps}) == 4
    assert steps[3]["lr"] == 0.01  # the policy's own warm-up begins now


@pytest.mark.parametrize("old_logps", ["learner", "engine"])
def test_the_gap_is_that_of_learner_and_engine_however_often_the_policy_moves(tiny, tmp_path, old_logps):
    """Both compute in float32 with the same weights: it is 0."""
    algorithm = {**GROUP, "samples": 8, "advantage": "rloo", "old_logps": old_logps}
    _, steps = run(tmp_path, tiny, algorithm, length=2, train={"steps": 2, "epochs": 2, "minibatches": 2})
    assert all(record["old_logps/gap_max"] < 1e-4 < record["policy/old_kl_k3"] for record in steps)


@pytest.mark.parametrize(("limit", "done"), [(1e-9, 2.0), (1e9, 4.0)])
def test_an_update_ends_early_once_the_policy_has_moved(tiny, tmp_path, limit, done):
    """The first optimiser step is by the policy itself, the second sees that it has moved."""
    algorithm = {**PPO, "stop_kl": limit}
    _, steps = run(tmp_path, tiny, algorithm, length=1, train={"steps": 1, "epochs": 2, "minibatches": 2})
    assert steps[0]["updates/done"] == done and steps[0]["updates/planned"] == 4.0


def test_scores_of_samples_that_are_used_again_count_once(tiny, tmp_path):
    algorithm = {**PPO, "importance_cap": 2.0, "reward": {"normalise": True}}
    run(tmp_path, tiny, algorithm, length=1, rollout={"prompts": 4, "resample_every": 3}, train={"steps": 4})
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-4" / "trainer" / "state.json").read_text())
    assert state["adaptive"]["score_count"] == 2 * 16  # two sets, 4 prompts × 4 samples each


def test_a_batch_is_split_as_far_as_it_has_answers(tiny, model, tmp_path):
    algorithm = {**GROUP, "samples": 8, "equal_groups": "keep"}
    rollout, train = {"prompts": 1, "monitor": 0}, {"steps": 1, "minibatches": 8}
    _, steps = run(tmp_path / "a", tiny, algorithm, length=1, rollout=rollout, train=train)
    assert steps[0]["answers/kept"] == 8
    with pytest.raises(ConfigError, match="at most rollout.prompts × algorithm.samples = 8"):
        learner = {"name": "deepspeed", "ranks": 9}
        changes = {"algorithm": algorithm, "rollout": rollout, "learner": learner, "placement": {"name": "ray"}}
        check_training(parse_config({**tiny_config(tmp_path, model), **changes}))


def test_the_greedy_answers_are_in_no_mean_of_rewards(tiny, tmp_path):
    algorithm = {**GROUP, "advantage": "remax", "equal_groups": "keep"}
    _, steps = run(tmp_path, tiny, algorithm, length=1, rollout={"prompts": 8, "monitor": 0}, **SHORT)
    for record in steps:
        assert record["answers/kept"] == 16 and record["reward/mean"] == pytest.approx(record["score/mean"])
        assert record["reward/std"] == pytest.approx(record["score/std"])


def test_dropped_groups_are_filled_up_with_other_prompts(tiny, tmp_path):
    """And the same again, from the same seeds."""
    found = [run(tmp_path / name, tiny, {**GROUP, "refill": 20}, length=1, **SHORT)[1] for name in "ab"]
    assert [timeless(record) for record in found[0]] == [timeless(record) for record in found[1]]
    for record in found[0]:
        assert record["groups/useless"] > 0 and record["groups/refilled"] == record["groups/useless"]
        assert record["groups/sampled_besides"] <= 20 and record["groups/kept"] == 8


def test_what_is_replaced_stays_in_the_records_and_kl_is_of_the_first_draw(tiny, tmp_path):
    """Answers of one token: the log-probs of both models are at hand, and so is what the KL of any of them is."""
    algorithm = {**GROUP, "kl": {"coef": 0.01}, "equal_groups": "drop", "refill": 20}
    changes = {"rollout": {"monitor": 8}, "checkpoint": {"every": 1, "keep": 9}, **SHORT}
    _, steps = run(tmp_path, tiny, algorithm, length=1, **changes)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    start = distribution(tiny, (1, 2), 1)
    for record in steps:
        own = [each for each in samples if each["step"] == record["step"]]
        assert record["groups/refilled"] > 0 and len(own) == 2 * (8 + record["groups/sampled_besides"])
        scores = torch.tensor([each["score"] for each in own], dtype=torch.float64)
        assert record["reward/mean"] == pytest.approx(float(scores.mean()))
        assert record["reward/std"] == pytest.approx(float(scores.std(correction=0)))
        before = tmp_path / "run" / "checkpoints" / f"step-{record['step'] - 1}"
        policy = distribution(before, (1, 2), 1) if record["step"] > 1 else start
        first = [TOKENS.index(each["completion"].strip() or TOKENS[EOS]) for each in own[:16:2]]
        assert record["kl/k1"] == pytest.approx(float((policy / start).log()[first].mean()), abs=1e-5)


def test_what_the_budget_does_not_fill_is_dropped_and_counted(tiny, tmp_path):
    _, steps = run(tmp_path, tiny, {**GROUP, "refill": 1}, length=1, **SHORT)
    for record in steps:
        assert record["groups/sampled_besides"] == min(1.0, record["groups/useless"])
        assert record["groups/dropped"] == record["groups/useless"] - record["groups/refilled"]


def test_numbers_that_are_not_finite_stop_the_run_and_the_batch_is_kept(tiny, tmp_path):
    with pytest.raises(TrainingStopped, match="not finite") as error:
        algorithm = {**GROUP, "advantage": "dr_grpo"}
        run(tmp_path, tiny, algorithm, length=1, scorer={"name": "tests.loop.test_policy_gradient:Endless"})
    file = tmp_path / "run" / "failed" / "step-1.pt"
    assert str(file) in str(error.value.value)
    kept = torch.load(file, weights_only=False)
    assert len(kept["examples"]) == 16 and kept["step"] == 1
    row = kept["examples"][0]["sequences"][0]
    assert {"prompt_ids", "completion_ids", "rollout_logps", "columns"} <= row.keys()
    assert not torch.isfinite(torch.tensor(row["columns"]["credit/advantages"])).all()


def test_a_resumed_run_goes_on_with_critic_coefficient_and_scores(tiny, tmp_path):
    algorithm = {
        **PPO,
        "kl": {**KL, "adaptive": {"target": 0.01, "horizon": 100}},
        "reward": {"normalise": True, "clip": 2.0},
    }
    parts = {"optimizer": {"lr": 0.03, "schedule": "constant"}, "checkpoint": {"every": 2}}
    _, whole = run(tmp_path / "whole", tiny, algorithm, length=2, train={"steps": 4}, **parts)
    folder = tmp_path / "parts"
    run(folder, tiny, algorithm, length=2, train={"steps": 2}, **parts)
    state = json.loads((folder / "run" / "checkpoints" / "step-2" / "trainer" / "state.json").read_text())
    assert state["adaptive"].keys() == {"kl_coef", "score_count", "score_mean", "score_m2"}
    _, again = run(folder, tiny, algorithm, length=2, train={"steps": 4}, resume=True, **parts)
    assert [timeless(record) for record in again] == [timeless(record) for record in whole]
    assert len({record["kl/coef"] for record in whole}) > 2


def test_a_shared_trunk_is_resumed_with_its_value_head(tiny, tmp_path):
    """The head is in the learner's state, not in the exported model."""
    algorithm = {**PPO, "critic": {"shared": True, "weight": 0.5}}
    parts = {"optimizer": {"lr": 0.03, "schedule": "constant"}, "checkpoint": {"every": 2}}
    _, whole = run(tmp_path / "whole", tiny, algorithm, length=2, train={"steps": 4}, **parts)
    folder = tmp_path / "parts"
    run(folder, tiny, algorithm, length=2, train={"steps": 2}, **parts)
    _, again = run(folder, tiny, algorithm, length=2, train={"steps": 4}, resume=True, **parts)
    assert [timeless(record) for record in again] == [timeless(record) for record in whole]
    assert whole[0]["critic/values_mean"] == 0.0 != whole[3]["critic/values_mean"]
    checkpoint = folder / "run" / "checkpoints" / "step-4"
    assert "value_head.weight" in load_file(checkpoint / "trainer" / "policy" / "weights.safetensors")
    assert not any("value" in name for name in load_file(checkpoint / "model.safetensors"))
    assert not (checkpoint / "trainer" / "critic").exists()


def test_plain_texts_are_mixed_into_the_update(tiny, tmp_path):
    """With a weight that drowns the reward, the policy learns the text; metrics of answers are those of answers."""
    text = tmp_path / "texts.txt"
    text.write_text("d e d e d e d e " * 8)
    settings = {"path": str(text), "tokens": 8, "count": 4}
    plain = run(tmp_path / "plain", tiny, PPO, length=2, train={"steps": 1})[1]
    _, steps = run(
        tmp_path / "mixed", tiny, {**PPO, "ptx": {**settings, "weight": 20.0}}, length=2, train={"steps": 20}
    )
    assert steps[-1]["ptx/nll"] < steps[0]["ptx/nll"] / 3
    assert steps[0]["policy/ratio"] == pytest.approx(1.0) and steps[0]["answers/kept"] == 32
    assert steps[0]["loss"] == pytest.approx(plain[0]["loss"] + 20 * steps[0]["ptx/nll"], rel=1e-4)
    assert steps[0]["critic/loss"] == plain[0]["critic/loss"]


def test_the_batch_has_no_variance_and_nothing_breaks(tiny, tmp_path):
    """A reward that is always the same: ppo's advantages are those of the critic's errors, and all stays finite."""
    _, steps = run(tmp_path, tiny, PPO, length=2, scorer={"name": "tests.parts:SameScore"}, **SHORT)
    assert all(torch.isfinite(torch.tensor(list(record.values()))).all() for record in steps)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sampling": {"max_tokens": 2, "top_p": 0.9}}, "not of the whole distribution"),
        ({"sampling": {"max_tokens": 2, "min_tokens": 2}}, "not of the whole distribution"),
        ({"rollout": {"prompts": 4, "depth": 1}}, "count as the policy's own"),
        ({"rollout": {"prompts": 4, "resample_every": 2}}, "count as the policy's own"),
        ({"train": {"steps": 2, "minibatches": 3}}, "do not divide the rollout"),
        ({"algorithm": {**PPO, "stop_kl": 0.1}}, "no later one that could be left out"),
        ({"algorithm": {**PPO, "critic": {"optimizer": {"rate": 1.0}}}}, "critic's optimizer"),
        ({"algorithm": {**PPO, "critic": {"optimizer": {"lr": -1.0}}}}, "critic's optimizer"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path, model, changes, says):
    with pytest.raises(ConfigError, match=says):
        parse_config({**tiny_config(tmp_path, model, algorithm=PPO), **changes})


def test_a_critic_of_another_tokenizer_is_refused(tiny, tmp_path):
    other = build_tiny_llama(tmp_path / "other")
    with pytest.raises(ConfigError, match="reads other tokens"):
        run(tmp_path / "run", tiny, {**PPO, "critic": {"model": str(other)}}, length=1)
