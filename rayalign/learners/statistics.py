"""Numbers of a whole step that a loss needs: summed over all its micro-batches and ranks before the loss pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rayalign.protocols import Algorithm
from rayalign.types import AnyColumn, Batch, Column, Example

if TYPE_CHECKING:
    from rayalign.learners.base import RankLearner

Part = tuple[bool, Batch, dict[str, Tensor]]  # of one micro-batch: whether it is no filler, and its columns


@torch.no_grad()
def statistics(
    learner: RankLearner, examples: Sequence[Example], algorithm: Algorithm, *, learning: bool
) -> dict[str, Tensor]:
    """The algorithm's sums over the whole step: all micro-batches, all ranks. Empty where no row is for them.

    What the algorithm carries is the mean over rows, mixed with what the learner has kept of it. Further statistics
    see all of that, and the columns as they were: there is no second forward pass.

    Args:
        learning: whether the learner keeps what is carried.
    """
    further = getattr(algorithm, "further_statistics", None)
    seen: list[Part] = []

    def parts() -> Iterator[Part]:
        for part in _parts(learner, examples, algorithm):
            if further is not None:
                seen.append(part)
            yield part

    found = _summed(learner, (_counted(part, algorithm.statistics(*part[1:])) for part in parts()))
    found |= moving_means(learner, found, getattr(algorithm, "carries", {}), learning=learning)
    if further is not None:
        found |= _summed(learner, (_counted(part, further(*part[1:], found)) for part in seen))
    return found


def _parts(learner: RankLearner, examples: Sequence[Example], algorithm: Algorithm) -> Iterator[Part]:
    rows = with_rows(examples, slice(algorithm.loss_rows, None) if algorithm.loss_rows else slice(None))
    rows = [example for example in rows if example.sequences]
    # The exact KL to the reference is a term of losses, and costs a forward pass of the reference.
    columns = [column for column in algorithm.columns if column is not Column.REFERENCE_KL]
    for micro in learner.split(rows, learner.world_size)[learner.rank]:
        batch = learner.batch(rows, micro)
        yield bool(micro), batch, named_columns(learner, batch, columns)


def _counted(part: Part, found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A filler counts for nothing."""
    return found if part[0] else {name: torch.zeros_like(value) for name, value in found.items()}


def _summed(learner: RankLearner, parts: Iterator[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for found in parts:
        for name, value in found.items():
            sums[name] = sums[name] + value if name in sums else value
    return {name: learner.total_tensor(value) for name, value in sums.items()}


def moving_means(
    learner: RankLearner, sums: Mapping[str, Tensor], decays: Mapping[str, float], *, learning: bool
) -> dict[str, Tensor]:
    """Moving averages over steps of means over rows, so that a step of few rows does not count as one of none. The
    first step's are its own; where nothing is learned, or no row counts, they are what was kept. `NAME/fresh` is their
    derivative by the step's sum.

    Args:
        sums: with `NAME/rows`, the number of rows in the sum, each as much as it is trusted.
    """
    found = {}
    for name, decay in decays.items():
        if name not in sums:
            continue
        before, rows = learner.carried.get(name), sums[f"{name}/rows"]
        share = 1.0 if before is None else 1.0 - decay if learning and rows > 0 else 0.0
        fresh = share / torch.where(rows > 0, rows, 1.0)
        found[name] = fresh * sums[name] + (0.0 if before is None else (1.0 - share) * before.to(sums[name]))
        found[f"{name}/fresh"] = fresh.expand_as(sums[name])
        if learning and rows > 0:
            learner.carried[name] = found[name]
    return found


def named_columns(learner: RankLearner, batch: Batch, columns: Sequence[AnyColumn]) -> dict[str, Tensor]:
    """ "role/column" → its numbers, with their gradient where there is one."""
    found = learner.columns(batch, columns)
    return {f"{learner.spec.role}/{name}": values for name, values in found.items()}


def with_rows(examples: Sequence[Example], rows: slice) -> Sequence[Example]:
    """The same examples with some of their rows only."""
    if rows == slice(None):
        return examples
    return [replace(example, sequences=example.sequences[rows]) for example in examples]
