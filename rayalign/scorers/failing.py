"""What becomes of completions that a scorer fails on: the run ends, they score 0, or nothing is learned from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from rayalign.errors import ScoreError
from rayalign.record import Record
from rayalign.types import FAILED, Group, Judgement


class Tolerance(Record):
    """What is done where a completion cannot be scored."""

    on_error: Literal["error", "zero", "skip"] = Field(
        "error",
        description="of a completion whose score fails, is no finite number, or takes too long: error ends the run, "
        "zero scores it 0, skip learns nothing from it; the metric scores/failed counts them",
    )


def judged(groups: Sequence[Group], scores: Sequence[float | None], on_error: str) -> list[Judgement]:
    """Scores of all completions, one group after the other, as judgements; None: there is no score.

    One that is skipped is contested; its number is the mean of its group's, so that no mean of rewards moves.
    """
    numbers: Iterator[float | None] = iter(scores)
    found = []
    for group in groups:
        row = [next(numbers) for _ in group.texts]
        there = [score for score in row if score is not None]
        usual = math.fsum(there) / len(there) if there and on_error == "skip" else 0.0
        failed = tuple(score is None for score in row)
        found.append(
            Judgement(
                tuple(usual if score is None else score for score in row),
                metrics={FAILED: float(sum(failed))},
                skipped=failed if on_error == "skip" else (),
            )
        )
    return found


def named(error: ScoreError, group: Group, place: int) -> ScoreError:
    """The error with the completion that it is about."""
    text = group.texts[place]
    short = text if len(text) <= 60 else f"{text[:59]}…"
    what = f"{error.what}, for completion {place} of prompt {group.prompt.index}: {short!r}"
    return ScoreError(what, where=error.where, value=error.value, rule=error.rule, remedy=error.remedy)
