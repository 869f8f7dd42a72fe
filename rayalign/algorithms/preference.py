"""Preference optimisation on pairs: what offline and online methods share, whatever the pair loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from rayalign.algorithms.base import Regularised
from rayalign.algorithms.groups import distinct, paired, place_of, probabilities, row, scored
from rayalign.algorithms.losses import DPO, AnyPairLoss, Mix, Pair, PsiPO, SoftDPO
from rayalign.errors import DataError
from rayalign.maths.logprobs import sequence_logprob
from rayalign.record import Record
from rayalign.types import Batch, Column, Example, Group, Metrics, Terms

Unrated = Literal["certain", "bradley_terry"]
UNRATED = "P(i ≻ j) of answers whose annotators gave none: certain, 1 for the better one; bradley_terry, by the scores"
UNRATED_ROWS = f"{UNRATED}; none: certain, but for the loss soft, which then wants votes or probabilities"


class PairAlgorithm(Regularised):
    """Groups with scores → pairs → a pair loss, against the reference where it needs one."""

    pairs: Literal["best_worst", "all"] = Field("best_worst", description="which pairs of the K are trained on")
    pair_loss: AnyPairLoss = Field(DPO(), alias="loss", description="the loss of one pair")
    nll_weight: float = Field(0.0, ge=0, description="adds the chosen answer's mean negative log-likelihood")
    unrated: Unrated | None = Field(None, description=UNRATED_ROWS)

    @property
    def needs(self) -> tuple[tuple[str, Column], ...]:
        return (("reference", Column.LOGPS),) if self.pair_loss.reference else ()  # type: ignore[attr-defined]

    @property
    def takes_ties(self) -> bool:
        """Whether all that the loss learns of a pair is who is better with what probability: ½ says something, too."""
        return all(isinstance(part, SoftDPO | PsiPO) for part in _parts(self.pair_loss))

    def paired(self, groups: Sequence[Group]) -> tuple[list[tuple[Group, int, int]], Metrics]:
        """(group, chosen, rejected) of each pair, and the metrics of what was kept and left out."""
        return paired(groups, self.pairs)

    def examples(self, groups: Sequence[Group]) -> tuple[list[Example], Metrics]:
        """Pairs (chosen, rejected). What `paired` leaves out is counted in pairs/dropped.

        Raises:
            DataError: a loss on probabilities, and a row without them, unless `unrated` says what it then is.
        """
        pairs, metrics = self.paired(groups)
        values = {key: self._values(group) for key, group in {id(group): group for group, _, _ in pairs}.items()}
        return [self._example(group, i, j, values[id(group)]) for group, i, j in pairs], metrics

    def _values(self, group: Group) -> _Values:
        soft = any(isinstance(part, SoftDPO) for part in _parts(self.pair_loss))
        if soft and self.unrated is None and group.preferences is None:
            raise DataError(
                "a pair has neither votes nor a probability",
                where=place_of(group),
                value="chosen and rejected alone",
                rule="a column votes or probability beside each pair with loss: soft; without them it is plain dpo",
                remedy="map it, data.examples.columns={probability: my_column}, or set algorithm.unrated=certain",
            )
        return _Values(group, self.pair_loss, self.unrated or "certain")

    def _example(self, group: Group, chosen: int, rejected: int, values: _Values) -> Example:
        rows = [row(group, chosen), row(group, rejected)]
        if self.pair_loss.takes_best:  # type: ignore[attr-defined]
            best = distinct(group)[0]
            rows += [row(group, best)] if best != chosen else []
        return Example(tuple(rows), values.of(chosen, rejected))

    def loss(self, batch: Batch, columns: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> Terms:
        pair = pair_of(batch, columns)
        loss = self.pair_loss.of(pair)  # type: ignore[attr-defined]
        if self.nll_weight:
            loss = loss - self.nll_weight * pair.means[:, 0]
        rewards = self.pair_loss.rewards(pair)  # type: ignore[attr-defined]
        metrics = {**pair_metrics(pair, rewards), **self.pair_loss.metrics(pair)}  # type: ignore[attr-defined]
        terms = Terms(loss, {name: value.detach() for name, value in metrics.items()})
        return self.regularised(terms, batch, columns)


class Preference(PairAlgorithm):
    """Offline preference optimisation: pairs, or ranked answers, of a data set train the policy."""

    paper: ClassVar = "Rafailov et al. 2023, arXiv:2305.18290"
    rows: ClassVar = ("pair", "ranked")
    by_row: ClassVar = True
    name: Literal["preference"] = "preference"
    pairs: Literal["best_worst", "all"] = Field("all", description="which pairs of ranked answers are trained on")


class _Values:
    """What a pair's loss knows besides log-probs: probabilities and utilities, of the whole group."""

    def __init__(self, group: Group, loss: Record, unrated: Unrated):
        kept = scored(group)
        self._place = {index: place for place, index in enumerate(kept)}
        self._probabilities = probabilities(group, kept, unrated)
        psi = next((part for part in _parts(loss) if isinstance(part, PsiPO)), None)
        self._utilities = None if psi is None else psi.utilities(self._probabilities.unsqueeze(0))[0]

    def of(self, i: int, j: int) -> dict[str, float]:
        i, j = self._place[i], self._place[j]
        values = {"prob_chosen": float(self._probabilities[i, j])}
        if self._utilities is not None:
            values["utility_gap"] = float(self._utilities[i] - self._utilities[j])
        return values


def _parts(loss: Record) -> list[Record]:
    return list(loss.losses) if isinstance(loss, Mix) else [loss]


def pair_of(batch: Batch, columns: Mapping[str, Tensor]) -> Pair:
    """What a pair loss looks at, from the columns "policy/logps" and, where annotated, "reference/logps"."""
    policy = batch.by_example(sequence_logprob(columns["policy/logps"], batch.mask))
    tokens = batch.by_example(batch.mask.sum(-1).to(policy.dtype))
    given = batch.columns.get("reference/logps")
    reference = None if given is None else batch.by_example(sequence_logprob(given, batch.mask))
    return Pair(policy, tokens, reference, batch.values)


def pair_metrics(pair: Pair, rewards: Tensor) -> dict[str, Tensor]:
    """What is written down of every pair: [B] each. `rewards`: [B, n], the chosen answer's first."""
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).to(margins.dtype),
        "logps/chosen": pair.policy[:, 0],
        "logps/rejected": pair.policy[:, 1],
        "nll": -pair.means[:, 0],
    }
