"""Policy-gradient losses (PPO, GRPO, GSPO), the weights that correct stale samples, and best-of-n's law.

B sequences, T tokens, A answers. Losses are unreduced and take no mask: `reduce.aggregate` masks them, and
what is not finite in a masked place stays in the loss there without a gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rayalign.maths._tensors import (
    clamped_exp,
    count,
    divide,
    keep,
    promote,
    require_dims,
    require_no_nan,
    require_non_negative,
    require_probability,
    require_same_shape,
)


def ppo_policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """−min(ρA, clip(ρ, 1−clip_low, 1+clip_high)·A), ρ = exp(logp − old_logp).

    With `dual_clip` c the objective is at least c·A where A < 0, so that one bad token with a large ratio
    cannot dominate. The exponent of ρ is clamped at 20.

    Args:
        logp: [B, T] log π of the sampled tokens; the gradient goes through this alone.
        old_logp: [B, T] of the policy that the ratio is taken to.
        advantage: [B, T].
        clip_low, clip_high: how far ρ may fall under and rise above 1; in [0, 1] and from 0 up.
        dual_clip: above 1, or None for without.

    Returns:
        loss [B, T], and bool flags [B, T]: the clipped branch of the min was the one taken. The dual clip
        is a bound of its own and sets no flag.

    Source: Schulman et al. 2017 (PPO) eq. 7; Ye et al. 2020 (dual clip) eq. 5; Yu et al. 2025 (DAPO) for
    two sides.

    Raises:
        ValueError: shapes that differ, a clip out of range, dual_clip not above 1.
    """
    require_same_shape(logp=logp, old_logp=old_logp, advantage=advantage)
    require_probability(clip_low=clip_low)
    require_non_negative(clip_high=clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be None or above 1, it is {dual_clip}")
    logp, old_logp, advantage = promote(logp, old_logp.detach(), advantage.detach())
    # A garbage advantage in a masked place must not reach the gradient: it is put back at the end.
    usable = torch.isfinite(advantage)
    safe = torch.where(usable, advantage, torch.zeros_like(advantage))
    ratio = clamped_exp(logp - old_logp)
    plain, clipped = ratio * safe, ratio.clamp(1 - clip_low, 1 + clip_high) * safe
    flags = clipped < plain
    objective = torch.where(flags, clipped, plain)
    if dual_clip is not None:
        bound = dual_clip * safe
        objective = torch.where((safe < 0) & (objective < bound), bound, objective)
    return torch.where(usable, -objective, torch.full_like(objective, math.nan)), flags & usable


def ppo_value_loss(value: Tensor, old_value: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """½·max((v−R)², (clip(v, old±clip)−R)²). Three [B, T] → [B, T]. An infinite clip is none.

    Source: Schulman et al. 2017, as in the released PPO code.

    Raises:
        ValueError: shapes that differ, a negative clip.
    """
    require_same_shape(value=value, old_value=old_value, returns=returns)
    require_non_negative(clip=clip)
    value, old_value, returns = promote(value, old_value.detach(), returns.detach())
    usable = torch.isfinite(value) & torch.isfinite(old_value) & torch.isfinite(returns)
    zero = torch.zeros_like(value)
    value, old_value, returns = (torch.where(usable, x, zero) for x in (value, old_value, returns))
    clipped = torch.minimum(torch.maximum(value, old_value - clip), old_value + clip)
    plain_error, clipped_error = (value - returns).square(), (clipped - returns).square()
    loss = torch.where(clipped_error > plain_error, clipped_error, plain_error) / 2
    return torch.where(usable, loss, torch.full_like(loss, math.nan))


def importance_weight(train_logp: Tensor, rollout_logp: Tensor, *, cap: float) -> Tensor:
    """min(exp(train − rollout), cap), detached: corrects engine-learner mismatch and staleness. [B, T] → [B, T].

    NaN where the rollout's log-prob is unknown (NaN): `where` it away before it multiplies a loss.

    Source: truncated importance sampling (Ionides 2008), between engine and learner as in Yao et al. 2025.

    Raises:
        ValueError: shapes that differ, cap not above 0.
    """
    require_same_shape(train_logp=train_logp, rollout_logp=rollout_logp)
    if not cap > 0:
        raise ValueError(f"cap must be above 0, it is {cap}")
    train_logp, rollout_logp = promote(train_logp.detach(), rollout_logp.detach())
    return clamped_exp(train_logp - rollout_logp).clamp(max=cap)


def sequence_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """exp of the mean log-ratio a token. Three [B, T] → [B]; 1 (a mean of 0) for an empty sequence.

    Source: Zheng et al. 2025 (GSPO) eq. 7.

    Raises:
        ValueError: shapes that differ.
    """
    require_dims(2, logp=logp)
    require_same_shape(logp=logp, old_logp=old_logp, mask=mask)
    logp, old_logp = promote(logp, old_logp)
    return clamped_exp(divide(keep(logp - old_logp, mask).sum(-1), count(mask, -1)))


def best_of_n_kl(n: int) -> float:
    """log n − (n−1)/n: the bound on KL(best of n ‖ one sample) that is reported for rejection sampling, in nats.

    Source: Stiennon et al. 2020, appendix G.3; a bound, not the value (Beirami et al. 2024).

    Raises:
        ValueError: n under 1.
    """
    _check_n(n)
    return math.log(n) - (n - 1) / n


def best_of_n_distribution(prob: Tensor, score: Tensor, n: int) -> Tensor:
    """The exact law of the best of n independent draws, ties going to the first drawn. [A], [A] → [A].

    P(best has score s) = F(s)ⁿ − F(s−)ⁿ with F the cumulated probability by score; among answers of one
    score it is shared in proportion to their probability.

    Args:
        prob: [A] of each answer, summing to 1.
        score: [A] of each answer.
        n: draws, 1 or more.

    Source: Beirami et al. 2024, lemma 1, with ties.

    Raises:
        ValueError: n under 1, probabilities outside [0, 1] or not summing to 1, NaN scores, shapes that differ.
    """
    _check_n(n)
    require_dims(1, prob=prob, score=score)
    require_same_shape(prob=prob, score=score)
    require_probability(prob=prob)
    require_no_nan(score=score)
    (prob,) = promote(prob)
    if abs(float(prob.sum()) - 1) > 1e-4:
        raise ValueError(f"prob must sum to 1, it sums to {float(prob.sum())}")
    zero = torch.zeros((), dtype=prob.dtype, device=prob.device)
    below = torch.where(score.unsqueeze(0) < score.unsqueeze(1), prob, zero).sum(-1)
    level = torch.where(score.unsqueeze(0) == score.unsqueeze(1), prob, zero).sum(-1)
    return divide((below + level) ** n - below**n, level) * prob


def _check_n(n: int) -> None:
    if int(n) != n or n < 1:
        raise ValueError(f"n must be a whole number of 1 or more, it is {n}")
