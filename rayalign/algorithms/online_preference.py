"""Online preference optimisation: sample K answers, let a scorer rank them, learn from the pairs.

Online DPO with AI feedback as in Guo et al. 2024 (OAIF), with the loss of Rafailov et al. 2023 or any other of a pair.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from rayalign.algorithms.base import refuse_cache
from rayalign.algorithms.preference import UNRATED, PairAlgorithm, Unrated
from rayalign.types import Sampling


class OnlinePreference(PairAlgorithm):
    """Online preference optimisation: K samples a prompt, a scorer ranks them, and pairs of them train the policy."""

    paper: ClassVar = "Guo et al. 2024, arXiv:2402.04792"
    name: Literal["online_preference"] = "online_preference"
    samples: int = Field(4, ge=2, description="K, completions sampled for each prompt")
    unrated: Unrated = Field("bradley_terry", description=UNRATED)

    def request(self, sampling: Sampling) -> list[Sampling]:
        return [sampling] * self.samples

    @model_validator(mode="after")
    def _samples_are_new(self) -> OnlinePreference:
        refuse_cache(self.reference)
        return self
