"""Cringe: raise the likelihood of good answers, and push tokens of bad ones under others that the model likes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rayalign.algorithms.base import Regularised, refuse_cache
from rayalign.algorithms.groups import Seeds, labelled, paired, row
from rayalign.algorithms.labels import Labels, counts, values_of
from rayalign.algorithms.pairing import Pairing, Which
from rayalign.maths.cringe import binary_cringe_loss, cringe_loss_of_top, pairwise_cringe_gate
from rayalign.maths.logprobs import mean_logprob, sequence_logprob
from rayalign.record import Unfit
from rayalign.types import AnyColumn, Batch, Column, Example, Group, Metrics, Sampling, Terms, TopLogits


class Cringe(Regularised):
    """Cringe loss: on answers labelled good or bad (binary), or on pairs that are not yet apart (pairwise).

    With `samples` above 0 it is iterative: the policy's own answers, labelled by the scorer, train it again.
    """

    paper: ClassVar = "Adolphs et al. 2022, arXiv:2211.05826; pairwise and iterative, Xu et al. 2023, arXiv:2312.16682"
    name: Literal["cringe"] = "cringe"
    variant: Literal["binary", "pairwise"] = Field("pairwise", description="labels, or pairs with a gate")
    alpha: float = Field(1.0, ge=0, description="of the bad answers' term; the good ones' is their likelihood")
    top_k: int = Field(5, ge=1, description="most likely other tokens, of which one is drawn to go above a bad token")
    margin: float = Field(0.0, description="pairwise: how far apart log-probs of a pair should be, nats")
    temperature: float = Field(10.0, gt=0, description="pairwise: how softly the gate closes there, nats")
    samples: int = Field(0, ge=0, description="completions sampled for each prompt; 0: learn from data.examples")
    good_above: float | Literal["mean"] = Field(
        0.5, description="binary: an answer with a score above this is good; mean: of samples, above their prompt's"
    )
    pairs: Which = Field("best_worst", description="pairwise: which pairs of ranked answers; random: two samples")

    @property
    def rows(self) -> tuple[str, ...]:  # type: ignore[override]
        if self.samples:
            return ()
        return ("label", "pair") if self.variant == "binary" else ("pair", "ranked")

    @property
    def loss_columns(self) -> tuple[AnyColumn, ...]:  # type: ignore[override]
        return (Column.LOGPS, TopLogits(self.top_k))

    def request(self, sampling: Sampling) -> list[Sampling]:
        return [sampling] * self.samples

    def examples(self, groups: Sequence[Group]) -> tuple[list[Example], Metrics]:
        """Single answers, or pairs (chosen, rejected). What cannot be told apart is dropped and counted."""
        seeds = Seeds(groups)
        if self.variant == "pairwise":
            pairs, metrics = Pairing(self.pairs).of(groups) if self.samples else paired(groups, self.pairs)
            return [
                Example((row(group, i), row(group, j)), {"seed": seeds.of(group, i, j)}) for group, i, j in pairs
            ], metrics
        answers, dropped = labelled(groups, self.good_above)
        total, good = len(answers), sum(label for *_, label in answers)
        examples = [
            Example((row(group, i),), values_of(label, good if label else total - good, total, seed=seeds.of(group, i)))
            for group, i, label in answers
        ]
        return examples, counts(total, good, dropped)

    def loss(self, batch: Batch, columns: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> Terms:
        nll = batch.by_example(-mean_logprob(columns["policy/logps"], batch.mask))
        cringe = batch.by_example(self._cringe(batch, columns["policy/top_logits"]))
        if self.variant == "binary":
            terms = self._binary(batch, nll[:, 0], cringe[:, 0])
        else:
            logps = batch.by_example(sequence_logprob(columns["policy/logps"], batch.mask))
            terms = self._pairwise(nll[:, 0], cringe[:, 1], logps)
        return self.regularised(terms, batch, columns)

    def _cringe(self, batch: Batch, top: Tensor) -> Tensor:
        """[R] token means of the bad answers' term."""
        tokens = cringe_loss_of_top(top[..., 0], top[..., 1:], batch.mask, uniform=_uniform(batch))
        return mean_logprob(tokens, batch.mask)  # a masked mean

    def _binary(self, batch: Batch, nll: Tensor, cringe: Tensor) -> Terms:
        """[B] terms whose mean is the good answers' mean NLL plus alpha times the bad ones' mean: for as many bad
        answers as good ones, the mean of `binary_cringe_loss` over couples of them."""
        labels = Labels.of(batch)
        zero = torch.zeros_like(nll)
        loss = binary_cringe_loss(
            torch.where(labels.good, nll, zero), torch.where(labels.good, zero, cringe), alpha=self.alpha
        )
        metrics = {**labels.means("nll", nll.detach()), **labels.means("cringe", cringe.detach())}
        return Terms(loss / labels.share, metrics)

    def _pairwise(self, nll: Tensor, cringe: Tensor, logps: Tensor) -> Terms:
        chosen, rejected = logps.unbind(-1)
        gate = pairwise_cringe_gate(chosen, rejected, margin=self.margin, temperature=self.temperature)
        lead = (chosen - rejected).detach()
        metrics = {
            "cringe/gate": gate,
            "nll/good": nll.detach(),
            "cringe/bad": cringe.detach(),
            "logps/chosen": chosen.detach(),
            "logps/rejected": rejected.detach(),
            "logps/margins": lead,
            "logps/accuracies": (lead > 0).to(lead.dtype),
        }
        return Terms(gate * binary_cringe_loss(nll, cringe, alpha=self.alpha), metrics)

    @model_validator(mode="after")
    def _samples_fit(self) -> Cringe:
        if self.samples == 1 and self.variant == "pairwise":
            raise Unfit(
                "one sample makes no pair",
                key="samples",
                rule="0, or 2 or more, with variant: pairwise",
                remedy="set samples: 4",
            )
        for key, value in (("good_above", "mean"), ("pairs", "random")):
            if not self.samples and getattr(self, key) == value:
                raise Unfit(
                    "this is for samples, and a data set is learned from",
                    key=key,
                    rule=f"{value} with samples above 0 only",
                    remedy=f"take {key} out, or set samples: 4",
                )
        if self.samples == 1 and self.good_above == "mean":
            raise Unfit(
                "one sample is its own mean, so neither good nor bad",
                key="samples",
                rule="0, or 2 or more, with good_above: mean",
                remedy="set samples: 4, or good_above: 0.5, say",
            )
        if self.samples:
            refuse_cache(self.reference)
        return self


def _uniform(batch: Batch) -> Tensor:
    """[R, T] numbers in [0, 1) for each token: a function of its example's seed and its place there, not of what else
    is in the batch."""
    rows = torch.zeros(batch.mask.shape, dtype=torch.float64)
    lengths = (batch.mask != 0).sum(-1).tolist()
    for place, seed in enumerate(batch.values["seed"].tolist()):
        generator = torch.Generator().manual_seed(int(seed))
        for index in range(place * batch.rows, (place + 1) * batch.rows):
            rows[index, : lengths[index]] = torch.rand(lengths[index], generator=generator, dtype=torch.float64)
    return rows.to(batch.mask.device)
