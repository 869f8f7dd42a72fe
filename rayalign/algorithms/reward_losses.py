"""Losses of a reward model, by name: `loss: {name: plackett_luce}`. The formulas are those of `maths.ranking`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor

from rayalign.maths import ranking as maths
from rayalign.record import Record
from rayalign.registry import Tagged

REWARD_LOSSES = {
    "bradley_terry": "rayalign.algorithms.reward_losses:BradleyTerry",
    "k_choose_2": "rayalign.algorithms.reward_losses:KChoose2",
    "best_of_choice": "rayalign.algorithms.reward_losses:BestOfChoice",
    "plackett_luce": "rayalign.algorithms.reward_losses:PlackettLuce",
}


@dataclass(frozen=True)
class Ranked:
    """K answers of each prompt and what the model says of them.

    Attributes:
        scores: [B, K] with gradient.
        ranks: [B, K] 0 for the best; a chosen answer has 0 and all others 1.
        values: name → [B]. `margin`: of a pair, where the loss takes it from the data.
    """

    scores: Tensor
    ranks: Tensor
    values: Mapping[str, Tensor] = field(default_factory=dict)


class RewardLoss(Record):
    """What the losses of a reward model share.

    Attributes:
        takes: "pairs", two answers an example; "all", every answer of a prompt; "choice", all, one of them the best.
    """

    takes: ClassVar[str] = "all"

    def of(self, ranked: Ranked) -> Tensor:
        """[B], unreduced."""
        raise TypeError(f"{type(self).__name__} defines no loss: give it an of(ranked)")


class BradleyTerry(RewardLoss):
    """The better answer of a pair gets the higher score, by a margin if asked."""

    paper: ClassVar = "Bradley and Terry 1952; the margin, Touvron et al. 2023, arXiv:2307.09288"
    takes: ClassVar = "pairs"
    name: Literal["bradley_terry"] = Field("bradley_terry", description="which loss")
    margin: float | Literal["column"] = Field(
        0.0, description="score by which the better answer should lead; column: each row's own, of its column margin"
    )

    def of(self, ranked: Ranked) -> Tensor:
        margin = ranked.values["margin"] if self.margin == "column" else self.margin
        return maths.bradley_terry_loss(ranked.scores[:, 0], ranked.scores[:, 1], margin=margin)


class KChoose2(RewardLoss):
    """All pairs of one prompt's ranked answers in one term, so that a prompt weighs the same whatever its K."""

    paper: ClassVar = "Ouyang et al. 2022, arXiv:2203.02155"
    name: Literal["k_choose_2"] = Field("k_choose_2", description="which loss")

    def of(self, ranked: Ranked) -> Tensor:
        return maths.k_choose_2_loss(ranked.scores, ranked.ranks, torch.ones_like(ranked.ranks))


class BestOfChoice(RewardLoss):
    """One answer was picked out of several: its probability under a softmax of the scores."""

    paper: ClassVar = "Ziegler et al. 2019, arXiv:1909.08593"
    takes: ClassVar = "choice"
    name: Literal["best_of_choice"] = Field("best_of_choice", description="which loss")

    def of(self, ranked: Ranked) -> Tensor:
        return maths.best_of_choice_loss(ranked.scores, ranked.ranks.argmin(-1), torch.ones_like(ranked.ranks))


class PlackettLuce(RewardLoss):
    """The whole ranking: the best answer among all, the next among the rest, and so on."""

    paper: ClassVar = "Plackett 1975; Luce 1959"
    name: Literal["plackett_luce"] = Field("plackett_luce", description="which loss")

    def of(self, ranked: Ranked) -> Tensor:
        return maths.plackett_luce_loss(ranked.scores, ranked.ranks, torch.ones_like(ranked.ranks))


AnyRewardLoss = Annotated[SerializeAsAny[Record], Tagged("loss", REWARD_LOSSES, "of", "bradley_terry")]
