"""Rewards, GAE against its definition, group advantages, and the adaptive coefficient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayalign.maths.advantage import AdaptiveKL, gae, group_advantage, leave_one_out_advantage, token_rewards

torch.set_num_threads(1)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_token_rewards():
    kl = t([0.1, math.nan, 0.3, math.inf], [1, 2, 3, 4], [math.nan] * 4)
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    out = token_rewards(t(2.0, -1.0, math.nan), kl, mask, kl_coef=0.5)
    assert out.tolist() == [[-0.05, 0, 1.85, 0], [-0.5, -1, -1.5, -3], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match="score"):
        token_rewards(t(1.0), kl, mask, kl_coef=0.5)


def test_gae_worked_values():
    advantages, returns = gae(
        t([0, -0.1, 0, 1]), t([0.2, 0.3, 9, 0.5]), torch.tensor([[1, 1, 0, 1]]), gamma=0.9, lam=0.8
    )
    assert advantages[0].tolist() == pytest.approx([0.3652, 0.41, 0, 0.5])
    assert returns[0].tolist() == pytest.approx([0.5652, 0.71, 0, 1])


def definition(rewards, values, last, gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l}, straight from the article, over the counted tokens alone."""
    ahead = [*values, last][1:]
    delta = [r + gamma * n - v for r, n, v in zip(rewards, ahead, values, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(delta[i:])) for i in range(len(delta))]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_gae_is_its_definition_on_what_counts(seed, gamma, lam, truncated):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 3, 6, dtype=torch.float64, generator=generator)
    mask = torch.rand(3, 6, generator=generator) < 0.6
    last = torch.randn(3, dtype=torch.float64, generator=generator)
    dirty = [x.masked_fill(~mask, math.nan).requires_grad_() for x in (rewards, values)]
    advantages, returns = gae(*dirty, mask, gamma=gamma, lam=lam, last_value=last if truncated else None)
    assert not advantages.requires_grad and not returns.requires_grad
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()
    for b in range(3):
        keep = mask[b]
        expected = definition(
            rewards[b, keep].tolist(), values[b, keep].tolist(), last[b].item() if truncated else 0.0, gamma, lam
        )
        assert advantages[b, keep].tolist() == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(returns[mask], (advantages + values)[mask])


def test_gae_bad_arguments():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3)
    for change in ({"gamma": 1.1}, {"lam": -0.1}, {"last_value": torch.zeros(3)}):
        with pytest.raises(ValueError):
            gae(x, x, mask, **{"gamma": 1.0, "lam": 1.0, **change})
    with pytest.raises(ValueError):
        gae(x, x[:1], mask, gamma=1.0, lam=1.0)


def test_group_advantage_by_hand():
    scores = t([1.0, 2.0, 6.0])
    std = scores.std().item()
    assert group_advantage(scores, scale="none").tolist() == [[-2, -1, 3]]
    assert group_advantage(scores, scale="std")[0].tolist() == pytest.approx([x / (std + 1e-6) for x in (-2, -1, 3)])
    padded = t([1.0, math.nan, 2.0, 6.0], [5.0, math.inf, math.nan, 0.0], [math.nan] * 4)
    mask = torch.tensor([[1, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    out = group_advantage(padded, scale="std", mask=mask)
    torch.testing.assert_close(out[0, [0, 2, 3]], group_advantage(scores, scale="std")[0])
    assert out[0, 1] == 0 and (out[1:] == 0).all()
    with pytest.raises(ValueError, match="scale"):
        group_advantage(scores, scale="mean")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, -1e4, 1 / 3])
def test_equal_scores_have_exactly_no_advantage(dtype, value):
    scores = torch.full((2, 7), value, dtype=dtype, requires_grad=True)
    for out in (*(group_advantage(scores, scale=s) for s in ("std", "none")), leave_one_out_advantage(scores)):
        assert (out == 0).all() and out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.isfinite(torch.autograd.grad(out.sum(), scores)[0]).all()


def test_leave_one_out():
    assert leave_one_out_advantage(t([1.0, 2.0, 6.0]))[0].tolist() == pytest.approx([-3, -1.5, 4.5])
    with pytest.raises(ValueError):
        leave_one_out_advantage(t([1.0]))


def test_adaptive_kl():
    kl = AdaptiveKL(0.1, target=6.0, horizon=1000)
    kl.update(60.0, 100)
    assert kl.coef == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    kl.update(0.0, 100)
    assert kl.coef == pytest.approx(0.1 * 1.02 * 0.98)
    before = kl.coef
    kl.update(6.6, 50)
    assert kl.coef == pytest.approx(before * (1 + 0.1 * 0.05))
    for bad in ({"target": 0, "horizon": 1}, {"target": 1, "horizon": 0}):
        with pytest.raises(ValueError):
            AdaptiveKL(0.1, **bad)
    with pytest.raises(ValueError):
        kl.update(math.nan, 1)


@pytest.mark.parametrize("scale", ["std", "none"])
def test_a_score_that_is_no_number_is_seen(scale):
    scores = t([1.0, math.nan, 2.0], [1.0, 1.0, 1.0])
    found = group_advantage(scores, scale=scale)
    assert found[0].isnan().all() and found[1].tolist() == [0.0, 0.0, 0.0]
    hidden = group_advantage(scores, scale=scale, mask=torch.tensor([[1, 0, 1]] * 2))
    assert hidden.isfinite().all() and hidden[0, 0] < 0 < hidden[0, 2]
    assert leave_one_out_advantage(scores)[0].isnan().all()
