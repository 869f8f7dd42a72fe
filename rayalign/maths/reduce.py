"""The one place where losses become a scalar, and the masked statistics that whitening needs.

A denominator may be global: the count over all ranks and micro-batches of a step. Then the sum of the
parts is the loss of one big batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rayalign.maths._collectives import sum_over_ranks
from rayalign.maths._tensors import (
    count,
    divide,
    keep,
    promote,
    require_dims,
    require_non_negative,
    require_positive,
    require_same_shape,
)

MODES = ("token_mean", "sequence_mean", "sequence_sum_mean", "constant")


def masked_mean(x: Tensor, mask: Tensor, *, denominator: float | Tensor | None = None) -> Tensor:
    """Σ x·mask / (denominator or Σ mask), over all elements; 0 with zero gradient when that is 0.

    Args:
        x: any shape.
        mask: the shape of x, 1 = counts.
        denominator: a count that replaces this tensor's own, for instance that of all ranks.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes that differ, a negative denominator.
    """
    require_same_shape(x=x, mask=mask)
    (x,) = promote(x)
    _check_denominator(denominator)
    return divide(keep(x, mask).sum(), count(mask) if denominator is None else denominator)


def masked_var(x: Tensor, mask: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Population variance (divide by n) of what the mask keeps; 0 when that is nothing.

    Args:
        x: any shape; ranks may hold different shapes.
        mask: the shape of x.
        group: the variance is over the elements of all its ranks.

    Returns:
        A scalar, the same on every rank.

    Raises:
        ValueError: shapes that differ.
    """
    require_same_shape(x=x, mask=mask)
    (x,) = promote(x)
    return _mean_and_var(x, mask, group)[1].to(x.dtype)


def whiten(
    x: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8, group: dist.ProcessGroup | None = None
) -> Tensor:
    """(x − μ)/sqrt(σ² + eps) with masked μ and σ²; μ is added back when `shift_mean` is False.

    Args:
        x: any shape; ranks may hold different shapes.
        mask: the shape of x.
        group: μ and σ² are over all its ranks.

    Returns:
        The shape of x, 0 where masked.

    Raises:
        ValueError: shapes that differ, a negative eps.
    """
    require_same_shape(x=x, mask=mask)
    require_non_negative(eps=eps)
    (x,) = promote(x)
    mean, var = _mean_and_var(x, mask, group)
    safe = torch.where(mask != 0, x, torch.zeros_like(x))
    spread = var + eps
    std = torch.sqrt(torch.where(spread == 0, torch.ones_like(spread), spread))  # sqrt has no gradient at 0
    scaled = (safe - mean.to(x.dtype)) / std.to(x.dtype)
    if not shift_mean:
        scaled = scaled + mean.to(x.dtype)
    return torch.where(mask != 0, scaled, torch.zeros_like(scaled))


def aggregate(
    x: Tensor,
    mask: Tensor,
    *,
    mode: str,
    denominator: float | Tensor | None = None,
    length: float | None = None,
) -> Tensor:
    """Token losses → one scalar.

    Args:
        x: [B, T].
        mask: [B, T].
        mode: "token_mean": Σ / tokens; "sequence_mean": mean over sequences of their token means;
            "sequence_sum_mean": mean over sequences of their sums; "constant": Σ / (sequences · length)
            (Dr. GRPO, Liu et al. 2025, with length the longest allowed answer).
        denominator: the global count of tokens ("token_mean") or of non-empty sequences (the others)
            when it is not this batch's own.
        length: tokens, for "constant" alone.

    Returns:
        A scalar; 0 with zero gradient when nothing counts.

    Raises:
        ValueError: an unknown mode, "constant" without a length above 0, shapes that differ.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, it is {mode!r}")
    require_dims(2, x=x)
    require_same_shape(x=x, mask=mask)
    _check_denominator(denominator)
    scale = 1.0
    if mode == "constant":
        if length is None:
            raise ValueError("mode 'constant' needs a length")
        require_positive(length=length)
        scale = length
    (x,) = promote(x)
    sums = keep(x, mask).sum(-1)
    if mode == "token_mean":
        return divide(sums.sum(), count(mask) if denominator is None else denominator)
    sequences = (mask != 0).any(-1).sum() if denominator is None else denominator
    if mode == "sequence_mean":
        sums = divide(sums, count(mask, -1))
    return divide(sums.sum(), sequences) / scale


def _mean_and_var(x: Tensor, mask: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """In float64, so that equal float32 numbers come out with their own mean and no spread."""
    wide = x.double()
    elements = sum_over_ranks(count(mask), group)
    mean = divide(sum_over_ranks(keep(wide, mask).sum(), group), elements)
    safe = torch.where(mask != 0, wide, torch.zeros_like(wide))
    var = divide(sum_over_ranks(keep((safe - mean).square(), mask).sum(), group), elements)
    return mean, var


def _check_denominator(denominator: float | Tensor | None) -> None:
    if denominator is not None and not isinstance(denominator, Tensor):
        require_non_negative(denominator=denominator)
