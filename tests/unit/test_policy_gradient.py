"""policy_gradient and ppo: which samples they learn from, and what each is worth, against numbers worked by hand."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rayalign.algorithms.credits import ADVANTAGES, RETURNS, Divergence, explained
from rayalign.algorithms.policy_gradient import PolicyGradient
from rayalign.algorithms.ppo import PPO
from rayalign.collate import collate
from rayalign.errors import DataError
from rayalign.protocols import columns_by_role
from rayalign.types import Column, Sampling
from tests.unit.policy_cases import K1, K3, NO_KL, advantages, annotated, one, sampled


@pytest.mark.parametrize(
    ("advantage", "wanted"),
    [
        ("grpo", [-2 / (14 / 3) ** 0.5, -1 / (14 / 3) ** 0.5, 0.0, 3 / (14 / 3) ** 0.5]),
        ("dr_grpo", [-2.0, -1.0, 0.0, 3.0]),
        ("rloo", [-8 / 3, -4 / 3, 0.0, 4.0]),
    ],
)
def test_an_answer_against_others_of_its_prompt(advantage, wanted):
    algorithm = PolicyGradient(advantage=advantage, kl=NO_KL)
    examples, metrics = algorithm.examples(one((1.0, 2.0, 3.0, 6.0)) + one((0.0, 5.0, 0.0, 5.0)))
    credited, said = algorithm.credit(examples)
    for index, value in enumerate(wanted):
        assert advantages(credited)[index] == pytest.approx([value] * (index + 1), abs=1e-5)
    assert metrics == {f"groups/{k}": v for k, v in (("kept", 2.0), ("dropped", 0.0))} | {
        "groups/equal": 0.0,
        "answers/kept": 8.0,
        "answers/left_out": 0.0,
        "answers/overlong": 0.0,
    }
    assert said["score/mean"] == pytest.approx(22 / 8)


def test_kl_in_the_reward_is_summed_over_an_answer_before_it_is_compared():
    algorithm = PolicyGradient(advantage="rloo", samples=2, kl=K1)
    examples, _ = algorithm.examples(one((1.0, 2.0), lengths=[1, 3]))
    credited, said = algorithm.credit(annotated(examples, policy_logps=-1.0, reference_logps=-1.4))
    # k1 is 0.4 a token: rewards 1 − 0.5·0.4 = 0.8 and 2 − 0.5·1.2 = 1.4.
    assert advantages(credited) == [pytest.approx([-0.6]), pytest.approx([0.6] * 3)]
    assert said["reward/kl_k1"] == pytest.approx(0.8) and said["reward/after_kl"] == pytest.approx(1.1)
    assert said["kl/coef"] == 0.5
    # |−1 + 0.5|, and of three tokens sampled at −0.5, −0.6, −0.7: 0.5, 0.4, 0.3.
    assert said["old_logps/gap_mean"] == pytest.approx((0.5 + 0.4) / 2)
    assert said["old_logps/gap_max"] == pytest.approx(0.5)


def test_with_the_engines_log_probs_no_pass_of_the_policy_is_needed():
    algorithm = PolicyGradient(advantage="rloo", samples=2, kl=K1, old_logps="engine").planned(4)
    assert algorithm.needs == (("reference", Column.LOGPS),)
    examples, _ = algorithm.examples(one((1.0, 2.0), lengths=[1, 2]))
    credited, _ = algorithm.credit(annotated(examples, reference_logps=-1.0))
    # k1: 0.5; 0.5 + 0.4. Rewards: 1 − 0.25 and 2 − 0.45.
    assert advantages(credited)[0] == pytest.approx([-0.8])


def test_alone_it_is_grpo_as_published():
    plain = PolicyGradient()
    assert plain.kl == Divergence(where="loss", estimator="k3", coef=0.04) and plain.aggregate == "sequence_mean"
    assert PolicyGradient(**plain.model_dump(mode="json", by_alias=True)) == plain
    assert PolicyGradient(kl={"coef": 0.1}).kl == Divergence(where="loss", estimator="k3", coef=0.1)
    assert PolicyGradient(kl={"in": "reward"}).kl == PolicyGradient(advantage="rloo").kl == Divergence()
    assert PolicyGradient(aggregate="token_mean").aggregate == PolicyGradient(advantage="rloo").aggregate


def test_dynamic_sampling_replaces_prompts_whose_answers_were_all_cut():
    algorithm = PolicyGradient(samples=2, kl=K3, overlong="mask", refill=4)
    assert not algorithm.useful(sampled(one((1.0, 2.0)), cut=(0, 1))[0])


def test_a_role_is_asked_for_all_its_columns_at_once():
    algorithm = PPO(kl=NO_KL, critic={"shared": True}).planned(2)
    assert columns_by_role(algorithm.needs) == {"policy": [Column.LOGPS, Column.STATE_VALUES]}
    assert list(columns_by_role(PPO().planned(2).needs)) == ["policy", "reference", "critic"]


def test_what_is_annotated():
    policy, reference, critic = ("policy", Column.LOGPS), ("reference", Column.LOGPS), ("critic", Column.STATE_VALUES)
    assert PolicyGradient(kl=NO_KL).needs == ()
    assert PolicyGradient(kl=NO_KL).planned(2).needs == (policy,)
    assert PolicyGradient(kl=NO_KL, importance_cap=2.0).needs == (policy,)
    assert PolicyGradient(kl=NO_KL, importance_cap=2.0, old_logps="engine").planned(2).needs == ()
    assert PolicyGradient(kl=K1).needs == (policy, reference)
    assert PolicyGradient(kl=K3).needs == (reference,)
    assert PPO(kl=NO_KL).needs == (critic,)


def test_the_greedy_answer_is_the_baseline_and_is_not_learned_from():
    algorithm = PolicyGradient(advantage="remax", samples=2, kl=NO_KL)
    asked = algorithm.request(Sampling(8))
    assert [each.temperature for each in asked] == [1.0, 1.0, 0.0]
    examples, _ = algorithm.examples(one((1.0, 2.0, 1.5)))
    assert advantages(algorithm.credit(examples)[0]) == [pytest.approx([-0.5]), pytest.approx([0.5] * 2)]
    contested = one((1.0, 2.0, 1.5), contested=(False, False, True))
    assert algorithm.examples(contested)[0] == [] and not algorithm.useful(contested[0])


def test_reinforce_pp_whitens_rewards_to_come_over_the_batch():
    algorithm = PolicyGradient(advantage="reinforce_pp", samples=2, kl=K1)
    examples, _ = algorithm.examples(one((1.0, 2.0), lengths=[1, 2]))
    credited, said = algorithm.credit(annotated(examples, policy_logps=-1.0, reference_logps=-1.4))
    plain = np.array([1 - 0.2, 2 - 0.4, 2 - 0.2])  # each token's own KL, and that of those after it
    wanted = (plain - plain.mean()) / plain.std()
    assert np.concatenate(advantages(credited)) == pytest.approx(wanted, abs=1e-5)
    assert (said["advantage/mean"], said["advantage/std"]) == pytest.approx((plain.mean(), plain.std()))


def test_rewards_of_tokens_stand_where_the_scorer_gave_them():
    algorithm = PPO(samples=2, gamma=1.0, kl=NO_KL, whiten=False, reward={"no_end_penalty": 0.5}, **{"lambda": 1.0})
    groups = one((1.0, 2.0), lengths=[1, 3], token_scores=((1.0,), (0.5, 0.5, 1.0)))
    examples, _ = algorithm.examples(sampled(groups, cut=(1,)))
    credited, _ = algorithm.credit(annotated(examples, critic_state_values=0.0))
    assert advantages(credited) == [pytest.approx([1.0]), pytest.approx([1.5, 1.0, 0.5])]


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_groups_without_rewards_of_tokens_have_their_score_at_the_end_beside_others(order):
    algorithm = PPO(samples=1, gamma=1.0, kl=NO_KL, whiten=False, **{"lambda": 1.0})
    groups = [*one((2.0,), lengths=[2]), *one((1.0,), lengths=[2], token_scores=((0.75, 0.25),))]
    examples, _ = algorithm.examples(groups[order])
    credited, _ = algorithm.credit(annotated(examples, critic_state_values=0.0))
    assert advantages(credited) == [[2.0, 2.0], [1.0, 0.25]][order]
    collate(algorithm.dealt(credited, ()), pad_id=0)


def test_ppo_gives_the_advantages_of_gae():
    """The worked values of MATHS.md, its masked token left out."""
    algorithm = PPO(gamma=0.9, kl={"coef": 1.0}, whiten=False, **{"lambda": 0.8})
    examples, _ = algorithm.examples(one((1.0,), lengths=[3]))
    row = examples[0].sequences[0]
    columns = {
        "critic/state_values": np.array([0.2, 0.3, 0.5]),
        "policy/logps": np.array([-1.0, -0.9, -1.0]),
        "reference/logps": np.array([-1.0, -1.0, -1.0]),
    }
    columns = {name: value.astype(np.float32) for name, value in columns.items()}
    credited, said = algorithm.credit([replace(examples[0], sequences=(replace(row, columns=columns),))])
    found = credited[0].sequences[0].columns
    assert found[ADVANTAGES] == pytest.approx([0.3652, 0.41, 0.5], abs=1e-5)
    assert found[RETURNS] == pytest.approx([0.5652, 0.71, 1.0], abs=1e-5)
    assert said["critic/values_mean"] == pytest.approx(1 / 3, abs=1e-6)


@pytest.mark.parametrize(("overlong", "count", "trained"), [("keep", 3, 3), ("mask", 3, 2), ("drop", 2, 2)])
def test_answers_that_were_cut(overlong, count, trained):
    algorithm = PolicyGradient(advantage="dr_grpo", samples=3, kl=NO_KL, overlong=overlong)
    examples, metrics = algorithm.examples(sampled(one((1.0, 2.0, 6.0)), cut=(2,)))
    assert len(examples) == count and sum(e.values["trained"] for e in examples) == trained
    assert metrics["answers/overlong"] == 1.0
    credited, _ = algorithm.credit(examples)
    mean = 1.5 if overlong == "drop" else 3.0  # what is masked is compared with all the same
    assert advantages(credited)[0] == pytest.approx([1.0 - mean])
    assert algorithm.denominator(credited) == {"keep": 6, "mask": 3, "drop": 3}[overlong]


@pytest.mark.parametrize("overlong", ["mask", "drop"])
def test_a_step_whose_answers_were_all_cut_is_skipped_and_counted(overlong):
    algorithm = PolicyGradient(samples=2, kl=NO_KL, overlong=overlong)
    examples, metrics = algorithm.examples(sampled(one((1.0, 2.0)), cut=(0, 1)))
    assert examples == [] and metrics["groups/dropped"] == 1.0 and metrics["answers/overlong"] == 2.0


def test_groups_of_equal_scores_are_dropped_or_kept():
    same, differ = one((1.0, 1.0)), one((1.0, 2.0))
    dropping = PolicyGradient(samples=2, kl=NO_KL)
    assert dropping.examples(same + differ)[1]["groups/dropped"] == 1.0
    assert not dropping.useful(same[0]) and dropping.useful(differ[0])
    for keeping in (
        PolicyGradient(samples=2, kl=K1, advantage="rloo"),
        PolicyGradient(samples=2, kl=K1, equal_groups="keep"),
        PolicyGradient(samples=2, kl=K3),
        PolicyGradient(samples=2, kl=NO_KL, entropy_weight=0.01),
        PolicyGradient(samples=2, kl=NO_KL, advantage="reinforce_pp"),
        PolicyGradient(samples=2, kl=NO_KL, equal_groups="keep"),
    ):
        assert keeping.examples(same + differ)[1]["groups/kept"] == 2.0
    for algorithm in (dropping, keeping, PPO(samples=2, kl=NO_KL)):
        assert algorithm.examples(same + differ)[1]["groups/equal"] == 1.0
        assert algorithm.examples(one((1.0,)))[1]["groups/equal"] == 0.0
    credited, _ = keeping.credit(keeping.examples(same)[0])
    assert advantages(credited) == [[0.0], [0.0, 0.0]]


def test_a_reward_that_differs_by_its_kl_alone_is_not_standardised():
    """Its spread is that of the KL, however small: advantages would be of size 1 whatever coef is."""
    algorithm = PolicyGradient(samples=2, kl=K1)
    assert algorithm.examples(one((1.0, 1.0)))[1]["groups/dropped"] == 1.0
    assert algorithm.useful(one((1.0, 2.0))[0])


def test_what_is_equal_is_what_answers_are_worth():
    """Scores less the penalty for answers without an end."""
    algorithm = PolicyGradient(samples=2, kl=NO_KL, reward={"no_end_penalty": 0.5})
    differ, same = (sampled(one(scores), cut=(1,)) for scores in ((1.0, 1.0), (1.0, 1.5)))
    assert algorithm.useful(differ[0]) and not algorithm.useful(same[0])
    assert algorithm.examples(differ + same)[1]["groups/equal"] == 1.0
    greedy = PolicyGradient(advantage="remax", samples=1, kl=NO_KL)
    assert greedy.useful(one((1.0, 2.0))[0]) and not greedy.useful(one((1.0, 1.0))[0])


@pytest.mark.parametrize(
    ("reward", "scores", "cut", "wanted"),
    [
        ({"clip": 1.0}, (5.0, 6.0, 5.0), (), [0.0, 0.0]),
        ({"no_end_penalty": 2.0}, (1.0, 1.5, 1.0), (0, 1, 2), [0.0, 0.5]),
        ({"no_end_penalty": 2.0}, (1.0, 1.5, 1.0), (2,), [2.0, 2.5]),
    ],
)
def test_the_greedy_answers_score_is_penalised_and_clipped_as_others_are(reward, scores, cut, wanted):
    algorithm = PolicyGradient(advantage="remax", samples=2, kl=NO_KL, reward=reward, equal_groups="keep")
    examples, _ = algorithm.examples(sampled(one(scores, lengths=[1, 1, 1]), cut=cut))
    assert [each[0] for each in advantages(algorithm.credit(examples)[0])] == pytest.approx(wanted)


def test_a_batch_without_variance_has_advantages_of_zero():
    for algorithm in (PolicyGradient(advantage="reinforce_pp", samples=2, kl=NO_KL), PPO(samples=2, kl=NO_KL)):
        examples, _ = algorithm.examples(one((1.0, 1.0), lengths=[1, 1]))
        credited, said = algorithm.credit(annotated(examples, critic_state_values=0.0))
        assert np.concatenate(advantages(credited)) == pytest.approx([0.0, 0.0], abs=1e-3)
        assert said["advantage/std"] == 0.0
    returns = torch.full((2, 3), 0.3, dtype=torch.float64)
    returns[0, 0] += 1e-16  # roundings of equal returns
    assert explained(torch.zeros_like(returns), returns, torch.ones_like(returns)) == 0.0
    assert explained(returns, returns + torch.arange(3) * 1e-3, torch.ones_like(returns)) == pytest.approx(
        0.0, abs=1e-9
    )


@pytest.mark.parametrize("settings", [{"advantage": "grpo"}, {"advantage": "dr_grpo"}, {"advantage": "rloo"}])
def test_a_log_prob_that_is_no_number_is_not_an_equal_group(settings):
    """The loss is not finite either, which stops the run."""
    algorithm = PolicyGradient(samples=2, kl=K1, **settings)
    examples = annotated(algorithm.examples(one((1.0, 2.0), lengths=[1, 1]))[0], reference_logps=float("nan"))
    assert np.isnan(np.concatenate(advantages(algorithm.credit(examples)[0]))).all()


def test_answers_that_a_clip_makes_equal_are_equal():
    """What is left of them differs by their KL alone."""
    algorithm = PolicyGradient(samples=3, kl=K1, reward={"clip": 1.0})
    assert algorithm.examples(one((2.0, 3.0, 4.0)))[1]["groups/equal"] == 1.0
    assert algorithm.examples(one((-2.0, 3.0, 4.0)))[1]["groups/equal"] == 0.0
    assert not algorithm.useful(one((2.0, 3.0, 4.0))[0])


def test_a_group_without_an_answer_that_is_learned_from_is_dropped():
    algorithm = PolicyGradient(samples=2, kl=NO_KL, overlong="mask")
    groups = [*sampled(one((1.0, 2.0)), cut=(0, 1)), *sampled(one((1.0, 2.0)), cut=(0,))]
    examples, said = algorithm.examples(groups)
    assert (said["groups/kept"], said["groups/dropped"], len(examples)) == (1.0, 1.0, 2)


def test_the_kl_of_samples_of_older_weights_is_the_policys_own():
    """π_old is ½ and ½, as the reference; π is .8 and .2: KL(π‖π_ref) = .8·log 1.6 + .2·log .4."""
    algorithm = PolicyGradient(advantage="rloo", samples=2, kl=K1, importance_cap=2.0)
    examples, _ = algorithm.examples(one((1.0, 2.0), lengths=[1, 1]))
    half, now = np.log([0.5]), [np.log([0.8]), np.log([0.2])]
    rows = [
        replace(e, sequences=(replace(row, rollout_logps=half, columns={"policy/logps": p, "reference/logps": half}),))
        for e, p in zip(examples, now, strict=True)
        for row in e.sequences
    ]
    _, said = algorithm.credit(rows)
    assert said["reward/kl_k1"] == pytest.approx(0.8 * np.log(1.6) + 0.2 * np.log(0.4))


@pytest.mark.parametrize("reward", [{"clip": 1.0}, {"normalise": True}])
def test_rewards_of_tokens_are_not_scaled_unnoticed(reward):
    groups = one((1.0, 2.0), lengths=[1, 1], token_scores=((1.0,), (2.0,)))
    with pytest.raises(DataError, match="each token its own reward"):
        PPO(samples=2, kl=NO_KL, reward=reward).examples(groups)
    assert len(PolicyGradient(samples=2, kl=NO_KL, reward={"clip": 1.5}).examples(groups)[0]) == 2


@pytest.mark.parametrize("gap", [-199.0, -1e4, 1e4])
def test_a_ratio_of_answers_beyond_numbers_has_a_gradient(gap):
    algorithm = PolicyGradient(samples=2, kl=NO_KL, ratio="sequence")
    examples, _ = algorithm.examples(one((1.0, 2.0), lengths=[2, 2]))
    credited, _ = algorithm.credit(examples)
    batch = collate(algorithm.dealt(credited, ()), pad_id=0)
    logp = (batch.rollout_logps + gap).requires_grad_()
    terms = algorithm.loss(
        replace(batch, columns={**batch.columns, "policy/logps": batch.rollout_logps}), {"policy/logps": logp}, {}
    )
    (pull,) = torch.autograd.grad(terms.loss.sum(), logp)
    assert pull.isfinite().all() and terms.loss.isfinite().all()


def test_empty_and_contested_answers_are_left_out_and_counted():
    algorithm = PolicyGradient(samples=4, kl=NO_KL, advantage="dr_grpo")
    groups = one((1.0, 2.0, 9.0, float("nan")), lengths=[1, 0, 1, 1], contested=(False, False, True, False))
    assert algorithm.examples(groups) == (
        [],
        {"groups/kept": 0, "groups/dropped": 1, "groups/equal": 0}
        | {"answers/kept": 0, "answers/left_out": 3, "answers/overlong": 0},
    )


def test_scores_are_penalised_then_normalised_then_clipped():
    algorithm = PPO(samples=4, kl=NO_KL, reward={"no_end_penalty": 1.0, "normalise": True, "clip": 1.2})
    first, _ = algorithm.examples(sampled(one((1.0, 2.0, 3.0, 6.0)), cut=(3,)))  # 1, 2, 3, 5
    second, _ = algorithm.examples(one((0.0, 4.0, 4.0, 8.0)))
    state: dict = {}
    for examples in (first, second):
        _, said = algorithm.adapted(state).credit(annotated(examples, critic_state_values=0.0))
        state = algorithm.adapted(state).adapt(state, {**said, "answers/kept": 4.0})
    seen = np.array([1, 2, 3, 5, 0, 4, 4, 8.0])
    assert state["score_count"] == 8 and state["score_mean"] == pytest.approx(seen.mean())
    assert state["score_m2"] / 8 == pytest.approx(seen.var())
    score = torch.tensor([0.0, 4.0, 4.0, 8.0], dtype=torch.float64)
    found, said = algorithm.reward.of(
        score, torch.zeros(4), state | {"score_count": 4.0, "score_mean": 2.75, "score_m2": 8.75}
    )
    wanted = (score.numpy() - seen.mean()) / seen.std()
    assert found.tolist() == pytest.approx(wanted.clip(-1.2, 1.2).tolist())
    assert said["score/clipped"] == 0.5
    again, _ = algorithm.adapted(state, fresh=False).credit(annotated(second, critic_state_values=0.0))
    assert algorithm.adapted(state, fresh=False).adapt(state, {**said, "answers/kept": 4.0}) == state
    assert [e.sequences[0].columns[RETURNS][-1] for e in again] == pytest.approx(wanted.clip(-1.2, 1.2).tolist())


def test_the_kl_coefficient_follows_its_target():
    algorithm = PolicyGradient(kl={"in": "reward", "coef": 0.1, "adaptive": {"target": 5.0, "horizon": 100}})
    said = {"answers/kept": 10.0, "loss": 0.5}
    assert algorithm.adapt({}, {"reward/kl_k1": 20.0, "answers/kept": 10.0}) == {}  # a critic was trained alone
    state = algorithm.adapt({}, {"reward/kl_k1": 20.0, **said})
    assert state == {"kl_coef": pytest.approx(0.1 * 1.02)}
    state = algorithm.adapted(state).adapt(state, {"reward/kl_k1": 5.5, **said})
    assert state == {"kl_coef": pytest.approx(0.1 * 1.02 * 1.01)}
    assert pickle.loads(pickle.dumps(algorithm.adapted(state)))._coef == state["kl_coef"]


@pytest.mark.parametrize(
    ("record", "settings", "says"),
    [
        (PPO, {"gamma": 1.1}, "less than or equal to 1"),
        (PPO, {"lambda": -0.1}, "greater than or equal to 0"),
        (PPO, {"ratio": "sequence"}, "one ratio stands for all"),
        (PPO, {"kl": {"in": "loss", "coef": 0.1}}, "gradient of k1 in the loss is zero"),
        (PPO, {"kl": {"coef": 0, "adaptive": {"target": 6}}}, "stays 0"),
        (PolicyGradient, {"aggregate": "constant"}, "nothing to be divided by"),
        (PolicyGradient, {"length": 5}, "nothing is divided by"),
        (PolicyGradient, {"samples": 1}, "no other to be compared with"),
        (PolicyGradient, {"advantage": "reinforce_pp", "ratio": "sequence"}, "one ratio stands for all"),
        (PolicyGradient, {"kl": {"estimator": "k1"}}, "gradient of k1 in the loss is zero"),
        (PolicyGradient, {"refill": 4}, "no prompt is dropped"),
        (PolicyGradient, {"advantage": "remax", "reward": {"normalise": True}}, "is not normalised"),
        (PolicyGradient, {"kl": NO_KL, "reward": {"normalise": True, "clip": 1}}, "after equal groups were dropped"),
        (PolicyGradient, {"reference": {"cached": True}}, "cannot be cached"),
        (PolicyGradient, {"kl": NO_KL, "reference": {"update": "replace"}}, "no reference that could follow"),
        (PolicyGradient, {"clip_low": 1.5}, "less than or equal to 1"),
        (PolicyGradient, {"dual_clip": 0.5}, "greater than 1"),
    ],
)
def test_what_does_not_fit_is_refused(record, settings, says):
    with pytest.raises(ValidationError, match=says):
        record(**settings)
