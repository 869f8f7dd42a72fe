"""d-PM: worked values, known limits, both gradient forms, masks and extremes."""

from __future__ import annotations

import math

import pytest
import torch

from rayalign.maths.disagreement import (
    DIVERGENCES,
    batch_log_mass,
    batch_posterior,
    dpm_loss,
    posterior_divergence,
    preference_score,
    vote_prior,
)

torch.set_num_threads(1)
LOGITS = torch.tensor([[1.0, 0, -1], [0.5, 0.5, 0]], dtype=torch.float64)
PRIOR = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], dtype=torch.float64)


@pytest.mark.parametrize(
    "divergence, values",
    [("kl_q_r", [0.0563951, 0.6139004]), ("kl_r_q", [0.0500410, 0.4990334]), ("js", [0.0131748, 0.1264006])],
)
def test_worked_values(divergence, values):
    assert dpm_loss(LOGITS, PRIOR, divergence=divergence).tolist() == pytest.approx(values, abs=1e-7)


def test_vote_prior():
    counts = torch.tensor([[2, 1, 0], [0, 0, 0]])
    torch.testing.assert_close(vote_prior(counts, smoothing=0.5), torch.tensor([[2.5, 1.5, 0.5], [1.5] * 3]) / 4.5)
    torch.testing.assert_close(vote_prior(counts[:1].double(), smoothing=0), counts[:1].double() / 3)
    for bad, smoothing in ((counts, 0), (counts - 1, 2), (counts, -1)):
        with pytest.raises(ValueError):
            vote_prior(bad, smoothing=smoothing)


def test_a_batch_of_one_has_its_prior_as_posterior():
    log_q = torch.log_softmax(LOGITS[:1], -1)
    torch.testing.assert_close(batch_posterior(log_q, PRIOR[:1] / 2).exp(), PRIOR[:1])
    soft_label_kl = (PRIOR[:1] * (PRIOR[:1].log() - log_q)).sum(-1)
    torch.testing.assert_close(dpm_loss(LOGITS[:1], PRIOR[:1], divergence="kl_r_q"), soft_label_kl)
    certain = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    torch.testing.assert_close(
        batch_posterior(certain, torch.tensor([[0.4, 0.6]], dtype=torch.float64)).exp(),
        torch.tensor([[0.4, 0.6]], dtype=torch.float64),
    )


@pytest.mark.parametrize("eps", [0.0, 1e-9])
def test_a_one_hot_prior_gives_the_cross_entropy(eps):
    prior = torch.eye(3, dtype=torch.float64)[[0, 2]]
    logits = LOGITS.clone().requires_grad_()
    out = dpm_loss(logits, prior, divergence="kl_r_q", eps=eps)
    out.sum().backward()
    expected = torch.nn.functional.cross_entropy(LOGITS, torch.tensor([0, 2]), reduction="none")
    torch.testing.assert_close(out.detach(), expected, atol=1e-6, rtol=0)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients(divergence, detach):
    logits = LOGITS.clone().requires_grad_()
    loss = dpm_loss(logits, PRIOR, divergence=divergence, detach_posterior=detach)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    if detach:
        log_r = batch_posterior(torch.log_softmax(LOGITS, -1), PRIOR)
        fixed = posterior_divergence(torch.log_softmax(logits, -1), log_r, divergence=divergence)
        torch.testing.assert_close(grad, torch.autograd.grad(fixed.sum(), logits)[0])
    else:
        assert torch.autograd.gradcheck(lambda z: dpm_loss(z, PRIOR, divergence=divergence), logits)
        other = dpm_loss(logits, PRIOR, divergence=divergence, detach_posterior=True)
        assert not torch.allclose(grad, torch.autograd.grad(other.sum(), logits)[0])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_rows_leave_no_trace(divergence):
    logits = torch.cat([LOGITS, torch.tensor([[math.nan, math.inf, 0]], dtype=torch.float64)])[[0, 2, 1]]
    prior = torch.cat([PRIOR, torch.full((1, 3), math.nan, dtype=torch.float64)])[[0, 2, 1]]
    logits.requires_grad_()
    out = dpm_loss(logits, prior, divergence=divergence, mask=torch.tensor([1, 0, 1]))
    torch.testing.assert_close(out[[0, 2]], dpm_loss(LOGITS, PRIOR, divergence=divergence))
    out.sum().backward()
    assert out[1] == 0 and torch.isfinite(logits.grad).all() and (logits.grad[1] == 0).all()
    empty = dpm_loss(logits, prior, divergence=divergence, mask=torch.zeros(3))
    (grad,) = torch.autograd.grad(empty.sum(), logits)
    assert (empty == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_extremes(divergence, dtype):
    logits = torch.tensor([[1e4, 0, -1e4], [-1e4, 1e4, 0], [5, 5, 5]], dtype=dtype, requires_grad=True)
    prior = torch.tensor([[0, 1, 0], [1, 0, 0], [0.2, 0.3, 0.5]], dtype=torch.float32)
    for eps in (1e-9, 0.0) if divergence != "kl_q_r" else (1e-9,):
        out = dpm_loss(logits, prior, divergence=divergence, eps=eps)
        (grad,) = torch.autograd.grad(out.sum(), logits)
        assert torch.isfinite(out).all() and torch.isfinite(grad).all()
        assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_given_mass_is_the_batch_s_own_in_two_passes():
    log_q = torch.log_softmax(LOGITS, -1)
    mass = batch_log_mass(log_q)
    torch.testing.assert_close(mass, log_q.exp().sum(0).log())
    whole = batch_posterior(log_q, PRIOR)
    for i in range(2):
        torch.testing.assert_close(batch_posterior(log_q[i : i + 1], PRIOR[i : i + 1], log_mass=mass), whole[i : i + 1])


def test_preference_score_puts_the_bad_class_last():
    log_q = torch.log_softmax(torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]), -1)
    scores = preference_score(log_q, weights=torch.tensor([0.0, 0.0, -1.0]))
    torch.testing.assert_close(scores, -log_q.exp()[:, 2])
    assert scores[0] > scores[1]


@pytest.mark.parametrize(
    "change",
    [{"divergence": "kl"}, {"eps": 0.0}, {"eps": -1.0}, {"prior": PRIOR + 1}, {"prior": PRIOR[:1]}, {"mask": [1.0]}],
)
def test_bad_arguments(change):
    arguments = {"prior": PRIOR, "divergence": "kl_q_r", **change}
    if "mask" in arguments:
        arguments["mask"] = torch.tensor(arguments["mask"])
    with pytest.raises(ValueError):
        dpm_loss(LOGITS, arguments.pop("prior"), **arguments)
