"""Online preference optimisation: sample K answers, let a scorer rank them, learn from the pairs.

Online DPO with AI feedback as in Guo et al. 2024 (OAIF), with the loss of Rafailov et al. 2023 or any other of a pair.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rayalign.algorithms.preference import PairAlgorithm
from rayalign.types import Sampling


class OnlinePreference(PairAlgorithm):
    """Online preference optimisation: K samples a prompt, a scorer ranks them, and pairs of them train the policy."""

    paper: ClassVar = "Guo et al. 2024, arXiv:2402.04792"
    name: Literal["online_preference"] = "online_preference"
    samples: int = Field(4, ge=2, description="K, completions sampled for each prompt")

    def request(self, sampling: Sampling) -> list[Sampling]:
        return [sampling] * self.samples
