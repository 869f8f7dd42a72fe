"""Losses that rank: reward models from comparisons, and calibration of the policy by ranking.

B prompts, K candidates of one prompt. A lower rank is better. What the mask leaves out may be NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rayalign.maths._tensors import (
    divide,
    promote,
    require_dims,
    require_finite,
    require_non_negative,
    require_same_shape,
)

REDUCTIONS = ("pair_sum", "offset_mean")


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, *, margin: float | Tensor = 0.0) -> Tensor:
    """−log σ(r_w − r_l − margin). [B], [B] → [B], nats.

    Args:
        chosen: [B] reward of the better answer.
        rejected: [B] reward of the worse one.
        margin: one for all, or [B].

    Source: Bradley and Terry 1952; the margin, Touvron et al. 2023 (Llama 2) eq. 2.

    Raises:
        ValueError: shapes that differ, a margin that is not finite.
    """
    require_same_shape(chosen=chosen, rejected=rejected)
    chosen, rejected = promote(chosen, rejected)
    if isinstance(margin, Tensor) and margin.dim() > 0:
        require_same_shape(chosen=chosen, margin=margin)
        margin = margin.to(chosen.dtype)
    else:
        require_finite(margin=float(margin))
    return -logsigmoid(chosen - rejected - margin)


def k_choose_2_loss(scores: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """Mean over one prompt's pairs of different ranks of −log σ(r_better − r_worse). Three [B, K] → [B], nats.

    A prompt weighs the same whatever its K. One without such a pair gives 0 with zero gradient and has to
    leave the denominator of the mean over prompts: the reward model makes no example of it.

    Source: Ouyang et al. 2022 (InstructGPT) eq. 1.

    Raises:
        ValueError: shapes that differ or are not [B, K].
    """
    scores, counted = _check_candidates(scores, mask, ranks=ranks)
    pairs = _ranked_pairs(ranks, counted)
    losses = -logsigmoid(scores.unsqueeze(2) - scores.unsqueeze(1))
    losses = torch.where(pairs, losses, torch.zeros_like(losses))
    return divide(losses.sum((1, 2)), pairs.sum((1, 2)))


def best_of_choice_loss(scores: Tensor, choice: Tensor, mask: Tensor) -> Tensor:
    """−log softmax(scores)[choice]: one candidate was picked out of K. → [B], nats.

    Args:
        scores: [B, K].
        choice: [B] the index of the one that was picked, which must not be masked.
        mask: [B, K]; an empty row gives 0 with zero gradient, and its choice is not read.

    Source: Ziegler et al. 2019 eq. 1.

    Raises:
        ValueError: shapes that do not fit, a choice outside 0 … K−1 or of a masked candidate.
    """
    scores, counted = _check_candidates(scores, mask)
    if choice.shape != scores.shape[:1] or choice.is_floating_point():
        raise ValueError(f"choice must be integers [{scores.shape[0]}], it is {choice.dtype} {tuple(choice.shape)}")
    present = counted.any(-1)
    choice = torch.where(present, choice.long(), torch.zeros_like(choice, dtype=torch.long))
    if bool(((choice < 0) | (choice >= scores.shape[1])).any()):
        raise ValueError(f"choice must lie in 0 … {scores.shape[1] - 1}, it is {choice.tolist()}")
    if not bool((counted.gather(1, choice.unsqueeze(1)).squeeze(1) | ~present).all()):
        raise ValueError("choice points at a candidate that is masked")
    # An empty row keeps its zeros: log-softmax of nothing but −inf would be NaN.
    logits = scores.masked_fill(~counted & present.unsqueeze(1), -torch.inf)
    losses = -torch.log_softmax(logits, -1).gather(1, choice.unsqueeze(1)).squeeze(1)
    return torch.where(present, losses, torch.zeros_like(losses))


def plackett_luce_loss(scores: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """−Σ log of successive softmaxes: the best among all, the next among the rest, … Three [B, K] → [B], nats.

    Candidates of equal rank each compete with all that are not better (Breslow's treatment of ties).

    Source: Plackett 1975; Luce 1959.

    Raises:
        ValueError: shapes that differ or are not [B, K].
    """
    scores, counted = _check_candidates(scores, mask, ranks=ranks)
    # rivals[b, i, j]: j stands in the softmax out of which i is picked, itself included.
    rivals = (ranks.unsqueeze(1) >= ranks.unsqueeze(2)) & counted.unsqueeze(1)
    itself = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    rivals = torch.where(counted.unsqueeze(2), rivals, itself)
    fields = scores.unsqueeze(1).expand(rivals.shape).masked_fill(~rivals, -torch.inf)
    losses = torch.logsumexp(fields, -1) - scores
    return torch.where(counted, losses, torch.zeros_like(losses)).sum(-1)


def margin_ranking_loss(
    p: Tensor, *, margin: float, reduction: str, mask: Tensor | None = None, ranks: Tensor | None = None
) -> Tensor:
    """Σ_{i<j} max(0, p_j − p_i + margin·(j−i)) over candidates ordered best first. [B, K] → [B].

    Args:
        p: [B, K] mean log-prob or mean prob of each candidate, the best first.
        margin: between neighbours, 0 or more.
        reduction: "pair_sum", as written; "offset_mean": for each offset j−i the mean over its pairs,
            summed over the offsets (the released code).
        mask: [B, K] of the candidates that are there; the others form no pair, and positions still count them.
        ranks: [B, K] whole numbers from 0 for the best to at most K−1, in the place of positions: candidates of equal
            rank form no pair, and j−i is the difference of ranks; their order is free. None: the positions.

    Source: Wang et al. 2023 eq. 7; that ties form no pair is ours.

    Raises:
        ValueError: an unknown reduction, a negative margin, shapes that differ.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, it is {reduction!r}")
    require_non_negative(margin=margin)
    p, counted = _check_candidates(p, torch.ones_like(p, dtype=torch.bool) if mask is None else mask)
    total = p.sum(-1) * 0
    if ranks is not None:
        require_same_shape(p=p, ranks=ranks)
        return total + _ranked_margins(p, ranks, counted, margin, reduction)
    for offset in range(1, p.shape[1]):
        pairs = counted[:, offset:] & counted[:, :-offset]
        short = torch.relu(p[:, offset:] - p[:, :-offset] + margin * offset)
        sums = torch.where(pairs, short, torch.zeros_like(short)).sum(-1)
        total = total + (sums if reduction == "pair_sum" else divide(sums, pairs.sum(-1)))
    return total


def _ranked_margins(p: Tensor, ranks: Tensor, counted: Tensor, margin: float, reduction: str) -> Tensor:
    """[B] of `margin_ranking_loss`, by ranks."""
    offsets = (ranks.unsqueeze(1) - ranks.unsqueeze(2)).to(p.dtype)  # [b, i, j]: how much worse j is than i
    pairs = _ranked_pairs(ranks, counted)
    short = torch.relu(p.unsqueeze(1) - p.unsqueeze(2) + margin * offsets)
    short = torch.where(pairs, short, torch.zeros_like(short))
    if reduction == "pair_sum":
        return short.sum((1, 2))
    total = torch.zeros_like(short[:, 0, 0])
    for offset in range(1, p.shape[1]):
        alike = pairs & (offsets == offset)
        total = total + divide(torch.where(alike, short, torch.zeros_like(short)).sum((1, 2)), alike.sum((1, 2)))
    return total


def _check_candidates(scores: Tensor, mask: Tensor, **others: Tensor) -> tuple[Tensor, Tensor]:
    """The scores with 0 where masked, so that garbage there reaches neither value nor gradient; and the mask."""
    require_dims(2, scores=scores)
    require_same_shape(scores=scores, mask=mask, **others)
    (scores,) = promote(scores)
    counted = mask != 0
    return torch.where(counted, scores, torch.zeros_like(scores)), counted


def _ranked_pairs(ranks: Tensor, counted: Tensor) -> Tensor:
    """[B, K, K], true where i is better than j and both count."""
    return (ranks.unsqueeze(2) < ranks.unsqueeze(1)) & counted.unsqueeze(2) & counted.unsqueeze(1)
