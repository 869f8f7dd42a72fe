"""Ranking losses against hand-worked and enumerated values, with masks, ties and extremes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayalign.maths.ranking import (
    best_of_choice_loss,
    bradley_terry_loss,
    k_choose_2_loss,
    margin_ranking_loss,
    plackett_luce_loss,
)

torch.set_num_threads(1)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def softplus(x):
    return math.log1p(math.exp(x))


def test_bradley_terry():
    assert bradley_terry_loss(t(1.0), t(0.5), margin=0.2).item() == pytest.approx(softplus(-0.3))
    torch.testing.assert_close(bradley_terry_loss(t(1.0, 2.0), t(0, 0), margin=t(1.0, 2.0)), t(1, 1) * math.log(2))
    extreme = t(1e4, -1e4).requires_grad_()
    bradley_terry_loss(extreme, t(0, 0)).sum().backward()
    assert extreme.grad.tolist() == [0, -1]


def test_k_choose_2_by_hand():
    scores = t([1.0, 0.0, math.nan, 2.0], [1, 1, 1, 1], [1, 2, 3, math.inf]).requires_grad_()
    ranks = torch.tensor([[0, 1, 0, 1], [2, 2, 2, 2], [0, 1, 2, 3]])
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 0, 0]])
    out = k_choose_2_loss(scores, ranks, mask)
    assert out.tolist() == pytest.approx([(softplus(-1) + softplus(1)) / 2, 0, 0])
    out.sum().backward()
    assert torch.isfinite(scores.grad).all() and (scores.grad[1:] == 0).all() and scores.grad[0, 2] == 0


def test_best_of_choice():
    scores = t([1.0, 2.0, math.nan], [math.inf, math.nan, 0.0]).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    out = best_of_choice_loss(scores, torch.tensor([0, -1]), mask)
    assert out.tolist() == pytest.approx([softplus(1), 0])
    out.sum().backward()
    assert torch.isfinite(scores.grad).all() and (scores.grad[1] == 0).all()
    for choice in ([2, 0], [3, 0], [-1, 0]):
        with pytest.raises(ValueError, match="choice"):
            best_of_choice_loss(scores, torch.tensor(choice), mask)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=3, max_size=3))
def test_plackett_luce_is_a_distribution_over_orders(scores):
    orders = torch.tensor(list(itertools.permutations(range(3))))
    logp = -plackett_luce_loss(t(*scores).expand(6, 3), orders, torch.ones(6, 3))
    assert logp.exp().sum().item() == pytest.approx(1)


def test_plackett_luce_by_hand():
    scores = t([1.0, math.nan, 3.0, 2.0], [5.0, 1, 1, 1]).requires_grad_()
    ranks = torch.tensor([[7, 0, 3, 1], [0, 1, 2, 3]])
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0]])
    first = math.log(math.exp(1) + math.exp(2) + math.exp(3)) - 2
    second = math.log(math.exp(1) + math.exp(3)) - 3
    out = plackett_luce_loss(scores, ranks, mask)
    assert out.tolist() == pytest.approx([first + second, 0])
    out.sum().backward()
    assert torch.isfinite(scores.grad).all() and (scores.grad[1] == 0).all()
    tied = plackett_luce_loss(t([0.0, 1.0]), torch.tensor([[1, 1]]), torch.ones(1, 2))
    assert tied.item() == pytest.approx(2 * math.log(1 + math.e) - 1)


def test_margin_ranking():
    p = t([-0.4, -0.35, -0.6])
    assert margin_ranking_loss(p, margin=0.1, reduction="pair_sum").item() == pytest.approx(0.15)
    assert margin_ranking_loss(p, margin=0.1, reduction="offset_mean").item() == pytest.approx(0.075)
    longer = t([-0.4, -0.35, -0.6, math.nan], [math.nan] * 4).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]])
    for reduction, value in (("pair_sum", 0.15), ("offset_mean", 0.075)):
        out = margin_ranking_loss(longer, margin=0.1, reduction=reduction, mask=mask)
        assert out.tolist() == pytest.approx([value, 0])
        (grad,) = torch.autograd.grad(out.sum(), longer)
        assert torch.isfinite(grad).all() and (grad[1] == 0).all() and grad[0, 3] == 0
    with pytest.raises(ValueError, match="reduction"):
        margin_ranking_loss(p, margin=0.1, reduction="mean")
    with pytest.raises(ValueError, match="margin"):
        margin_ranking_loss(p, margin=-0.1, reduction="pair_sum")


def test_gradcheck_extremes_and_dtypes():
    ranks, mask = torch.tensor([[1, 0, 2], [0, 0, 1]]), torch.tensor([[1, 1, 1], [1, 0, 1]])
    losses = [
        lambda s: k_choose_2_loss(s, ranks, mask),
        lambda s: plackett_luce_loss(s, ranks, mask),
        lambda s: best_of_choice_loss(s, torch.tensor([1, 2]), mask),
        lambda s: margin_ranking_loss(s, margin=0.1, reduction="offset_mean", mask=mask),
    ]
    for loss in losses:
        assert torch.autograd.gradcheck(loss, t([0.3, -0.2, 1.1], [0.5, 2.0, 0.9]).requires_grad_())
        for scores in ([[1e4, -1e4, 0.0]] * 2, [[3.0, 3.0, 3.0]] * 2):
            s = torch.tensor(scores, requires_grad=True)
            loss(s).sum().backward()
            assert torch.isfinite(s.grad).all()
        assert loss(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.float32
        with pytest.raises(ValueError):
            loss(torch.zeros(2, 4))
