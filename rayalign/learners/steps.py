"""Optimiser steps, and the same without learning: from examples to one loss over all ranks and micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rayalign.errors import ConfigError, DataError, TrainingStopped
from rayalign.learners.merge import StepMetrics, weighted_sum
from rayalign.learners.settings import learning_rate
from rayalign.protocols import Algorithm, UpdatePlan
from rayalign.sharding import minibatches
from rayalign.types import Batch, Example, Terms

if TYPE_CHECKING:
    from rayalign.learners.base import RankLearner


@dataclass
class Sums:
    """This rank's part of one step's loss and metrics, divided by global counts; and the tokens of all ranks."""

    loss: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    def add(self, loss: Tensor, terms: Terms, batch: Batch, count: int) -> None:
        self.loss += float(loss.detach())
        for name, values in terms.metrics.items():
            part = float(torch.where(batch.weight > 0, values.detach().float(), 0.0).sum()) / count
            self.metrics[name] = self.metrics.get(name, 0.0) + part

    def named(self) -> dict[str, float]:
        return {"loss": self.loss, **self.metrics}


def update(learner: RankLearner, examples: Sequence[Example], algorithm: Algorithm, plan: UpdatePlan) -> StepMetrics:
    """Train on this rank's share of the examples.

    Returns:
        (summed, same): this rank's part of the loss and of the algorithm's metrics, already divided by global
        counts and averaged over the optimiser steps, so that the sum over ranks is the mean; and lr, grad_norm
        (the largest of the optimiser steps, before clipping) and padding (the share of padding in all positions
        of all ranks' micro-batches), the same on all ranks.

    Raises:
        TrainingStopped: a loss or a gradient that is not finite, on every rank alike.
        DataError: no examples.
        ConfigError: this role is not trained.
    """
    if not learner.spec.trainable:
        role = learner.spec.role
        raise ConfigError(f"the {role} learner is frozen and cannot be trained", where=role)
    _require(examples, "a training step")
    rate = learning_rate(learner.spec.optimizer, plan.step, learner.spec.total_steps)
    steps, largest, summed, positions = 0, 0.0, {}, [0, 0]
    for epoch in range(plan.epochs):
        for part in minibatches(len(examples), count=plan.minibatches, seed=plan.seed, epoch=epoch):
            chosen = [examples[index] for index in part]
            shares = learner.split(chosen, learner.world_size)
            sums, norm = _optimizer_step(learner, chosen, shares[learner.rank], algorithm, rate, plan.step)
            steps, largest = steps + 1, max(largest, norm)
            for name, value in sums.named().items():
                summed[name] = summed.get(name, 0.0) + value
            for place, count in enumerate(learner.positions(chosen, shares)):
                positions[place] += count
    same = {"lr": rate, "grad_norm": largest, "padding": 1.0 - positions[0] / positions[1]}
    return {name: value / steps for name, value in summed.items()}, same


@torch.no_grad()
def measure(learner: RankLearner, examples: Sequence[Example], algorithm: Algorithm) -> StepMetrics:
    """Loss and metrics of all examples as one step of `update` would give them. Changes nothing.

    Raises:
        DataError: no examples.
    """
    _require(examples, "a measurement")
    share = learner.split(examples, learner.world_size)[learner.rank]
    sums = Sums()
    for _ in _losses(learner, examples, share, algorithm, sums):
        pass
    return sums.named(), {}


def _optimizer_step(
    learner: RankLearner, examples: list[Example], share: list[list[int]], algorithm: Algorithm, lr: float, step: int
) -> tuple[Sums, float]:
    sums = Sums()
    for index, loss in enumerate(_losses(learner, examples, share, algorithm, sums)):
        learner.backward(loss, last=index == len(share) - 1)
    _finite(learner, "the loss", learner.total(sums.loss), step)
    norm = learner.step(lr)
    _finite(learner, "the gradient norm", norm, step)
    return sums, norm


def _losses(
    learner: RankLearner, examples: Sequence[Example], share: list[list[int]], algorithm: Algorithm, sums: Sums
) -> Iterator[Tensor]:
    """One loss a micro-batch of this rank's share, and their sum and metrics in `sums`."""
    denominator = algorithm.denominator(examples) or 1.0  # nothing counts: the sum is 0, and stays so
    statistics = _statistics(learner, examples, share, algorithm) if algorithm.statistics is not None else {}
    seen = _with_rows(examples, slice(algorithm.loss_rows))
    for micro in share:
        batch = learner.batch(seen, micro)
        columns = _named_columns(learner, batch, algorithm)
        if micro:
            terms = algorithm.loss(batch, columns, statistics)
            loss = weighted_sum(terms, batch) / denominator
            sums.add(loss, terms, batch, len(examples))
        else:
            # The algorithm is not asked about a filler: its loss is exactly 0 whatever the numbers are.
            loss = sum(torch.where(_like(batch.mask, each), 0.0, each).sum() for each in columns.values())
        del columns
        yield loss


def _like(mask: Tensor, column: Tensor) -> Tensor:
    """Where mask [R, T] is 1, in the shape of a column [R, T, …]."""
    return (mask > 0).reshape(*mask.shape, *(1 for _ in column.shape[2:])).expand_as(column)


def _named_columns(learner: RankLearner, batch: Batch, algorithm: Algorithm) -> dict[str, Tensor]:
    found = learner.columns(batch, algorithm.columns)
    return {f"{learner.spec.role}/{name}": values for name, values in found.items()}


@torch.no_grad()
def _statistics(
    learner: RankLearner, examples: Sequence[Example], share: list[list[int]], algorithm: Algorithm
) -> dict[str, Tensor]:
    """The algorithm's sums over the whole step: all micro-batches, all ranks."""
    sums: dict[str, Tensor] = {}
    examples = _with_rows(examples, slice(algorithm.loss_rows, None) if algorithm.loss_rows else slice(None))
    share = [[index for index in micro if examples[index].sequences] for micro in share]
    if not any(example.sequences for example in examples):
        return {}
    for micro in share:
        batch = learner.batch(examples, micro)
        found = algorithm.statistics(batch, _named_columns(learner, batch, algorithm))
        for name, value in found.items():
            value = value if micro else torch.zeros_like(value)  # a filler counts for nothing
            sums[name] = sums[name] + value if name in sums else value
    return {name: learner.total_tensor(value) for name, value in sums.items()}


def _with_rows(examples: Sequence[Example], rows: slice) -> Sequence[Example]:
    """The same examples with some of their rows only."""
    if rows == slice(None):
        return examples
    return [replace(example, sequences=example.sequences[rows]) for example in examples]


def _require(examples: Sequence[Example], what: str) -> None:
    if not examples:
        raise DataError(
            f"{what} without examples",
            rule="at least one example",
            remedy="skip steps whose examples were all dropped",
        )


def _finite(learner: RankLearner, what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise TrainingStopped(
            f"{what} of the {learner.spec.role} is not finite",
            where=f"step {step + 1}",
            value=value,
            rule="training goes on with finite numbers only; this step was not taken",
            remedy="start from the last checkpoint with a lower optimizer.lr (or a longer warm-up, a lower "
            "max_grad_norm, dtype float32)",
        )
