"""What policy_gradient and ppo share: which samples are learned from, and the clipped loss of their tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor

from rayalign.algorithms.base import Offline, refuse_cache
from rayalign.algorithms.credits import ESTIMATORS, TOKEN_SCORES, Divergence, Rewards, Rows, running
from rayalign.algorithms.groups import is_cut, row, scored, scores_of_tokens
from rayalign.algorithms.reference import Reference
from rayalign.errors import DataError
from rayalign.maths.advantage import AdaptiveKL
from rayalign.maths.divergence import kl_k3
from rayalign.maths.policy_gradient import importance_weight, ppo_policy_loss
from rayalign.record import Unfit
from rayalign.types import AnyColumn, Batch, Column, Example, Group, Metrics, Sampling, Terms
from rayalign.types import Sequence as Row

Aggregate = Literal["token_mean", "sequence_mean", "sequence_sum_mean", "constant"]


class PolicyLoss(Offline):
    """−min(ρA, clip(ρ)A) of each token of the policy's own samples, with a KL to the reference in reward or loss."""

    whole_distribution: ClassVar[bool] = True
    each_answer: ClassVar[bool] = True
    credits_tokens: ClassVar[bool] = False  # whether an answer's tokens have advantages of their own
    drops_equal: ClassVar[bool] = False  # whether nothing is learned from groups whose answers are all worth the same
    samples: int = Field(4, ge=1, description="completions sampled for each prompt")
    kl: Divergence = Field(Divergence(), description="the KL to the reference: where, by which estimator, how much")
    reward: Rewards = Field(Rewards(), description="what is done to scores first")
    clip_low: float = Field(0.2, ge=0, le=1, description="how far the ratio may fall under 1")
    clip_high: float = Field(0.2, ge=0, description="how far the ratio may rise above 1")
    dual_clip: float | None = Field(None, gt=1, description="bound of the loss where advantages are negative, say 3")
    ratio: Literal["token", "sequence"] = Field(
        "token", description="of new to old probability: each token's, or the geometric mean of the answer's (GSPO)"
    )
    aggregate: Aggregate = Field(
        "token_mean",
        description="token_mean: all tokens of the step weigh the same; sequence_mean: all answers; sequence_sum_mean: "
        "sums of answers, averaged; constant: sums ÷ length, averaged (Dr. GRPO)",
    )
    length: float | None = Field(None, gt=0, description="tokens that constant divides by, say sampling.max_tokens")
    overlong: Literal["keep", "mask", "drop"] = Field(
        "keep",
        description="answers cut at max_tokens: learned from; compared with, but not learned from; or left out",
    )
    entropy_weight: float = Field(0.0, ge=0, description="takes this times the entropy of each token off the loss")
    old_logps: Literal["learner", "engine"] = Field(
        "learner",
        description="what ratios are taken to: log-probs by the learner (a pass more where an update has several "
        "optimiser steps), or those that the engine sampled with",
    )
    importance_cap: float | None = Field(
        None,
        gt=0,
        description="weigh tokens by min(p of learner ÷ p of engine, this): for samples of older weights; with "
        "old_logps: engine that is the ratio itself, cut at this",
    )
    stop_kl: float | None = Field(
        None,
        gt=0,
        description="end the update once KL(old‖new), k3, nats a token, averaged over answers, is above this",
    )
    reference: Reference = Field(Reference(), description="whether, and how, the reference follows the policy")

    _updates: int = PrivateAttr(1)  # optimiser steps of an update
    _state: Mapping[str, float] = PrivateAttr(default_factory=dict)  # see `adapt`
    _fresh: bool = PrivateAttr(True)  # whether the scores of this step are new

    # What is asked for, and what is learned from.

    def request(self, sampling: Sampling) -> list[Sampling]:
        return [sampling] * self.samples

    @property
    def needs(self) -> tuple[tuple[str, AnyColumn], ...]:  # type: ignore[override]
        told = self._updates > 1 or self.importance_cap is not None or self._kl_in("reward")
        policy = (("policy", Column.LOGPS),) if self.old_logps == "learner" and told else ()
        return (*policy, *((("reference", Column.LOGPS),) if self.kl.coef else ()))

    @property
    def columns(self) -> tuple[AnyColumn, ...]:
        return (Column.LOGPS, *((Column.ENTROPY,) if self.entropy_weight else ()))

    @property
    def watched(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("policy/old_kl_k3",) if self.stop_kl is not None else ()

    @property
    def at_first(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("old_logps/gap_mean", "old_logps/gap_max")

    def enough(self, metrics: Metrics) -> bool:
        return self.stop_kl is not None and metrics["policy/old_kl_k3"] > self.stop_kl

    def refresh(self, step: int) -> float | None:
        return self.reference.decay_after(step)

    def planned(self, updates: int) -> Self:
        return self._with(_updates=updates)

    def examples(self, groups: Sequence[Group]) -> tuple[list[Example], Metrics]:
        """One example an answer. What is left out is counted: answers that are empty, contested or without a finite
        score, those that were cut where `overlong` says so, and groups that `keeps` does not want, or whose answers
        are all worth the same where `drops_equal` says so. `groups/equal` counts the latter either way."""
        made: list[Example] = []
        left_out = cut = dropped = equal = 0
        by_token = any(group.token_scores for group in groups)
        if by_token and self.credits_tokens:
            self._check_tokens()
        for number, group in enumerate(groups):
            usable = scored(group)
            own = [k for k in usable if k < self.samples]
            kept = [k for k in own if not (self.overlong == "drop" and is_cut(group, k))]
            left_out += min(self.samples, len(group.completions)) - len(own)
            cut += sum(is_cut(group, k) for k in own)
            trained = [k for k in kept if not (self.overlong == "mask" and is_cut(group, k))]
            wanted = bool(trained) and self.keeps(group, kept, usable)
            same = wanted and self.same(group, kept)
            equal += same
            if not wanted or (same and self.drops_equal):
                dropped += 1
                continue
            made += [self._example(group, number, k, by_token) for k in kept]
        counts = {"groups/kept": len(groups) - dropped, "groups/dropped": dropped, "answers/kept": len(made)}
        counts |= {"groups/equal": equal, "answers/left_out": left_out, "answers/overlong": cut}
        return made, {name: float(count) for name, count in counts.items()}

    def _check_tokens(self) -> None:
        """Raises DataError where a scale or a clip of scores would pass the rewards of tokens by."""
        for key in ("normalise", "clip"):
            if getattr(self.reward, key):
                raise DataError(
                    "the scorer gives each token its own reward, and scores of answers would be scaled",
                    where=f"key algorithm.reward.{key}",
                    value=getattr(self.reward, key),
                    rule="rewards of tokens are neither normalised nor clipped",
                    remedy=f"take reward.{key} out, or let the scorer give scores of answers alone",
                )

    def keeps(self, group: Group, kept: Sequence[int], usable: Sequence[int]) -> bool:
        """Whether there is all that it takes to learn from a group of which these answers are left."""
        return True

    def same(self, group: Group, places: Sequence[int]) -> bool:
        """Whether there are several answers, and all have the same score once the penalty is taken off, and the clip
        made."""
        limit = float("inf") if self.reward.clip is None or self.reward.normalise else self.reward.clip
        worth = (group.scores[k] - self.reward.no_end_penalty * is_cut(group, k) for k in places)
        return len(places) > 1 and len({min(max(each, -limit), limit) for each in worth}) == 1

    def useful(self, group: Group) -> bool:
        return bool(self.examples([group])[0])

    def more_values(self, group: Group) -> dict[str, float]:
        """What an example has besides, by name: the same for all answers of the group."""
        return {}

    def _example(self, group: Group, number: int, k: int, by_token: bool) -> Example:
        sequence, cut = row(group, k), is_cut(group, k)
        if by_token:
            sequence = replace(sequence, columns={TOKEN_SCORES: scores_of_tokens(group, k)})
        trained = float(not (cut and self.overlong == "mask"))
        values = {"group": float(number), "score": float(group.scores[k]), "cut": float(cut), "trained": trained}
        return Example((sequence,), values | self.more_values(group))

    # What it is worth.

    def credit(self, examples: Sequence[Example]) -> tuple[Sequence[Example], Metrics]:
        if not examples:
            return examples, {}
        rows = Rows(examples)
        score, metrics = self.reward.of(rows.value("score"), rows.value("cut"), self._state, fresh=self._fresh)
        kl = torch.zeros_like(rows.mask)
        if self._kl_in("reward"):
            policy = rows.column("policy/logps") if rows.has("policy/logps") else rows.rollout_logps()
            kl = ESTIMATORS[self.kl.estimator](policy, rows.column("reference/logps")) * rows.mask
            # Of samples of older weights the penalty alone is no estimate of the policy's KL, which the controller
            # follows: their tokens weigh as they do in the loss.
            cap = self.importance_cap
            own = 1.0 if cap is None else importance_weight(policy, rows.rollout_logps(), cap=cap)
            metrics[f"reward/kl_{self.kl.estimator}"] = float((own * kl).sum(1).mean())
            metrics["reward/after_kl"] = float((score - self._coef * kl.sum(1)).mean())
        if self.kl.coef:
            metrics["kl/coef"] = self._coef
        if rows.has("policy/logps"):
            gap = (rows.column("policy/logps") - rows.rollout_logps()).abs()
            metrics["old_logps/gap_mean"] = float((gap.sum(1) / rows.mask.sum(1)).mean())
            metrics["old_logps/gap_max"] = float(gap.amax(1).mean())
        columns, more = self.advantages(rows, score, kl)
        return rows.with_columns(columns), metrics | more

    def advantages(self, rows: Rows, score: Tensor, kl: Tensor) -> tuple[dict[str, Tensor], Metrics]:
        """[N] scores and [N, T] KL (0 where it is not in the reward) → columns [N, T], advantages among them."""
        raise TypeError(f"{type(self).__name__} defines no advantages")

    def _rewards(self, rows: Rows, score: Tensor, kl: Tensor) -> Tensor:
        """[N, T] of each token."""
        return rows.rewards(score, kl, coef=self._coef, penalty=self.reward.no_end_penalty)

    # The loss.

    def dealt(self, examples: Sequence[Example], texts: Sequence[Row]) -> list[Example]:
        return among(examples, len(examples))

    def denominator(self, examples: Sequence[Example]) -> float:
        trained = [example for example in examples if example.values["trained"]]
        if self.aggregate == "token_mean":
            return float(sum(len(example.sequences[0].completion_ids) for example in trained))
        return float(len(trained))

    def loss(self, batch: Batch, columns: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> Terms:
        logp = columns["policy/logps"]
        mask = (batch.mask > 0) & (batch.values["trained"] > 0).unsqueeze(1)
        annotated = batch.columns.get("policy/logps")
        rollout = torch.where(mask, batch.rollout_logps, logp.detach())
        engine = self.old_logps == "engine"
        old = annotated if annotated is not None else rollout if engine else logp.detach()
        taken, base = self._taken(logp, old, mask)
        if engine and self.importance_cap is not None:  # min(ratio, cap), with the gradient of a weight that is fixed
            base = torch.maximum(base, taken.detach() - math.log(self.importance_cap))
        advantages = batch.columns["credit/advantages"]
        loss, clipped = ppo_policy_loss(
            taken, base, advantages, clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip
        )
        of_rows = {
            "policy/clipped": clipped.to(loss.dtype),
            "policy/ratio": (taken - base).detach().clamp(max=20).exp(),
            "policy/old_kl_k3": kl_k3(old, logp.detach()),
        }
        if self._kl_in("loss"):
            kl = ESTIMATORS[self.kl.estimator](logp, batch.columns["reference/logps"])
            loss = loss + self._coef * kl
        if self.importance_cap is not None and not engine:
            weight = importance_weight(old, rollout, cap=self.importance_cap)
            loss, of_rows["policy/weight"] = loss * weight, weight
        if self.entropy_weight:
            loss = loss - self.entropy_weight * columns["policy/entropy"]
            of_rows["policy/entropy"] = columns["policy/entropy"].detach()
        metrics = {name: _mean(each, mask) for name, each in of_rows.items()}
        if self._kl_in("loss"):
            metrics[f"policy/kl_{self.kl.estimator}"] = torch.where(mask, kl.detach(), 0.0).sum(1)
        if annotated is None:
            gap = torch.where(mask, (logp.detach() - rollout).abs(), 0.0)
            metrics |= {"old_logps/gap_mean": _mean(gap, mask), "old_logps/gap_max": gap.amax(1)}
        return Terms(self._terms(loss, mask), of_trained(metrics, batch))

    def _taken(self, logp: Tensor, old: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[R, T] twice: what the ratio of each token is the exponent of the difference of."""
        if self.ratio == "token":
            return logp, old
        # The log of GSPO's ratio itself: that of a ratio which is too small for a number would have no gradient.
        mean = torch.where(mask, logp - old, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        return mean.expand_as(logp), torch.zeros_like(logp)

    def _terms(self, loss: Tensor, mask: Tensor) -> Tensor:
        """[R, T] so that their sum ÷ `denominator` is what `maths.reduce.aggregate` gives."""
        loss = torch.where(mask, loss, 0.0)
        if self.aggregate == "sequence_mean":
            return loss / mask.sum(1, keepdim=True).clamp(min=1)
        return loss / self.length if self.aggregate == "constant" else loss

    # What follows the training.

    def adapted(self, state: Mapping[str, float], *, fresh: bool = True) -> Self:
        return self._with(_state=dict(state), _fresh=fresh)

    def adapt(self, state: Mapping[str, float], metrics: Metrics) -> dict[str, float]:
        """The KL coefficient of the controller, and what is known of all scores."""
        found, count = dict(state), int(metrics["answers/kept"])
        measured = metrics.get(f"{'reward' if self.kl.where == 'reward' else 'policy'}/kl_{self.kl.estimator}")
        learned = "loss" in metrics  # a policy that waits for its critic has the KL of nothing that it learned
        if self.kl.adaptive is not None and measured is not None and learned:
            follow = self.kl.adaptive
            controller = AdaptiveKL(self._coef, target=follow.target, horizon=follow.horizon)
            found["kl_coef"] = controller.update(measured, count)
        if self.reward.normalise:
            found |= running(state, metrics, count, fresh=self._fresh)
        return found

    @property
    def _coef(self) -> float:
        return self._state.get("kl_coef", self.kl.coef)

    def _kl_in(self, where: str) -> bool:
        return self.kl.coef > 0 and self.kl.where == where

    def _with(self, **private: object) -> Self:
        found = self.model_copy()
        for name, value in private.items():
            setattr(found, name, value)
        return found

    @model_validator(mode="after")
    def _fits(self) -> PolicyLoss:
        refuse_cache(self.reference)
        if (self.length is not None) != (self.aggregate == "constant"):
            constant = self.aggregate == "constant"
            raise Unfit(
                "sums have nothing to be divided by" if constant else "nothing is divided by a length",
                key="length",
                rule="set with aggregate: constant, and only there",
                remedy="set length to sampling.max_tokens" if constant else "take length out, or aggregate: constant",
            )
        if self.drops_equal and self.reward.normalise and self.reward.clip is not None:
            raise Unfit(
                "the clip of normalised scores would make answers equal after equal groups were dropped",
                key="reward",
                rule="clip without normalise, or equal_groups: keep",
                remedy="take reward.normalise out: an answer's score is compared with its group's anyway",
            )
        if self.ratio == "sequence" and self.credits_tokens:
            raise Unfit(
                "the advantages of an answer's tokens differ, and one ratio stands for all of them",
                key="ratio",
                rule="token with ppo and reinforce_pp",
                remedy="take ratio out, or use policy_gradient with advantage: grpo",
            )
        if self.reference != Reference() and not self.kl.coef:
            raise Unfit(
                "there is no reference that could follow the policy",
                key="reference",
                rule="kl.coef above 0",
                remedy="take reference out",
            )
        return self


def among(examples: Sequence[Example], count: int) -> list[Example]:
    """With the factor that makes a mean over the `count` examples of an optimiser step one over those of these that
    are trained on. Where none of them is, there is nothing to be averaged."""
    factor = count / max(1.0, sum(example.values["trained"] for example in examples))
    return [replace(example, values={**example.values, "among": factor}) for example in examples]


def of_trained(metrics: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """[B] metrics that are 0 where nothing is trained, so that their means are over the others."""
    return {name: each * batch.values["among"] for name, each in metrics.items()}


def _mean(numbers: Tensor, mask: Tensor) -> Tensor:
    """[R, T] → [R] over the tokens that count; 0 where none do."""
    kept = torch.where(mask, numbers.detach(), 0.0)
    return kept.sum(1) / mask.sum(1).clamp(min=1)
