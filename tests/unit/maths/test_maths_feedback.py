"""From judges and scores to labels and pairs."""

from __future__ import annotations

import math

import pytest
import torch

from rayalign.maths.feedback import (
    all_pairs,
    annotate_pairs,
    best_worst_pair,
    debiased_preference,
    expected_score,
    flip_votes,
)

torch.set_num_threads(1)


def test_a_judge_that_always_picks_the_first_prefers_nobody():
    out = debiased_preference(torch.tensor([1.0, 0.8, 0.9]), torch.tensor([1.0, 0.2, 0.5]))
    assert out.tolist() == pytest.approx([0.5, 0.8, 0.7])
    with pytest.raises(ValueError, match="p_first"):
        debiased_preference(torch.tensor([1.1]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match="shapes"):
        debiased_preference(torch.tensor([0.1]), torch.tensor([0.5, 0.5]))


def test_expected_score():
    logps = torch.tensor([[0.0, 0.0, 0.0], [-math.inf, -math.inf, -3.0], [math.log(3), -math.inf, 0.0], [1e4, 0, -1e4]])
    out = expected_score(logps, torch.tensor([1, 5, 9]), low=1, high=9)
    assert out.tolist() == pytest.approx([0, 1, -0.5, -1])
    for change in ({"low": 9, "high": 1}, {"low": 2, "high": 9}, {"values": torch.tensor([1, 9])}):
        arguments = {"values": torch.tensor([1, 5, 9]), "low": 1, "high": 9, **change}
        with pytest.raises(ValueError):
            expected_score(logps, arguments.pop("values"), **arguments)
    with pytest.raises(ValueError, match="row 1"):
        expected_score(torch.tensor([[0.0, 0.0], [-math.inf] * 2]), torch.tensor([0, 1]), low=0, high=1)


def test_best_and_worst():
    scores = torch.tensor([[0.5, 2.0, -1.0, 2.0], [1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 0.0, 1.0]])
    indices, keep = best_worst_pair(scores)
    assert indices.tolist()[0] == [1, 2] and indices.tolist()[2] == [1, 0]
    assert keep.tolist() == [True, False, True]
    for bad in (torch.tensor([[math.nan, 1.0]]), torch.zeros(2, 0), torch.zeros(3)):
        with pytest.raises(ValueError):
            best_worst_pair(bad)


def test_all_pairs():
    scores = torch.tensor([[1.0, 3.0, 2.0, 0.0], [5.0, 5.0, 4.0, 5.0], [1.0, 1.0, 1.0, 1.0]])
    assert all_pairs(scores).tolist() == [
        [0, 1, 0],
        [0, 2, 0],
        [0, 0, 3],
        [0, 1, 2],
        [0, 1, 3],
        [0, 2, 3],
        [1, 0, 2],
        [1, 1, 2],
        [1, 3, 2],
    ]
    assert all_pairs(scores[2:]).shape == (0, 3) and all_pairs(scores[:0]).shape == (0, 3)


def test_annotators():
    n = 20_000
    generator = torch.Generator().manual_seed(3)
    votes = annotate_pairs(torch.full((n,), 1.0), torch.zeros(n), generator)
    p = 1 / (1 + math.exp(-1))
    assert votes.dtype == torch.bool and abs(votes.double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / n)
    generator.manual_seed(3)
    assert torch.equal(votes, annotate_pairs(torch.full((n,), 1.0), torch.zeros(n), generator))
    assert annotate_pairs(torch.full((n,), 1e4), torch.zeros(n), generator).all()
    assert not annotate_pairs(torch.full((n,), -1e4), torch.zeros(n), generator).any()
    flipped = flip_votes(votes, 0.2, generator) ^ votes
    assert abs(flipped.double().mean().item() - 0.2) < 5 * math.sqrt(0.16 / n)
    assert torch.equal(flip_votes(votes, 0.0, generator), votes)
    assert torch.equal(flip_votes(votes, 1.0, generator), ~votes)
    for call in (
        lambda: flip_votes(votes, 1.1, generator),
        lambda: flip_votes(votes.float(), 0.1, generator),
        lambda: annotate_pairs(torch.zeros(2), torch.zeros(3), generator),
        lambda: annotate_pairs(torch.tensor([math.nan]), torch.zeros(1), generator),
    ):
        with pytest.raises(ValueError):
            call()
