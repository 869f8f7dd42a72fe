"""Scorers that tests of labelling and of rounds name by dotted path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rayalign.scorers.base import ScoreFunction, ScorerConfig
from rayalign.types import Group, Judgement


def share_above(token_ids: Sequence[int], above: int = 100) -> float:
    return sum(token > above for token in token_ids) / len(token_ids)


class Compare(ScorerConfig):
    """Compares answers by their tokens: P(i ≻ j) = ½ + half of the lead, and a metric of its own."""

    name: str

    def start(self) -> ScoreFunction:
        def judge(group: Group) -> Judgement:
            scores = [share_above(c.token_ids) for c in group.completions]
            matrix = tuple(tuple(0.5 + (a - b) / 2 for b in scores) for a in scores)
            return Judgement(tuple(scores), matrix, {"judge/asked": float(len(scores) ** 2)})

        return lambda groups: [judge(group) for group in groups]


class Fragile(ScorerConfig):
    """Scores tokens, writes down whom it was asked about, and cannot once when the file `broken` is there."""

    name: str
    log: str
    broken: str
    after: int = 4  # prompts that it scores before it breaks

    def start(self) -> ScoreFunction:
        def score(groups: Sequence[Group]) -> list[list[float]]:
            found = []
            for group in groups:
                asked = Path(self.log).read_text().split() if Path(self.log).exists() else []
                if Path(self.broken).exists() and len(asked) >= self.after:
                    raise ConnectionError("the judge is gone")
                with Path(self.log).open("a") as file:
                    file.write(f"{group.prompt.index}\n")
                found.append([share_above(c.token_ids) for c in group.completions])
            return found

        return score


class Refuses(ScorerConfig):
    """Rates tokens as a judge would, and says nothing of each n-th prompt."""

    name: str
    of: int

    def start(self) -> ScoreFunction:
        def judge(group: Group) -> Judgement:
            if group.prompt.index % self.of == 0:
                return Judgement((0.0,) * len(group.completions), None, {"judge/refused": 1.0})
            scores = tuple(0.5 + share_above(c.token_ids) for c in group.completions)
            return Judgement(scores, None, {"judge/refused": 0.0})

        return lambda groups: [judge(group) for group in groups]


class Length(ScorerConfig):
    """Likes answers of many characters: what a data set alone decides."""

    name: str

    def start(self) -> ScoreFunction:
        return lambda groups: [[float(len(text)) for text in group.texts] for group in groups]
