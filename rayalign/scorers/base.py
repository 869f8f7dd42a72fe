"""What a scorer is, and a scorer in this process."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from pydantic import Field

from rayalign.errors import ScoreError
from rayalign.memory import peak_gib
from rayalign.record import Record
from rayalign.types import Group

ScoreFunction = Callable[[Sequence[Group]], Sequence[Sequence[float]]]


class ScorerConfig(Record):
    """Settings that all scorers share. A scorer of one's own derives from this and defines `start`."""

    name: str
    count: int = Field(1, ge=1, description="scorer actors")
    deadline_s: float = Field(300.0, gt=0, description="longest time for the scores of one group")
    max_replacements: int = Field(3, ge=0, description="dead scorer actors that are replaced in one run")

    def start(self) -> ScoreFunction:
        """Load what is needed, in the process that will score, and return the function that scores
        groups: one score a completion, higher is better."""
        raise ScoreError(f"the scorer {self.name} defines no start()", remedy="return a function from groups to scores")


class LocalScorer:
    """A scorer in this process: scores at once, and hands the groups back at the next poll."""

    def __init__(self, config: ScorerConfig, *, name: str = "scorer-0"):
        self._score, self._done, self.name = config.start(), [], name

    def submit(self, groups: Sequence[Group]) -> None:
        self._done += score_groups(self._score, groups, who=self.name)

    def poll(self, timeout_s: float = 1.0) -> list[Group]:
        done, self._done = self._done, []
        return done

    def memory_gib(self) -> float:
        return peak_gib()

    def close(self) -> None:
        self._done = []


def score_groups(score: ScoreFunction, groups: Sequence[Group], *, who: str) -> list[Group]:
    """The groups with their scores. Raises ScoreError when a score is missing or not a finite number."""
    scores = list(score(groups))
    if len(scores) != len(groups):
        raise ScoreError(
            "the number of scored groups is wrong", where=who, value=len(scores), rule=f"{len(groups)} groups"
        )
    return [replace(group, scores=_checked(group, row, who)) for group, row in zip(groups, scores, strict=True)]


def _checked(group: Group, row: Sequence[float], who: str) -> tuple[float, ...]:
    row = tuple(float(score) for score in row)
    if len(row) != len(group.completions):
        raise ScoreError(
            "the number of scores is wrong",
            where=f"{who}, prompt {group.prompt.index}",
            value=len(row),
            rule=f"one score for each of {len(group.completions)} completions",
        )
    for text, score in zip(group.texts, row, strict=True):
        if not math.isfinite(score):
            raise ScoreError(
                "a score is not a finite number",
                where=f"{who}, prompt {group.prompt.index}",
                value=f"{score} for {text!r}",
                remedy="make the scorer return a number for every text, the empty one included",
            )
    return row
