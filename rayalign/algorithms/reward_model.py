"""Reward models: a language model with a scalar head learns which answers people prefer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from rayalign.algorithms.base import Offline
from rayalign.algorithms.groups import distinct, paired, place_of, row
from rayalign.algorithms.reward_losses import AnyRewardLoss, BradleyTerry, Ranked
from rayalign.errors import DataError
from rayalign.types import Batch, Column, Example, Group, Metrics, Terms

BINS = 10  # of the calibration error, over confidences from ½ to 1
GAP = "calibration/gap_"


class RewardModel(Offline):
    """A reward model: a scalar head on a language model, trained on pairs, ranked answers or choices.

    The losses do not know the scores' mean, so that it drifts; `center_weight` holds it near 0. It adds
    center_weight·(2·mean score of the example's answers)², which of a pair is center_weight·(r_w + r_l)².
    """

    paper: ClassVar = "Ouyang et al. 2022, arXiv:2203.02155; centred scores, Eisenstein et al. 2023, arXiv:2312.09244"
    rows: ClassVar = ("pair", "ranked")
    network: ClassVar = "score"
    columns: ClassVar = (Column.VALUES,)
    name: Literal["reward_model"] = "reward_model"
    reward_loss: AnyRewardLoss = Field(BradleyTerry(), alias="loss", description="the loss of one comparison")
    pairs: Literal["best_worst", "all"] = Field("all", description="which pairs of ranked answers bradley_terry takes")
    center_weight: float = Field(0.01, ge=0, description="strength with which scores are centred at 0; 0: not at all")

    def examples(self, groups: Sequence[Group]) -> tuple[list[Example], Metrics]:
        """Pairs, or all answers of a prompt, the best first.

        Dropped and counted are ties, the same answer again, scores that are not finite, and for best_of_choice
        prompts without a single best answer.

        Raises:
            DataError: margins are to come from the data, and a row has none.
        """
        if self.reward_loss.takes == "pairs":  # type: ignore[attr-defined]
            pairs, metrics = paired(groups, self.pairs)
            return [self._example(group, (i, j), (0.0, 1.0)) for group, i, j in pairs], metrics
        examples, kept, dropped = [], 0, 0
        for group in groups:
            order = distinct(group)
            ranks = self._ranks([group.scores[index] for index in order])
            used = len(order) if ranks else 0
            examples += [self._example(group, order, ranks)] if ranks else []
            kept, dropped = kept + used, dropped + len(group.completions) - used
        return examples, {"answers/kept": float(kept), "answers/dropped": float(dropped)}

    def _ranks(self, scores: Sequence[float]) -> tuple[float, ...]:
        """Of scores in falling order: 0 for the best, equal ones alike. Empty where there is nothing to learn."""
        levels = sorted(set(scores), reverse=True)
        if len(levels) < 2:
            return ()
        if self.reward_loss.takes != "choice":  # type: ignore[attr-defined]
            return tuple(float(levels.index(score)) for score in scores)
        return (0.0, *[1.0] * (len(scores) - 1)) if scores[1] < scores[0] else ()

    def _example(self, group: Group, order: Sequence[int], ranks: tuple[float, ...]) -> Example:
        values: dict[str, float | tuple[float, ...]] = {"ranks": ranks}
        if getattr(self.reward_loss, "margin", None) == "column":
            values["margin"] = _margin(group)
        return Example(tuple(row(group, index) for index in order), values)

    def loss(self, batch: Batch, columns: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> Terms:
        scores, ranks = batch.by_example(last_value(columns["policy/values"], batch.mask)), batch.values["ranks"]
        loss = self.reward_loss.of(Ranked(scores, ranks, batch.values))  # type: ignore[attr-defined]
        if self.center_weight:
            loss = loss + self.center_weight * (2 * scores.mean(-1)).square()
        return Terms(loss, _metrics(scores.detach(), ranks))

    def summarise(self, metrics: Metrics) -> Metrics:
        """Means over all examples → what cannot be a mean: the expected calibration error, for its bins."""
        gaps = [value for name, value in metrics.items() if name.startswith(GAP)]
        rest = {name: value for name, value in metrics.items() if not name.startswith(GAP)}
        return rest | ({"calibration/ece": sum(map(abs, gaps))} if gaps else {})


def last_value(values: Tensor, mask: Tensor) -> Tensor:
    """A sequence's score: the value at its last completion token. [R, T], [R, T] → [R]."""
    last = (mask != 0).sum(-1).clamp(min=1) - 1
    return values.gather(1, last.unsqueeze(1)).squeeze(1)


def _metrics(scores: Tensor, ranks: Tensor) -> dict[str, Tensor]:
    """Means over the ranked pairs of each example, so that prompts weigh the same: [B] each.

    Calibration reads σ(r_w − r_l) as the probability that the better answer is preferred. The gap of a bin is
    accuracy minus confidence, summed over the example's pairs in it and divided by all its pairs.
    """
    pairs = ranks.unsqueeze(2) < ranks.unsqueeze(1)  # [B, i better, j worse]
    share = pairs / pairs.sum((1, 2), keepdim=True)
    lead = scores.unsqueeze(2) - scores.unsqueeze(1)

    def mean(x: Tensor) -> Tensor:
        return torch.where(pairs, x * share, 0.0).sum((1, 2))

    right = (lead > 0).to(scores.dtype) + 0.5 * (lead == 0)
    confidence = torch.sigmoid(lead.abs())
    place = ((confidence - 0.5) * (2 * BINS)).long().clamp(max=BINS - 1)
    return {
        "rewards/accuracies": mean(right),
        "rewards/margins": mean(lead),
        "rewards/mean": scores.mean(-1),
        "rewards/std": scores.std(-1),
        "calibration/nll": mean(-logsigmoid(lead)),
        "calibration/brier": mean(torch.sigmoid(-lead).square()),
        **{f"{GAP}{index}": mean((right - confidence) * (place == index)) for index in range(BINS)},
    }


def _margin(group: Group) -> float:
    margin = group.prompt.extra.get("margin")
    if not isinstance(margin, int | float) or isinstance(margin, bool) or not float("-inf") < margin < float("inf"):
        raise DataError(
            "a pair has no margin",
            where=place_of(group),
            value="no margin" if margin is None else margin,
            rule="a finite number in the column margin of each row, with loss.margin: column",
            remedy="add the column, or set algorithm.loss.margin to a number",
        )
    return float(margin)
