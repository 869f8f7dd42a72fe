"""What the learner tests share: examples, orders, and algorithms made to go wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rayalign.algorithms.online_preference import OnlinePreference
from rayalign.learners.base import LearnerSettings, LearnerSpec, OptimizerConfig
from rayalign.protocols import UpdatePlan
from rayalign.types import Batch, Column, Example, Terms, TopLogits
from rayalign.types import Sequence as Row

DPO = OnlinePreference()
# eps well above float32 noise: Adam divides by the gradient's size, and would blow noise up to the rate.
OPTIMIZER = OptimizerConfig(lr=1e-3, eps=1e-5, weight_decay=0.01, max_grad_norm=0.5, schedule="linear", warmup_steps=1)
STEPS = 2


def pairs(count: int, seed: int = 0) -> list[Example]:
    """Pairs of different lengths."""
    rng = random.Random(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(4, 150) for _ in range(n))

    made = []
    for index in range(count):
        prompt = ids(3 + 2 * index)
        made.append(Example((Row(prompt, ids(2 + 3 * index)), Row(prompt, ids(max(1, 9 - 2 * index))))))
    return made


PROBES = [row.prompt_ids + row.completion_ids for example in pairs(2, seed=5) for row in example.sequences] + [(7,)]


def specs(model: Path, settings: LearnerSettings, network: str = "causal", **changes) -> list[LearnerSpec]:
    """A policy, or a score network in its place, and its reference."""
    common = dict(settings=settings, total_steps=5, temperature=0.8) | changes
    return [
        LearnerSpec("policy", str(model), optimizer=OPTIMIZER, network=network, **common),
        LearnerSpec("reference", str(model), trainable=False, **common),
    ]


def weights(learner) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().float().cpu().clone() for name, tensor in learner.full_tensors()}


def train(
    roles, examples: Sequence[Example], *, annotate, update, start: int = 0, steps: int = STEPS, algorithm=DPO, **plan
):
    """A few steps; the metrics of each."""
    return [
        update(
            roles["policy"],
            annotate(roles["reference"], examples, [Column.LOGPS]),
            algorithm,
            UpdatePlan(step=step, **plan),
        )
        for step in range(start, start + steps)
    ]


def smooth(metrics: dict[str, float]) -> dict[str, float]:
    """Without the share of positive margins (while policy and reference are equal, rounding decides each sign) and
    without padding, which depends on the split."""
    return {name: value for name, value in metrics.items() if name not in ("rewards/accuracies", "padding")}


@dataclass(frozen=True)
class Centred:
    """A loss with a number of the whole step in it (the mean gap), and a second column: only the same on any
    number of ranks and micro-batches when both passes cover all examples and count each once."""

    columns = (Column.LOGPS, Column.ENTROPY)
    loss_rows = None

    def denominator(self, examples: Sequence[Example]) -> float:
        return float(len(examples))

    @staticmethod
    def _gap(batch: Batch, columns) -> torch.Tensor:
        rows = torch.where(batch.mask > 0, columns["policy/logps"], 0.0).sum(1)
        pair = batch.by_example(rows)
        return (pair[:, 0] - pair[:, 1]) / 10

    def statistics(self, batch: Batch, columns) -> dict[str, torch.Tensor]:
        gap = self._gap(batch, columns)
        return {"gap": gap.sum(), "count": torch.ones_like(gap).sum()}

    def loss(self, batch: Batch, columns, statistics) -> Terms:
        gap, mean = self._gap(batch, columns), statistics["gap"] / statistics["count"]
        entropy = batch.by_example(torch.where(batch.mask > 0, columns["policy/entropy"], 0.0).sum(1)).sum(1)
        return Terms((gap - mean - 1.0) ** 2 - 0.01 * entropy, {"mean": torch.full_like(gap, float(mean))})


@dataclass(frozen=True)
class Distilled:
    """The exact KL to the reference, and logits of other tokens: only right when the reference's part is."""

    columns = (Column.LOGPS, Column.REFERENCE_KL, TopLogits(2))
    statistics = None
    loss_rows = None

    def denominator(self, examples: Sequence[Example]) -> float:
        return float(len(examples))

    def loss(self, batch: Batch, columns, statistics) -> Terms:
        kl = columns["policy/reference_kl"]
        top = columns["policy/top_logits"]
        tokens = torch.nn.functional.softplus(top[..., 0] - top[..., 2]) - 0.1 * columns["policy/logps"]
        tokens = torch.where(batch.mask > 0, kl + 0.1 * tokens, 0.0)
        return Terms(tokens, {"kl": batch.by_example(kl.detach()).sum((1, 2))})


@dataclass(frozen=True)
class Compared:
    """Bradley-Terry on the scores of pairs."""

    columns = (Column.VALUES,)
    statistics = None
    loss_rows = None

    def denominator(self, examples: Sequence[Example]) -> float:
        return float(len(examples))

    def loss(self, batch: Batch, columns, statistics) -> Terms:
        last = (batch.mask.sum(1) - 1).unsqueeze(1)
        scores = batch.by_example(columns["policy/values"].gather(1, last)[:, 0])
        gap = scores[:, 0] - scores[:, 1]
        return Terms(-torch.nn.functional.logsigmoid(gap), {"margin": gap.detach()})


@dataclass(frozen=True)
class Broken:
    """An algorithm with a number that is not finite: in the loss of the longest row, or only in its gradient."""

    where: str
    columns = (Column.LOGPS,)
    statistics = None
    loss_rows = None

    def denominator(self, examples: Sequence[Example]) -> float:
        return float(len(examples))

    def loss(self, batch: Batch, columns, statistics) -> Terms:
        total = torch.where(batch.mask > 0, columns["policy/logps"], 0.0).sum(1)
        total = batch.by_example(total).sum(1)
        if self.where == "gradient":
            return Terms((total - total.detach()).abs().sqrt())  # the root at 0: finite, its slope is not
        longest = batch.by_example(batch.mask.sum(1)).amax(1) >= 14
        return Terms(torch.where(longest, torch.full_like(total, float("nan")), total))
