"""AI and rule feedback: from a judge's log-probs and from scores to labels, pairs and votes.

B prompts, K candidates, S score tokens. Higher scores are better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayalign.maths._tensors import (
    promote,
    require_dims,
    require_finite,
    require_no_nan,
    require_probability,
    require_same_shape,
)


def debiased_preference(p_first: Tensor, p_first_swapped: Tensor) -> Tensor:
    """P(a ≻ b) = ½(p_first + 1 − p_first_swapped): the mean over both orders of showing. [B], [B] → [B].

    Args:
        p_first: [B] P(the judge picks the first shown), a shown first: softmax over the two answer tokens.
        p_first_swapped: [B] the same with b shown first.

    Source: Lee et al. 2023 (RLAIF), position bias.

    Raises:
        ValueError: a probability outside [0, 1], shapes that differ.
    """
    require_same_shape(p_first=p_first, p_first_swapped=p_first_swapped)
    require_probability(p_first=p_first, p_first_swapped=p_first_swapped)
    p_first, p_first_swapped = promote(p_first, p_first_swapped)
    return (p_first + (1 - p_first_swapped)) / 2


def expected_score(logps: Tensor, values: Tensor, *, low: float, high: float) -> Tensor:
    """Expectation of the score under softmax over the score tokens, scaled from [low, high] to [−1, 1].

    Args:
        logps: [B, S] log-probs (or logits) of the score tokens; −inf for one that the judge cannot say.
        values: [S] the score that each token stands for, within [low, high].

    Returns:
        [B] in [−1, 1].

    Source: Lee et al. 2023 (direct RLAIF).

    Raises:
        ValueError: low not below high, values outside them, shapes that do not fit, a row without any
            finite log-prob.
    """
    require_dims(2, logps=logps)
    require_finite(low=low, high=high)
    if not low < high:
        raise ValueError(f"low must be below high, they are {low} and {high}")
    if values.shape != logps.shape[1:]:
        raise ValueError(f"values {tuple(values.shape)} do not fit logps {tuple(logps.shape)}")
    logps, values = promote(logps, values)
    if not bool((values.ge(low) & values.le(high)).all()):
        raise ValueError(f"values must lie in [{low}, {high}], they are {values.tolist()}")
    probs = torch.softmax(logps, -1)
    unreadable = torch.isnan(probs).any(-1)
    if bool(unreadable.any()):
        raise ValueError(f"logps row {int(unreadable.nonzero()[0])} has no finite log-prob, or one that is NaN or inf")
    scaled = (values - low) * (2 / (high - low)) - 1
    return (probs * scaled).sum(-1).clamp(-1, 1)


def best_worst_pair(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The best and the worst of K candidates; the first index wins ties. [B, K] → [B, 2] (best, worst), keep [B].

    `keep` is False where all scores are equal: there is nothing to learn from such a prompt.

    Raises:
        ValueError: scores that are not [B, K] with K ≥ 1, or NaN.
    """
    _check_scores(scores)
    best, worst = scores.argmax(-1), scores.argmin(-1)
    return torch.stack([best, worst], -1), scores.amax(-1) > scores.amin(-1)


def all_pairs(scores: Tensor) -> Tensor:
    """Every pair of one prompt's candidates with different scores: [B, K] → [N, 3] (example, better, worse).

    Example by example, and within one in the order (0,1), (0,2), …, (1,2), …; ties are dropped. Four
    different scores give six pairs.

    Raises:
        ValueError: scores that are not [B, K] with K ≥ 1, or NaN.
    """
    _check_scores(scores)
    batch, k = scores.shape
    first, second = torch.triu_indices(k, k, offset=1, device=scores.device)
    ahead, behind = scores[:, first] > scores[:, second], scores[:, first] < scores[:, second]
    better, worse = torch.where(ahead, first, second), torch.where(ahead, second, first)
    example = torch.arange(batch, device=scores.device).unsqueeze(-1).expand_as(better)
    return torch.stack([example, better, worse], -1)[ahead | behind]


def annotate_pairs(r1: Tensor, r2: Tensor, generator: torch.Generator | None) -> Tensor:
    """A Bradley-Terry annotator: True (the first is preferred) with probability σ(r1 − r2). [B], [B] → bool [B].

    Raises:
        ValueError: shapes that differ, NaN.
    """
    require_same_shape(r1=r1, r2=r2)
    r1, r2 = promote(r1, r2)
    probs = torch.sigmoid(r1 - r2)
    require_no_nan(**{"r1 - r2": probs})
    return _uniform(probs, generator) < probs


def flip_votes(choice: Tensor, prob: float, generator: torch.Generator | None) -> Tensor:
    """A noisy annotator: each vote is turned round with this probability. bool [B] → bool [B].

    Raises:
        ValueError: prob outside [0, 1], votes of a floating dtype.
    """
    require_probability(prob=prob)
    if choice.is_floating_point():
        raise ValueError(f"choice must be bool, it is {choice.dtype}")
    shape = torch.zeros(choice.shape, dtype=torch.float64, device=choice.device)
    return choice.bool() ^ (_uniform(shape, generator) < prob)


def _check_scores(scores: Tensor) -> None:
    require_dims(2, scores=scores)
    require_no_nan(scores=scores)
    if scores.shape[1] == 0:
        raise ValueError("scores must hold at least one candidate a prompt")


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform in [0, 1), drawn on the generator's own device."""
    device = like.device if generator is None else generator.device
    return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=device).to(like.device)
