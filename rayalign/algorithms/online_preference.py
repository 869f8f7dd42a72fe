"""Online preference optimisation: sample K answers, let a scorer rank them, learn from the pairs.

Online DPO with AI feedback as in Guo et al. 2024 (OAIF), with the loss of Rafailov et al. 2023 or any other of a pair.
How long one set of samples is used is `rollout.resample_every`: from every step to once, which is offline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from rayalign.algorithms.base import refuse_cache
from rayalign.algorithms.pairing import LABELS, WHICH, Labels, Pairing, Which
from rayalign.algorithms.preference import UNRATED, PairAlgorithm, Unrated
from rayalign.types import Group, Metrics, Sampling


class OnlinePreference(PairAlgorithm):
    """Online preference optimisation: K samples a prompt, a scorer ranks them, and pairs of them train the policy.

    Any pair loss learns from scores, or from a judge's P(i ≻ j) where it gives one: it says which answer is chosen,
    and what `soft` and `psi_po` are drawn to.
    """

    paper: ClassVar = "Guo et al. 2024, arXiv:2402.04792"
    name: Literal["online_preference"] = "online_preference"
    samples: int = Field(4, ge=2, description="K, completions sampled for each prompt")
    pairs: Which = Field("best_worst", description=WHICH)
    labels: Labels = Field("certain", description=LABELS)
    unrated: Unrated = Field("bradley_terry", description=UNRATED)

    def request(self, sampling: Sampling) -> list[Sampling]:
        return [sampling] * self.samples

    def paired(self, groups: Sequence[Group]) -> tuple[list[tuple[Group, int, int]], Metrics]:
        return Pairing(self.pairs, self.labels, self.unrated, self.takes_ties).of(groups)

    @model_validator(mode="after")
    def _samples_are_new(self) -> OnlinePreference:
        refuse_cache(self.reference)
        return self
