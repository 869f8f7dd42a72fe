"""What becomes of completions that a scorer fails on: the run ends, they score 0, or nothing is learned from them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Literal

from pydantic import Field

from rayalign.errors import ScoreError, ScorerLost
from rayalign.record import Record
from rayalign.types import FAILED, Group, Judgement

MOST_LEFT = 16  # calls that never came back, in one scorer's life


class Tolerance(Record):
    """What is done where a completion cannot be scored."""

    on_error: Literal["error", "zero", "skip"] = Field(
        "error",
        description="of a completion whose score fails, is no finite number, or takes too long: error ends the run, "
        "zero scores it 0, skip learns nothing from it; the metric scores/failed counts them",
    )


def judged(groups: Sequence[Group], scores: Sequence[float | None], on_error: str) -> list[Judgement]:
    """Scores of all completions, one group after the other, as judgements; None: there is no score.

    One that is skipped is contested; its number is the mean of its group's, so that no mean of rewards moves.
    """
    numbers: Iterator[float | None] = iter(scores)
    found = []
    for group in groups:
        row = [next(numbers) for _ in group.texts]
        there = [score for score in row if score is not None]
        usual = math.fsum(there) / len(there) if there and on_error == "skip" else 0.0
        failed = tuple(score is None for score in row)
        found.append(
            Judgement(
                tuple(usual if score is None else score for score in row),
                metrics={FAILED: float(sum(failed))},
                contested=failed if on_error == "skip" else (),
            )
        )
    return found


def named(error: ScoreError, group: Group, place: int) -> ScoreError:
    """The error with the completion that it is about."""
    text = group.texts[place]
    short = text if len(text) <= 60 else f"{text[:59]}…"
    what = f"{error.what}, for completion {place} of prompt {group.prompt.index}: {short!r}"
    return ScoreError(what, where=error.where, value=error.value, rule=error.rule, remedy=error.remedy)


class TooLate(Exception):
    """A call has not come back within its time."""


class Worker:
    """Calls functions one after the other, in a thread of its own, and waits for each so long and no longer.

    Python cannot end a thread: a call that is late is left behind, and the next one gets a new thread.
    """

    def __init__(self) -> None:
        self._left: list[threading.Thread] = []
        self._thread: threading.Thread | None = None

    def __call__(self, function: Callable[..., Any], timeout_s: float, **arguments: Any) -> Any:
        """Raises TooLate, what the function raises, and ScorerLost when too many calls have been left behind."""
        self._left = [thread for thread in self._left if thread.is_alive()]
        if len(self._left) >= MOST_LEFT:
            raise ScorerLost(
                "too many calls of the scoring function have not come back",
                value=f"{len(self._left)} that still run",
                rule=f"fewer than {MOST_LEFT}: each of them takes memory and time",
                remedy="give the function a deadline of its own for what it waits for",
            )
        if self._thread is None:
            self._asked: SimpleQueue[tuple[Callable[..., Any], dict[str, Any]] | None] = SimpleQueue()
            self._answers: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
            queues = (self._asked, self._answers)
            self._thread = threading.Thread(target=_work, args=queues, name="scoring", daemon=True)
            self._thread.start()
        self._asked.put((function, arguments))
        try:
            well, value = self._answers.get(timeout=timeout_s)
        except Empty:
            self._left.append(self._thread)
            self._asked.put(None)  # should it ever come back, its thread ends
            self._thread = None
            raise TooLate from None
        if not well:
            raise value
        return value

    def close(self) -> None:
        if self._thread is not None:
            self._asked.put(None)
            self._thread = None


def _work(asked: SimpleQueue, answers: SimpleQueue) -> None:
    while (call := asked.get()) is not None:
        function, arguments = call
        try:
            answers.put((True, function(**arguments)))
        except BaseException as error:  # whatever it is, it belongs to whoever waits
            answers.put((False, error))
