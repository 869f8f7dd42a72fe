"""Answers that are each good or bad, alone: what KTO and binary Cringe learn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rayalign.types import Batch


@dataclass(frozen=True)
class Labels:
    """The labels of a micro-batch, and of the step that it belongs to.

    Attributes:
        good: [B] bool.
        share: [B] of the answers of a step, how many have this one's label.
    """

    good: Tensor
    share: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Labels:
        return cls(batch.values["good"] > 0, batch.values["share"])

    def means(self, name: str, x: Tensor) -> Mapping[str, Tensor]:
        """Metrics whose means over all answers are the means of x over the good ones, and over the bad ones.

        A label that no answer of the step has is left out: 1 − share is exactly 0 then.
        """
        found = {}
        for label, wanted in (("good", self.good), ("bad", ~self.good)):
            share = torch.where(wanted, self.share, 1 - self.share)
            if bool((share > 0).any()):
                found[f"{name}/{label}"] = torch.where(wanted, x / share, torch.zeros_like(x))
        return found


def values_of(good: bool, count: int, total: int, **more: float) -> dict[str, float]:
    """An example's values: its label, and how many of all have it.

    Args:
        count: of the step's answers those with this label.
        total: all of them.
    """
    return {"good": float(good), "share": count / total, **more}


def counts(found: int, good: int, dropped: int) -> dict[str, float]:
    """The metrics of a step's labels."""
    share = {"labels/good_share": good / found} if found else {}
    return {"labels/kept": float(found), "labels/dropped": float(dropped), **share}
