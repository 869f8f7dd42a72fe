"""From scores, KL and values to advantages.

B sequences (or prompts), T tokens, K answers of one prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayalign.maths._tensors import (
    count,
    divide,
    keep,
    promote,
    require_dims,
    require_finite,
    require_non_negative,
    require_positive,
    require_probability,
    require_same_shape,
)


def token_rewards(score: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """−kl_coef·kl at each token, plus the score at the last one that counts. → [B, T], 0 where masked.

    Args:
        score: [B]; of a sequence with no token it goes nowhere.
        kl: [B, T] nats, usually k1 of policy and reference.
        mask: [B, T].

    Source: Ziegler et al. 2019 eq. 2; Ouyang et al. 2022 eq. 2.

    Raises:
        ValueError: kl_coef not finite, shapes that do not fit.
    """
    require_finite(kl_coef=kl_coef)
    require_dims(2, kl=kl)
    require_same_shape(kl=kl, mask=mask)
    if score.shape != kl.shape[:1]:
        raise ValueError(f"score {tuple(score.shape)} does not fit kl {tuple(kl.shape)}")
    score, kl = promote(score, kl)
    counted = mask != 0
    # The last token is the one after which nothing counts.
    following = counted.flip(-1).cumsum(-1).flip(-1)
    last = counted & (following == 1)
    zero = torch.zeros_like(kl)
    return torch.where(counted, -kl_coef * kl, zero) + torch.where(last, score.unsqueeze(-1), zero)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float, last_value: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns, without gradient.

    Masked holes inside a sequence (the text of a tool, say) are skipped over: the next counted token
    follows the last counted one.

    Args:
        rewards: [B, T].
        values: [B, T], of the state before each token.
        mask: [B, T].
        gamma, lam: in [0, 1].
        last_value: [B], what follows the last counted token (0 for an answer that ended); 0 when None.

    Returns:
        advantages [B, T] and returns (advantages + values) [B, T], both 0 where masked.

    Source: Schulman et al. 2016 eq. 16.

    Raises:
        ValueError: gamma or lam outside [0, 1], shapes that do not fit.
    """
    require_probability(gamma=gamma, lam=lam)
    require_dims(2, rewards=rewards)
    require_same_shape(rewards=rewards, values=values, mask=mask)
    if last_value is not None and last_value.shape != rewards.shape[:1]:
        raise ValueError(f"last_value {tuple(last_value.shape)} does not fit rewards {tuple(rewards.shape)}")
    rewards, values = promote(rewards.detach(), values.detach())
    counted = mask != 0
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    following = rewards.new_zeros(rewards.shape[:1])
    next_value = following.clone() if last_value is None else last_value.detach().to(values.dtype)
    for t in range(rewards.shape[1] - 1, -1, -1):
        here = counted[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(here, delta + gamma * lam * following, following)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = torch.where(here, following, advantages[:, t])
        returns[:, t] = torch.where(here, following + values[:, t], returns[:, t])
    return advantages, returns


def group_advantage(scores: Tensor, *, scale: str, mask: Tensor | None = None) -> Tensor:
    """Scores against the mean of their own prompt. [B, K] → [B, K], 0 where masked.

    Args:
        scores: [B, K].
        scale: "std": (s − mean)/(std + 1e-6), std with n−1 (GRPO); "none": s − mean (Dr. GRPO).
        mask: [B, K], for groups of unequal size.

    Returns:
        Exactly 0 for a group whose scores are all equal, or that has one. NaN for one with a NaN among what counts.

    Source: Shao et al. 2024 (GRPO) section 4.1.2; Liu et al. 2025 (Dr. GRPO) section 3.2.

    Raises:
        ValueError: an unknown scale, shapes that differ.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"scale must be 'std' or 'none', it is {scale!r}")
    require_dims(2, scores=scores)
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask != 0
    require_same_shape(scores=scores, mask=mask)
    centred, sizes = _centred(scores, mask)
    if scale == "none":
        return centred
    var = divide(centred.square().sum(-1, keepdim=True), (sizes - 1).clamp(min=0))
    spread = ~(var <= 0)  # a NaN is no group of equal scores, and has to be seen
    std = torch.where(spread, var, torch.ones_like(var)).sqrt()  # sqrt has no gradient at 0
    return torch.where(spread, centred / (std + 1e-6), torch.zeros_like(centred))


def leave_one_out_advantage(scores: Tensor) -> Tensor:
    """s_i − mean of the other scores of its prompt. [B, K] → [B, K]; exactly 0 where all are equal.

    Source: Kool et al. 2019; Ahmadian et al. 2024 (RLOO) eq. 8.

    Raises:
        ValueError: scores that are not [B, K] with K of 2 or more.
    """
    require_dims(2, scores=scores)
    k = scores.shape[1]
    if k < 2:
        raise ValueError(f"scores must hold 2 or more answers a prompt, they hold {k}")
    centred, _ = _centred(scores, torch.ones_like(scores, dtype=torch.bool))
    return centred * (k / (k - 1))


class AdaptiveKL:
    """A KL coefficient that follows a target: coef ← coef·(1 + clip(kl/target − 1, ±0.2)·n/horizon).

    Args:
        init: the first coefficient, 0 or more.
        target: the KL aimed at, nats a sequence, above 0.
        horizon: in samples, above 0.

    Attributes:
        coef: the coefficient of now.

    Source: Ziegler et al. 2019 section 2.2.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, init: float, *, target: float, horizon: float):
        require_non_negative(init=init)
        require_finite(init=init)
        require_positive(target=target, horizon=horizon)
        self.coef, self.target, self.horizon = float(init), float(target), float(horizon)

    def update(self, kl: float, n: int) -> float:
        """Take in the mean KL (nats a sequence) of n samples, and give the new coefficient.

        Raises:
            ValueError: a kl that is not finite, a negative n.
        """
        require_finite(kl=float(kl))
        require_non_negative(n=n)
        error = min(max(float(kl) / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * n / self.horizon
        return self.coef


def _centred(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """s − mean over what counts, 0 elsewhere and in groups of equal scores; and the group sizes [B, 1]."""
    (scores,) = promote(scores)
    sizes = count(mask, -1).unsqueeze(-1)
    mean = divide(keep(scores, mask).sum(-1, keepdim=True), sizes)
    high = scores.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    low = scores.masked_fill(~mask, torch.inf).amin(-1, keepdim=True)
    # The mean of equal numbers may be off by a rounding, which a division by std would blow up. A NaN is not equal.
    return torch.where(mask & ~(high <= low), scores - mean, torch.zeros_like(scores)), sizes
