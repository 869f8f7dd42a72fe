"""What `sampling:` in a config can be: samples, or the candidates of a search."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from rayalign.record import Record, Unfit
from rayalign.types import DiverseBeam, Sampling


class _Lengths(Record):
    """Of completions, however they are drawn."""

    name: str  # first of the keys, wherever they are listed
    max_tokens: int = Field(64, ge=1, description="longest completion, in tokens")
    min_tokens: int = Field(0, ge=0, description="no end token before this many tokens")

    @model_validator(mode="after")
    def _room(self) -> _Lengths:
        if self.min_tokens > self.max_tokens:
            raise Unfit(
                "completions could never end",
                key="min_tokens",
                rule=f"at most sampling.max_tokens={self.max_tokens}",
                remedy=f"lower min_tokens to {self.max_tokens} or less, or raise max_tokens",
            )
        return self


class SamplingConfig(_Lengths):
    """Samples: each completion drawn by itself, with a seed of its own."""

    name: Literal["sample"] = "sample"
    temperature: float = Field(1.0, ge=0, description="of the softmax; 0 is greedy. The learner applies it too")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling; 1 is off")
    top_k: int = Field(0, ge=0, description="0 is off")

    def sampling(self) -> Sampling:
        """Of one completion."""
        return Sampling(self.max_tokens, self.temperature, self.top_p, self.top_k, self.min_tokens)


class DiverseBeamConfig(_Lengths):
    """Diverse beam search: the K completions of a prompt come from one search, each group kept away from the others.

    It draws nothing: the same weights give the same candidates, whatever the seed. Their log-probs are the model's at
    temperature 1, without penalty. Evaluations of a policy sample ordinarily all the same, at temperature 1 and up to
    max_tokens, whatever min_tokens. Candidates of different groups may come out the same: candidates/distinct counts
    those that differ.
    """

    paper: ClassVar = "Vijayakumar et al. 2016, arXiv:1610.02424"
    temperature: ClassVar[float] = 1.0  # of the log-probs, in engine and learner
    name: Literal["diverse_beam"] = "diverse_beam"
    beams: int = Field(10, ge=2, le=256, description="K, candidates a prompt; the algorithm's samples have to agree")
    groups: int = Field(
        10,
        ge=1,
        description="into which the beams are divided; as many as beams is one pass of the engine, at the speed of "
        "sampling, and fewer are two to four times slower",
    )
    penalty: float = Field(
        4.0,
        ge=0,
        description="nats a token loses for each beam of an earlier group that has it at the same place, where a group "
        "that has ended has the end token",
    )
    length_penalty: float = Field(
        1.0, description="candidates are ranked by sum ÷ length^length_penalty; above 0 longer ones gain"
    )

    @model_validator(mode="after")
    def _equal_groups(self) -> DiverseBeamConfig:
        if self.beams % self.groups:
            near = [n for n in range(1, self.beams + 1) if self.beams % n == 0]
            raise Unfit(
                "the groups cannot be of the same size",
                key="groups",
                rule=f"a divisor of beams={self.beams}: {', '.join(map(str, near))}",
                remedy=f"set groups={min(near, key=lambda n: abs(n - self.groups))}, or beams to a multiple of it",
            )
        return self

    def sampling(self) -> Sampling:
        """Of one prompt's candidates together."""
        search = DiverseBeam(self.beams, self.groups, self.penalty, self.length_penalty)
        return Sampling(self.max_tokens, min_tokens=self.min_tokens, search=search)
