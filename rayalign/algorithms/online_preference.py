"""Online preference optimisation: sample K answers, let a scorer rank them, learn from the pairs.

Online DPO with AI feedback as in Guo et al. 2024 (OAIF), with the loss of Rafailov et al. 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rayalign.algorithms.reference import Reference
from rayalign.maths.feedback import all_pairs, best_worst_pair
from rayalign.maths.logprobs import sequence_logprob
from rayalign.maths.preference import dpo_loss, log_ratio_gap
from rayalign.record import Record
from rayalign.types import Batch, Column, Example, Group, Metrics, Sampling, Terms
from rayalign.types import Sequence as Row


class DPO(Record):
    """Direct preference optimisation; label smoothing above 0 makes it cDPO (Mitchell 2023)."""

    paper: ClassVar = "Rafailov et al. 2023, arXiv:2305.18290"
    name: Literal["dpo"] = Field("dpo", description="which loss")
    beta: float = Field(0.1, gt=0, description="strength of the KL penalty to the reference")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="assumed probability that a label is wrong")

    def __call__(self, gap: Tensor) -> Tensor:
        return dpo_loss(gap, beta=self.beta, label_smoothing=self.label_smoothing)


class OnlinePreference(Record):
    """Online preference optimisation: K samples a prompt, a scorer ranks them, and pairs of them train the policy."""

    paper: ClassVar = "Guo et al. 2024, arXiv:2402.04792"
    name: Literal["online_preference"] = "online_preference"
    samples: int = Field(4, ge=2, description="K, completions sampled for each prompt")
    pairs: Literal["best_worst", "all"] = Field("best_worst", description="which pairs of the K are trained on")
    pair_loss: DPO = Field(DPO(), alias="loss", description="the loss of one pair")
    reference: Reference = Field(Reference(), description="whether, and how, the reference follows the policy")

    needs: ClassVar = (("reference", Column.LOGPS),)
    columns: ClassVar = (Column.LOGPS,)
    statistics: ClassVar = None

    def request(self, sampling: Sampling) -> list[Sampling]:
        return [sampling] * self.samples

    def examples(self, groups: Sequence[Group]) -> tuple[list[Example], Metrics]:
        """Pairs (chosen, rejected). Ties are dropped and counted in pairs/dropped."""
        pairs, dropped = [], 0
        for group in groups:
            scores = torch.tensor([group.scores], dtype=torch.float64)
            if self.pairs == "all":
                chosen = [(better, worse) for _, better, worse in all_pairs(scores).tolist()]
                dropped += self.samples * (self.samples - 1) // 2 - len(chosen)
            else:
                index, keep = best_worst_pair(scores)
                chosen = [tuple(index[0].tolist())] if keep[0] else []
                dropped += 1 - len(chosen)
            pairs += [Example((_row(group, better), _row(group, worse))) for better, worse in chosen]
        return pairs, {"pairs/kept": float(len(pairs)), "pairs/dropped": float(dropped)}

    def credit(self, examples: Sequence[Example]) -> Sequence[Example]:
        return examples

    def denominator(self, examples: Sequence[Example]) -> float:
        return float(len(examples))

    def loss(self, batch: Batch, columns: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> Terms:
        policy = batch.by_example(sequence_logprob(columns["policy/logps"], batch.mask))  # [B, 2]
        reference = batch.by_example(sequence_logprob(batch.columns["reference/logps"], batch.mask))
        gap = log_ratio_gap(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1])
        rewards = self.pair_loss.beta * (policy - reference).detach()
        margins = rewards[:, 0] - rewards[:, 1]
        return Terms(
            self.pair_loss(gap),
            {
                "rewards/chosen": rewards[:, 0],
                "rewards/rejected": rewards[:, 1],
                "rewards/margins": margins,
                "rewards/accuracies": (margins > 0).float(),
            },
        )

    def refresh(self, step: int) -> float | None:
        return self.reference.decay_after(step)


def _row(group: Group, index: int) -> Row:
    completion = group.completions[index]
    return Row(group.prompt.token_ids, completion.token_ids, completion.logps)
