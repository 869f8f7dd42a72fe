"""PPO with a critic, as in published RLHF: token rewards with a KL penalty, GAE, and several passes over a rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from rayalign.algorithms.base import Offline
from rayalign.algorithms.credits import ADVANTAGES, RETURNS, Rows, explained
from rayalign.algorithms.policy_loss import PolicyLoss, among, of_trained
from rayalign.maths.advantage import gae
from rayalign.maths.policy_gradient import ppo_value_loss
from rayalign.record import Record, Unfit
from rayalign.types import AnyColumn, Batch, Column, Example, Metrics, Terms
from rayalign.types import Sequence as Row


class PlainTexts(Record):
    """Texts as a language model is pretrained on."""

    path: str = Field(
        min_length=1, description="a .txt file, or a data set with a column of texts", examples=["my_texts.jsonl"]
    )
    column: str = Field("text", description="of the data set")
    weight: float = Field(1.0, gt=0, description="of their negative log-likelihood a token, beside the policy's loss")
    tokens: int = Field(256, ge=2, description="of one text; longer ones are several")
    count: int = Field(8, ge=1, description="texts in each training step")


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
    shared: bool = Field(
        False, description="a value head on the policy's own trunk instead of a network: one pass, one optimiser"
    )
    weight: float = Field(
        0.1, gt=0, description="with shared: of the value loss, reduced as `aggregate` says, beside the policy's"
    )
    warmup_steps: int = Field(0, ge=0, description="training steps at the start that train the critic alone")
    value_clip: float | None = Field(
        0.2, gt=0, description="values move at most this far from those before the update; none: without limit"
    )

    @model_validator(mode="after")
    def _one_network(self) -> Critic:
        given = [key for key in ("model", "optimizer", "warmup_steps") if getattr(self, key)]
        if self.shared and given:
            raise Unfit(
                "a head on the policy's trunk starts, learns and steps with the policy",
                key=given[0],
                rule="not set with shared: true",
                remedy=f"take {given[0]} out, or shared: true",
            )
        if not self.shared and self.weight != type(self).model_fields["weight"].default:
            raise Unfit(
                "a critic of its own has an optimizer of its own: its loss is added to no other one",
                key="weight",
                rule="not set, unless shared: true",
                remedy="take weight out, or set shared: true; how fast the critic learns is optimizer: {lr: …}",
            )
        return self


class ValueLoss(Offline):
    """What trains the critic: ½·max((v − R)², (v cut to old ± clip − R)²), averaged over tokens."""

    name: Literal["value_loss"] = "value_loss"
    value_clip: float | None = None
    columns: ClassVar[Sequence[AnyColumn]] = (Column.STATE_VALUES,)

    def dealt(self, examples: Sequence[Example], texts: Sequence[Row]) -> list[Example]:
        return among(examples, len(examples))

    def denominator(self, examples: Sequence[Example]) -> float:
        trained = [example for example in examples if example.values["trained"]]
        return float(sum(len(example.sequences[0].completion_ids) for example in trained))

    def loss(self, batch: Batch, columns: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> Terms:
        loss, clipped = value_terms(batch, columns["critic/state_values"], "critic", self.value_clip)
        return Terms(loss, of_trained({"clipped": clipped}, batch))


def value_terms(batch: Batch, value: Tensor, role: str, limit: float | None) -> tuple[Tensor, Tensor]:
    """[R, T] the loss of values, 0 where nothing is learned; [R] the share of them that moved beyond the clip."""
    mask = (batch.mask > 0) & (batch.values["trained"] > 0).unsqueeze(1)
    old, clip = batch.columns[f"{role}/state_values"], float("inf") if limit is None else limit
    loss = torch.where(mask, ppo_value_loss(value, old, batch.columns[RETURNS], clip=clip), 0.0)
    moved = torch.where(mask, (value.detach() - old).abs() > clip, False)
    return loss, moved.float().sum(1) / mask.sum(1).clamp(min=1)


class PPO(PolicyLoss):
    """PPO as published RLHF uses it: a critic beside the policy, reward and KL by token, generalised advantages.

    Schulman et al. 2017; Ziegler et al. 2019, Stiennon et al. 2020 and Ouyang et al. 2022 for language models.
    The score stands at an answer's last token, unless the scorer gives each token its own; rewards of tokens are
    neither normalised nor clipped. After its last token an answer is worth nothing more, also one that was cut. Passes
    and optimiser steps over one rollout are train.epochs and train.minibatches.
    """

    paper: ClassVar = "Ouyang et al. 2022, arXiv:2203.02155"
    name: Literal["ppo"] = "ppo"
    credits_tokens: ClassVar[bool] = True
    samples: int = Field(1, ge=1, description="completions sampled for each prompt")
    gamma: float = Field(1.0, ge=0, le=1, description="γ, discount of what comes a token later")
    lam: float = Field(
        0.95, alias="lambda", ge=0, le=1, description="λ of GAE: 1 trusts rewards alone, 0 the critic's next value"
    )
    whiten: bool = Field(True, description="advantages get mean 0 and spread 1 over all tokens of the step")
    ptx: PlainTexts | None = Field(
        None,
        description="plain texts mixed into each update, against forgetting (Ouyang 2022's PPO-ptx)",
        examples=[{"path": "my_texts.jsonl", "weight": 1.0}],
    )
    critic: Critic = Field(Critic(), description="what the critic starts as, and how it is trained")

    @property
    def needs(self) -> tuple[tuple[str, AnyColumn], ...]:  # type: ignore[override]
        return (*super().needs, (self._valued_by, Column.STATE_VALUES))

    @property
    def columns(self) -> tuple[AnyColumn, ...]:
        return (*super().columns, *((Column.STATE_VALUES,) if self.critic.shared else ()))

    @property
    def _valued_by(self) -> str:
        return "policy" if self.critic.shared else "critic"

    @property
    def critic_algorithm(self) -> ValueLoss | None:  # type: ignore[override]
        return None if self.critic.shared else ValueLoss(value_clip=self.critic.value_clip)

    @property
    def policy_from(self) -> int:  # type: ignore[override]
        return self.critic.warmup_steps

    def advantages(self, rows: Rows, score: Tensor, kl: Tensor) -> tuple[dict[str, Tensor], Metrics]:
        rewards, values = self._rewards(rows, score, kl), rows.column(f"{self._valued_by}/state_values")
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

    def loss(self, batch: Batch, columns: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> Terms:
        terms, mask = super().loss(batch, columns, statistics), batch.mask > 0
        loss, metrics = terms.loss, dict(terms.metrics)
        if self.critic.shared:
            values, clipped = value_terms(batch, columns["policy/state_values"], "policy", self.critic.value_clip)
            loss = loss + self.critic.weight * self._terms(values, mask)
            found = {"critic/loss": values.detach().sum(1) / mask.sum(1).clamp(min=1), "critic/clipped": clipped}
            metrics |= of_trained(found, batch)
        if self.ptx is None:
            return Terms(loss, metrics)
        text = batch.values["ptx"].unsqueeze(1)
        nll = torch.where(mask & (text > 0), -columns["policy/logps"], 0.0)
        metrics["ptx/nll"] = nll.detach().sum(1) / mask.sum(1).clamp(min=1) * batch.values["among"]
        return Terms(loss + text * nll, metrics)

    def dealt(self, examples: Sequence[Example], texts: Sequence[Row]) -> list[Example]:
        """The examples and plain texts, whose mean negative log-likelihood a token counts ptx.weight times."""
        count = len(examples) + len(texts)
        made = among(examples, count)
        if self.ptx is None:
            return made
        made = [replace(example, values={**example.values, "ptx": 0.0}) for example in made]
        tokens = sum(len(text.completion_ids) for text in texts)
        nothing, columns = dict.fromkeys(made[0].values, 0.0), examples[0].sequences[0].columns
        for text in texts:
            zeros = np.zeros(len(text.completion_ids), np.float32)
            scale = self.ptx.weight * self.denominator(examples) / tokens
            row = replace(text, columns=dict.fromkeys(columns, zeros))
            made.append(Example((row,), {**nothing, "ptx": scale, "among": count / len(texts)}))
        return made
