"""Scorers that tests of online methods name by dotted path."""

from __future__ import annotations

from collections.abc import Sequence

from rayalign.scorers.base import ScoreFunction, ScorerConfig
from rayalign.types import Group, Judgement


class Contrary(ScorerConfig):
    """Scores by the share of tokens above a limit, and prefers the other answer of each pair."""

    name: str
    above: int = 100

    def start(self) -> ScoreFunction:
        def judge(group: Group) -> Judgement:
            scores = [sum(t > self.above for t in c.token_ids) / len(c.token_ids) for c in group.completions]
            matrix = [[0.5 + 0.45 * ((b > a) - (a > b)) for b in scores] for a in scores]
            return Judgement(tuple(scores), tuple(map(tuple, matrix)), {"judge/ties": 0.25})

        def score(groups: Sequence[Group]) -> list[Judgement]:
            return [judge(group) for group in groups]

        return score
