"""Who answers a judge's questions, and what it says: log-probs of answers that are given, never free text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

from pydantic import SerializeAsAny

from rayalign.record import Record
from rayalign.registry import Tagged

ASKERS = {
    "engine": "rayalign.scorers.engine_asker:EngineAsker",
    "policy": "rayalign.scorers.engine_asker:PolicyAsker",
    "server": "rayalign.scorers.server:ServerAsker",
}

AnyAsker = Annotated[SerializeAsAny[Record], Tagged("asker", ASKERS, "start")]


@dataclass(frozen=True)
class Question:
    """One question, as chat messages.

    Attributes:
        id: unique among the questions of one call.
        messages: {"role": …, "content": …} each, the last one the user's.
        answers: what may be answered, each one token of the model that is asked, as it stands at the very
            beginning of its turn.
        reasoning: tokens of thinking aloud before the answer, at most; 0: the answer at once. The thinking is the
            assistant's turn after `messages`; then the user says `conclude`, and the answer opens the next turn.
        conclude: what asks for the answer after the thinking.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    answers: tuple[str, ...]
    reasoning: int = 0
    conclude: str = ""

    @property
    def messages_key(self) -> tuple[str, ...]:
        """The same for questions that are asked in the same words."""
        return tuple(f"{message['role']}\n{message['content']}" for message in self.messages)

    def concluded(self, reasoning: str) -> tuple[dict[str, str], ...]:
        """The messages that the answer follows, after this thinking."""
        said = {"role": "assistant", "content": reasoning}
        return (*self.messages, said, {"role": "user", "content": self.conclude})


@dataclass(frozen=True)
class Answer:
    """What was answered.

    Attributes:
        logps: for each of the question's answers its log-prob, −inf where it is not among what was given back;
            None where there is none at all.
        reasoning: the text before the answer, empty where none was asked for.
        unseen: log-prob that an answer that is not among what was given back has at most.
        error: why there is no answer to this one question; it counts as a refusal.
    """

    id: str
    logps: tuple[float, ...] | None
    reasoning: str = ""
    error: str | None = None
    unseen: float = 0.0


def parted(messages: Sequence[Mapping[str, str]], words: re.Pattern[str]) -> list[dict[str, str]]:
    """The same with a space behind the first character of each of these words: a text that spells out a special token
    is then no token of that kind, and ends no turn.

    Args:
        words: what finds that character, as its group 1.
    """
    return [{**each, "content": words.sub(r"\1 ", each["content"])} for each in messages]


@runtime_checkable
class Asker(Protocol):
    """Something that answers questions. It may have many open at once; the answers come in the questions' order."""

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Raises ScoreError when nobody can be asked at all; what is wrong with one question is its answer's error."""

    def tokenizes(self, answers: Sequence[str]) -> None:
        """Whether each answer is one token of the model that is asked, and no two the same: what does not know its
        model's tokenizer says nothing. Raises ScoreError."""

    def memory_gib(self) -> float:
        """Peak memory of other processes than this one."""

    def close(self) -> None: ...
