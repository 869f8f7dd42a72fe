"""Preference losses: worked values, identities between them, gradients, and the extremes."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from rayalign.maths.preference import (
    binary_cringe_loss,
    cringe_token_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    kto_pair_loss,
    kto_reference_point,
    log_ratio_gap,
    mdpo_loss,
    orpo_loss,
    pairwise_cringe_gate,
    psi_identity,
    psi_logit,
    psi_po_loss,
    psi_utilities,
    robust_dpo_loss,
    simpo_loss,
    slic_hf_loss,
    soft_dpo_loss,
    spin_loss,
)

torch.set_num_threads(1)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


GAP = log_ratio_gap(
    t(-12.3, -45, -8.75, -30.2, -101.5),
    t(-14.1, -40.5, -8.75, -33.9, -99),
    t(-13, -44.2, -9.5, -28, -103),
    t(-13.5, -43, -9, -35, -97.25),
)

GAP_LOSSES = {
    "dpo": functools.partial(dpo_loss, beta=0.1),
    "cdpo": functools.partial(dpo_loss, beta=0.1, label_smoothing=0.1),
    "robust": functools.partial(robust_dpo_loss, beta=0.1, flip_prob=0.1),
    "ipo 0.1": functools.partial(ipo_loss, tau=0.1),
    "ipo 1": functools.partial(ipo_loss, tau=1),
    "hinge": functools.partial(hinge_loss, beta=0.1),
    "spin": functools.partial(spin_loss, lam=0.1),
    "soft": lambda gap: soft_dpo_loss(gap, beta=0.1, prob_chosen=torch.full_like(gap, 0.9)),
    "psi": lambda gap: psi_po_loss(gap, torch.full_like(gap, 0.5), tau=0.1),
    "mdpo": lambda gap: mdpo_loss(gap, 2 * gap, -gap, beta=0.1, anchor=0.5),
}


@pytest.mark.parametrize(
    "name, value",
    [
        ("dpo", 0.7171814),
        ("cdpo", 0.7140814),
        ("robust", 0.7210564),
        ("ipo 0.1", 34.9565),
        ("ipo 1", 7.4165),
        ("hinge", 1.031),
        ("spin", 0.7171814),
        ("soft", 0.7140814),
        ("psi", 34.9565),
    ],
)
def test_worked_values(name, value):
    assert torch.allclose(GAP, t(1.3, -3.3, 0.5, -3.3, 3.25))
    assert GAP_LOSSES[name](GAP).mean().item() == pytest.approx(value, abs=5e-8)


@pytest.mark.parametrize("name", GAP_LOSSES)
def test_gradcheck_extremes_and_dtypes(name):
    loss = GAP_LOSSES[name]
    assert torch.autograd.gradcheck(loss, GAP.clone().requires_grad_())
    for dtype, out_dtype in [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        gap = torch.tensor([1e4, -1e4, 0.0], dtype=dtype, requires_grad=True)
        out = loss(gap)
        out.sum().backward()
        assert out.dtype == out_dtype and out.shape == (3,)
        assert torch.isfinite(out).all() and torch.isfinite(gap.grad).all()


@settings(max_examples=40, deadline=None)
@given(st.floats(-50, 50), st.floats(0.01, 0.49), st.floats(0.05, 2))
def test_robust_dpo_is_unbiased_under_flips(h, flip, beta):
    clean = dpo_loss(t(h), beta=beta)
    right, flipped = (robust_dpo_loss(t(g), beta=beta, flip_prob=flip) for g in (h, -h))
    torch.testing.assert_close((1 - flip) * right + flip * flipped, clean, rtol=1e-8, atol=1e-8)


def test_mdpo_by_hand():
    gap, image_gap, ratio = t(0.4), t(-1.0), t(2.0)
    expected = -(logsigmoid(0.5 * gap) + logsigmoid(0.5 * image_gap) + logsigmoid(0.5 * ratio - 0.3))
    torch.testing.assert_close(mdpo_loss(gap, image_gap, ratio, beta=0.5, anchor=0.3), expected)


def test_psi_po_with_two_answers_and_identity_is_ipo():
    certain = t([math.nan, 1.0], [0.0, 7.0]).unsqueeze(0)
    u = psi_utilities(certain, psi=psi_identity)
    assert u.tolist() == [[0.75, 0.25]]
    torch.testing.assert_close(
        psi_po_loss(GAP, (u[:, 0] - u[:, 1]).expand(5), tau=0.3), ipo_loss(GAP, tau=0.3), rtol=1e-12, atol=1e-12
    )


def test_psi_logit():
    assert psi_logit(t(0.5, 0.8), eps=1e-3).tolist() == pytest.approx([0, math.log(4)])
    for dtype in (torch.float32, torch.float64):
        p = torch.tensor([0.0, 1.0, 0.3], dtype=dtype, requires_grad=True)
        out = psi_logit(p, eps=1e-9)
        out.sum().backward()
        bound = math.log(1e-9)
        assert out[:2].tolist() == pytest.approx([bound, -bound], rel=1e-6) and torch.isfinite(p.grad).all()
    three = torch.full((1, 3, 3), 0.5) + torch.tensor([[0, 0.3, 0.1], [-0.3, 0, 0], [-0.1, 0, 0]])
    u = psi_utilities(three, psi=functools.partial(psi_logit, eps=1e-3))
    assert u[0].tolist() == pytest.approx(
        [(math.log(4) + math.log(1.5)) / 3, -math.log(4) / 3, -math.log(1.5) / 3], rel=1e-5
    )


def test_slic_hf():
    out = slic_hf_loss(t(-3.0, -9.0), t(-6.0, -8.5), t(-4.0, -2.0), delta=1.0, weight=0.5)
    assert out.tolist() == [2.0, 2.5]


def test_simpo_and_orpo():
    assert simpo_loss(t(-0.5), t(-1.25), beta=2, gamma=0.5).item() == pytest.approx(0.3132617, abs=5e-8)
    assert orpo_loss(t(-0.5), t(-1.25), weight=0.1).item() == pytest.approx(0.5231504, abs=5e-8)
    chosen, rejected = t(-0.5, -3.0, -0.01).requires_grad_(), t(-1.25, -0.2, -9.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: orpo_loss(a, b, weight=0.7), (chosen, rejected))
    assert torch.autograd.gradcheck(lambda a, b: simpo_loss(a, b, beta=2, gamma=0.5), (chosen, rejected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orpo_at_probability_one_and_zero(dtype):
    chosen = torch.tensor([0.0, -1e4, 0.0, -1e-12], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-1e4, 0.0, 0.0, -1e-5], dtype=dtype, requires_grad=True)
    out = orpo_loss(chosen, rejected, weight=0.1)
    out.sum().backward()
    assert all(torch.isfinite(x).all() for x in (out, chosen.grad, rejected.grad))
    assert chosen.grad[0] == -1  # the likelihood's own gradient stays


def test_kto():
    policy, ref = t(-10, -12, -9).requires_grad_(), t(-11, -11.5, -9.2)
    desirable = torch.tensor([True, False, True])
    loss = functools.partial(kto_loss, z_ref=0.25, beta=0.1, weight_undesirable=1.33)
    assert loss(policy, ref, desirable).tolist() == pytest.approx([0.4812588, 0.6400742, 0.50125], abs=1e-7)
    assert torch.autograd.gradcheck(lambda p: loss(p, ref, desirable), policy)
    extreme = t(1e4, -1e4).requires_grad_()
    out = kto_loss(extreme, t(0, 0), torch.tensor([False, True]), z_ref=t(0.0)[0], beta=1.0)
    out.sum().backward()
    assert out.tolist() == [1, 1] and torch.isfinite(extreme.grad).all()


def test_kto_reference_point():
    policy = t(-1.0, -2.0).requires_grad_()
    z = kto_reference_point(policy, t(-2.0, -2.5))
    assert z.item() == 0.75 and not z.requires_grad
    assert kto_reference_point(t(-3.0), t(-1.0)).item() == 0
    assert kto_reference_point(t(), t()).item() == 0


def test_kto_pair():
    chosen, rejected = t(1.0, 2.0).requires_grad_(), t(0.5, 1.5).requires_grad_()
    out = kto_pair_loss(chosen, rejected, t(0, 0), t(0, 0), beta=0.5)
    s = [1 / (1 + math.exp(-0.5 * x)) for x in (1.0 - 1.0, 2.0 - 1.0, 1.5 - 0.5, 1.5 - 1.5)]
    assert out.tolist() == pytest.approx([1 - x for x in s])
    out[0].backward()
    assert rejected.grad.tolist() == [0, 0] and chosen.grad[1] == 0 and chosen.grad[0] < 0


def test_cringe_with_one_rival_is_deterministic():
    logits = t([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0], [math.nan, 0.0, math.inf]]).reshape(1, 3, 3).requires_grad_()
    out = cringe_token_loss(logits, torch.tensor([[0, 0, -100]]), torch.tensor([[1, 1, 0]]), top_k=1)
    assert out.tolist() == [[pytest.approx(math.log1p(math.e)), pytest.approx(math.log1p(math.exp(-5))), 0]]
    out.sum().backward()
    assert torch.isfinite(logits.grad).all() and (logits.grad[0, 2] == 0).all()
    assert logits.grad[0, 0, 0] > 0 > logits.grad[0, 0, 2] and logits.grad[0, 0, 1] == 0


def test_cringe_samples_from_the_softmax_of_the_kept():
    logits = t(2.0, 1.0, 0.5, -9.0).expand(1, 4000, 4)
    labels = torch.full((1, 4000), 1)
    generator = torch.Generator().manual_seed(0)
    out = cringe_token_loss(logits, labels, torch.ones(1, 4000), top_k=2, generator=generator)
    first, second = math.log1p(math.exp(-1)), math.log1p(math.exp(0.5))
    is_first = torch.isclose(out, t(first))
    assert (is_first | torch.isclose(out, t(second))).all()  # never the label, never the fourth
    share = math.exp(2) / (math.exp(2) + math.exp(0.5))
    assert abs(is_first.double().mean().item() - share) < 5 * math.sqrt(share * (1 - share) / 4000)
    generator.manual_seed(0)
    assert torch.equal(out, cringe_token_loss(logits, labels, torch.ones(1, 4000), top_k=2, generator=generator))


def test_cringe_edges():
    assert cringe_token_loss(torch.zeros(0, 4, 5), torch.zeros(0, 4).long(), torch.zeros(0, 4), top_k=2).shape == (0, 4)
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], dtype=torch.bfloat16, requires_grad=True)
    out = cringe_token_loss(logits, torch.tensor([[0]]), torch.ones(1, 1), top_k=2)
    out.sum().backward()
    assert out.dtype == torch.float32 and out.item() == pytest.approx(1e4, rel=0.01)
    assert torch.isfinite(logits.grad).all()
    for top_k in (0, 3):
        with pytest.raises(ValueError, match="top_k"):
            cringe_token_loss(logits, torch.tensor([[0]]), torch.ones(1, 1), top_k=top_k)


def test_cringe_parts():
    assert binary_cringe_loss(t(1.0), t(2.0), alpha=0.5).item() == 2
    gate = pairwise_cringe_gate(t(-5.0, -1e4).requires_grad_(), t(-6.0, 0.0), margin=2.0, temperature=0.5)
    assert gate.tolist() == pytest.approx([1 / (1 + math.exp(-2)), 1]) and not gate.requires_grad


@pytest.mark.parametrize(
    "call",
    [
        lambda: dpo_loss(GAP, beta=0.0),
        lambda: dpo_loss(GAP, beta=float("nan")),
        lambda: dpo_loss(GAP, beta=0.1, label_smoothing=1.1),
        lambda: robust_dpo_loss(GAP, beta=0.1, flip_prob=0.5),
        lambda: robust_dpo_loss(GAP, beta=0.1, flip_prob=-0.1),
        lambda: soft_dpo_loss(GAP, beta=0.1, prob_chosen=GAP),
        lambda: soft_dpo_loss(GAP, beta=0.1, prob_chosen=t(0.5)),
        lambda: ipo_loss(GAP, tau=0),
        lambda: psi_po_loss(GAP, GAP[:1], tau=1),
        lambda: psi_identity(t(1.5)),
        lambda: psi_logit(t(0.5), eps=0.0),
        lambda: psi_utilities(torch.zeros(1, 2, 3), psi=psi_identity),
        lambda: psi_utilities(torch.full((1, 2, 2), 2.0), psi=psi_identity),
        lambda: psi_utilities(torch.zeros(1, 2, 2), psi="identity"),
        lambda: slic_hf_loss(GAP, GAP, GAP[:1], delta=1, weight=1),
        lambda: orpo_loss(GAP, GAP, weight=-1),
        lambda: kto_loss(GAP, GAP, GAP, z_ref=0, beta=0.1),
        lambda: kto_reference_point(GAP, GAP[:1]),
        lambda: pairwise_cringe_gate(GAP, GAP, margin=0, temperature=0),
        lambda: spin_loss(GAP, lam=-1),
        lambda: log_ratio_gap(GAP, GAP, GAP, GAP[:1]),
    ],
)
def test_bad_arguments(call):
    with pytest.raises(ValueError):
        call()
