"""Losses on pairs and single answers with a known sign: the DPO family, KTO, Cringe, mDPO and SPIN.

B examples. Log-probs are in nats and, unless an argument's name says `mean_`, sums over the answer's
tokens. Every loss is unreduced, one value an example. "gap" is always
h = (log π(y_w|x) − log π_ref(y_w|x)) − (log π(y_l|x) − log π_ref(y_l|x)).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rayalign.maths._tensors import (
    promote,
    require_dims,
    require_finite,
    require_non_negative,
    require_positive,
    require_probability,
    require_same_shape,
)
from rayalign.maths.cringe import binary_cringe_loss, cringe_token_loss, pairwise_cringe_gate
from rayalign.maths.kto import kto_loss, kto_pair_loss, kto_reference_point

__all__ = [
    "binary_cringe_loss",
    "cringe_token_loss",
    "dpo_loss",
    "hinge_loss",
    "ipo_loss",
    "kto_loss",
    "kto_pair_loss",
    "kto_reference_point",
    "log_ratio_gap",
    "mdpo_loss",
    "orpo_loss",
    "pairwise_cringe_gate",
    "psi_identity",
    "psi_logit",
    "psi_po_loss",
    "psi_utilities",
    "robust_dpo_loss",
    "simpo_loss",
    "slic_hf_loss",
    "soft_dpo_loss",
    "spin_loss",
]


def log_ratio_gap(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """h: by how much the policy prefers the chosen answer more than the reference does. Four [B] → [B], nats.

    Source: Rafailov et al. 2023 (DPO) eq. 7.

    Raises:
        ValueError: shapes that differ.
    """
    require_same_shape(
        policy_chosen=policy_chosen, policy_rejected=policy_rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = promote(
        policy_chosen, policy_rejected, ref_chosen, ref_rejected
    )
    return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)


def dpo_loss(gap: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """−(1−ε)·log σ(βh) − ε·log σ(−βh). [B] → [B], nats.

    Source: Rafailov et al. 2023 eq. 7; with ε > 0 conservative DPO (Mitchell 2023).

    Raises:
        ValueError: beta not above 0, label_smoothing outside [0, 1].
    """
    require_probability(label_smoothing=label_smoothing)
    win, lose = _log_sigmoids(gap, beta)
    return -(1 - label_smoothing) * win - label_smoothing * lose


def robust_dpo_loss(gap: Tensor, *, beta: float, flip_prob: float) -> Tensor:
    """[−(1−ε)·log σ(βh) + ε·log σ(−βh)]/(1−2ε): unbiased for DPO when labels are flipped with ε. [B] → [B].

    Source: Chowdhury et al. 2024 (rDPO) eq. 10.

    Raises:
        ValueError: beta not above 0, flip_prob outside [0, ½).
    """
    if not 0 <= flip_prob < 0.5:
        raise ValueError(f"flip_prob must lie in [0, 0.5), it is {flip_prob}")
    win, lose = _log_sigmoids(gap, beta)
    return (-(1 - flip_prob) * win + flip_prob * lose) / (1 - 2 * flip_prob)


def soft_dpo_loss(gap: Tensor, *, beta: float, prob_chosen: Tensor) -> Tensor:
    """−p·log σ(βh) − (1−p)·log σ(−βh), p = P(chosen ≻ rejected) from votes or a judge. [B], [B] → [B].

    Source: soft AI labels, Lee et al. 2023 (RLAIF), in the DPO loss.

    Raises:
        ValueError: beta not above 0, prob_chosen outside [0, 1], shapes that differ.
    """
    require_same_shape(gap=gap, prob_chosen=prob_chosen)
    require_probability(prob_chosen=prob_chosen)
    gap, prob_chosen = promote(gap, prob_chosen)
    win, lose = _log_sigmoids(gap, beta)
    return -prob_chosen * win - (1 - prob_chosen) * lose


def ipo_loss(gap: Tensor, *, tau: float) -> Tensor:
    """(h − 1/(2τ))². [B] → [B]. The gap is of sums of log-probs; of means it is another objective.

    Source: Azar et al. 2023 (ΨPO) eq. 17.

    Raises:
        ValueError: tau not above 0.
    """
    require_positive(tau=tau)
    (gap,) = promote(gap)
    return (gap - 1 / (2 * tau)).square()


def psi_po_loss(gap: Tensor, utility_gap: Tensor, *, tau: float) -> Tensor:
    """(h − u/τ)², u = u(y) − u(y′) with u(y) = E_{y′∼μ} Ψ(p*(y ≻ y′)). [B], [B] → [B].

    Source: Azar et al. 2023, the general ΨPO objective in the form of eq. 13.

    Raises:
        ValueError: tau not above 0, shapes that differ.
    """
    require_positive(tau=tau)
    require_same_shape(gap=gap, utility_gap=utility_gap)
    gap, utility_gap = promote(gap, utility_gap)
    return (gap - utility_gap / tau).square()


def psi_identity(p: Tensor) -> Tensor:
    """Ψ(p) = p (IPO's). Any shape.

    Source: Azar et al. 2023, section 5.

    Raises:
        ValueError: p outside [0, 1].
    """
    require_probability(p=p)
    return promote(p)[0]


def psi_logit(p: Tensor, *, eps: float) -> Tensor:
    """Ψ(p) = log(p/(1−p)), p clamped to [eps, 1−eps] (DPO's Ψ). Any shape.

    Source: Azar et al. 2023, section 4.2.

    Raises:
        ValueError: p outside [0, 1], eps outside (0, ½).
    """
    require_probability(p=p)
    if not 0 < eps < 0.5:
        raise ValueError(f"eps must lie in (0, 0.5), it is {eps}")
    (p,) = promote(p)
    # p and 1−p are clamped apart: in float32 a small eps would vanish from 1−eps, and 1−p become 0.
    return p.clamp(eps, 1 - eps).log() - (1 - p).clamp(eps, 1 - eps).log()


def psi_utilities(pref: Tensor, *, psi: Callable[[Tensor], Tensor]) -> Tensor:
    """u_i = mean over all j of Ψ(P(i ≻ j)), the answer against itself counting as ½. [B, K, K] → [B, K].

    With K = 2 and the identity, `psi_po_loss` of these is `ipo_loss` exactly.

    Args:
        pref: [B, K, K], pref[b, i, j] = P(i ≻ j); whatever the diagonal holds is not read.
        psi: maps a tensor of probabilities to one of the same shape, for instance `psi_identity`.

    Source: Azar et al. 2023, the inner expectation of eq. 6 over a uniform μ.

    Raises:
        ValueError: pref that is not [B, K, K] with K ≥ 1, or outside [0, 1] off the diagonal; a psi that
            cannot be called or changes the shape.
    """
    require_dims(3, pref=pref)
    if pref.shape[1] != pref.shape[2] or pref.shape[1] == 0:
        raise ValueError(f"pref must be [B, K, K] with K of 1 or more, its shape is {tuple(pref.shape)}")
    if not callable(psi):
        raise ValueError(f"psi must be a function of a tensor, it is {psi!r}")
    (pref,) = promote(pref)
    itself = torch.eye(pref.shape[1], dtype=torch.bool, device=pref.device)
    pref = torch.where(itself, torch.full_like(pref, 0.5), pref)
    require_probability(pref=pref)
    utilities = psi(pref)
    if utilities.shape != pref.shape:
        raise ValueError(f"psi must keep the shape {tuple(pref.shape)}, it gave {tuple(utilities.shape)}")
    return utilities.mean(-1)


def hinge_loss(gap: Tensor, *, beta: float) -> Tensor:
    """max(0, 1 − βh): SLiC on log-ratios. [B] → [B].

    Source: Zhao et al. 2023 (SLiC-HF), in the form of Liu et al. 2024 (RSO) eq. 10.

    Raises:
        ValueError: beta not above 0.
    """
    require_positive(beta=beta)
    (gap,) = promote(gap)
    return torch.relu(1 - beta * gap)


def slic_hf_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, policy_target: Tensor, *, delta: float, weight: float
) -> Tensor:
    """max(0, δ − log π(y_w) + log π(y_l)) − weight·log π(y_target), without a reference model. Three [B] → [B].

    The target is a reference output: gold text, or a sample of the model before alignment.

    Source: Zhao et al. 2023 (SLiC-HF) eq. 1.

    Raises:
        ValueError: delta or weight negative, shapes that differ.
    """
    require_non_negative(delta=delta, weight=weight)
    require_same_shape(policy_chosen=policy_chosen, policy_rejected=policy_rejected, policy_target=policy_target)
    chosen, rejected, target = promote(policy_chosen, policy_rejected, policy_target)
    return torch.relu(delta - chosen + rejected) - weight * target


def simpo_loss(mean_chosen: Tensor, mean_rejected: Tensor, *, beta: float, gamma: float) -> Tensor:
    """−log σ(β(m_w − m_l) − γ), m the mean log-prob a token. [B], [B] → [B].

    Source: Meng et al. 2024 (SimPO) eq. 6.

    Raises:
        ValueError: beta not above 0, gamma not finite, shapes that differ.
    """
    require_positive(beta=beta)
    require_finite(gamma=gamma)
    require_same_shape(mean_chosen=mean_chosen, mean_rejected=mean_rejected)
    chosen, rejected = promote(mean_chosen, mean_rejected)
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def orpo_loss(mean_chosen: Tensor, mean_rejected: Tensor, *, weight: float) -> Tensor:
    """−m_w − weight·log σ(logodds(m_w) − logodds(m_l)), logodds(m) = m − log(1−e^m). [B], [B] → [B].

    In the odds m is at most −(machine epsilon), so that a probability of 1 has finite odds.

    Source: Hong et al. 2024 (ORPO) eq. 6 and 7.

    Raises:
        ValueError: weight negative, shapes that differ.
    """
    require_non_negative(weight=weight)
    require_same_shape(mean_chosen=mean_chosen, mean_rejected=mean_rejected)
    chosen, rejected = promote(mean_chosen, mean_rejected)
    return -chosen - weight * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def mdpo_loss(gap: Tensor, image_gap: Tensor, chosen_ratio: Tensor, *, beta: float, anchor: float = 0.0) -> Tensor:
    """DPO(gap) + DPO(image_gap) − log σ(β·chosen_ratio − anchor). Three [B] → [B].

    Args:
        gap: [B] h between two answers to the same image.
        image_gap: [B] h of the same chosen answer under the image and under a corrupted one.
        chosen_ratio: [B] log π(y_w|x) − log π_ref(y_w|x).

    Source: Wang et al. 2024 (mDPO) eq. 4 to 6.

    Raises:
        ValueError: beta not above 0, anchor not finite, shapes that differ.
    """
    require_finite(anchor=anchor)
    require_same_shape(gap=gap, image_gap=image_gap, chosen_ratio=chosen_ratio)
    gap, image_gap, chosen_ratio = promote(gap, image_gap, chosen_ratio)
    anchored = -logsigmoid(beta * chosen_ratio - anchor)
    return dpo_loss(gap, beta=beta) + dpo_loss(image_gap, beta=beta) + anchored


def spin_loss(gap: Tensor, *, lam: float) -> Tensor:
    """−log σ(λh): chosen is the data's answer, rejected and reference the previous iterate's. [B] → [B].

    Source: Chen et al. 2024 (SPIN) eq. 4.7, with the logistic loss.

    Raises:
        ValueError: lam not above 0.
    """
    require_positive(lam=lam)
    (gap,) = promote(gap)
    return -logsigmoid(lam * gap)


def _log_sigmoids(gap: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    require_positive(beta=beta)
    (gap,) = promote(gap)
    return logsigmoid(beta * gap), logsigmoid(-beta * gap)


def _log_odds(mean_logp: Tensor) -> Tensor:
    """m − log(1−e^m). Near 0 by expm1, far below by log1p; each `where` keeps the other's branch finite."""
    m = mean_logp.clamp(max=-torch.finfo(mean_logp.dtype).eps)
    near = m > -math.log(2)
    log_complement = torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, m, -torch.ones_like(m)))),
        torch.log1p(-torch.exp(torch.where(near, -torch.ones_like(m), m))),
    )
    return m - log_complement
