"""Votes of annotators, and how well a classifier says what they say."""

from __future__ import annotations

import torch
from torch import Tensor

from rayalign.types import Metrics

BINS = 10  # of the calibration error, over confidences from 0 to 1
GAP = "calibration/gap_"
VOTED = "votes/share"  # of rows with a vote: metrics that compare with votes are means over these
COMPARED = ("nll", "accuracy")


def vote_shares(counts: Tensor, *, majority: bool = False) -> Tensor:
    """What to draw a classifier to: [B, L] → [B, L], rows sum to 1; uniform where nobody has voted.

    Args:
        majority: all on the class with most votes, shared by classes that have as many.
    """
    if majority:
        counts = (counts == counts.amax(-1, keepdim=True)).to(counts.dtype)
    counts = torch.where(counts.sum(-1, keepdim=True) == 0, torch.ones_like(counts), counts)
    return counts / counts.sum(-1, keepdim=True)


def agreement(log_q: Tensor) -> Tensor:
    """That two draws from a distribution are of one class: 1 where all agree, 1/L at the least. [..., L] → [...]"""
    return log_q.exp().square().sum(-1)


def entropy(log_q: Tensor) -> Tensor:
    """Nats, [..., L] → [...]."""
    return -(log_q.exp() * log_q.clamp(min=-1e4)).sum(-1)


def measured(log_q: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Numbers of each row, [B]; those that compare with votes are 0 where there is none, see `of_voted`.

    nll: of a vote, mean over the row's. accuracy: whether the likeliest class is one with most votes. Calibration:
    the gap of a bin is the share of votes for the likeliest class, minus the probability that it was given.
    """
    shares, voted = vote_shares(counts), (counts.sum(-1) > 0).to(log_q.dtype)
    confidence, top = log_q.exp().max(-1)

    def at_top(x: Tensor) -> Tensor:
        return x.gather(-1, top.unsqueeze(-1)).squeeze(-1)

    place = (confidence * BINS).long().clamp(max=BINS - 1)
    gap = (at_top(shares) - confidence) * voted
    return {
        "nll": -(shares * log_q.clamp(min=-1e4)).sum(-1) * voted,
        "accuracy": (at_top(counts) == counts.amax(-1)).to(log_q.dtype) * voted,
        "entropy": entropy(log_q),
        "agreement": agreement(log_q),
        VOTED: voted,
        **{f"{GAP}{index}": gap * (place == index) for index in range(BINS)},
    }


def of_voted(metrics: Metrics) -> Metrics:
    """Means over all rows → those that compare with votes over the rows that have one."""
    share = metrics.get(VOTED, 0.0)
    return {
        name: value / share if share and (name in COMPARED or name.startswith(GAP)) else value
        for name, value in metrics.items()
        if share or not (name in COMPARED or name.startswith(GAP))
    }
