"""Policy gradients without a critic: each answer against others to the same prompt, or against the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from rayalign.algorithms.credits import ADVANTAGES, Rows, later_sums
from rayalign.algorithms.groups import is_cut
from rayalign.algorithms.policy_loss import PolicyLoss
from rayalign.record import Unfit
from rayalign.types import Group, Metrics, Sampling

SCALES = {"grpo": "std", "dr_grpo": "none", "rloo": "leave_one_out"}


class PolicyGradient(PolicyLoss):
    """Group methods: an answer's advantage is its reward against others', and every token of it has the same.

    With KL in the reward, an answer's reward is its score less coef times the KL summed over its tokens, before it is
    compared. `advantage: grpo` has by default k3 in the loss, weighed 0.04, and means over answers, as published.
    reinforce_pp alone credits each token with what comes after it (its own reward where the scorer gives
    one a token), whitened over the whole batch. Truncated sampling is refused: ratios would be wrong.
    """

    paper: ClassVar = "Shao et al. 2024, arXiv:2402.03300; Ahmadian et al. 2024, arXiv:2402.14740"
    name: Literal["policy_gradient"] = "policy_gradient"
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "remax"] = Field(
        "grpo",
        description="grpo: (r − mean)/std of the prompt's answers; dr_grpo: r − mean; rloo: r − mean of the others; "
        "remax: r − that of the greedy answer, sampled besides; reinforce_pp: rewards to come, whitened over the batch",
    )
    equal_groups: Literal["drop", "keep"] | None = Field(
        None,
        description="prompts whose answers all score the same; default: drop where nothing would be learned from them "
        "(all but reinforce_pp, without KL and entropy bonus), and with grpo and KL in the reward, which would divide "
        "by the spread of the KL alone; else keep",
    )
    refill: int = Field(
        0, ge=0, description="dynamic sampling: at most so many more prompts a rollout, in place of dropped ones"
    )

    def request(self, sampling: Sampling) -> list[Sampling]:
        greedy = [replace(sampling, temperature=0.0)] if self.advantage == "remax" else []
        return [sampling] * self.samples + greedy

    @property
    def credits_tokens(self) -> bool:  # type: ignore[override]
        return self.advantage == "reinforce_pp"

    @property
    def drops_equal(self) -> bool:  # type: ignore[override]
        if self.equal_groups is not None:
            return self.equal_groups == "drop"
        if self.advantage == "grpo" and self._kl_in("reward"):
            return True
        return self.advantage != "reinforce_pp" and not self.kl.coef and not self.entropy_weight

    def keeps(self, group: Group, kept: Sequence[int], usable: Sequence[int]) -> bool:
        """At least two answers where they are compared, and the greedy one, which comes last, where it is the
        baseline."""
        if self.advantage == "remax":
            return self.samples in usable
        return self.advantage not in SCALES or len(kept) > 1

    def same(self, group: Group, places: Sequence[int]) -> bool:
        return super().same(group, [*places, self.samples] if self.advantage == "remax" else places)

    def more_values(self, group: Group) -> dict[str, float]:
        if self.advantage != "remax":
            return {}
        return {"baseline": float(group.scores[self.samples]), "baseline/cut": float(is_cut(group, self.samples))}

    def advantages(self, rows: Rows, score: Tensor, kl: Tensor) -> tuple[dict[str, Tensor], Metrics]:
        if self.credits_tokens:
            found = later_sums(self._rewards(rows, score, kl))
        else:
            total = score - self._coef * kl.sum(1)
            if self.advantage == "remax":
                own = total - self.reward.of(rows.value("baseline"), rows.value("baseline/cut"), {})[0]
            else:
                own = rows.by_group(total, SCALES[self.advantage])
            found = own.unsqueeze(1) * rows.mask
        mean, std = rows.over_tokens(found)  # before they are whitened
        if self.credits_tokens:
            found = rows.whitened(found)
        return {ADVANTAGES: found}, {"advantage/mean": mean, "advantage/std": std}

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, data: Any) -> Any:
        """What nobody has set of GRPO; of a KL that is to be in the reward, nothing."""
        if not isinstance(data, dict) or data.get("advantage", "grpo") != "grpo":
            return data
        kl = data.get("kl", {})
        if isinstance(kl, dict) and kl.get("in", "loss") == "loss" and "where" not in kl:
            data = {**data, "kl": {"in": "loss", "estimator": "k3", "coef": 0.04, **kl}}
        return {"aggregate": "sequence_mean", **data}

    @model_validator(mode="after")
    def _comparable(self) -> PolicyGradient:
        if self.advantage in SCALES and self.samples < 2:
            raise Unfit(
                "one answer has no other to be compared with",
                key="samples",
                rule=f"2 or more with advantage: {self.advantage}",
                remedy="set samples: 4, or advantage: remax or reinforce_pp",
            )
        if self.advantage == "remax" and self.reward.normalise:
            raise Unfit(
                "the greedy answer's score is not normalised, and would be another unit",
                key="reward",
                rule="normalise: false with advantage: remax",
                remedy="take reward.normalise out; scores are compared with the greedy answer's already",
            )
        if self.refill and not self.drops_equal and self.overlong == "keep":
            raise Unfit(
                "no prompt is dropped that another could replace",
                key="refill",
                rule="0, unless equal_groups: drop, overlong: drop or overlong: mask",
                remedy="set equal_groups: drop, or refill: 0",
            )
        return self
