"""Rewards that are rules: no model, always the same answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from rayalign.scorers.base import ScoreFunction, ScorerConfig
from rayalign.types import Group


def _vader() -> Callable[[str], float]:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda text: analyzer.polarity_scores(text)["compound"]


def _brevity() -> Callable[[str], float]:
    return lambda text: -float(len(text.split()))


RULES: dict[str, Callable[[], Callable[[str], float]]] = {"vader": _vader, "brevity": _brevity}


class Rules(ScorerConfig):
    """A rule on the completion's text: no model, always the same answer.

    `vader`: the compound sentiment of Hutto and Gilbert 2014, from −1 to 1.
    `brevity`: minus the number of words.
    """

    paper: ClassVar = "Hutto and Gilbert 2014, ICWSM (vader)"
    name: Literal["rules"] = "rules"
    rule: Literal["vader", "brevity"] = Field(
        description="vader: sentiment from −1 to 1; brevity: minus the number of words"
    )

    def start(self) -> ScoreFunction:
        score = RULES[self.rule]()

        def score_groups(groups: Sequence[Group]) -> list[list[float]]:
            return [[score(text) for text in group.texts] for group in groups]

        return score_groups
