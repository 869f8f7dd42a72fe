"""One set of scored groups: what is learned from, and what is said of all that was sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from rayalign.types import FAILED, Group, Metrics, unscored

T = TypeVar("T")


@dataclass(frozen=True)
class Rollout:
    """One set of scored groups.

    Attributes:
        index: s, counted from 0.
        version: of the weights that sampled it; None for rows of a data set.
        rollout_s: seconds until the last completion, scoring in between not counted; or those of reading.
        score_s: seconds spent in, or waiting for, the scorer.
        age: training steps since the set that it belongs to was taken into use.
        refill: of dynamic sampling: how many groups left nothing to learn from, and how many were sampled besides.
        baselines: the last completions of each group, which others are compared with: metrics are of the others.
        sampled: of dynamic sampling, all groups that were sampled, the first draw first, which are as many as `groups`:
            those that others replaced, and those that replaced none, are part of every mean. Empty: `groups`.
    """

    index: int
    version: int | None
    groups: tuple[Group, ...]
    rollout_s: float
    score_s: float
    age: int = 0
    refill: Mapping[str, float] = field(default_factory=dict)
    baselines: int = 0
    sampled: tuple[Group, ...] = ()

    @property
    def drawn(self) -> tuple[Group, ...]:
        """All groups that were sampled, whether they are learned from or not."""
        return self.sampled or self.groups

    @property
    def unselected(self) -> tuple[Group, ...]:
        """The groups of the first draw, among which no score has chosen."""
        return self.drawn[: len(self.groups)]

    def metrics(self, *, first_use: bool = True) -> Metrics:
        """Of the samples; and, in the step that uses them first, of the time they took."""
        completions = [c for group in self.drawn for c in self._own(group.completions)]
        lengths = np.array([len(c.token_ids) for c in completions])
        shared = {
            "completion/length_mean": float(lengths.mean()),
            "completion/truncated": float(np.mean([c.finish_reason == "length" for c in completions])),
        }
        if self.version is None:
            return {**shared, "time/read_s": self.rollout_s}
        scores = np.array([s for group in heard(self.drawn) for s in self._own(group.known_scores) if s is not None])
        return {
            **shared,
            **({"reward/mean": float(scores.mean()), "reward/std": float(scores.std())} if scores.size else {}),
            **group_metrics(self.drawn),
            **self.refill,
            "rollout/version": float(self.version),
            **(self._speed() if first_use else {}),
        }

    def _own(self, each: Sequence[T]) -> Sequence[T]:
        return each[: len(each) - self.baselines]

    def _speed(self) -> Metrics:
        tokens = sum(len(c.token_ids) for group in self.drawn for c in group.completions)
        return {
            "rollout/tokens_per_s": tokens / max(self.rollout_s, 1e-9),
            "time/rollout_s": self.rollout_s,
            "time/score_s": self.score_s,
        }


def as_told(group: Group) -> Group:
    """What has to be kept of a group that nothing is learned from, for means, samples.jsonl and the KL of its first
    completion. Numbers for each token of the others, which take most memory, are not."""
    first, *others = group.completions
    lighter = tuple(replace(completion, logps=(), candidates=()) for completion in others)
    return replace(group, completions=(first, *lighter), preferences=None, token_scores=(), inferred=())


def heard(groups: Sequence[Group]) -> list[Group]:
    """Those that the scorer said something of: what stands for a refusal is no part of a mean."""
    return [group for group in groups if not unscored(group.metrics)]


def group_metrics(groups: Sequence[Group]) -> Metrics:
    """What the scorer says of groups besides their scores."""
    return mean_metrics([group.metrics for group in groups])


def mean_metrics(metrics: Sequence[Metrics]) -> Metrics:
    """What the scorer says of each group besides its scores, in one: the mean of each number over the groups that have
    it, and of completions that it failed on their number."""
    found: dict[str, list[float]] = {}
    for said in metrics:
        for name, value in said.items():
            found.setdefault(name, []).append(value)
    return {name: float((np.sum if name.endswith(FAILED) else np.mean)(each)) for name, each in sorted(found.items())}
