"""Rows of a data set as the rollouts of a run: offline methods take them where online ones take scored samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from rayalign.rollouts import Progress
from rayalign.samples import Rollout
from rayalign.types import Group


class Rows(Protocol):
    """What is read of a data set, see `data.examples.ExampleSet`."""

    def step(self, index: int, count: int) -> list[Group]:
        """The rows of a training step: a function of its index alone."""


class Reading:
    """The methods of `rollouts.Rollouts`, without an engine: nothing is sampled, nothing has to be kept.

    Args:
        count: rows of one training step.
    """

    progress: Progress | None = None

    def __init__(self, rows: Rows, *, count: int):
        self._rows, self._count = rows, count

    def samples_before(self, step: int) -> bool:
        """No engine waits for weights."""
        return False

    def fresh(self, step: int) -> bool:
        """Each step has rows of its own."""
        return True

    def milestone(self, step: int) -> bool:
        """Each step is as any other."""
        return False

    def start(self, step: int) -> None:
        pass

    def ready(self, step: int) -> bool:
        return True

    def take(self, step: int) -> Rollout:
        begun = time.perf_counter()
        groups = tuple(self._rows.step(step, self._count))
        return Rollout(step, None, groups, time.perf_counter() - begun, 0.0)

    def settle(self) -> None:
        pass

    def state(self) -> list[Rollout]:
        return []

    def restore(self, rollouts: Sequence[Rollout]) -> None:
        pass

    def close(self) -> None:
        pass
