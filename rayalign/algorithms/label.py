"""Labelling: answers are sampled, or read, and scored; what comes of it is a data set. Nothing is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from rayalign.algorithms.base import Offline
from rayalign.record import Unfit
from rayalign.types import AnyColumn, Example, Group, Metrics, Sampling


class Label(Offline):
    """Labelling: K samples a prompt, or answers of a data set, with the scorer's word, become a data set.

    It is what `rayalign label` does, and a stage of `rounds` whose rows later stages learn from.
    """

    paper: ClassVar = "Lee et al. 2023 (RLAIF), arXiv:2309.00267"
    learns: ClassVar = False
    columns: ClassVar[Sequence[AnyColumn]] = ()
    name: Literal["label"] = "label"
    samples: int = Field(4, ge=0, description="K, completions sampled for each prompt; 0: the answers of data.examples")
    write: Literal["ranked", "pairs", "best"] | None = Field(
        None,
        description="rows: ranked, all answers of a prompt with their scores; pairs, with a probability where the "
        "scorer compares; best, the best answer alone. Default: pairs of a scorer that compares, else ranked",
    )
    shard: int = Field(64, ge=1, description="prompts that are written together: a kill loses no more than these")
    drop_truncated: bool = Field(False, description="leave out answers that were cut at sampling.max_tokens")

    @property
    def rows(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.samples else ("answers", "ranked", "pair")

    def request(self, sampling: Sampling) -> list[Sampling]:
        return [sampling] * self.samples

    def examples(self, groups: Sequence[Group]) -> tuple[list[Example], Metrics]:
        """None: these groups are written, not learned from."""
        return [], {"examples/kept": 0.0, "examples/dropped": 0.0}

    @model_validator(mode="after")
    def _something_to_compare(self) -> Label:
        if self.samples == 1 and self.write != "best":
            raise Unfit(
                "one answer alone is neither ranked nor a pair",
                key="samples",
                rule="2 or more samples; 1 with write: best, to have answers of one's own",
                remedy="raise samples, or set write: best",
            )
        return self
