"""KTO: learn from answers that are each good or bad, against a reference point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rayalign.algorithms.base import Regularised, refuse_cache
from rayalign.algorithms.groups import labelled, paired, row
from rayalign.algorithms.labels import Labels, counts, values_of
from rayalign.maths.logprobs import mean_logprob, sequence_logprob
from rayalign.maths.preference import kto_loss
from rayalign.record import Unfit
from rayalign.types import Batch, Column, Example, Group, Metrics, Sampling, Terms
from rayalign.types import Sequence as Row

Weight = Annotated[float, Field(ge=0)] | Literal["auto"]


class KTO(Regularised):
    """Kahneman-Tversky optimisation: answers labelled good or bad, each against the same reference point.

    The point is the mean log-ratio of mismatched answers, the next one's with this one's prompt: an example has
    a second row for it, which only the statistics look at. It is cut where it would be longer than the step's longest
    answer with its own prompt. `paired` takes pairs, and the other half's mean instead.

    With `samples` above 0 it is online: the policy's own answers, good or bad by the sign of their score's distance
    from the mean of their prompt's, or above a threshold.
    """

    paper: ClassVar = "Ethayarajh et al. 2024, arXiv:2402.01306"
    needs: ClassVar = (("reference", Column.LOGPS),)
    name: Literal["kto"] = "kto"
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    weight_desirable: Weight = Field(
        1.0, description="λ_D, of good answers; auto: all good ones of a step weigh as all its bad ones"
    )
    weight_undesirable: Weight = Field(
        1.0, description="λ_U, of bad answers; auto: all bad ones of a step weigh as all its good ones"
    )
    nll_weight: float = Field(0.0, ge=0, description="adds the good answers' mean negative log-likelihood")
    paired: bool = Field(False, description="the paired variant: a pair's halves against each other's mean log-ratio")
    samples: int = Field(0, ge=0, description="completions sampled for each prompt; 0: learn from data.examples")
    good_above: float | Literal["mean"] = Field(
        "mean", description="sampled answers with a score above this are good; mean: above their prompt's mean"
    )

    @property
    def loss_rows(self) -> int | None:  # type: ignore[override]
        return None if self.paired else 1

    @property
    def by_row(self) -> bool:  # type: ignore[override]
        return self.paired

    @property
    def rows(self) -> tuple[str, ...]:  # type: ignore[override]
        if self.samples:
            return ()
        return ("pair",) if self.paired else ("label", "pair")

    def request(self, sampling: Sampling) -> list[Sampling]:
        return [sampling] * self.samples

    def examples(self, groups: Sequence[Group]) -> tuple[list[Example], Metrics]:
        """(answer, mismatched answer) of each label, or pairs. What has no clear label is dropped and counted."""
        if self.paired:
            pairs, metrics = paired(groups, "best_worst")
            return [Example((row(group, i), row(group, j))) for group, i, j in pairs], metrics
        answers, dropped = labelled(groups, self.good_above if self.samples else 0.5)  # 0.5: rows say 1 or 0
        rows = [row(group, index) for group, index, _ in answers]
        total, good = len(answers), sum(label for *_, label in answers)
        weights = self._weights(good, total - good)
        longest, cut, examples = max(map(len, rows), default=0), 0, []
        for place, ((_, _, label), other) in enumerate(zip(answers, _mismatched(rows), strict=True)):
            if other is not None and len(other) > longest:
                room = longest - len(other.prompt_ids)
                other, cut = replace(other, completion_ids=other.completion_ids[:room]), cut + 1
            values = values_of(label, good if label else total - good, total, weight=weights[label])
            examples.append(Example((rows[place],) if other is None else (rows[place], other), values))
        return examples, {**counts(total, good, dropped), "kto/mismatched_cut": float(cut)}

    def _weights(self, good: int, bad: int) -> dict[bool, float]:
        """λ by label, with auto worked out from the counts of the step; 1 where one of them is 0.

        A step is all that is known here. Where one label is rare, a number for the whole data set is the same in each.
        """
        desirable, undesirable = self.weight_desirable, self.weight_undesirable
        if desirable == "auto" and undesirable == "auto":
            desirable, undesirable = ((good + bad) / (2 * n) if good and bad else 1.0 for n in (good, bad))
        elif desirable == "auto":
            desirable = undesirable * bad / good if good and bad else 1.0
        elif undesirable == "auto":
            undesirable = desirable * good / bad if good and bad else 1.0
        return {True: desirable, False: undesirable}

    def statistics(self, batch: Batch, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        """Sums of the log-ratios that reference points are means of (of mismatched rows alone, but for `paired`),
        and their counts."""
        ratio = _ratio(batch, columns)
        one = torch.ones((), dtype=torch.float64, device=ratio.device)
        if self.paired:
            return {
                "chosen": ratio[:, 0].double().sum(),
                "rejected": ratio[:, 1].double().sum(),
                "count": one * len(ratio),
            }
        return {"mismatched": ratio.double().sum(), "count": one * ratio.numel()}

    def loss(self, batch: Batch, columns: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> Terms:
        ratio = _ratio(batch, columns)
        points = {
            name: (total / statistics["count"].clamp(min=1)).clamp(min=0).to(ratio.dtype)
            for name, total in statistics.items()
            if name != "count"
        }
        if self.paired:
            terms = self._paired(ratio, points["chosen"], points["rejected"])
            return self.regularised(self._likely(terms, batch, columns), batch, columns)
        labels, point = Labels.of(batch), points.get("mismatched", ratio.new_zeros(()))  # one prompt: no mismatch
        loss = self._of(ratio[:, 0], labels.good, point) * batch.values["weight"]
        rewards = self.beta * ratio[:, 0].detach()
        metrics = {
            "kto/reference_point": point.expand_as(rewards),
            "rewards/accuracies": ((ratio[:, 0].detach() > point) == labels.good).to(rewards.dtype),
            **labels.means("rewards", rewards),
        }
        return self.regularised(self._likely(Terms(loss, metrics), batch, columns, labels), batch, columns)

    def _likely(self, terms: Terms, batch: Batch, columns: Mapping[str, Tensor], labels: Labels | None = None) -> Terms:
        """The terms with the likelihood of good answers: of those with this label, or of the first of each pair."""
        if not self.nll_weight:
            return terms
        nll = batch.by_example(-mean_logprob(columns["policy/logps"], batch.mask))[:, 0]
        if labels is None:
            return replace(terms, loss=terms.loss + self.nll_weight * nll)
        good = torch.where(labels.good, nll / labels.share, torch.zeros_like(nll))  # its mean is that of good ones
        return replace(terms, loss=terms.loss + self.nll_weight * good)

    def _paired(self, ratio: Tensor, chosen: Tensor, rejected: Tensor) -> Terms:
        """[B] the mean of a pair's two terms; the reference point of either half is the other's."""
        good = torch.ones(len(ratio), dtype=torch.bool, device=ratio.device)
        loss = (self._of(ratio[:, 0], good, rejected) + self._of(ratio[:, 1], ~good, chosen)) / 2
        rewards = self.beta * ratio.detach()
        margins = rewards[:, 0] - rewards[:, 1]
        metrics = {
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).to(rewards.dtype),
            "kto/reference_point_chosen": rejected.expand_as(margins),
            "kto/reference_point_rejected": chosen.expand_as(margins),
        }
        return Terms(loss, metrics)

    @model_validator(mode="after")
    def _weights_are_of_labels(self) -> KTO:
        for key in ("weight_desirable", "weight_undesirable"):
            if self.paired and getattr(self, key) != 1.0:
                raise Unfit(
                    "both halves of a pair weigh the same",
                    key=key,
                    rule="1.0 with paired: true",
                    remedy=f"take {key} out, or set paired: false",
                )
        return self

    @model_validator(mode="after")
    def _samples_fit(self) -> KTO:
        if not self.samples and self.good_above != "mean":
            raise Unfit(
                "a data set says itself which answers are good",
                key="good_above",
                rule="only with samples above 0",
                remedy="take good_above out, or set samples: 4 to learn from samples",
            )
        if self.samples == 1 and (self.paired or self.good_above == "mean"):
            raise Unfit(
                "one sample makes no pair" if self.paired else "one sample is its own mean, so neither good nor bad",
                key="samples",
                rule="0, or 2 or more" + ("" if self.paired else ", with good_above: mean"),
                remedy="set samples: 4" + ("" if self.paired else ", or good_above: 0.5, say"),
            )
        if self.samples:
            refuse_cache(self.reference)
        return self

    def _of(self, ratio: Tensor, good: Tensor, point: Tensor) -> Tensor:
        return kto_loss(ratio, torch.zeros_like(ratio), good, z_ref=point, beta=self.beta)


def _ratio(batch: Batch, columns: Mapping[str, Tensor]) -> Tensor:
    """[B, n] log π − log π_ref, sums over tokens."""
    policy = sequence_logprob(columns["policy/logps"], batch.mask)
    reference = sequence_logprob(batch.columns["reference/logps"], batch.mask)
    return batch.by_example(policy - reference)


def _mismatched(rows: Sequence[Row]) -> list[Row | None]:
    """Each prompt with an answer of the next other prompt, the first with its first, the second with its second, and
    around again where that has fewer; None where there is no other prompt."""
    runs = [(prompt, list(own)) for prompt, own in groupby(rows, lambda each: (each.prompt_ids, each.images))]
    found: list[Row | None] = []
    for place, (prompt, own) in enumerate(runs):
        others = next((theirs for key, theirs in runs[place + 1 :] + runs[:place] if key != prompt), ())
        for number in range(len(own)):
            other = others[number % len(others)].completion_ids if others else ()
            found.append(Row(prompt[0], other, images=prompt[1]) if others else None)
    return found
