"""Optimiser steps, and the same without learning: from examples to one loss over all ranks and micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rayalign.errors import ConfigError, DataError, TrainingStopped
from rayalign.learners.merge import StepMetrics, weighted_sum
from rayalign.learners.settings import learning_rate
from rayalign.learners.statistics import named_columns, statistics, with_rows
from rayalign.protocols import Algorithm, Stretch, UpdatePlan
from rayalign.sharding import minibatches
from rayalign.types import Example, Terms
from rayalign.types import Sequence as Row

if TYPE_CHECKING:
    from rayalign.learners.base import RankLearner


@dataclass
class Sums:
    """This rank's part of one step's loss, in which an example counts as much as it is trusted, and of its metrics, in
    which all count alike; divided by global counts.

    They stay on the device until they are read, all at once: reading a number waits for all that is queued there.
    """

    parts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, loss: Tensor, terms: Terms, count: int) -> None:
        self._add("loss", loss)
        for name, values in terms.metrics.items():
            self._add(name, values.float().sum().double() / count)

    def _add(self, name: str, part: Tensor) -> None:
        part = part.detach().double()
        self.parts[name] = self.parts[name] + part if name in self.parts else part

    def named(self) -> dict[str, float]:
        """The loss first; of a rank without a micro-batch the loss alone, 0."""
        if not self.parts:
            return {"loss": 0.0}
        return dict(zip(self.parts, torch.stack(list(self.parts.values())).tolist(), strict=True))


def update(learner: RankLearner, examples: Sequence[Example], algorithm: Algorithm, plan: UpdatePlan) -> StepMetrics:
    """Train on this rank's share of the examples.

    Returns:
        (summed, same): this rank's part of the loss and of the algorithm's metrics, already divided by global
        counts and averaged over the optimiser steps that were taken (after any of them the algorithm may say that it
        is enough; those of `at_first` are the first one's), each weighing as many examples as it has, so that the sum
        over ranks is the mean; and lr, grad_norm (the largest of the optimiser steps, before clipping) and padding
        (the share of padding in all positions of all ranks' micro-batches), the same on all ranks.

    Raises:
        TrainingStopped: a loss or a gradient that is not finite, on every rank alike.
        DataError: no examples.
        ConfigError: this role is not trained.
    """
    if not learner.spec.trainable:
        role = learner.spec.role
        raise ConfigError(f"the {role} learner is frozen and cannot be trained", where=role)
    _require(examples, "a training step")
    rate = _rate(learner, plan)
    parts = optimizer_steps(examples, algorithm, plan)
    watched, at_first = getattr(algorithm, "watched", ()), getattr(algorithm, "at_first", ())
    largest, summed, first, positions, taken, done = 0.0, {}, {}, [0, 0], 0, 0
    for chosen in parts:
        numbers, norm = _optimizer_step(learner, chosen, algorithm, rate, plan.step)
        largest, taken, done = max(largest, norm), taken + len(chosen), done + 1
        for name, value in numbers.items():
            if name not in at_first:
                summed[name] = summed.get(name, 0.0) + value * len(chosen)
            elif done == 1:
                first[name] = value
        seen = with_rows(chosen, slice(algorithm.loss_rows))
        for place, count in enumerate(learner.positions(seen, learner.split(seen, learner.world_size))):
            positions[place] += count
        if watched and algorithm.enough({name: learner.total(numbers.get(name, 0.0)) for name in watched}):
            break
    same = {"lr": rate, "grad_norm": largest, "padding": 1.0 - positions[0] / positions[1]}
    if watched:
        same |= {"updates/done": float(done), "updates/planned": float(len(parts))}
    return {name: value / taken for name, value in summed.items()} | first, same


def optimizer_steps(examples: Sequence[Example], algorithm: Algorithm, plan: UpdatePlan) -> list[Sequence[Example]]:
    """The examples of each optimiser step: answers and plain texts are dealt out apart, so that each step has its share
    of both. A step in which nothing counts is left out, unless that is so in all of them."""
    found = []
    for epoch in range(plan.epochs):
        own = minibatches(len(examples), count=plan.minibatches, seed=plan.seed, epoch=epoch)
        beside = minibatches(len(plan.texts), count=len(own), seed=plan.seed, epoch=epoch)
        for mine, texts in zip_longest(own, beside, fillvalue=()):
            found.append(([examples[index] for index in mine], [plan.texts[index] for index in texts]))
    counted = [part for part in found if algorithm.denominator(part[0])]
    return [_dealt(algorithm, *part) for part in counted or found]


def _dealt(algorithm: Algorithm, examples: Sequence[Example], texts: Sequence[Row] = ()) -> Sequence[Example]:
    dealt = getattr(algorithm, "dealt", None)
    return examples if dealt is None else dealt(examples, texts)


def _rate(learner: RankLearner, plan: UpdatePlan) -> float:
    part = plan.stretch or Stretch(0, learner.spec.total_steps)
    return part.lr_scale * learning_rate(learner.spec.optimizer, plan.step - part.first, part.steps)


@torch.no_grad()
def measure(learner: RankLearner, examples: Sequence[Example], algorithm: Algorithm) -> StepMetrics:
    """Loss and metrics of all examples as one step of `update` would give them. Changes nothing.

    Raises:
        DataError: no examples.
    """
    _require(examples, "a measurement")
    sums = Sums()
    for _ in _losses(learner, _dealt(algorithm, examples), algorithm, sums, learning=False):
        pass
    return sums.named(), {}


def _optimizer_step(
    learner: RankLearner, examples: Sequence[Example], algorithm: Algorithm, lr: float, step: int
) -> tuple[dict[str, float], float]:
    """This rank's part of the loss and metrics, and the norm of the whole gradient."""
    sums = Sums()
    for loss, last in _losses(learner, examples, algorithm, sums):
        learner.backward(loss, last=last)
    numbers = sums.named()
    _finite(learner, "the loss", learner.total(numbers["loss"]), step)
    norm = learner.step(lr)
    _finite(learner, "the gradient norm", norm, step)
    return numbers, norm


def _losses(
    learner: RankLearner, examples: Sequence[Example], algorithm: Algorithm, sums: Sums, *, learning: bool = True
) -> Iterator[tuple[Tensor, bool]]:
    """One loss a micro-batch of this rank's share, and whether it is the last; their sum and metrics in `sums`."""
    denominator = algorithm.denominator(examples) or 1.0  # nothing counts: the sum is 0, and stays so
    known = {} if algorithm.statistics is None else statistics(learner, examples, algorithm, learning=learning)
    seen = with_rows(examples, slice(algorithm.loss_rows))
    share = learner.split(seen, learner.world_size)[learner.rank]
    for place, micro in enumerate(share):
        batch = learner.batch(seen, micro)
        columns = named_columns(learner, batch, algorithm.columns)
        if micro:
            terms = algorithm.loss(batch, columns, known)
            loss = weighted_sum(terms, batch) / denominator
            sums.add(loss, terms, len(examples))
        else:
            # The algorithm is not asked about a filler: its loss is exactly 0 whatever the numbers are.
            loss = sum(torch.where(torch.ones_like(each).bool(), 0.0, each).sum() for each in columns.values())
        del columns
        yield loss, place == len(share) - 1


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
