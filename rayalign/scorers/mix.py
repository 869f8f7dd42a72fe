"""Several scorers as one: their scores, weighted and added."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, model_validator

from rayalign.record import Record, Unfit
from rayalign.registry import Tagged
from rayalign.scorers import SCORERS
from rayalign.scorers.base import ScoreFunction, ScorerConfig
from rayalign.types import Group, Judgement

SINGLE = {name: dotted for name, dotted in SCORERS.items() if name != "mix"}
SingleScorer = Annotated[SerializeAsAny[Record], Tagged("scorer", SINGLE, "start")]


class Part(Record):
    """One scorer of a mix."""

    scorer: SingleScorer = Field(
        description="any scorer but a mix; count, deadline_s and max_replacements are those of the mix",
        examples=[{"name": "rules", "rule": "vader"}],
    )
    weight: float = Field(1.0, description="its factor in the sum; below 0 it is a penalty", examples=[1.0])
    label: str | None = Field(
        None,
        pattern=r"^[\w.-]+$",
        description="of its metric scores/LABEL; none: its name, or its rule",
        examples=["brevity"],
    )

    @property
    def called(self) -> str:
        """The label, or else what it is: a rule by its own name."""
        return self.label or str(getattr(self.scorer, "rule", None) or self.scorer.name).rpartition(":")[2]


class Mix(ScorerConfig):
    """Several scorers at once: weight · score, added up.

    Each one's mean, as it gave it, is the metric scores/LABEL. With `standardise: group` a scorer's scores of one
    prompt have mean 0 and standard deviation 1 before they are weighted (all 0 where they are equal), so that
    weights compare scorers of any scale; what is left is the order within a prompt, so that the reward's mean no
    longer rises as the policy gets better: look at scores/LABEL. Soft preferences of the parts are averaged by
    weight where all of them give some, and no weight is below 0.
    """

    paper: ClassVar = ""
    name: Literal["mix"] = "mix"
    scorers: tuple[Part, ...] = Field(
        min_length=1,
        description="the scorers, each with its weight",
        examples=[[{"scorer": {"name": "rules", "rule": "vader"}, "weight": 1.0}]],
    )
    standardise: Literal["none", "group"] = Field(
        "none", description="group: each scorer's scores of one prompt get mean 0 and standard deviation 1"
    )

    @model_validator(mode="after")
    def _apart(self) -> Mix:
        labels = [part.called for part in self.scorers]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise Unfit(
                f"two scorers of the mix are called {twice}",
                key="scorers",
                rule="a label for each that no other has: it names the metric scores/LABEL",
                remedy=f"set label: {twice}_2, say, beside the second one's weight",
            )
        if not any(part.weight for part in self.scorers):
            raise Unfit(
                "all weights are 0",
                key="scorers",
                rule="at least one weight that is not 0, or every completion scores 0",
                remedy="set weight: 1.0 for the scorer that counts; one of weight 0 is only reported",
            )
        return self

    def start(self) -> ScoreFunction:
        started = [part.scorer.start() for part in self.scorers]

        def score_groups(groups: Sequence[Group]) -> list[Judgement]:
            given = [list(score(groups)) for score in started]
            for part, rows in zip(self.scorers, given, strict=True):
                check_rows(groups, rows, who=part.called)
            return [self._joined([as_judgement(rows[at]) for rows in given]) for at in range(len(groups))]

        return score_groups

    def _joined(self, given: Sequence[Judgement]) -> Judgement:
        """The parts' judgements of one group as one."""
        rows = [standardised(each.scores) if self.standardise == "group" else each.scores for each in given]
        weights = [part.weight for part in self.scorers]
        scores = tuple(math.fsum(w * s for w, s in zip(weights, column, strict=True)) for column in zip(*rows, strict=True))
        metrics: dict[str, float] = {}
        for part, each in zip(self.scorers, given, strict=True):
            metrics |= {name if name not in metrics else f"{part.called}/{name}": n for name, n in each.metrics.items()}
            metrics[f"scores/{part.called}"] = math.fsum(each.scores) / len(each.scores)
        return Judgement(scores, _preferences(given, weights), metrics)


def standardised(scores: Sequence[float]) -> tuple[float, ...]:
    """[K] with mean 0 and standard deviation 1 (of the K scores themselves); all 0 where they are equal."""
    if not all(map(math.isfinite, scores)):  # left as they are: the check of scores names the completion
        return tuple(scores)
    mean = math.fsum(scores) / len(scores)
    spread = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / len(scores))
    equal = spread <= 1e-12 * max(1.0, max(map(abs, scores)))
    return tuple(0.0 if equal else (score - mean) / spread for score in scores)


def _preferences(given: Sequence[Judgement], weights: Sequence[float]) -> tuple[tuple[float, ...], ...] | None:
    """[K, K] mean of the parts' soft preferences by weight; None where one that counts gives none, or is a penalty."""
    counted = [(weight, each.preferences) for weight, each in zip(weights, given, strict=True) if weight]
    if any(weight < 0 or matrix is None for weight, matrix in counted):
        return None
    total = math.fsum(weight for weight, _ in counted)
    count = len(given[0].scores)
    return tuple(
        tuple(math.fsum(weight * matrix[i][j] for weight, matrix in counted) / total for j in range(count))
        for i in range(count)
    )


def as_judgement(row: Any) -> Judgement:
    return row if isinstance(row, Judgement) else Judgement(tuple(float(score) for score in row))
