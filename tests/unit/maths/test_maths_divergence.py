"""Divergences: worked values, exact expectations of the estimators, and the edges of probability."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayalign.maths.divergence import categorical_kl, jensen_shannon, kl_k1, kl_k2, kl_k3

torch.set_num_threads(1)
log_probs = st.lists(st.floats(-8, 8), min_size=4, max_size=4).map(
    lambda z: torch.log_softmax(torch.tensor(z, dtype=torch.float64), -1)
)


def test_worked_values():
    logp, ref = torch.tensor([-1.0, -2.0], dtype=torch.float64), torch.tensor([-1.5, -1.75], dtype=torch.float64)
    assert kl_k1(logp, ref).tolist() == [0.5, -0.25]
    assert kl_k2(logp, ref).tolist() == [0.125, 0.03125]
    assert kl_k3(logp, ref).tolist() == pytest.approx([0.1065307, 0.0340254], abs=1e-7)


@settings(max_examples=40, deadline=None)
@given(log_probs, log_probs)
def test_k1_and_k3_have_the_exact_kl_as_expectation(log_p, log_q):
    exact = categorical_kl(log_p, log_q)
    for estimator in (kl_k1, kl_k3):
        torch.testing.assert_close((log_p.exp() * estimator(log_p, log_q)).sum(), exact, rtol=1e-6, atol=1e-9)
    assert exact >= -1e-12 and (kl_k3(log_p, log_q) >= 0).all()


@settings(max_examples=20, deadline=None)
@given(log_probs, log_probs)
def test_gradients_as_a_loss(log_p, log_q):
    """Of E_π (samples held fixed): k1 gives 0, k2 that of KL(π‖π_ref), k3 that of KL(π_ref‖π)."""

    def gradient(build):
        z = log_p.clone().requires_grad_()
        return torch.autograd.grad(build(torch.log_softmax(z, -1)), z)[0]

    def expected(estimator):
        return gradient(lambda lp: (lp.detach().exp() * estimator(lp, log_q)).sum())

    torch.testing.assert_close(expected(kl_k1), torch.zeros(4, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(expected(kl_k2), gradient(lambda lp: categorical_kl(lp, log_q)), atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(expected(kl_k3), gradient(lambda lp: categorical_kl(log_q, lp)), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k2, kl_k3])
def test_extremes_and_masked_garbage(estimator):
    logp = torch.tensor([1e4, -1e4, math.nan, math.inf, -math.inf], requires_grad=True)
    out = estimator(logp, torch.zeros(5))
    assert torch.isfinite(out[:2]).all() and not torch.isfinite(out[2:]).any()
    torch.where(torch.tensor([1, 1, 0, 0, 0]) == 1, out, torch.zeros(5)).sum().backward()
    assert torch.isfinite(logp.grad).all()
    if estimator is kl_k3:
        assert logp.grad[:2].tolist() == [1, 0] and (out[:2] > 0).all()


def test_classes_of_probability_zero():
    log_p = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64).log().requires_grad_()
    log_q = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64).log().requires_grad_()
    for divergence, value in ((categorical_kl, math.log(4)), (jensen_shannon, None)):
        out = divergence(log_p, log_q)
        assert out[1].item() == pytest.approx(0, abs=1e-15)
        if value is not None:
            assert out[0].item() == pytest.approx(value)
        for grad in torch.autograd.grad(out.sum(), (log_p, log_q)):
            assert torch.isfinite(grad).all()
    assert categorical_kl(log_q, log_p)[0] == math.inf
    impossible = torch.tensor([0.0, -math.inf], dtype=torch.float64, requires_grad=True)
    out = jensen_shannon(impossible, impossible)
    out.backward()
    assert out.item() == 0 and torch.isfinite(impossible.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jensen_shannon_reaches_ln_two_and_not_more(dtype):
    logits = torch.tensor([[1e4, -1e4], [20.0, -20.0]], dtype=dtype)
    out = jensen_shannon(torch.log_softmax(logits, -1), torch.log_softmax(-logits, -1))
    assert all(0.6931 < x <= math.log(2) for x in out.tolist())


@settings(max_examples=40, deadline=None)
@given(log_probs, log_probs)
def test_jensen_shannon_is_symmetric_and_bounded(log_p, log_q):
    out = jensen_shannon(log_p, log_q)
    torch.testing.assert_close(out, jensen_shannon(log_q, log_p))
    assert -1e-12 <= out <= math.log(2)


def test_gradcheck():
    z = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for f in (categorical_kl, jensen_shannon, kl_k2, kl_k3):
        assert torch.autograd.gradcheck(lambda y, f=f: f(torch.log_softmax(y[0], -1), torch.log_softmax(y[1], -1)), z)


def test_dtypes_and_shapes():
    half = torch.zeros(3, dtype=torch.bfloat16)
    assert kl_k3(half, half).dtype == torch.float32 and categorical_kl(half, half.double()).dtype == torch.float64
    for f in (kl_k1, kl_k2, kl_k3, categorical_kl, jensen_shannon):
        with pytest.raises(ValueError, match="shapes"):
            f(half, half[:2])
