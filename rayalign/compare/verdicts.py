"""Who won: shares of wins, ties and losses, quality, their intervals, and a sign test. All over prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayalign.errors import ScoreError
from rayalign.evaluate import bootstrap_interval
from rayalign.samples import group_metrics
from rayalign.types import Group, Metrics

COLUMNS = ("win", "tie", "loss", "quality")
Interval = tuple[float, float, float]  # mean, low, high


@dataclass(frozen=True)
class Verdicts:
    """Of answers side by side, A's first.

    Attributes:
        lead: [prompts, samples] above 0 where A's answer is better: P(a ≻ b) − P(b ≻ a) by a judge, else the
            difference of the scores.
        qualities: [2, prompts, samples] the scores of A's and of B's answers.
        tie: leads that are no larger than this are ties.
        metrics: what the scorer says besides, a judge's share of order-dependent verdicts, say.
    """

    lead: np.ndarray
    qualities: np.ndarray
    tie: float
    seed: int
    metrics: Metrics

    def outcome(self) -> np.ndarray:
        """[prompts, samples] 1 where A wins, 0 for a tie, −1 where B wins."""
        return np.where(np.abs(self.lead) <= self.tie, 0, np.sign(self.lead)).astype(int)

    def rows(self) -> dict[str, dict[str, Interval]]:
        """ "a" and "b" → column → mean over prompts with its 95 % bootstrap interval."""
        outcome = self.outcome()
        found = {}
        for side, name in enumerate("ab"):
            of_this = outcome if side == 0 else -outcome
            columns = (of_this > 0, of_this == 0, of_this < 0, self.qualities[side])
            found[name] = {key: self._interval(values) for key, values in zip(COLUMNS, columns, strict=True)}
        return found

    def win_rate(self) -> Interval:
        """Share of A's wins, a tie counting ½."""
        return self._interval((self.outcome() + 1) / 2)

    def quality_lead(self) -> Interval:
        """Of A over B, paired by prompt."""
        return self._interval(self.qualities[0] - self.qualities[1])

    def sign_test(self) -> dict[str, float]:
        """Prompts on which A wins more often than B, and the other way round; p, exact and two-sided."""
        signs = np.sign(self.outcome().sum(axis=1))
        wins, losses = int((signs > 0).sum()), int((signs < 0).sum())
        return {"a": wins, "b": losses, "even": int((signs == 0).sum()), "p": sign_test(wins, losses)}

    def record(self) -> dict[str, Any]:
        return {
            **self.rows(),
            "win_rate": self.win_rate(),
            "quality_lead": self.quality_lead(),
            "sign_test": self.sign_test(),
            "metrics": self.metrics,
        }

    def _interval(self, values: np.ndarray) -> Interval:
        by_prompt = np.asarray(values, dtype=float).mean(axis=1)
        return (float(by_prompt.mean()), *bootstrap_interval(by_prompt, seed=self.seed))


def verdicts_of(pairs: Sequence[Group], samples: int, *, tie: float, seed: int) -> Verdicts:
    """Of scored groups of two, `samples` for each prompt, in the order of the prompts.

    A judge's P(a ≻ b) decides where there is one (it has shown the two in both orders), else the scores do.
    """
    scores = np.array([group.scores for group in pairs], dtype=float)
    if not len(pairs) or scores.shape != (len(pairs), 2):
        raise ScoreError("a pair has no two scores", value=scores.shape, rule="two scores a pair of answers")
    judged = [group.preferences is not None for group in pairs]
    lead = [
        2 * group.preferences[0][1] - 1 if known else first - second  # type: ignore[index]
        for group, known, (first, second) in zip(pairs, judged, scores, strict=True)
    ]
    shape = (-1, samples)
    qualities = np.stack([scores[:, side].reshape(shape) for side in range(2)])
    return Verdicts(np.array(lead).reshape(shape), qualities, tie, seed, group_metrics(pairs))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of so many wins among wins + losses, if either were as likely; exact, 1 where there is neither."""
    count, fewer = wins + losses, min(wins, losses)
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    return float(min(1.0, 2 * (tail / 2**count)))  # whole numbers up to the division: nothing is rounded before it


def interval(values: Interval, *, percent: bool = False) -> str:
    """As tables show it: mean [low, high]; percent without its sign."""
    form = "{:.1f}" if percent else "{:+.3f}"
    mean, low, high = (form.format(value * (100 if percent else 1)) for value in values)
    return f"{mean} [{low}, {high}]"
