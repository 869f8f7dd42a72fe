"""How an opponent's answers are asked for, kept while they come, and counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from rayalign.errors import DataError
from rayalign.protocols import Engine
from rayalign.rollouts import sample_seed
from rayalign.selfplay.shards import Answer, L, Shard
from rayalign.types import Completion, Group, Request, Sampling

SAY_EVERY_S = 15.0
LONG = "a long prompt"


@dataclass(frozen=True)
class Opponent:
    """How answers are sampled.

    Attributes:
        room: tokens that a prompt may have, so that an answer fits behind it.
        refuse_long: whether a longer one ends the run; else it is left out, and counted.
        open: requests that are open at a time: enough that no engine waits, few enough that none is given too many.
    """

    engine: Engine
    sampling: Sampling
    decode: Callable[[Sequence[int]], str]
    seed: int
    room: int
    refuse_long: bool
    open: int

    def request(self, iteration: int, row: int, group: Group) -> Request:
        seed = sample_seed(self.seed, f"generation-{iteration}", group.prompt.index, 0)
        return Request(f"generation-{iteration}/{row}", group.prompt.token_ids, self.sampling, seed)

    def without(self, row: int, group: Group | None) -> Answer | None:
        """Why a row gets no answer. Raises DataError where that ends the run."""
        if group is None:
            return Answer(row, (), left_out="a bad row")
        tokens = len(group.prompt.token_ids)
        if tokens <= self.room:
            return None
        if self.refuse_long:
            raise DataError(
                "this prompt leaves no room for an answer",
                where=f"data.examples, row {group.prompt.index + 1}",
                value=f"{tokens} tokens",
                rule=f"at most {self.room} (engine.max_context − sampling.max_tokens)",
                remedy="raise engine.max_context, lower sampling.max_tokens, or set data.long_prompts=skip",
            )
        return Answer(row, (), group.prompt.text, left_out=LONG)

    def answer(self, row: int, group: Group, completion: Completion) -> Answer:
        text, same = self.decode(completion.token_ids), completion.token_ids == group.completions[0].token_ids
        ids, reason = completion.token_ids, completion.finish_reason
        return Answer(row, ids, group.prompt.text, text, reason, same, engine=completion.engine)


class Rate:
    """How fast answers come, in words: at each tenth of them, but not more often than one can read.

    Args:
        known: answers that were there before.
        total: answers of the iteration.
    """

    def __init__(self, known: int, total: int):
        self._known, self._there, self._total, self._tokens = known, known, total, 0
        self._begun = self._said = self._now = time.perf_counter()

    def tells(self, there: int, tokens: int) -> bool:
        """Count an answer of so many tokens, the last of so many; whether it is time to say how it goes."""
        tenth = there * 10 // self._total > self._there * 10 // self._total
        self._there, self._tokens, self._now = there, self._tokens + tokens, time.perf_counter()
        if there < self._total and not (tenth and self._now - self._said > SAY_EVERY_S):
            return False
        self._said = self._now
        return True

    @property
    def seconds(self) -> float:
        return self._now - self._begun

    @property
    def tokens_per_s(self) -> float:
        return self._tokens / max(self.seconds, 1e-9)

    def already(self) -> str:
        return f", {self._known:,} of them there already" if self._known else ""

    def __str__(self) -> str:
        answers = (self._there - self._known) / max(self.seconds, 1e-9)
        return f"{self._there:,} of {self._total:,} answers, {answers:.1f} a second, {self.tokens_per_s:,.0f} tokens/s"


class Work(Generic[L]):
    """The shards of an iteration while they are filled. `answers`: all that is there, without texts."""

    def __init__(self, shards: Sequence[Shard[L]], say: Callable[[str], None]):
        self._place = {row: shard for shard in shards for row in shard.rows}
        self._begun: dict[Path, dict[int, L]] = {}  # of the shards that are not whole
        self.answers: dict[int, L] = {}
        self.missing: list[int] = []
        for shard in shards:
            there = shard.read()
            if shard.damage:
                say(f"{shard.damage}: it is set aside, and what it is to hold is asked again")
                shard.set_aside()
                there = {}
            there = {row: answer for row, answer in there.items() if answer.left_out != LONG}  # there may be room now
            if there and (len(there) < len(shard.rows) or not shard.path.is_file()):
                self._begin(shard, there)
            self.answers |= {row: answer.compact() for row, answer in there.items()}
            self.missing += [row for row in shard.rows if row not in there]

    def add(self, answer: L) -> None:
        shard = self._place[answer.row]
        if shard.path not in self._begun:
            self._begin(shard, {})
        there = self._begun[shard.path]
        there[answer.row] = answer
        shard.add(answer)
        self.answers[answer.row] = answer.compact()
        if len(there) == len(shard.rows):
            shard.finish(self._begun.pop(shard.path))

    def _begin(self, shard: Shard[L], there: dict[int, L]) -> None:
        if len(there) == len(shard.rows):  # killed between its last answer and its last word
            shard.finish(there)
            return
        shard.begin(there.values())
        self._begun[shard.path] = there

    def close(self) -> None:
        for shard in {id(each): each for each in self._place.values()}.values():
            shard.close()
