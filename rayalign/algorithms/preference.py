"""Preference optimisation on pairs: what offline and online methods share, whatever the pair loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rayalign.algorithms.losses import DPO, AnyPairLoss, Mix, Pair, PsiPO
from rayalign.algorithms.reference import Reference
from rayalign.maths.feedback import all_pairs, best_worst_pair
from rayalign.maths.logprobs import sequence_logprob
from rayalign.record import Record
from rayalign.types import Batch, Column, Example, Group, Metrics, Sampling, Terms
from rayalign.types import Sequence as Row


class PairAlgorithm(Record):
    """Groups with scores → pairs → a pair loss against the reference."""

    pairs: Literal["best_worst", "all"] = Field("best_worst", description="which pairs of the K are trained on")
    pair_loss: AnyPairLoss = Field(DPO(), alias="loss", description="the loss of one pair")
    nll_weight: float = Field(0.0, ge=0, description="adds the chosen answer's mean negative log-likelihood")
    reference: Reference = Field(Reference(), description="whether, and how, the reference follows the policy")

    columns: ClassVar = (Column.LOGPS,)
    statistics: ClassVar = None

    @property
    def needs(self) -> tuple[tuple[str, Column], ...]:
        return (("reference", Column.LOGPS),) if self.pair_loss.reference else ()  # type: ignore[attr-defined]

    def request(self, sampling: Sampling) -> list[Sampling]:
        return []

    def examples(self, groups: Sequence[Group]) -> tuple[list[Example], Metrics]:
        """Pairs (chosen, rejected). Ties, and answers that are the same, are dropped and counted in pairs/dropped."""
        examples, dropped = [], 0
        for group in groups:
            chosen, ties = self._pairs(group)
            different = [(i, j) for i, j in chosen if group.completions[i].token_ids != group.completions[j].token_ids]
            dropped += ties + len(chosen) - len(different)
            values = _Values(group, self.pair_loss)
            examples += [Example((_row(group, i), _row(group, j)), values.of(i, j)) for i, j in different]
        return examples, {"pairs/kept": float(len(examples)), "pairs/dropped": float(dropped)}

    def _pairs(self, group: Group) -> tuple[list[tuple[int, int]], int]:
        """(better, worse) of one group, and how many ties were left out."""
        scores = torch.tensor([group.scores], dtype=torch.float64)
        if self.pairs == "all":
            found = [(better, worse) for _, better, worse in all_pairs(scores).tolist()]
            count = len(group.completions)
            return found, count * (count - 1) // 2 - len(found)
        index, keep = best_worst_pair(scores)
        return ([(int(index[0, 0]), int(index[0, 1]))], 0) if keep[0] else ([], 1)

    def credit(self, examples: Sequence[Example]) -> Sequence[Example]:
        return examples

    def denominator(self, examples: Sequence[Example]) -> float:
        return float(len(examples))

    def loss(self, batch: Batch, columns: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> Terms:
        pair = _pair(batch, columns)
        loss = self.pair_loss.of(pair)  # type: ignore[attr-defined]
        metrics: dict[str, Tensor] = {}
        if self.nll_weight:
            nll = -pair.means[:, 0]
            loss = loss + self.nll_weight * nll
            metrics["nll"] = nll.detach()
        scale = self.pair_loss.scale  # type: ignore[attr-defined]
        rewards = scale * (pair.means if pair.reference is None else pair.ratio).detach()
        margins = rewards[:, 0] - rewards[:, 1]
        return Terms(
            loss,
            metrics
            | {
                "rewards/chosen": rewards[:, 0],
                "rewards/rejected": rewards[:, 1],
                "rewards/margins": margins,
                "rewards/accuracies": (margins > 0).float(),
            },
        )

    def refresh(self, step: int) -> float | None:
        return self.reference.decay_after(step)


class Preference(PairAlgorithm):
    """Offline preference optimisation: pairs, or ranked answers, of a data set train the policy."""

    paper: ClassVar = "Rafailov et al. 2023, arXiv:2305.18290"
    name: Literal["preference"] = "preference"
    pairs: Literal["best_worst", "all"] = Field("all", description="which pairs of ranked answers are trained on")


class _Values:
    """What a pair's loss knows besides log-probs: probabilities and utilities, of the whole group."""

    def __init__(self, group: Group, loss: Record):
        self._probabilities = _preferences(group)
        self._utilities = None
        psi = next((part for part in _parts(loss) if isinstance(part, PsiPO)), None)
        if psi is not None:
            self._utilities = psi.utilities(self._probabilities.unsqueeze(0))[0]

    def of(self, i: int, j: int) -> dict[str, float]:
        values = {"prob_chosen": float(self._probabilities[i, j])}
        if self._utilities is not None:
            values["utility_gap"] = float(self._utilities[i] - self._utilities[j])
        return values


def _preferences(group: Group) -> Tensor:
    """[K, K] P(i ≻ j): as given, or a Bradley-Terry annotator's, σ(s_i − s_j)."""
    if group.preferences is not None:
        return torch.tensor(group.preferences, dtype=torch.float64)
    scores = torch.tensor(group.scores, dtype=torch.float64)
    return torch.sigmoid(scores.unsqueeze(1) - scores.unsqueeze(0))


def _parts(loss: Record) -> list[Record]:
    return [part.loss for part in loss.parts] if isinstance(loss, Mix) else [loss]


def _pair(batch: Batch, columns: Mapping[str, Tensor]) -> Pair:
    policy = batch.by_example(sequence_logprob(columns["policy/logps"], batch.mask))
    tokens = batch.by_example(batch.mask.sum(-1).to(policy.dtype))
    given = batch.columns.get("reference/logps")
    reference = None if given is None else batch.by_example(sequence_logprob(given, batch.mask))
    return Pair(policy, tokens, reference, batch.values)


def _row(group: Group, index: int) -> Row:
    completion = group.completions[index]
    return Row(group.prompt.token_ids, completion.token_ids, completion.logps)
