"""What all learners have in common: from examples to losses and numbers, on one rank or as one of many.

Every rank receives all examples of a step and works out orders, micro-batches and denominators alone; only
gradients, and one sum of the loss, cross between ranks. `update` and `annotate` of the Learner protocol are
the case of a single rank; a group of ranks calls `update_shard` and `annotate_shard` on each of its members
and merges with the functions below.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayalign.collate import collate
from rayalign.errors import ConfigError, DataError, TrainingStopped
from rayalign.learners.merge import Annotation, StepMetrics, merge_annotations, merge_metrics, weighted_sum
from rayalign.learners.models import CausalPolicy, resolve_dtype
from rayalign.learners.settings import LearnerSettings, LearnerSpec, OptimizerConfig, learning_rate
from rayalign.memory import peak_gib
from rayalign.protocols import Algorithm, UpdatePlan, WeightPush
from rayalign.sharding import lengths_of, minibatches, split
from rayalign.types import Batch, Column, Example, Metrics
from rayalign.types import Sequence as Row

__all__ = [
    "LearnerSettings",
    "LearnerSpec",
    "OptimizerConfig",
    "RankLearner",
    "learning_rate",
    "merge_annotations",
    "merge_metrics",
    "weighted_sum",
]


@dataclass
class _Sums:
    loss: float
    metrics: dict[str, float]


class RankLearner(ABC):
    """One role on one rank. Subclasses own the parameters: backward, step, gather, and state on disk.

    Args:
        spec: what to build.
        peers: the learners beside this one by role; it registers itself there, so that `refresh` finds them.
        rank, world_size: its place among the ranks that share this role.

    Attributes:
        wrap_chunk: called on each finished chunk of a push, for instance to put it into an object store.
    """

    wrap_chunk: Callable[[np.ndarray], Any]
    policy: CausalPolicy

    def __init__(self, spec: LearnerSpec, peers: dict[str, RankLearner], *, rank: int = 0, world_size: int = 1):
        self.spec, self.settings, self.peers = spec, spec.settings, peers
        self.rank, self.world_size = rank, world_size
        self.wrap_chunk = lambda array: array
        self.refreshed = False
        self.dtype = resolve_dtype(spec)
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        torch.manual_seed(spec.seed)
        peers[spec.role] = self

    # What a subclass owns.

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where batches go."""

    @abstractmethod
    def _columns(self, batch: Batch, columns: Sequence[Column], temperature: float) -> dict[str, Tensor]:
        """One forward pass: column value → [R, T]."""

    @abstractmethod
    def _backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss` (over all ranks, its sum) to what this optimiser step has so far."""

    @abstractmethod
    def _step(self, lr: float) -> float:
        """Clip and step; the global norm before clipping. Must not step where that norm is not finite."""

    @abstractmethod
    def _total(self, value: float) -> float:
        """The sum of `value` over all ranks, the same on each."""

    @abstractmethod
    def _total_tensor(self, value: Tensor) -> Tensor:
        """As `_total`, of a tensor."""

    @abstractmethod
    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face names and full tensors, one at a time, valid until the next is asked for. Every rank
        of the role has to walk through all of them."""

    @abstractmethod
    def _blend(self, source: RankLearner, decay: float) -> None:
        """own ← decay·own + (1−decay)·source, all ranks together."""

    @abstractmethod
    def save(self, path: Path) -> None: ...

    @abstractmethod
    def restore(self, path: Path) -> None: ...

    # Columns.

    def annotate(self, examples: Sequence[Example], columns: Sequence[Column]) -> list[Example]:
        """See protocols.Learner. For a role on a single rank."""
        return merge_annotations(examples, [self.annotate_shard(examples, columns)])

    def annotate_shard(self, examples: Sequence[Example], columns: Sequence[Column]) -> list[Annotation]:
        """ "role/column" arrays for this rank's share of the examples, by index. Every rank has to call it."""
        if not examples or not columns:
            return [(index, tuple({} for _ in example.sequences)) for index, example in enumerate(examples)]
        return self._annotate(examples, columns, self.spec.temperature, self.rank, self.world_size)

    @torch.no_grad()
    def _annotate(
        self, examples: Sequence[Example], columns: Sequence[Column], temperature: float, rank: int, ranks: int
    ) -> list[Annotation]:
        plan = split(lengths_of(examples), ranks=ranks, micro_batch_tokens=self.settings.micro_batch_tokens)
        found: list[Annotation] = []
        for micro in plan[rank]:
            batch = self._batch(examples, micro, columns=False)
            tensors = {
                name: values.cpu().numpy() for name, values in self._columns(batch, columns, temperature).items()
            }
            for place, index in enumerate(micro):
                rows = []
                for offset, row in enumerate(examples[index].sequences):
                    at, count = place * batch.rows + offset, len(row.completion_ids)
                    rows.append(
                        {f"{self.spec.role}/{name}": values[at, :count].copy() for name, values in tensors.items()}
                    )
                found.append((index, tuple(rows)))
        return found

    def _batch(self, examples: Sequence[Example], micro: Sequence[int], *, columns: bool = True) -> Batch:
        """A micro-batch on the device; for an empty one, the shortest example of the step with weight 0, which
        keeps the collective calls of all ranks in step."""
        if micro:
            chosen, weight = [examples[index] for index in micro], None
        else:
            chosen, weight = [min(examples, key=lambda example: sum(map(len, example.sequences)))], [0.0]
        if not columns:
            chosen = [
                replace(example, values={}, sequences=tuple(replace(row, columns={}) for row in example.sequences))
                for example in chosen
            ]
        return _to(collate(chosen, pad_id=self.spec.pad_id, weight=weight), self.device)

    def logps(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """See protocols.Learner. Every rank computes all of them, so that all walk together."""
        longer = [index for index, ids in enumerate(sequences) if len(ids) > 1]
        found = [np.zeros(0, dtype=np.float32) for _ in sequences]
        examples = [Example((Row(tuple(sequences[i][:1]), tuple(sequences[i][1:])),)) for i in longer]
        if examples:
            for index, (columns,) in self._annotate(examples, [Column.LOGPS], 1.0, 0, 1):
                found[longer[index]] = columns[f"{self.spec.role}/logps"]
        return found

    # Training.

    def update(self, examples: Sequence[Example], algorithm: Algorithm, plan: UpdatePlan) -> Metrics:
        """See protocols.Learner. For a role on a single rank."""
        return merge_metrics([self.update_shard(examples, algorithm, plan)])

    def update_shard(self, examples: Sequence[Example], algorithm: Algorithm, plan: UpdatePlan) -> StepMetrics:
        """Train on this rank's share of the examples; every rank has to call it with all of them.

        Returns:
            (summed, same): this rank's part of the loss and of the algorithm's metrics, already divided by
            global counts and averaged over the optimiser steps, so that the sum over ranks is the mean; and lr
            and grad_norm (the largest of the optimiser steps, before clipping), the same on all ranks.

        Raises:
            TrainingStopped: a loss or a gradient that is not finite, on every rank alike.
            DataError: no examples.
            ConfigError: this role is not trained.
        """
        if not self.spec.trainable:
            raise ConfigError(f"the {self.spec.role} learner is frozen and cannot be trained", where=self.spec.role)
        if not examples:
            raise DataError(
                "a training step without examples",
                rule="at least one example",
                remedy="skip steps whose examples were all dropped",
            )
        rate = learning_rate(self.spec.optimizer, plan.step, self.spec.total_steps)
        steps, largest, summed = 0, 0.0, {}
        for epoch in range(plan.epochs):
            for part in minibatches(len(examples), count=plan.minibatches, seed=plan.seed, epoch=epoch):
                sums, norm = self._optimizer_step([examples[index] for index in part], algorithm, rate, plan.step)
                steps, largest = steps + 1, max(largest, norm)
                for name, value in {"loss": sums.loss, **sums.metrics}.items():
                    summed[name] = summed.get(name, 0.0) + value
        return {name: value / steps for name, value in summed.items()}, {"lr": rate, "grad_norm": largest}

    def _optimizer_step(self, examples: list[Example], algorithm: Algorithm, lr: float, step: int):
        denominator = algorithm.denominator(examples) or 1.0  # nothing counts: the sum is 0, and stays so
        plan = split(lengths_of(examples), ranks=self.world_size, micro_batch_tokens=self.settings.micro_batch_tokens)[
            self.rank
        ]
        statistics = self._statistics(examples, algorithm, plan) if algorithm.statistics is not None else {}
        sums = _Sums(0.0, {})
        for index, micro in enumerate(plan):
            batch = self._batch(examples, micro)
            columns = self._named_columns(batch, algorithm)
            if micro:
                terms = algorithm.loss(batch, columns, statistics)
                loss = weighted_sum(terms, batch) / denominator
                _add(sums, loss, terms.metrics, batch, len(examples))
            else:
                # The algorithm is not asked about a filler: its loss is exactly 0 whatever the numbers are.
                loss = sum(torch.where(batch.mask > 0, 0.0, column).sum() for column in columns.values())
            self._backward(loss, last=index == len(plan) - 1)
        self._finite("the loss", self._total(sums.loss), step)
        norm = self._step(lr)
        self._finite("the gradient norm", norm, step)
        return sums, norm

    def _named_columns(self, batch: Batch, algorithm: Algorithm) -> dict[str, Tensor]:
        found = self._columns(batch, algorithm.columns, self.spec.temperature)
        return {f"{self.spec.role}/{name}": values for name, values in found.items()}

    @torch.no_grad()
    def _statistics(self, examples: list[Example], algorithm: Algorithm, plan: list[list[int]]) -> dict[str, Tensor]:
        """The algorithm's sums over the whole step: all micro-batches, all ranks."""
        sums: dict[str, Tensor] = {}
        for micro in plan:
            batch = self._batch(examples, micro)
            found = algorithm.statistics(batch, self._named_columns(batch, algorithm))
            for name, value in found.items():
                value = value if micro else torch.zeros_like(value)  # a filler counts for nothing
                sums[name] = sums[name] + value if name in sums else value
        return {name: self._total_tensor(value) for name, value in sums.items()}

    def _finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise TrainingStopped(
                f"{what} of the {self.spec.role} is not finite",
                where=f"step {step + 1}",
                value=value,
                rule="training goes on with finite numbers only; this step was not taken",
                remedy="start from the last checkpoint with a lower optimizer.lr (or a longer warm-up, a lower "
                "max_grad_norm, dtype float32)",
            )

    # Weights.

    @property
    def push_dtype(self) -> torch.dtype:
        """The dtype of pushed and exported weights."""
        return self.dtype

    def push(self, version: int) -> WeightPush:
        """See protocols.Learner. Ranks other than the first walk along and give an empty push."""
        from rayalign.sync.flat import pack

        if self.rank:
            for _ in self.full_tensors():
                pass
            return WeightPush(version, {}, ())
        return pack(self.full_tensors(), version, dtype=self.push_dtype, wrap=self.wrap_chunk)

    def refresh(self, source: str, *, decay: float = 0.0) -> None:
        """own ← decay·own + (1−decay)·source.

        Raises:
            ConfigError: no such role beside this one, or this role is trained.
            ValueError: decay outside [0, 1).
        """
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        if source not in self.peers or self.spec.trainable:
            raise ConfigError(
                f"the {self.spec.role} learner cannot take over weights",
                where=self.spec.role,
                value=source,
                rule="a frozen role follows a role that is built beside it: "
                + ", ".join(sorted(set(self.peers) - {self.spec.role})),
            )
        self._blend(self.peers[source], decay)
        self.refreshed = True

    def export(self, path: Path) -> None:
        """See protocols.Learner. The first rank writes."""
        state = {}
        for name, tensor in self.full_tensors():
            if self.rank == 0:
                state[name] = tensor.detach().to("cpu", self.push_dtype, copy=True)
        if self.rank == 0:
            self.policy.export(Path(path), state, self.push_dtype)

    def memory_gib(self) -> float:
        """Peak memory of this process: all roles in it."""
        return peak_gib()

    def close(self) -> None:
        """Forget the weights. The learner cannot be used any more."""
        self.peers.pop(self.spec.role, None)


def _add(sums: _Sums, loss: Tensor, metrics: Mapping[str, Tensor], batch: Batch, count: int) -> None:
    sums.loss += float(loss.detach())
    for name, values in metrics.items():
        part = float(torch.where(batch.weight > 0, values.detach().float(), 0.0).sum()) / count
        sums.metrics[name] = sums.metrics.get(name, 0.0) + part


def _to(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    moved = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    nested = {
        name: {key: tensor.to(device) for key, tensor in getattr(batch, name).items()} for name in ("columns", "values")
    }
    return replace(batch, **moved, **nested)
