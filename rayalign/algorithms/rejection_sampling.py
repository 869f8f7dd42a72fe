"""Rejection sampling: of K answers the one that the scorer likes best is learned, by its likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from rayalign.algorithms.groups import scored
from rayalign.algorithms.sft import SFT
from rayalign.maths.policy_gradient import best_of_n_kl
from rayalign.types import Example, Group, Metrics, Sampling


class RejectionSampling(SFT):
    """Rejection sampling: K samples a prompt, and the likelihood of the one that the scorer likes best.

    The best of n is at most log n − (n−1)/n nats from the policy that sampled it: best_of_n/kl_bound stands beside
    what it gains. To sample a whole data set first and learn from it later, see the algorithm `label`.
    """

    paper: ClassVar = "Touvron et al. 2023 (Llama 2), arXiv:2307.09288; Llama 3, Dubey et al. 2024, arXiv:2407.21783"
    rows: ClassVar = ()
    name: Literal["rejection_sampling"] = "rejection_sampling"
    samples: int = Field(4, ge=2, description="K, completions sampled for each prompt, of which one is learned")
    min_gain: float = Field(
        0.0,
        ge=0,
        description="prompts whose best answer is less than this above their mean score are left out, as "
        "are those whose answers are all as good",
    )

    def request(self, sampling: Sampling) -> list[Sampling]:
        return [sampling] * self.samples

    def examples(self, groups: Sequence[Group]) -> tuple[list[Example], Metrics]:
        """The best answer of each group. Ties, and groups whose best gains less than `min_gain`, are dropped and
        counted."""
        kept = [group for group in groups if self._gains(group)]
        examples, _ = super().examples(kept)
        counts = {"examples/kept": float(len(examples)), "examples/dropped": float(len(groups) - len(examples))}
        drawn = not any("candidates/distinct" in group.metrics for group in groups)
        return examples, counts | best_of_n([[group.scores[i] for i in scored(group)] for group in groups], drawn=drawn)

    def _gains(self, group: Group) -> bool:
        scores = [group.scores[index] for index in scored(group)]
        if not scores or min(scores) == max(scores):  # ties, whose mean in floating point may not be their score
            return False
        return max(scores) - math.fsum(scores) / len(scores) >= self.min_gain


def best_of_n(scores: Sequence[Sequence[float]], *, drawn: bool = True) -> Metrics:
    """What choosing the best of n gains, and how far it is from the policy at most (nats). Prompts weigh the same.

    best_of_n/reward: mean of the best scores; best_of_n/mean_reward: of all scores; best_of_n/gain: their difference;
    best_of_n/kl_bound: log n − (n−1)/n, an upper bound on KL(best of n ‖ policy), the mean over prompts where n
    differs. Empty where nothing is scored.

    Args:
        scores: of each prompt those of its answers, finite.
        drawn: whether the answers are samples: for those of a search there is no such bound.
    """
    known = [each for each in scores if each]
    if not known:
        return {}
    best, mean = np.mean([max(each) for each in known]), np.mean([np.mean(each) for each in known])
    return {
        "best_of_n/reward": float(best),
        "best_of_n/mean_reward": float(mean),
        "best_of_n/gain": float(best - mean),
        **({"best_of_n/kl_bound": float(np.mean([best_of_n_kl(len(each)) for each in known]))} if drawn else {}),
    }
