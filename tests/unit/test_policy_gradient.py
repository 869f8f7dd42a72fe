"""policy_gradient and ppo: which samples they learn from, what each is worth, and the loss, against numbers by hand."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rayalign.algorithms.credits import ADVANTAGES, RETURNS, Divergence
from rayalign.algorithms.policy_gradient import PolicyGradient
from rayalign.algorithms.ppo import PPO, ValueLoss
from rayalign.collate import collate
from rayalign.learners.steps import optimizer_steps
from rayalign.maths.reduce import aggregate
from rayalign.protocols import UpdatePlan, columns_by_role
from rayalign.types import Column, Example, Sampling, Sequence
from tests.unit.algorithm_cases import group, random_groups, step, table

NO_KL = {"coef": 0}
K1 = {"in": "reward", "estimator": "k1", "coef": 0.5}
K3 = {"in": "loss", "estimator": "k3", "coef": 0.5}


def sampled(groups, cut=()):
    """Groups as an engine gives them: each token has a log-prob; of these completions of each the end was cut off."""
    made = []
    for each in groups:
        completions = tuple(
            replace(c, logps=tuple(-0.5 - 0.1 * i for i in range(len(c.token_ids))), finish_reason="length")
            if k in cut
            else replace(c, logps=tuple(-0.5 - 0.1 * i for i in range(len(c.token_ids))))
            for k, c in enumerate(each.completions)
        )
        made.append(replace(each, completions=completions))
    return made


def annotated(examples, **columns):
    """With the same number at every token: annotated(examples, policy_logps=-1.0)."""
    made = []
    for example in examples:
        row = example.sequences[0]
        count = len(row.completion_ids)
        more = {name.replace("_", "/", 1): np.full(count, value, np.float32) for name, value in columns.items()}
        made.append(replace(example, sequences=(replace(row, columns={**row.columns, **more}),)))
    return made


def advantages(examples):
    return [example.sequences[0].columns[ADVANTAGES].tolist() for example in examples]


def one(scores, lengths=None, **more):
    """One group whose answers have these scores and lengths."""
    lengths = lengths or [1 + k for k in range(len(scores))]
    return sampled([group("p", [1, 2], [[3] * n for n in lengths], scores, **more)])


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
    assert said["advantage/mean"] == pytest.approx(0, abs=1e-9) and said["advantage/std"] == pytest.approx(1, abs=1e-6)


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


def test_the_critic_learns_returns_with_a_clipped_step():
    row = Sequence((1,), (2, 3), columns={"critic/state_values": np.array([0.0, 1.0]), RETURNS: np.array([2.0, 1.0])})
    batch = collate(ValueLoss().dealt([Example((row,), {"trained": 1.0})], ()), pad_id=0)
    value = torch.tensor([[1.0, 1.5]], requires_grad=True)
    terms = ValueLoss(value_clip=0.2).loss(batch, {"critic/state_values": value}, {})
    # ½·max((1−2)², (0.2−2)²) and ½·max((1.5−1)², (1.2−1)²)
    assert terms.loss.tolist() == [pytest.approx([1.62, 0.125])]
    assert terms.metrics["clipped"].tolist() == [1.0]


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
    for keeping in (PolicyGradient(samples=2, kl=K1), PolicyGradient(samples=2, kl=NO_KL, equal_groups="keep")):
        assert keeping.examples(same + differ)[1]["groups/kept"] == 2.0
    for algorithm in (dropping, keeping, PPO(samples=2, kl=NO_KL)):
        assert algorithm.examples(same + differ)[1]["groups/equal"] == 1.0
        assert algorithm.examples(one((1.0,)))[1]["groups/equal"] == 0.0
    credited, _ = keeping.credit(keeping.examples(same)[0])
    assert advantages(credited) == [[0.0], [0.0, 0.0]]


def test_what_is_equal_is_what_answers_are_worth():
    """Scores less the penalty for answers without an end."""
    algorithm = PolicyGradient(samples=2, kl=NO_KL, reward={"no_end_penalty": 0.5})
    differ, same = (sampled(one(scores), cut=(1,)) for scores in ((1.0, 1.0), (1.0, 1.5)))
    assert algorithm.useful(differ[0]) and not algorithm.useful(same[0])
    assert algorithm.examples(differ + same)[1]["groups/equal"] == 1.0
    greedy = PolicyGradient(advantage="remax", samples=1, kl=NO_KL, equal_groups="drop")
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
    algorithm = PolicyGradient(advantage="remax", samples=2, kl=NO_KL, reward=reward)
    examples, _ = algorithm.examples(sampled(one(scores, lengths=[1, 1, 1]), cut=cut))
    assert [each[0] for each in advantages(algorithm.credit(examples)[0])] == pytest.approx(wanted)


def test_a_batch_without_variance_has_advantages_of_zero():
    for algorithm in (PolicyGradient(advantage="reinforce_pp", samples=2, kl=NO_KL), PPO(samples=2, kl=NO_KL)):
        examples, _ = algorithm.examples(one((1.0, 1.0), lengths=[1, 1]))
        credited, said = algorithm.credit(annotated(examples, critic_state_values=0.0))
        assert np.concatenate(advantages(credited)) == pytest.approx([0.0, 0.0], abs=1e-3)
        assert said["advantage/std"] == 0.0


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
    state = algorithm.adapt({}, {"reward/kl_k1": 20.0, "answers/kept": 10.0})
    assert state == {"kl_coef": pytest.approx(0.1 * 1.02)}
    state = algorithm.adapted(state).adapt(state, {"reward/kl_k1": 5.5, "answers/kept": 10.0})
    assert state == {"kl_coef": pytest.approx(0.1 * 1.02 * 1.01)}
    assert pickle.loads(pickle.dumps(algorithm.adapted(state)))._coef == state["kl_coef"]


GROUPS = sampled(random_groups(3, (1.0, 0.0, 2.0)), cut=(1,))
CASES = {
    "token mean": PolicyGradient(samples=3, kl=NO_KL, aggregate="token_mean", entropy_weight=0.1),
    "kl in the loss": PolicyGradient(samples=3, kl=K3, aggregate="sequence_mean", dual_clip=2.0).planned(2),
    "constant": PolicyGradient(samples=3, kl=NO_KL, aggregate="constant", length=5, overlong="mask"),
    "gspo": PolicyGradient(samples=3, kl=NO_KL, aggregate="sequence_mean", ratio="sequence").planned(2),
    "importance": PolicyGradient(samples=3, kl=K1, aggregate="sequence_sum_mean", importance_cap=1.5),
    "the engine's": PolicyGradient(samples=3, kl=NO_KL, importance_cap=1.5, old_logps="engine"),
    "ppo": PPO(samples=3, kl=K1, overlong="mask").planned(2),
}


@pytest.mark.parametrize("name", CASES)
def test_the_split_into_micro_batches_changes_nothing(name):
    algorithm = pickle.loads(pickle.dumps(CASES[name]))
    examples, _ = algorithm.examples(GROUPS)
    wanted = {role for role, _ in algorithm.needs}
    if "policy" in wanted:
        examples = annotated(examples, policy_logps=-2.4)
    if "critic" in wanted:
        examples = annotated(examples, critic_state_values=0.3)
    examples, _ = algorithm.credit(annotated(examples, reference_logps=-2.2))
    found = []
    for parts in ([range(len(examples))], [[i] for i in reversed(range(len(examples)))]):
        policy = table(1).requires_grad_()
        loss, metrics = step(algorithm, examples, policy, table(0), parts)
        loss.backward()
        assert policy.grad.abs().max() > 1e-4
        found.append((loss.detach(), policy.grad, metrics))
    (loss, gradient, metrics), (other, other_gradient, other_metrics) = found
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient, other_gradient, rtol=1e-6, atol=1e-9)
    assert metrics == pytest.approx(other_metrics, rel=1e-5, abs=1e-6)


def of_tokens(algorithm, logps, lengths):
    """Terms of examples with these log-probs, old ones of −1, and advantages 1 and −2, and what reduces them."""
    rows = [
        Sequence(
            (1,),
            (2,) * count,
            (-1.25,) * count,
            {"policy/logps": np.full(count, -1.0, np.float32), ADVANTAGES: np.full(count, value, np.float32)},
        )
        for count, value in zip(lengths, (1.0, -2.0), strict=True)
    ]
    examples = [Example((row,), {"trained": 1.0}) for row in rows]
    batch = collate(algorithm.dealt(examples, ()), pad_id=0)
    terms = algorithm.loss(batch, {"policy/logps": torch.tensor(logps, requires_grad=True)}, {})
    return terms, batch, algorithm.denominator(examples)


def test_ratios_are_clipped_on_both_sides():
    algorithm = PolicyGradient(kl=NO_KL, aggregate="token_mean", clip_low=0.2, clip_high=0.3).planned(2)
    terms, _, count = of_tokens(algorithm, np.log([[0.9, 1.5], [0.7, 9.0]]) - 1.0, [2, 1])
    assert terms.loss.tolist() == [pytest.approx([-0.9, -1.3]), pytest.approx([1.6, 0.0])]
    assert count == 3 and terms.metrics["policy/clipped"].tolist() == [0.5, 1.0]
    assert terms.metrics["policy/ratio"].tolist() == pytest.approx([1.2, 0.7])
    bound = PolicyGradient(kl=NO_KL, aggregate="token_mean", dual_clip=3.0).planned(2)
    assert of_tokens(bound, np.log([[1.0, 1.0], [5.0, 1.0]]) - 1.0, [2, 1])[0].loss[1, 0].item() == pytest.approx(6.0)


def test_gspo_takes_the_geometric_mean_of_an_answers_ratios():
    algorithm = PolicyGradient(kl=NO_KL, ratio="sequence", aggregate="sequence_mean", clip_high=9.0).planned(2)
    terms, _, count = of_tokens(algorithm, np.log([[1.0, 4.0], [1.1, 1.0]]) - 1.0, [2, 1])
    assert terms.loss.sum(1).tolist() == pytest.approx([-2.0, 2.2]) and count == 2


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean", "sequence_sum_mean", "constant"])
def test_terms_over_the_denominator_are_the_aggregate(mode):
    more = {"length": 4.0} if mode == "constant" else {}
    algorithm = PolicyGradient(kl=NO_KL, aggregate=mode, clip_low=1.0, clip_high=9.0, **more).planned(2)
    terms, batch, count = of_tokens(algorithm, np.log([[0.9, 1.5, 2.0], [0.7, 1.0, 1.0]]) - 1.0, [3, 1])
    plain = torch.tensor([[-0.9, -1.5, -2.0], [1.4, 0.0, 0.0]])
    assert float(terms.loss.detach().sum() / count) == pytest.approx(
        float(aggregate(plain, batch.mask, mode=mode, **more))
    )


def test_the_truncated_importance_weight_multiplies_the_loss():
    algorithm = PolicyGradient(kl=NO_KL, importance_cap=1.2)
    terms, *_ = of_tokens(algorithm, np.full((2, 1), -1.0), [1, 1])  # e^(−1 + 1.25) = 1.28
    assert terms.loss.flatten().tolist() == pytest.approx([-1.2, 2.4])
    algorithm = PolicyGradient(kl=NO_KL, importance_cap=2.0)
    assert of_tokens(algorithm, np.full((2, 1), -1.0), [1, 1])[0].loss[0, 0].item() == pytest.approx(-np.exp(0.25))


@pytest.mark.parametrize("updates", [1, 2])
def test_ratios_to_the_engine_are_cut_at_the_cap(updates):
    """Advantages are 1 and −2, the engine's log-probs −1.25; what is cut keeps the gradient of a fixed weight."""
    algorithm = PolicyGradient(kl=NO_KL, old_logps="engine", importance_cap=2.0, aggregate="token_mean").planned(
        updates
    )
    row = Sequence((1,), (2, 3, 4), (-1.25,) * 3, {ADVANTAGES: np.full(3, -2.0, np.float32)})
    batch = collate(algorithm.dealt([Example((row,), {"trained": 1.0})], ()), pad_id=0)
    logps = torch.tensor([[np.log(1.5), np.log(9.0), np.log(0.5)]], dtype=torch.float32) - 1.25
    terms = algorithm.loss(batch, {"policy/logps": logps.requires_grad_()}, {})
    terms.loss.sum().backward()
    assert terms.loss.tolist() == [pytest.approx([3.0, 4.0, 1.6])]
    assert logps.grad.tolist() == [pytest.approx([3.0, 4.0, 0.0])]
    assert terms.metrics["policy/ratio"].tolist() == pytest.approx([(1.5 + 2 + 0.5) / 3])


def test_a_ratio_of_answers_to_the_engine_is_cut_as_well():
    algorithm = PolicyGradient(kl=NO_KL, old_logps="engine", importance_cap=1.5, ratio="sequence").planned(2)
    row = Sequence((1,), (2, 3), (-1.0, -1.0), {ADVANTAGES: np.full(2, -1.0, np.float32)})
    batch = collate(algorithm.dealt([Example((row,), {"trained": 1.0})], ()), pad_id=0)
    terms = algorithm.loss(batch, {"policy/logps": torch.tensor([[0.0, -0.5]], requires_grad=True)}, {})
    assert terms.loss.sum(1).tolist() == [pytest.approx(1.5)]  # e^0.75 = 2.1


def test_an_update_ends_when_the_policy_has_moved_enough():
    algorithm = PPO(stop_kl=0.02)
    assert algorithm.watched == ("policy/old_kl_k3",) and PPO().watched == ()
    assert algorithm.enough({"policy/old_kl_k3": 0.021}) and not algorithm.enough({"policy/old_kl_k3": 0.019})


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
        (PolicyGradient, {"reference": {"cached": True}}, "cannot be cached"),
        (PolicyGradient, {"kl": NO_KL, "reference": {"update": "replace"}}, "no reference that could follow"),
        (PolicyGradient, {"clip_low": 1.5}, "less than or equal to 1"),
        (PolicyGradient, {"dual_clip": 0.5}, "greater than 1"),
    ],
)
def test_what_does_not_fit_is_refused(record, settings, says):
    with pytest.raises(ValidationError, match=says):
        record(**settings)


def with_texts(answers, cut=(), **settings):
    """PPO with plain texts, and so many answers of 40 tokens, annotated and credited; these are cut."""
    algorithm = PPO(kl=NO_KL, whiten=False, ptx={"path": "x", "weight": 0.5}, **settings).planned(4)
    groups = [sampled(one((1.0,), lengths=[40]), cut=(0,) if k in cut else ())[0] for k in range(answers)]
    examples, _ = algorithm.examples(groups)
    examples, _ = algorithm.credit(annotated(examples, critic_state_values=0.0, policy_logps=-1.0))
    return algorithm, list(examples)


TEXTS = [Sequence((1,), (2,) * (3 + k)) for k in range(8)]


@pytest.mark.parametrize(("answers", "texts"), [(1, 1), (1, 3), (4, 1), (3, 8)])
def test_texts_weigh_the_same_whatever_they_are_dealt_with(answers, texts):
    algorithm, examples = with_texts(answers)
    dealt = algorithm.dealt(examples, TEXTS[:texts])
    batch = collate(dealt, pad_id=0)
    logps = torch.full(batch.labels.shape, -1.0, requires_grad=True)
    terms = algorithm.loss(batch, {"policy/logps": logps}, {})
    (terms.loss.sum() / algorithm.denominator(dealt)).backward()
    text = batch.values["ptx"] > 0
    assert float(logps.grad[text].abs().sum()) == pytest.approx(0.5)  # ptx.weight, shared out over their tokens
    assert float(terms.metrics["ptx/nll"].mean()) == pytest.approx(1.0)
    assert float(terms.metrics["policy/ratio"].mean()) == pytest.approx(1.0)


def test_each_optimiser_step_has_its_share_of_answers_and_texts():
    algorithm, examples = with_texts(8)
    for seed in range(20):
        parts = optimizer_steps(examples, algorithm, UpdatePlan(0, epochs=2, minibatches=4, seed=seed, texts=TEXTS))
        assert [sum(e.values["ptx"] > 0 for e in part) for part in parts] == [2] * 8
        assert [sum(e.values["trained"] for e in part) for part in parts] == [2.0] * 8
        lengths = [len(e.sequences[0].completion_ids) for part in parts[:4] for e in part if e.values["ptx"]]
        assert sorted(lengths) == list(range(3, 11))


def test_an_optimiser_step_without_an_answer_that_is_trained_on_is_left_out():
    algorithm, examples = with_texts(8, cut=range(5), overlong="mask")
    for seed in range(20):
        plan = UpdatePlan(0, minibatches=8, seed=seed, texts=TEXTS)
        for learned in (algorithm, algorithm.critic_algorithm):
            parts = optimizer_steps(examples, learned, plan)
            assert [sum(e.values["trained"] for e in part) for part in parts] == [1.0] * 3


MASKING = {"samples": 4, "kl": K3, "overlong": "mask"}


@pytest.mark.parametrize("algorithm", [PolicyGradient(**MASKING, stop_kl=0.02), PPO(**MASKING)])
def test_metrics_are_means_over_the_answers_that_are_trained_on(algorithm):
    algorithm = algorithm.planned(2)
    found = []
    for cut in ((1, 2, 3), ()):
        examples, _ = algorithm.examples(sampled(one((1.0, 2.0, 3.0, 6.0), lengths=[2] * 4), cut=cut))
        examples = annotated(examples, policy_logps=-1.0, reference_logps=-2.0, critic_state_values=0.0)
        batch = collate(algorithm.dealt(algorithm.credit(examples)[0], ()), pad_id=0)
        logps = torch.full(batch.labels.shape, -1.3)
        metrics = algorithm.loss(batch, {"policy/logps": logps}, {}).metrics
        if algorithm.critic_algorithm is not None:
            values = {"critic/state_values": torch.full(batch.labels.shape, 9.0)}
            metrics = metrics | algorithm.critic_algorithm.loss(batch, values, {}).metrics
        found.append({name: float(each.mean()) for name, each in metrics.items() if name != "policy/clipped"})
    assert found[0] == pytest.approx(found[1])
    assert found[0]["policy/ratio"] == pytest.approx(np.exp(-0.3))
