"""Groups to score, made of texts, and scorers that say what a test says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rayalign.scorers.base import ScoreFunction, ScorerConfig
from rayalign.types import Completion, Group, Judgement, Prompt


def group(index: int, *texts: str, **extra: Any) -> Group:
    """One prompt with these completions. Its tokens mean nothing: what is scored are the texts."""
    text = f"prompt {index}"
    prompt = Prompt(index, text, (4, 5), extra, messages=({"role": "user", "content": text},))
    completions = tuple(Completion(f"{index}/{k}", (k + 4, 1), (), "stop", 0) for k in range(len(texts)))
    return Group(f"g{index}", prompt, completions, texts)


class Says(ScorerConfig):
    """Says of every group what the test says."""

    name: str
    scores: tuple[float, ...]
    certainty: float | None = None  # P(i ≻ j) of i < j
    metrics: dict[str, float] = {}

    def start(self) -> ScoreFunction:
        def judge(groups: Sequence[Group]) -> list[Judgement]:
            count, sure = len(self.scores), self.certainty
            matrix = None
            if sure is not None:
                row = [[0.5 if i == j else sure if i < j else 1 - sure for j in range(count)] for i in range(count)]
                matrix = tuple(map(tuple, row))
            return [Judgement(self.scores, matrix, self.metrics) for _ in groups]

        return judge


class Hurried(ScorerConfig):
    """Gives the seconds that it has as scores."""

    name: str

    def start(self) -> ScoreFunction:
        return lambda groups: [[self.deadline_s] * len(each.texts) for each in groups]


class Counts(ScorerConfig):
    """Keeps count of what is started and closed."""

    name: str
    fails: bool = False

    def start(self) -> Any:
        if self.fails:
            raise RuntimeError("it cannot start")
        return Counted()


class Counted:
    closed = 0

    def __call__(self, groups: Sequence[Group]) -> list[list[float]]:
        return [[1.0] * len(each.texts) for each in groups]

    def memory_gib(self) -> float:
        return 2.0

    def close(self) -> None:
        Counted.closed += 1
