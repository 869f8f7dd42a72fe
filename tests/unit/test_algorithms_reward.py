"""Reward models: their losses are those of maths, scores are centred, and what is measured of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rayalign.algorithms.reward_losses import REWARD_LOSSES
from rayalign.algorithms.reward_model import BINS, RewardModel, last_value
from rayalign.errors import DataError
from rayalign.maths import ranking
from tests.unit.algorithm_cases import VOCABULARY, group, random_groups, step, table, whole

PAIRS = random_groups(4, (1.0, 0.0))


def rewards(each) -> torch.Tensor:
    return torch.stack([table(1)[c.token_ids[-1], VOCABULARY] for c in each.completions]).unsqueeze(0)


@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_reward_losses_are_those_of_maths(name):
    groups = random_groups(4, (-2.0, 0.0, -1.0, -1.0), seed=3)
    ranks, mask = torch.tensor([[2, 0, 1, 1]]), torch.ones(1, 4)
    wanted = []
    for each in groups:
        scores = rewards(each)
        wanted += {
            "bradley_terry": lambda r: [
                ranking.bradley_terry_loss(r[:, i], r[:, j], margin=0.3)
                for i, j in ((1, 0), (2, 0), (3, 0), (1, 2), (1, 3))
            ],
            "k_choose_2": lambda r: [ranking.k_choose_2_loss(r, ranks, mask)],
            "best_of_choice": lambda r: [ranking.best_of_choice_loss(r, torch.tensor([1]), mask)],
            "plackett_luce": lambda r: [ranking.plackett_luce_loss(r, ranks, mask)],
        }[name](scores)
    settings = {"margin": 0.3} if name == "bradley_terry" else {}
    loss, metrics = whole(RewardModel(loss={"name": name, **settings}, center_weight=0.0), groups)
    assert loss == pytest.approx(float(torch.cat(wanted).mean()), rel=1e-5)
    assert metrics["rewards/std"] > 0


def test_scores_are_centred_by_the_square_of_a_pairs_sum():
    centred, _ = whole(RewardModel(center_weight=0.2), PAIRS)
    plain, _ = whole(RewardModel(center_weight=0.0), PAIRS)
    total = torch.cat([rewards(g).sum(1) for g in PAIRS])
    assert centred - plain == pytest.approx(0.2 * float(total.square().mean()), rel=1e-4)


@pytest.mark.parametrize(("weight", "low", "high"), [(0.01, -0.05, 0.05), (0.0, 2.0, 8.0)])
def test_training_brings_the_mean_score_to_zero(weight, low, high):
    """From a mean of about 5, which nothing draws to 0 without the regulariser."""
    groups = [*random_groups(12, (1.0, 0.0)), *random_groups(12, (0.0, 1.0), seed=1)]
    algorithm = RewardModel(center_weight=weight)
    examples, _ = algorithm.examples(groups)
    policy = table(1)
    policy[:, VOCABULARY] += 5.0
    policy.requires_grad_()
    optimizer = torch.optim.Adam([policy], lr=0.2)
    for _ in range(150):
        optimizer.zero_grad()
        loss, metrics = step(algorithm, examples, policy, table(0), [range(len(examples))])
        loss.backward()
        optimizer.step()
    assert low < metrics["rewards/mean"] < high


def test_the_score_is_the_value_at_the_last_token():
    values = torch.tensor([[1.0, 2.0, math.nan], [3.0, 4.0, 5.0]])
    assert last_value(values, torch.tensor([[1, 1, 0], [1, 1, 1]])).tolist() == [2.0, 5.0]


def test_margins_come_from_the_column():
    groups = [
        group(g.id, g.prompt.token_ids, [c.token_ids for c in g.completions], (1.0, 0.0), extra={"margin": i})
        for i, g in enumerate(PAIRS)
    ]
    algorithm = RewardModel(loss={"name": "bradley_terry", "margin": "column"}, center_weight=0.0)
    scores = torch.cat([rewards(g) for g in groups])
    wanted = ranking.bradley_terry_loss(scores[:, 0], scores[:, 1], margin=torch.arange(4))
    assert whole(algorithm, groups)[0] == pytest.approx(float(wanted.mean()), rel=1e-5)
    with pytest.raises(DataError, match="row 1: a pair has no margin"):
        algorithm.examples(PAIRS)


def test_a_choice_has_one_best_answer():
    algorithm = RewardModel(loss="best_of_choice")
    examples, metrics = algorithm.examples([
        group("a", [1], [[2], [3], [2]], (0.0, 1.0, 0.0)),  # the same answer twice: once
        group("b", [1], [[2], [3], [4]], (1.0, 1.0, 0.0)),
        group("c", [1], [[2]], (1.0,)),
    ])  # fmt: skip
    assert [r.completion_ids for r in examples[0].sequences] == [(3,), (2,)]
    assert examples[0].values == {"ranks": (0.0, 1.0)} and len(examples) == 1
    assert metrics == {"answers/kept": 2.0, "answers/dropped": 5.0}


def test_calibration_of_held_out_pairs():
    groups = random_groups(30, (1.0, 0.0), seed=11)
    _, metrics = whole(RewardModel(), groups)
    leads = torch.cat([rewards(g)[:, 0] - rewards(g)[:, 1] for g in groups]).numpy()
    p = 1 / (1 + np.exp(-leads))
    assert metrics["rewards/accuracies"] == pytest.approx(np.mean((p > 0.5) + 0.5 * (p == 0.5)))
    assert metrics["calibration/nll"] == pytest.approx(-np.log(p).mean())
    assert metrics["calibration/brier"] == pytest.approx(((1 - p) ** 2).mean())
    confidence, right = np.maximum(p, 1 - p), (p > 0.5) + 0.5 * (p == 0.5)
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    ece = sum(abs((right - confidence)[place == b].sum()) for b in range(BINS)) / len(p)
    found = RewardModel().summarise(metrics)
    assert found["calibration/ece"] == pytest.approx(ece) and ece > 0.01
    assert not any("gap" in name for name in found)
