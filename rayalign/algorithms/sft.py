"""Supervised fine-tuning: the likelihood of the answer, given the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rayalign.algorithms.base import Regularised
from rayalign.algorithms.groups import distinct, row
from rayalign.maths.logprobs import mean_logprob, sequence_logprob
from rayalign.types import AnyColumn, Batch, Example, Group, Metrics, Terms, TopLogits


class SFT(Regularised):
    """Supervised fine-tuning on completions; of pairs and ranked answers the best one. Prompts are not trained on.

    Of a conversation the last answer is learned; the turns before it are its prompt.
    The regulariser is averaged as the likelihood is: over tokens with token_mean.
    """

    paper: ClassVar = "Ouyang et al. 2022, arXiv:2203.02155"
    rows: ClassVar = ("completion", "pair", "ranked")
    name: Literal["sft"] = "sft"
    aggregation: Literal["token_mean", "sequence_mean"] = Field(
        "token_mean", description="the mean over all tokens of a step, or over its answers, of their token means"
    )
    token_accuracy: bool = Field(False, description="also measure how often the likeliest token is the answer's")

    @property
    def columns(self) -> tuple[AnyColumn, ...]:
        return (*super().columns, *((TopLogits(1),) if self.token_accuracy else ()))

    def examples(self, groups: Sequence[Group]) -> tuple[list[Example], Metrics]:
        """The best answer of each group, the first of equals. Groups without a finite score are dropped."""
        best = [(group, distinct(group)) for group in groups]
        examples = [Example((row(group, order[0]),)) for group, order in best if order]
        dropped = float(len(groups) - len(examples))
        return examples, {"examples/kept": float(len(examples)), "examples/dropped": dropped}

    def denominator(self, examples: Sequence[Example]) -> float:
        if self.aggregation == "sequence_mean":
            return float(len(examples))
        return float(sum(len(example.sequences[0].completion_ids) for example in examples))

    def loss(self, batch: Batch, columns: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> Terms:
        tokens = -columns["policy/logps"]
        metrics = {"nll": mean_logprob(tokens, batch.mask)}
        if self.token_accuracy:
            own, best = columns["policy/top_logits"].unbind(-1)  # of the answer's token, of the best other one
            metrics["token_accuracy"] = mean_logprob((own >= best).to(tokens.dtype), batch.mask)
        if self.kl_weight:
            kl = columns["policy/reference_kl"]
            tokens = tokens + self.kl_weight * kl
            metrics["kl/exact"] = sequence_logprob(kl, batch.mask)
        if self.aggregation == "sequence_mean":
            loss = mean_logprob(tokens, batch.mask)
        else:
            loss = torch.where(batch.mask > 0, tokens, torch.zeros_like(tokens))
        return Terms(loss, {name: value.detach() for name, value in metrics.items()})
