"""Rejection sampling: the best of K is learned, and what choosing it gains stands beside the bound on its KL."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rayalign.algorithms.rejection_sampling import RejectionSampling, best_of_n
from rayalign.algorithms.sft import SFT
from rayalign.maths.policy_gradient import best_of_n_distribution, best_of_n_kl
from tests.unit.algorithm_cases import random_groups, whole


def test_the_loss_is_that_of_the_best_answer():
    groups = random_groups(3, (0.5, 2.0, -1.0))
    loss, metrics = whole(RejectionSampling(samples=3), groups)
    assert loss == pytest.approx(whole(SFT(), groups)[0])
    assert metrics["nll"] == pytest.approx(whole(SFT(), groups)[1]["nll"])


def test_prompts_that_gain_too_little_are_left_out_and_counted():
    groups = [*random_groups(2, (0.0, 3.0)), *random_groups(3, (1.0, 1.2))]
    examples, metrics = RejectionSampling(samples=2, min_gain=0.5).examples(groups)
    assert (len(examples), metrics["examples/kept"], metrics["examples/dropped"]) == (2, 2.0, 3.0)
    assert metrics["best_of_n/reward"] == pytest.approx((2 * 3.0 + 3 * 1.2) / 5)
    assert metrics["best_of_n/mean_reward"] == pytest.approx((2 * 1.5 + 3 * 1.1) / 5)
    assert metrics["best_of_n/gain"] == pytest.approx((2 * 1.5 + 3 * 0.1) / 5)
    assert metrics["best_of_n/kl_bound"] == pytest.approx(math.log(2) - 0.5)
    assert len(RejectionSampling(samples=2).examples(groups)[0]) == 5


@pytest.mark.parametrize("scores", [(0.1,) * 3, (0.1,) * 4, (0.7,) * 6, (0.0, 0.0)])
def test_ties_are_left_out_and_counted(scores):
    examples, metrics = RejectionSampling(samples=len(scores)).examples(random_groups(2, scores))
    assert not examples and metrics["examples/dropped"] == 2.0


def test_numbers_are_means_over_prompts_and_the_bound_is_that_of_each_n():
    found = best_of_n([[1.0, 0.0], [2.0], [], [3.0, 0.0, 0.0, 1.0]])
    assert found["best_of_n/reward"] == pytest.approx(2.0)
    assert found["best_of_n/mean_reward"] == pytest.approx((0.5 + 2.0 + 1.0) / 3)
    assert found["best_of_n/kl_bound"] == pytest.approx((best_of_n_kl(2) + 0.0 + best_of_n_kl(4)) / 3)
    assert best_of_n([[], []]) == {}


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_reported_gain_and_bound_are_those_of_the_exact_law(n):
    """On an enumerable policy: sampled means meet the exact expectation, and the exact KL is under the bound."""
    rng = np.random.default_rng(0)
    prob, score = rng.dirichlet(np.ones(12)), rng.normal(size=12)
    law = best_of_n_distribution(torch.tensor(prob), torch.tensor(score), n).numpy()
    draws = rng.choice(12, size=(20000, n), p=prob)
    found = best_of_n(score[draws].tolist())
    assert found["best_of_n/reward"] == pytest.approx(float(law @ score), abs=0.02)
    assert found["best_of_n/mean_reward"] == pytest.approx(float(prob @ score), abs=0.02)
    kl = float((law[law > 0] * np.log(law[law > 0] / prob[law > 0])).sum())
    assert 0 < kl <= found["best_of_n/kl_bound"] == pytest.approx(best_of_n_kl(n))


@pytest.mark.parametrize("wrong", [{"samples": 1}, {"reference": {"cached": True}, "kl_weight": 0.1}])
def test_one_sample_and_a_cached_reference_are_refused(wrong):
    with pytest.raises(ValueError):
        RejectionSampling(**wrong)
    assert RejectionSampling(kl_weight=0.1).needs == ()
