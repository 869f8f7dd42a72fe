"""Generation: completions are written down as they come. Nothing is scored, nothing is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from rayalign.algorithms.base import Offline
from rayalign.types import AnyColumn, Example, Group, Metrics, Sampling


class Generate(Offline):
    """Generation: K completions of each prompt, sampled or searched, with their log-probs. No scorer, no training.

    It is what `rayalign generate` does, also with the config of another algorithm.
    """

    paper: ClassVar = "Vijayakumar et al. 2016 (diverse beam search), arXiv:1610.02424"
    learns: ClassVar = False
    unscored: ClassVar = True
    columns: ClassVar[Sequence[AnyColumn]] = ()
    name: Literal["generate"] = "generate"
    samples: int | None = Field(
        None, ge=1, description="K, completions of each prompt; default 1, or the beams of a search"
    )

    def request(self, sampling: Sampling) -> list[Sampling]:
        return [sampling] * (self.samples or (sampling.search.beams if sampling.search else 1))

    def examples(self, groups: Sequence[Group]) -> tuple[list[Example], Metrics]:
        """None: these completions are written, not learned from."""
        return [], {"examples/kept": 0.0, "examples/dropped": 0.0}
