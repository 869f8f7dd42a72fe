"""Calibration: the policy's likelihoods of K candidates come to rank them as a scorer does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rayalign.algorithms.base import Regularised, refuse_cache
from rayalign.algorithms.candidates import agreement, ranked
from rayalign.algorithms.groups import row
from rayalign.maths.logprobs import mean_logprob, mean_prob, sequence_logprob
from rayalign.maths.ranking import margin_ranking_loss
from rayalign.record import Unfit
from rayalign.types import Batch, Example, Group, Metrics, Sampling, Terms
from rayalign.types import Sequence as Row

LIKELIHOODS = {"mean_logprob": mean_logprob, "mean_prob": mean_prob}


class Calibration(Regularised):
    """Calibration by ranking: of K candidates the better one is to be the likelier one, by a margin for each rank.

    With `samples` above 0 the candidates are the policy's own, searched or sampled, and a scorer ranks them: once
    (rollout.resample_every: never, as in the paper), or anew every n steps (rollout.resample_every: n). Without, they
    are the ranked answers of data.examples, as `rayalign label` writes them. The likelihood of a reference answer, the
    column `gold` of prompts or rows, is kept up beside; where there is none, that term is 0. No reference model.

    Candidates that are the same once stripped, have no finite score or are contested are left out and counted; those
    of equal score have the same rank and form no pair. Each step, and held-out rows or prompts, say how far the
    policy's likelihood ranks as the scorer does: `ranking/kendall_tau`, over the pairs that the scorer tells apart, and
    `ranking/top1`, how often the likeliest candidate is the scorer's best; and `gold/perplexity`, over all tokens of
    reference answers.
    """

    paper: ClassVar = "Wang et al. 2023 (d-PM), arXiv:2310.05782, eq. 7 and 8"
    untempered: ClassVar = True  # no ratios are taken, and reference answers are not the policy's samples
    takes_gold: ClassVar = True
    measures_samples: ClassVar = True
    name: Literal["dpm_calibration"] = "dpm_calibration"
    samples: int = Field(
        0, ge=0, description="K, candidates of each prompt, searched or sampled; 0: learn from data.examples"
    )
    likelihood: Literal["mean_logprob", "mean_prob"] = Field(
        "mean_logprob", description="by which candidates rank: mean over their tokens of log-prob, or of probability"
    )
    reduction: Literal["pair_sum", "offset_mean"] = Field(
        "pair_sum",
        description="the sum over all pairs, as the paper writes; or, as its code has it, the mean over the pairs that "
        "are as many ranks apart, summed over these distances",
    )
    margin: float = Field(0.001, ge=0, description="by which a candidate is to lead the one that is a rank worse")
    mle_weight: float = Field(1.0, ge=0, description="of the reference answer's mean negative log-likelihood")
    min_candidates: int = Field(2, ge=2, description="prompts with fewer different, scored candidates are dropped")

    @property
    def rows(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.samples else ("ranked", "pair")

    def request(self, sampling: Sampling) -> list[Sampling]:
        return [sampling] * self.samples

    def examples(self, groups: Sequence[Group]) -> tuple[list[Example], Metrics]:
        """K candidates of a prompt, the best first, and its reference answer as the last row where it has one."""
        examples, left_out, kept = [], Counter({"repeated": 0, "unscored": 0}), 0
        for group in groups:
            order, ranks, lost = ranked(group)
            left_out += lost
            if len(order) >= self.min_candidates and len(set(ranks)) > 1:
                kept += len(order)
                examples.append(_example(group, order, ranks))
        total = sum(len(group.completions) for group in groups)
        counts = {
            "examples/kept": len(examples),
            "examples/dropped": len(groups) - len(examples),
            "candidates/kept": kept,
            "candidates/dropped": total - kept,
            "candidates/repeated": left_out["repeated"],
            "candidates/unscored": left_out["unscored"],
            "gold/missing": sum(not example.values["gold"] for example in examples),
        }
        return examples, {name: float(count) for name, count in counts.items()}

    def loss(self, batch: Batch, columns: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> Terms:
        logps, gold = columns["policy/logps"], batch.values["gold"] > 0
        likelihood = batch.by_example(LIKELIHOODS[self.likelihood](logps, batch.mask))
        ranks, counted = batch.values["ranks"], torch.ones_like(likelihood, dtype=torch.bool)
        counted[:, -1] = ~gold
        ranking = margin_ranking_loss(
            likelihood, margin=self.margin, reduction=self.reduction, mask=counted, ranks=ranks
        )
        sums = -batch.by_example(sequence_logprob(logps, batch.mask))[:, -1]
        tokens = batch.by_example(batch.mask.sum(-1))[:, -1].to(sums.dtype)
        nll = torch.where(gold, sums / tokens, torch.zeros_like(sums))
        tau, top = agreement(likelihood.detach(), ranks, counted)
        metrics = {
            "ranking/loss": ranking,
            "ranking/kendall_tau": tau,
            "ranking/top1": top,
            "likelihood/best": likelihood[:, 0],
            "likelihood/mean": torch.where(counted, likelihood, 0.0).sum(-1) / counted.sum(-1),
            "gold/nats": torch.where(gold, sums, torch.zeros_like(sums)),
            "gold/tokens": torch.where(gold, tokens, torch.zeros_like(tokens)),
        }
        terms = Terms(ranking + self.mle_weight * nll, {name: value.detach() for name, value in metrics.items()})
        return self.regularised(terms, batch, columns)

    def summarise(self, metrics: Metrics) -> Metrics:
        """With the reference answers' mean negative log-likelihood, nats a token over all of their tokens, and the
        perplexity, which is no mean; both are left out where there is no such answer."""
        rest = {name: value for name, value in metrics.items() if name not in ("gold/nats", "gold/tokens")}
        if not metrics.get("gold/tokens"):
            return rest
        nll = metrics["gold/nats"] / metrics["gold/tokens"]
        return {**rest, "gold/nll": nll, "gold/perplexity": math.exp(min(nll, 700.0))}

    @model_validator(mode="after")
    def _enough_candidates(self) -> Calibration:
        if self.samples and self.samples < self.min_candidates:
            raise Unfit(
                "one candidate alone has no rank" if self.samples == 1 else "all prompts would be dropped",
                key="samples",
                rule=f"0, or at least min_candidates={self.min_candidates}",
                remedy="set samples: 10" + ("" if self.samples == 1 else ", or lower min_candidates"),
            )
        if self.samples:
            refuse_cache(self.reference)
        return self


def _example(group: Group, order: Sequence[int], ranks: tuple[float, ...]) -> Example:
    """Values: `ranks`, one a row, 0 for the reference answer, which has none; `gold`, 1 where the last row is one."""
    rows, gold = [row(group, index) for index in order], group.prompt.gold_ids
    if gold:
        rows.append(Row(group.prompt.token_ids, gold, images=group.prompt.images))
        ranks = (*ranks, 0.0)
    return Example(tuple(rows), {"ranks": ranks, "gold": float(bool(gold))})
