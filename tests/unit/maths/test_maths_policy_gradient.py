"""PPO's losses by hand, its gradients, masked garbage; and best-of-n against enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayalign.maths.policy_gradient import (
    best_of_n_distribution,
    best_of_n_kl,
    importance_weight,
    ppo_policy_loss,
    ppo_value_loss,
    sequence_ratio,
)
from rayalign.maths.reduce import aggregate

torch.set_num_threads(1)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def ppo(ratio, advantage, dual_clip=None):
    logp = t(ratio).log().requires_grad_()
    loss, clipped = ppo_policy_loss(
        logp, torch.zeros_like(logp), t(advantage), clip_low=0.2, clip_high=0.3, dual_clip=dual_clip
    )
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    return loss[0].tolist(), clipped[0].tolist(), grad[0].tolist()


def test_ppo_by_hand():
    loss, clipped, grad = ppo([1.0, 1.5, 0.5, 1.5, 0.5, 4.0], [2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    assert loss == pytest.approx([-2, -2.6, -1, 3, 1.6, 8])
    assert clipped == [False, True, False, False, True, False]
    assert grad == pytest.approx([-2, 0, -1, 3, 0, 8])


def test_dual_clip_bounds_bad_tokens_alone():
    loss, clipped, grad = ppo([4.0, 2.0, 4.0, 0.5], [-2.0, -2.0, 1.0, -2.0], dual_clip=3.0)
    assert loss == pytest.approx([6, 4, -1.3, 1.6])
    assert clipped == [False, False, True, True]
    assert grad == pytest.approx([0, 4, 0, 0])


def test_ppo_on_policy_has_the_policy_gradient():
    logp = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    advantage = t([1.0, -2.0, 0.0], [0.5, 3.0, -1.0])
    loss, _ = ppo_policy_loss(logp, logp.detach(), advantage, clip_low=0.2, clip_high=0.2)
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    torch.testing.assert_close(grad, -advantage)
    old = logp.detach() + 0.05
    assert torch.autograd.gradcheck(lambda x: ppo_policy_loss(x, old, advantage, clip_low=0.2, clip_high=0.2)[0], logp)


def test_masked_garbage_and_extremes_leave_finite_gradients():
    garbage = [math.nan, math.inf, -math.inf]
    cells = torch.tensor([(a, b, c) for a in [0.5, *garbage] for b in [0.5, *garbage] for c in [-0.5, *garbage]])
    x, y, z = cells.T.unsqueeze(1)
    mask = torch.isfinite(x) & torch.isfinite(y) & torch.isfinite(z)
    x = x.clone().requires_grad_()
    for loss in (
        ppo_policy_loss(x, y, z, clip_low=0.2, clip_high=0.2, dual_clip=3.0)[0],
        ppo_value_loss(x, y, z, clip=0.2),
    ):
        total = aggregate(loss, mask, mode="token_mean")
        (grad,) = torch.autograd.grad(total, x)
        assert torch.isfinite(total) and torch.isfinite(grad).all() and (grad[~mask] == 0).all()
    far = torch.tensor([[1e4, -1e4, 1e4, -1e4]], requires_grad=True)
    zero, advantage = torch.zeros(1, 4), torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    loss, _ = ppo_policy_loss(far, zero, advantage, clip_low=0.2, clip_high=0.2)
    (grad,) = torch.autograd.grad((loss + ppo_value_loss(far, zero, zero, clip=math.inf)).sum(), far)
    assert torch.isfinite(loss).all() and torch.isfinite(grad).all()


def test_value_loss_by_hand():
    value = t([1.0, 1.0, 0.3, 0.0]).requires_grad_()
    out = ppo_value_loss(value, t([0.5, 0.5, 0.2, 0.5]), t([1.0, 3.0, 0.0, 1.0]), clip=0.2)
    assert out[0].tolist() == pytest.approx([0.045, 2.645, 0.045, 0.5])
    (grad,) = torch.autograd.grad(out.sum(), value)
    assert grad[0].tolist() == pytest.approx([0, 0, 0.3, -1])


def test_importance_weight():
    train = t([0.0, 1.0, 1e4, -1e4, 0.0]).requires_grad_()
    out = importance_weight(train, t([math.log(2), 0.0, 0.0, 0.0, math.nan]), cap=2.0)
    assert out[0, :4].tolist() == pytest.approx([0.5, 2, 2, 0]) and out[0, 4].isnan() and not out.requires_grad
    assert importance_weight(train, t([0.0] * 5), cap=1e30)[0, 2].item() == pytest.approx(math.exp(20))


def test_sequence_ratio():
    logp = t([0.3, math.nan, 0.1], [math.nan] * 3, [1e4] * 3).requires_grad_()
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]])
    out = sequence_ratio(logp, t([0.0] * 3).expand(3, 3), mask)
    assert out.tolist() == pytest.approx([math.exp(0.2), 1, math.exp(20)])
    out.sum().backward()
    assert logp.grad[0].tolist() == pytest.approx([math.exp(0.2) / 2, 0, math.exp(0.2) / 2])
    assert (logp.grad[1:] == 0).all()


def enumerated(prob, score, n):
    law = [0.0] * len(prob)
    for draws in itertools.product(range(len(prob)), repeat=n):
        best = max(draws, key=lambda a: score[a])  # max keeps the first of equals
        law[best] += math.prod(prob[a] for a in draws)
    return law


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=4, max_size=4).filter(lambda w: sum(w) > 0.1),
    st.lists(st.sampled_from([-1.0, 0.0, 2.5]), min_size=4, max_size=4),
    st.integers(1, 4),
)
def test_best_of_n_is_the_enumerated_law(weights, score, n):
    prob = [w / sum(weights) for w in weights]
    out = best_of_n_distribution(t(*prob), t(*score), n)
    assert out.tolist() == pytest.approx(enumerated(prob, score, n), abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 16])
def test_the_best_of_n_bound(n):
    prob = torch.full((500,), 1 / 500, dtype=torch.float64)
    law = best_of_n_distribution(prob, torch.arange(500), n)
    kl = (law * (law / prob).log()).sum().item()
    assert kl <= best_of_n_kl(n) + 1e-12 and kl == pytest.approx(best_of_n_kl(n), abs=0.02)


def test_dtypes():
    half = torch.zeros(1, 2, dtype=torch.bfloat16)
    assert ppo_policy_loss(half, half, half, clip_low=0.2, clip_high=0.2)[0].dtype == torch.float32
    assert sequence_ratio(half, half, half).dtype == torch.float32
    assert ppo_value_loss(half, half.double(), half, clip=0.1).dtype == torch.float64


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ppo_policy_loss(x, x, x, clip_low=-0.1, clip_high=0.2),
        lambda x: ppo_policy_loss(x, x, x, clip_low=0.1, clip_high=-0.2),
        lambda x: ppo_policy_loss(x, x, x, clip_low=0.1, clip_high=0.2, dual_clip=1.0),
        lambda x: ppo_policy_loss(x, x, x[:, :1], clip_low=0.1, clip_high=0.2),
        lambda x: ppo_value_loss(x, x, x, clip=-1),
        lambda x: importance_weight(x, x, cap=0),
        lambda x: best_of_n_kl(0),
        lambda x: best_of_n_distribution(t(0.5, 0.6), t(0, 0), 2),
        lambda x: best_of_n_distribution(t(-0.5, 1.5), t(0, 0), 2),
        lambda x: best_of_n_distribution(t(0.5, 0.5), t(0, math.nan), 2),
        lambda x: best_of_n_distribution(t(0.5, 0.5), t(0, 0), 1.5),
    ],
)
def test_bad_arguments(call):
    with pytest.raises(ValueError):
        call(torch.zeros(2, 2))
