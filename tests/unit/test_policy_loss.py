"""policy_gradient and ppo: the loss of an optimiser step and its metrics, against numbers worked by hand."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from rayalign.algorithms.credits import ADVANTAGES, RETURNS
from rayalign.algorithms.policy_gradient import PolicyGradient
from rayalign.algorithms.ppo import PPO, ValueLoss
from rayalign.collate import collate
from rayalign.learners.steps import optimizer_steps
from rayalign.maths.reduce import aggregate
from rayalign.protocols import UpdatePlan
from rayalign.types import Example, Sequence
from tests.unit.algorithm_cases import random_groups, step, table
from tests.unit.policy_cases import K1, K3, NO_KL, annotated, one, sampled

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


def test_the_critic_learns_returns_with_a_clipped_step():
    row = Sequence((1,), (2, 3), columns={"critic/state_values": np.array([0.0, 1.0]), RETURNS: np.array([2.0, 1.0])})
    batch = collate(ValueLoss().dealt([Example((row,), {"trained": 1.0})], ()), pad_id=0)
    value = torch.tensor([[1.0, 1.5]], requires_grad=True)
    terms = ValueLoss(value_clip=0.2).loss(batch, {"critic/state_values": value}, {})
    # ½·max((1−2)², (0.2−2)²) and ½·max((1.5−1)², (1.2−1)²)
    assert terms.loss.tolist() == [pytest.approx([1.62, 0.125])]
    assert terms.metrics["clipped"].tolist() == [1.0]


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
