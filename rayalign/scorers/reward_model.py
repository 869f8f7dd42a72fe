"""A reward model: a checkpoint with a scalar head, as training one here writes it, or anybody's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from rayalign.scorers.base import ScoreFunction
from rayalign.scorers.network import NetworkScorer, NetworkScores
from rayalign.types import Group


class RewardModelScorer(NetworkScorer):
    """A reward model (AutoModelForSequenceClassification with one label): the score of the last token.

    Prompt and answer become tokens by its own tokenizer, as those of a data set do in training, the token that ends
    an answer included: the score of a text is the one that the learner gave it. An answer that was cut is scored as
    if it had ended there. In bfloat16 the last product is one in float32. On a cluster with GPUs each of its actors
    takes one, unless `device: cpu`.
    """

    paper: ClassVar = "Ouyang et al. 2022, arXiv:2203.02155"
    name: Literal["reward_model"] = "reward_model"
    model: str = Field(
        description="folder of a checkpoint with one label, or a hub id", examples=["runs/reward/checkpoints/step-30"]
    )

    def start(self) -> ScoreFunction:
        numbers = NetworkScores(self)

        def score(groups: Sequence[Group]) -> list[list[float]]:
            return [scores[:, 0].tolist() for scores in numbers(groups)]

        return score
