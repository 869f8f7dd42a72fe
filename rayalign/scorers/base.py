"""What a scorer is, what it may give, and a scorer in this process."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

from pydantic import Field

from rayalign.errors import ScoreError
from rayalign.memory import peak_gib
from rayalign.record import Record
from rayalign.types import Group, Judgement

# Groups → for each of them one score a completion, or a Judgement. It may have `close()`, called at the end, and
# `memory_gib()`, the peak memory of processes of its own.
ScoreFunction = Callable[[Sequence[Group]], Sequence[Sequence[float] | Judgement]]
AT_ONCE = 32  # groups that are scored in one call, at most: more would keep others waiting for the first of them
# What a run says itself: a scorer's metric of such a name would stand in its place.
TAKEN = (
    *("reward", "rewards", "length", "truncated", "completion", "rollout", "time", "memory", "kl", "loss", "logps"),
    *("step", "eval", "held_out", "win_rate", "examples", "pairs", "best_of_n", "distinct_1", "distinct_2"),
    *("ranking", "likelihood", "candidates", "gold", "groups", "answers", "score", "advantage", "policy", "critic"),
)


class ScorerConfig(Record):
    """Settings that all scorers share. A scorer of one's own derives from this and defines `start`."""

    name: str
    count: int = Field(1, ge=1, description="scorer actors")
    deadline_s: float = Field(
        300.0, gt=0, description="seconds without the scores of any group after which one is lost"
    )
    max_replacements: int = Field(3, ge=0, description="dead scorer actors that are replaced in one run")

    def start(self) -> ScoreFunction:
        """Load what is needed, in the process that will score, and return the function that scores
        groups: one score a completion, higher is better; or a Judgement, with preferences and metrics besides."""
        raise ScoreError(f"the scorer {self.name} defines no start()", remedy="return a function from groups to scores")

    def check(self, model: str, *, trust_remote_code: bool = False) -> None:
        """Whether what it needs is there, looked at by the driver before anything is started. Raises ConfigError.

        Args:
            model: of the policy, a folder or a hub id.
        """

    def check_files(self) -> None:
        """Whether files that it names are there, for a plan, which loads nothing. Raises ConfigError."""

    def at_once(self, answers: int) -> int:
        """Groups of so many answers each that are scored in one call: a scorer is heard of after each of them only,
        so that they have to be scored well within `deadline_s`."""
        return AT_ONCE

    def contents(self) -> dict[str, str]:
        """Fingerprints of files that it names, by key: others would be another scorer. Raises ConfigError."""
        return {}

    def within(self, deadline_s: float) -> Self:
        """The same with so many seconds for some groups, as a part of a mix has them."""
        return self.model_copy(update={"deadline_s": deadline_s})

    @property
    def compares(self) -> bool:
        """Whether a score is how an answer stands among the others to its prompt: the same for any that is alone."""
        return False

    @property
    def gives_preferences(self) -> bool:
        """Whether it says of pairs which one is better."""
        return False

    @property
    def relative(self) -> bool:
        """Whether it says nothing of an answer that is the only one to its prompt."""
        return False

    @property
    def gpus(self) -> int:
        """That each of its actors takes, on a cluster that has some."""
        return 0

    @property
    def borrows_engine(self) -> bool:
        """Whether it asks the policy's engine, with the reference's weights, between samplings: it is then no actor
        but lives with the driver, see `scorers.lent`."""
        return False


class LocalScorer:
    """A scorer in this process: `poll` scores what was submitted."""

    def __init__(self, config: ScorerConfig, *, name: str = "scorer-0"):
        self._score: Any = config.start()
        self._at_once = config.at_once
        self._waiting: list[Group] = []
        self.name = name

    def submit(self, groups: Sequence[Group]) -> None:
        self._waiting += groups

    def poll(self, timeout_s: float = 1.0) -> list[Group]:
        """Some groups at least, when any wait, however long it takes."""
        if not self._waiting:
            return []
        most = self._at_once(len(self._waiting[0].texts))
        taken, self._waiting = self._waiting[:most], self._waiting[most:]
        return score_groups(self._score, taken, who=self.name)

    def memory_gib(self) -> float:
        return peak_gib() + (self._score.memory_gib() if hasattr(self._score, "memory_gib") else 0.0)

    def close(self) -> None:
        self._waiting = []
        if hasattr(self._score, "close"):
            self._score.close()


def score_groups(score: ScoreFunction, groups: Sequence[Group], *, who: str) -> list[Group]:
    """The groups with their scores, and what else is said of them.

    Raises:
        ScoreError: scores are missing, or something is not a finite number or no probability.
    """
    found = list(score(groups))
    if len(found) != len(groups):
        raise ScoreError(
            "the number of scored groups is wrong", where=who, value=len(found), rule=f"{len(groups)} groups"
        )
    return [_judged(group, each, who) for group, each in zip(groups, found, strict=True)]


def _judged(group: Group, found: Sequence[float] | Judgement, who: str) -> Group:
    if not isinstance(found, Judgement):
        return replace(group, scores=_checked(group, found, who))
    metrics = {str(name): float(value) for name, value in found.metrics.items()}
    for name, value in metrics.items():
        if name.partition("/")[0] in TAKEN:
            raise ScoreError(
                "a metric of a scorer has the name of one of the run's own",
                where=f"{who}, prompt {group.prompt.index}",
                value=name,
                rule=f"no name that begins with {', '.join(TAKEN)}",
                remedy=f"call it my/{name}, say",
            )
        if not math.isfinite(value):
            raise ScoreError(
                "a metric of a scorer is not a finite number",
                where=f"{who}, prompt {group.prompt.index}",
                value=f"{name}={value}",
                remedy="leave a metric out where there is nothing to say",
            )
    preferences = None if found.preferences is None else _matrix(group, found.preferences, who)
    marks = {name: _marks(group, getattr(found, name), name, who) for name in ("contested", "skipped")}
    if any(marks["skipped"]):  # from what has no score nothing is learned
        marks["contested"] = tuple(map(any, zip(*filter(None, marks.values()), strict=True)))
    metrics = {**group.metrics, **metrics}  # a search has counted its candidates
    scores = _checked(group, found.scores, who)
    tokens = _token_scores(group, found.token_scores, who) if found.token_scores else ()
    more = {"preferences": preferences, "metrics": metrics, "token_scores": tokens, **marks}
    more |= {"inferred": _pairs(group, found.inferred, who), "trust": _trust(group, found.trust, who)}
    more["shares"] = found.shares
    return replace(group, scores=scores, **more)


def _marks(group: Group, given: Sequence[bool], name: str, who: str) -> tuple[bool, ...]:
    marks = tuple(map(bool, given))
    if marks and len(marks) != len(group.completions):
        raise ScoreError(
            f"the number of {name} answers is wrong",
            where=f"{who}, prompt {group.prompt.index}",
            value=len(marks),
            rule=f"true or false for each of {len(group.completions)} completions, or nothing",
        )
    return marks


def _trust(group: Group, numbers: Sequence[float], who: str) -> tuple[float, ...]:
    trust = tuple(map(float, numbers))
    if trust and not (len(trust) == len(group.completions) and all(0 <= each <= 1 for each in trust)):
        raise ScoreError(
            "the trust in answers does not fit them",
            where=f"{who}, prompt {group.prompt.index}",
            value=list(trust),
            rule=f"a number from 0 to 1 for each of {len(group.completions)} completions, or nothing",
        )
    return trust


def _token_scores(group: Group, rows: Sequence[Sequence[float]], who: str) -> tuple[tuple[float, ...], ...]:
    """One finite number for each token of each completion."""
    found = tuple(tuple(float(score) for score in row) for row in rows)
    counts = [len(completion.token_ids) for completion in group.completions]
    if [len(row) for row in found] != counts or not all(math.isfinite(score) for row in found for score in row):
        raise ScoreError(
            "the rewards of tokens do not fit the answers",
            where=f"{who}, prompt {group.prompt.index}",
            value=f"{[len(row) for row in found]} numbers",
            rule=f"one finite number a token: {counts}",
        )
    return found


def _pairs(group: Group, inferred: Sequence[tuple[int, int]], who: str) -> tuple[tuple[int, int], ...]:
    count = len(group.completions)
    for i, j in inferred:
        if not 0 <= i < j < count:
            raise ScoreError(
                "inferred pairs are no pairs",
                where=f"{who}, prompt {group.prompt.index}",
                value=f"({i}, {j})",
                rule=f"i < j, of the {count} completions",
            )
    return tuple((i, j) for i, j in inferred)


def _matrix(group: Group, rows: Sequence[Sequence[float]], who: str) -> tuple[tuple[float, ...], ...]:
    """K×K, each pair's two probabilities adding up to 1."""
    matrix = tuple(tuple(float(prob) for prob in row) for row in rows)
    count = len(group.completions)
    if len(matrix) != count or any(len(row) != count for row in matrix):
        raise ScoreError(
            "preferences have the wrong shape",
            where=f"{who}, prompt {group.prompt.index}",
            value=f"{len(matrix)} rows of {sorted({len(row) for row in matrix})}",
            rule=f"{count}×{count}, one row and one column a completion",
        )
    for i in range(count):
        for j in range(i + 1):
            if not (0 <= matrix[i][j] <= 1 and abs(matrix[i][j] + matrix[j][i] - 1) <= 1e-6):
                raise ScoreError(
                    "preferences are no probabilities",
                    where=f"{who}, prompt {group.prompt.index}, completions {i} and {j}",
                    value=f"{matrix[i][j]} and {matrix[j][i]}",
                    rule="from 0 to 1, the two of a pair adding up to 1, and ½ on the diagonal",
                )
    return matrix


def _checked(group: Group, row: Sequence[float], who: str) -> tuple[float, ...]:
    row = tuple(float(score) for score in row)
    if len(row) != len(group.completions):
        raise ScoreError(
            "the number of scores is wrong",
            where=f"{who}, prompt {group.prompt.index}",
            value=len(row),
            rule=f"one score for each of {len(group.completions)} completions",
        )
    for text, score in zip(group.texts, row, strict=True):
        if not math.isfinite(score):
            raise ScoreError(
                "a score is not a finite number",
                where=f"{who}, prompt {group.prompt.index}",
                value=f"{score} for {text!r}",
                remedy="make the scorer return a number for every text, the empty one included",
            )
    return row
