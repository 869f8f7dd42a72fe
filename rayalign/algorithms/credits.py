"""From scores, KL and values to advantages: on the driver, over all rows of a step, before they are dealt to ranks.

N rows (answers) of a step, T tokens of the longest. What spans a prompt's answers, or the batch (a mean, a spread),
is made here, so that neither ranks nor micro-batches can matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from rayalign.maths.advantage import group_advantage, leave_one_out_advantage, token_rewards
from rayalign.maths.divergence import kl_k1, kl_k2, kl_k3
from rayalign.maths.reduce import whiten
from rayalign.record import Record, Unfit
from rayalign.types import Example, Metrics

ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
ADVANTAGES, RETURNS, TOKEN_SCORES = "credit/advantages", "credit/returns", "score/tokens"


class Controller(Record):
    """The KL coefficient follows a target: coef ← coef·(1 + clip(KL/target − 1, ±0.2)·n/horizon) after each step, n
    answers long (Ziegler 2019, section 2.2). It goes on from where it was when a run is resumed."""

    target: float = Field(gt=0, description="KL to aim at, nats an answer, by the estimator that is named")
    horizon: float = Field(10000.0, gt=0, description="answers; the smaller, the faster the coefficient moves")


class Divergence(Record):
    """KL(π‖π_ref) as a penalty, by a named estimator on the policy's own samples."""

    where: Literal["reward", "loss"] = Field(
        "reward", alias="in", description="reward: taken off the reward of each token; loss: added to the loss"
    )
    estimator: Literal["k1", "k2", "k3"] = Field(
        "k1", description="of d = log π/π_ref: k1 d, k2 d²/2, k3 e^−d − 1 + d; in the loss k3 as GRPO, or k2"
    )
    coef: float = Field(0.05, ge=0, description="β, its weight; 0: none, and no reference is loaded for it")
    adaptive: Controller | None = Field(
        None, description="let coef follow a target KL", examples=[{"target": 6.0, "horizon": 10000}]
    )

    @model_validator(mode="after")
    def _has_a_gradient(self) -> Divergence:
        if self.where == "loss" and self.estimator == "k1" and self.coef:
            raise Unfit(
                "the gradient of k1 in the loss is zero on average: it would hold nothing back",
                key="estimator",
                rule="k2 or k3 with in: loss; k1 with in: reward",
                remedy="set estimator: k3, or in: reward",
            )
        if self.adaptive is not None and not self.coef:
            raise Unfit(
                "a coefficient of 0 stays 0, whatever the target",
                key="coef",
                rule="above 0 with adaptive",
                remedy="set coef: 0.05, or take adaptive out",
            )
        return self


class Rewards(Record):
    """What is done to scores first: the penalty, then the scale, then the clip."""

    no_end_penalty: float = Field(0.0, ge=0, description="taken off the score of an answer without an end token")
    normalise: bool = Field(
        False, description="less the mean, and divided by the spread, of all scores of the run so far"
    )
    clip: float | None = Field(None, gt=0, description="scores are cut to ± this")

    def of(
        self, score: Tensor, cut: Tensor, state: Mapping[str, float], *, fresh: bool = True
    ) -> tuple[Tensor, Metrics]:
        """[N] scores, where `cut` [N] says which answers have no end token; `state` and `fresh` as in `running`."""
        score = score - self.no_end_penalty * cut
        metrics = {"score/mean": float(score.mean()), "score/std": float(score.std(unbiased=False))}
        if self.normalise:
            seen = running(state, metrics, len(score), fresh=fresh)
            spread = (seen["score_m2"] / seen["score_count"]) ** 0.5
            score = (score - seen["score_mean"]) / (spread + 1e-8) if spread > 0 else torch.zeros_like(score)
        if self.clip is not None:
            metrics["score/clipped"] = float((score.abs() > self.clip).double().mean())
            score = score.clamp(-self.clip, self.clip)
        return score, metrics


def running(state: Mapping[str, float], metrics: Metrics, count: int, *, fresh: bool) -> dict[str, float]:
    """Count, mean and sum of squared deviations of all scores so far, with those of one step (Chan et al. 1979); where
    that one uses samples again (not `fresh`) they are there already."""
    if not fresh and "score_count" in state:
        return {name: state[name] for name in ("score_count", "score_mean", "score_m2")}
    before, mean = state.get("score_count", 0.0), state.get("score_mean", 0.0)
    total, lead = before + count, metrics["score/mean"] - mean
    return {
        "score_count": total,
        "score_mean": mean + lead * count / total,
        "score_m2": state.get("score_m2", 0.0) + count * metrics["score/std"] ** 2 + lead**2 * before * count / total,
    }


class Rows:
    """The rows of a step side by side, in float64; one row an example.

    Attributes:
        mask: [N, T] 1 where there is a token.
        trained: [N, T] the same, without rows whose loss is masked.
    """

    def __init__(self, examples: Sequence[Example]):
        self.examples = examples
        self.counts = [len(example.sequences[0].completion_ids) for example in examples]
        self.mask = self._padded([np.ones(count) for count in self.counts])
        self.trained = self.mask * self.value("trained").unsqueeze(1)

    def value(self, name: str) -> Tensor:
        """[N] a value of each example."""
        return torch.tensor([example.values[name] for example in self.examples], dtype=torch.float64)

    def has(self, name: str) -> bool:
        return name in self.examples[0].sequences[0].columns

    def column(self, name: str) -> Tensor:
        """[N, T] a column, 0 beyond the tokens."""
        return self._padded([example.sequences[0].columns[name] for example in self.examples])

    def rollout_logps(self) -> Tensor:
        """[N, T] the engine's."""
        return self._padded([example.sequences[0].rollout_logps for example in self.examples])

    def by_group(self, total: Tensor, how: str) -> Tensor:
        """[N] each total against those of its own prompt. `how`: std, none or leave_one_out; of a prompt with one
        answer it is 0."""
        found, group = torch.zeros_like(total), self.value("group")
        for number in group.unique():
            at = group == number
            own = total[at].unsqueeze(0)
            if own.shape[1] > 1:
                loo = how == "leave_one_out"
                found[at] = (leave_one_out_advantage(own) if loo else group_advantage(own, scale=how))[0]
        return found

    def rewards(self, score: Tensor, kl: Tensor, *, coef: float, penalty: float) -> Tensor:
        """[N, T] of each token: its own score where the scorer gave one, else the answer's at its last token; less
        coef·kl, and of an answer that was cut less `penalty` at its last token (it is in `score` already)."""
        if not self.has(TOKEN_SCORES):
            return token_rewards(score, kl, self.mask, kl_coef=coef)
        return self.column(TOKEN_SCORES) + token_rewards(-penalty * self.value("cut"), kl, self.mask, kl_coef=coef)

    def whitened(self, advantages: Tensor) -> Tensor:
        """[N, T] mean 0 and spread 1 over all tokens that are trained on."""
        return whiten(advantages, self.trained)

    def over_tokens(self, numbers: Tensor) -> tuple[float, float]:
        """Mean and spread over all tokens that are trained on."""
        kept = numbers[self.trained > 0]
        return float(kept.mean()), float(kept.std(unbiased=False))

    def with_columns(self, columns: Mapping[str, Tensor]) -> list[Example]:
        """The examples with these [N, T] numbers as columns."""
        made = []
        for index, (example, count) in enumerate(zip(self.examples, self.counts, strict=True)):
            row = example.sequences[0]
            new = {name: numbers[index, :count].float().numpy() for name, numbers in columns.items()}
            made.append(replace(example, sequences=(replace(row, columns={**row.columns, **new}),)))
        return made

    def _padded(self, lists: Sequence[Sequence[float]]) -> Tensor:
        found = np.zeros((len(lists), max(self.counts)))
        for index, numbers in enumerate(lists):
            found[index, : len(numbers)] = numbers
        return torch.from_numpy(found)


def later_sums(rewards: Tensor) -> Tensor:
    """[N, T] of each token the sum of its own reward and all that follow."""
    return rewards.flip(-1).cumsum(-1).flip(-1)


def explained(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 − Var(returns − values)/Var(returns): 1 for a critic that knows all, 0 for one that knows nothing; 0 where
    the returns are all the same."""
    kept = mask > 0
    spread = returns[kept].var(unbiased=False)
    same = spread <= 1e-12 * returns[kept].square().mean()  # but for roundings
    return 0.0 if same else float(1 - (returns - values)[kept].var(unbiased=False) / spread)
