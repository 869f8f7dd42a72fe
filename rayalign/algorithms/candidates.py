"""K candidates of one prompt, ranked by a scorer: which of them count, and how far a policy ranks them alike."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from rayalign.algorithms.groups import scored
from rayalign.types import Group


def ranked(group: Group) -> tuple[list[int], tuple[float, ...], Counter[str]]:
    """Candidates best first, their ranks (0 for the best; equal scores, equal ranks), and what was left out, by reason.

    Left out are those without a finite score, or contested (`unscored`), and of candidates that are the same once
    stripped, or the same tokens, all but the best scored (`repeated`).
    """
    known = scored(group)
    left_out = Counter({"unscored": len(group.completions) - len(known)})
    order: list[int] = []
    seen: set[str | tuple[int, ...]] = set()
    for index in sorted(known, key=lambda i: -group.scores[i]):  # type: ignore[index]
        ways = {group.texts[index].strip(), group.completions[index].token_ids}
        if ways & seen:
            left_out["repeated"] += 1
        else:
            order.append(index)
            seen |= ways
    levels = sorted({group.scores[index] for index in order}, reverse=True)  # type: ignore[index]
    return order, tuple(float(levels.index(group.scores[index])) for index in order), left_out  # type: ignore[index]


def agreement(likelihood: Tensor, ranks: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """How far likelihood and scorer rank the candidates of a prompt alike. Three [B, K] → two [B].

    Args:
        likelihood: by which the policy would choose.
        ranks: the scorer's, 0 for the best.
        counted: bool, which candidates are there.

    Returns:
        Kendall's τ over the pairs that the scorer tells apart: (concordant − discordant) / pairs, equal likelihoods
        counting as neither, 0 where there is no pair; and 1 where the likeliest candidate is one of the scorer's
        best, else 0.
    """
    pairs = (ranks.unsqueeze(2) < ranks.unsqueeze(1)) & counted.unsqueeze(2) & counted.unsqueeze(1)
    signs = torch.sign(likelihood.unsqueeze(2) - likelihood.unsqueeze(1))
    total = torch.where(pairs, signs, torch.zeros_like(signs)).sum((1, 2))
    likeliest = likelihood.masked_fill(~counted, -torch.inf).argmax(-1, keepdim=True)
    top = (ranks.gather(1, likeliest).squeeze(1) == 0).to(likelihood.dtype)
    return total / pairs.sum((1, 2)).clamp(min=1), top
