"""PPO with a critic, as in published RLHF: token rewards with a KL penalty, GAE, and several passes over a rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rayalign.algorithms.base import Offline
from rayalign.algorithms.credits import ADVANTAGES, RETURNS, Rows, explained
from rayalign.algorithms.policy_loss import PolicyLoss
from rayalign.maths.advantage import gae
from rayalign.maths.policy_gradient import ppo_value_loss
from rayalign.record import Record, Unfit
from rayalign.types import AnyColumn, Batch, Column, Example, Metrics, Terms


class Critic(Record):
    """What says how much reward is still to come, at each token."""

    model: str | None = Field(
        None,
        description="checkpoint of a language model, or of a reward model, that it starts as; default: the policy's",
        examples=["runs/reward/checkpoints/step-30"],
    )
    optimizer: dict[str, Any] = Field(
        {}, description="keys in which its optimizer differs from `optimizer`", examples=[{"lr": 1.0e-5}]
    )
    warmup_steps: int = Field(0, ge=0, description="training steps at the start that train the critic alone")
    value_clip: float | None = Field(
        0.2, gt=0, description="values move at most this far from those before the update; none: without limit"
    )


class ValueLoss(Offline):
    """What trains the critic: ½·max((v − R)², (v cut to old ± clip − R)²), averaged over tokens."""

    name: Literal["value_loss"] = "value_loss"
    value_clip: float | None = None
    columns: ClassVar[Sequence[AnyColumn]] = (Column.STATE_VALUES,)

    def denominator(self, examples: Sequence[Example]) -> float:
        trained = [example for example in examples if example.values["trained"]]
        return float(sum(len(example.sequences[0].completion_ids) for example in trained))

    def loss(self, batch: Batch, columns: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> Terms:
        mask = (batch.mask > 0) & (batch.values["trained"] > 0).unsqueeze(1)
        value, old = columns["critic/state_values"], batch.columns["critic/state_values"]
        clip = float("inf") if self.value_clip is None else self.value_clip
        loss = torch.where(mask, ppo_value_loss(value, old, batch.columns[RETURNS], clip=clip), 0.0)
        moved = torch.where(mask, (value.detach() - old).abs() > clip, False)
        return Terms(loss, {"clipped": moved.float().sum(1) / mask.sum(1).clamp(min=1)})


class PPO(PolicyLoss):
    """PPO (Schulman et al. 2017) as Ziegler 2019, Stiennon 2020 and Ouyang 2022 use it: a critic beside the policy,
    reward and KL token by token, generalised advantages.

    The score stands at an answer's last token, unless the scorer gives each token its own; rewards of tokens are
    neither normalised nor clipped. After its last token an answer is worth nothing more, also one that was cut. Passes
    and optimiser steps over one rollout are train.epochs and train.minibatches.
    """

    paper: ClassVar = "Ouyang et al. 2022, arXiv:2203.02155"
    name: Literal["ppo"] = "ppo"
    samples: int = Field(1, ge=1, description="completions sampled for each prompt")
    gamma: float = Field(1.0, ge=0, le=1, description="γ, discount of what comes a token later")
    lam: float = Field(
        0.95, alias="lambda", ge=0, le=1, description="λ of GAE: 1 trusts rewards alone, 0 the critic's next value"
    )
    whiten: bool = Field(True, description="advantages get mean 0 and spread 1 over all tokens of the step")
    critic: Critic = Field(Critic(), description="what the critic starts as, and how it is trained")

    @property
    def needs(self) -> tuple[tuple[str, AnyColumn], ...]:  # type: ignore[override]
        return (*super().needs, ("critic", Column.STATE_VALUES))

    @property
    def critic_algorithm(self) -> ValueLoss:  # type: ignore[override]
        return ValueLoss(value_clip=self.critic.value_clip)

    def trains_policy(self, step: int) -> bool:
        return step >= self.critic.warmup_steps

    def advantages(self, rows: Rows, score: Tensor, kl: Tensor) -> tuple[dict[str, Tensor], Metrics]:
        rewards, values = self._rewards(rows, score, kl), rows.column("critic/state_values")
        found, returns = gae(rewards, values, rows.mask, gamma=self.gamma, lam=self.lam)
        mean, std = rows.over_tokens(found)  # before they are whitened
        metrics = {
            "advantage/mean": mean,
            "advantage/std": std,
            "critic/values_mean": rows.over_tokens(values)[0],
            "critic/returns_mean": rows.over_tokens(returns)[0],
            "critic/explained_variance": explained(values, returns, rows.trained),
        }
        return {ADVANTAGES: rows.whitened(found) if self.whiten else found, RETURNS: returns}, metrics

    @model_validator(mode="after")
    def _ratio_of_tokens(self) -> PPO:
        if self.ratio == "sequence":
            raise Unfit(
                "the advantages of an answer's tokens differ, and one ratio stands for all of them",
                key="ratio",
                rule="token with ppo",
                remedy="take ratio out, or use policy_gradient",
            )
        return self
