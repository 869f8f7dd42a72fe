"""Reductions: hand-worked values, empty masks, and parts that add up to the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayalign.maths.reduce import MODES, aggregate, masked_mean, masked_var, whiten

torch.set_num_threads(1)
X = torch.tensor([[1.0, 2.0, torch.nan], [6.0, torch.inf, torch.nan], [torch.nan, torch.nan, torch.nan]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    "mode, value", [("token_mean", 3.0), ("sequence_mean", 3.75), ("sequence_sum_mean", 4.5), ("constant", 0.9)]
)
def test_aggregate_by_hand(mode, value):
    x = X.clone().requires_grad_()
    out = aggregate(x, MASK, mode=mode, length=5)
    out.backward()
    assert out.item() == pytest.approx(value)
    assert torch.isfinite(x.grad).all() and (x.grad[MASK == 0] == 0).all() and (x.grad[MASK == 1] > 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_mask_is_zero_with_zero_gradient(mode):
    x = X.clone().requires_grad_()
    out = aggregate(x, torch.zeros_like(MASK), mode=mode, length=5)
    out.backward()
    assert out.item() == 0 and (x.grad == 0).all()
    assert aggregate(X, MASK, mode=mode, length=5, denominator=0).item() == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(MODES), st.integers(0, 6))
def test_parts_with_the_global_denominator_add_up(seed, mode, cut):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    mask = torch.rand(6, 4, generator=generator) < 0.4
    denominator = mask.sum() if mode == "token_mean" else mask.any(-1).sum()
    whole = aggregate(x, mask, mode=mode, length=4)
    parts = sum(
        aggregate(x[part], mask[part], mode=mode, length=4, denominator=denominator)
        for part in (slice(0, cut), slice(cut, 6))
    )
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_masked_mean_and_var():
    x = X.clone().requires_grad_()
    assert masked_mean(x, MASK).item() == 3
    assert masked_mean(x, MASK, denominator=18).item() == 0.5
    assert masked_var(x, MASK).item() == pytest.approx(((1 - 3) ** 2 + 1 + 9) / 3)
    for out in (masked_mean(x, MASK * 0), masked_mean(x, MASK, denominator=0), masked_var(x, MASK * 0)):
        (grad,) = torch.autograd.grad(out, x)
        assert out.item() == 0 and (grad == 0).all()


def test_whiten():
    x = X.clone().requires_grad_()
    out = whiten(x, MASK)
    kept = out[MASK == 1]
    assert kept.mean().item() == pytest.approx(0, abs=1e-6)
    assert kept.var(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    assert (out[MASK == 0] == 0).all()
    shifted = whiten(x, MASK, shift_mean=False)
    torch.testing.assert_close(shifted[MASK == 1], kept + 3)
    assert (shifted[MASK == 0] == 0).all()
    (grad,) = torch.autograd.grad((out * torch.arange(9.0).reshape(3, 3)).sum(), x)
    assert torch.isfinite(grad).all() and (grad[MASK == 0] == 0).all()


def test_whiten_gradcheck_and_equal_values():
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: whiten(y, torch.rand(3, 4) > -1), x)
    same = torch.full((7,), 1234.567, requires_grad=True)
    out = whiten(same, torch.ones(7))
    out.sum().backward()
    assert (out == 0).all() and torch.isfinite(same.grad).all()


def test_dtypes():
    half = torch.ones(2, 300, dtype=torch.bfloat16)
    assert aggregate(half, half, mode="token_mean").dtype == torch.float32
    assert masked_mean(half.double(), half).dtype == torch.float64
    assert whiten(half, half).dtype == torch.float32 and masked_var(half.double(), half).dtype == torch.float64
    assert aggregate(half, half, mode="sequence_mean").item() == 1


def test_bad_arguments():
    with pytest.raises(ValueError, match="mode"):
        aggregate(X, MASK, mode="mean")
    with pytest.raises(ValueError, match="length"):
        aggregate(X, MASK, mode="constant")
    with pytest.raises(ValueError, match="shapes"):
        masked_mean(X, MASK[0])
    with pytest.raises(ValueError, match="denominator"):
        masked_mean(X, MASK, denominator=-1)
