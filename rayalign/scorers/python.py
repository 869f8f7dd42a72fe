"""A reward that is a Python function of one's own."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rayalign.errors import ScoreError, ScorerLost
from rayalign.record import Unfit
from rayalign.scorers.base import ScoreFunction, ScorerConfig
from rayalign.scorers.child import Child, Died, TooLate
from rayalign.scorers.failing import Tolerance, judged, named
from rayalign.scorers.function import CallFailed, Reward, Row, check, find
from rayalign.types import Group, Judgement

log = logging.getLogger("rayalign")
Place = tuple[int, int]  # a group's, and a completion's in it


class Python(ScorerConfig, Tolerance):
    """A function of one's own: score(prompts, completions, …) → one number a completion.

    It is called by keyword, with lists of the same length: `prompts` and `completions` are texts (a prompt of
    several messages is one, each behind its role), and every other parameter gets the column of the prompt file that
    has its name, or what `arguments` says. A function that takes `**columns` gets all columns. Each scorer calls it in
    a process of its own, which imports it once, and keeps what its module holds. Where a call fails, its groups are
    scored one by one, then the completions of groups that fail too, so that those at fault are known. A call that takes
    longer than `timeout_s`, or ends its process, has failed, whatever `on_error` says. That process is then started
    again, without what the module held.
    """

    paper: ClassVar = "Lambert et al. 2024, arXiv:2411.15124 (rewards that are functions)"
    name: Literal["python"] = "python"
    function: str = Field(
        description="package.module:name of a function, importable from where the command runs",
        examples=["my_pkg.rewards:score"],
    )
    arguments: dict[str, Any] = Field({}, description="more keywords, the same in every call")
    timeout_s: float | None = Field(
        None,
        gt=0,
        description="seconds after which a call of the function has failed; default a tenth of deadline_s; with "
        "on_error: error half of it, and a tenth for the calls that then find out which completion is at fault",
    )

    @model_validator(mode="after")
    def _callable(self) -> Python:
        """Before anything is started: whether the function is there, and takes what it is given."""
        check(find(self.function), self.function, self.arguments)
        return self

    @model_validator(mode="after")
    def _time_to_find_out(self) -> Python:
        if self.timeout_s is not None and self.timeout_s > self.deadline_s / 4:
            raise Unfit(
                "there would be no time to find the completion at fault",
                key="timeout_s",
                rule=f"at most a quarter of deadline_s={self.deadline_s:g}",
                remedy=f"set scorer.deadline_s={4 * self.timeout_s:g}, or lower timeout_s",
            )
        return self

    def within(self, deadline_s: float) -> Self:
        """Calls are no longer than leaves time to find the completion at fault."""
        limit = None if self.timeout_s is None else min(self.timeout_s, deadline_s / 4)
        return self.model_copy(update={"deadline_s": deadline_s, "timeout_s": limit})

    def start(self) -> ScoreFunction:
        """Raises ConfigError when the function is not there, on another node than the one that read the config, say."""
        return _Calls(self, _InTime(self))

    def limits_s(self) -> tuple[float, float]:
        """Seconds for a call of all groups, and for one that looks for what made such a call fail: short enough for a
        completion that hangs to be named before the scorer counts as lost. Where a call that took too long ends the
        run, it has as long as that leaves: it may be slow, and hang nowhere."""
        usual = self.timeout_s or self.deadline_s / 10
        return self.deadline_s / 2 if self.timeout_s is None and self.on_error == "error" else usual, usual


class _TimeIsOut(Exception):
    """None is left of `deadline_s` for a call of the usual length."""


class _InTime:
    """The function in a process of its own, each call within its limit, and all for some groups in `deadline_s`."""

    def __init__(self, config: Python):
        self._config, self._where = config, f"scorer.function {config.function}"
        self._child = Child(Reward, config.function, config.arguments)
        self.memory_gib, self.close = self._child.memory_gib, self._child.close
        self._until = time.monotonic() + config.deadline_s
        try:
            self._start()
        except _TimeIsOut:
            raise self._not_started(f"nothing after {config.deadline_s:g} s") from None

    def begin(self) -> None:
        """The calls for some groups begin."""
        self._until = time.monotonic() + 0.9 * self._config.deadline_s

    def __call__(self, rows: Sequence[Row], *, searching: bool) -> list[float]:
        """Raises CallFailed, ScoreError as the function does, ScorerLost, and _TimeIsOut.

        Args:
            searching: for what made a call fail.
        """
        self._start()
        limit = self._config.limits_s()[searching]
        allowed = min(limit, self._until - time.monotonic())
        try:
            return self._child(rows, allowed)
        except TooLate:
            if allowed < limit:
                raise _TimeIsOut from None
            raise self._too_late(len(rows), limit) from None
        except Died as died:
            raise CallFailed(
                "the process of the scoring function ended",
                where=self._where,
                value=f"{died}, with {len(rows)} completions",
                rule="a number for every completion",
                remedy="look for what it printed in the scorer's log; it may have wanted more memory than there is",
            ) from None

    def _too_late(self, count: int, limit: float) -> CallFailed:
        given = self._config.timeout_s is not None
        return CallFailed(
            "the scoring function gave nothing in time",
            where=self._where,
            value=f"nothing after {limit:.3g} s for {count} completion{'s' * (count > 1)}",
            rule=f"scorer.timeout_s={limit:g}" if given else f"{limit:g} s of scorer.deadline_s, without a timeout_s",
            remedy="give it a deadline of its own for what it waits for, or raise "
            f"{'scorer.timeout_s and deadline_s' if given else 'scorer.deadline_s'}",
        )

    def _start(self) -> None:
        try:
            self._child.start(self._until - time.monotonic())
        except TooLate:
            raise _TimeIsOut from None
        except Died as died:
            raise self._not_started(str(died)) from None

    def _not_started(self, value: str) -> ScorerLost:
        remedy = f"see that `python -c 'import {self._config.function.partition(':')[0]}'` ends, and how long it takes"
        what = "the module of the scoring function is not imported in a process of its own"
        return ScorerLost(what, where=self._where, value=value, rule="well within scorer.deadline_s", remedy=remedy)


class _Calls:
    """The ScoreFunction: groups → judgements, by as few calls as will do."""

    def __init__(self, config: Python, call: _InTime):
        self._config, self._call = config, call
        self.memory_gib, self.close = call.memory_gib, call.close

    def __call__(self, groups: Sequence[Group]) -> list[Sequence[float] | Judgement]:
        """All groups in one call, then, of what failed, each group, and then each completion."""
        everything = [(place, k) for place, group in enumerate(groups) for k in range(len(group.texts))]
        known: dict[Place, float | None] = {}
        first: CallFailed | None = None
        parts = [everything]
        self._call.begin()
        while parts:
            failed = []
            for part in parts:
                try:
                    rows = [_row(groups, place) for place in part]
                    known |= zip(part, self._call(rows, searching=parts[0] is not everything), strict=True)
                except CallFailed as error:
                    first = first or error
                    failed.append(part)
                    if len(part) == 1:
                        self._at_fault(named(error, groups[part[0][0]], part[0][1]))
                        known[part[0]] = None
                except _TimeIsOut:
                    unasked = sorted({groups[i].prompt.index for i, k in everything if (i, k) not in known})
                    raise self._unasked(len(everything) - len(known), len(everything), unasked) from first
            parts = [smaller for part in failed for smaller in _smaller(part)]
        if first is not None and None not in known.values():
            self._at_fault(first)  # it fails on several at once only
        flat = [known[place] for place in everything]
        if self._config.on_error != "error":
            return list(judged(groups, flat, self._config.on_error))
        numbers = iter(flat)
        return [[next(numbers) for _ in group.texts] for group in groups]  # type: ignore[misc]

    def _at_fault(self, error: ScoreError) -> None:
        if self._config.on_error == "error":
            raise error
        log.warning("%s", error)

    def _unasked(self, count: int, total: int, prompts: Sequence[int]) -> ScoreError:
        """No policy is for those: nothing is known of them."""
        return ScoreError(
            "no time was left to score all completions, after calls that gave nothing",
            where=f"scorer.function {self._config.function}",
            value=f"{count} of {total} completions of a call never asked for alone, or with others that fare well; "
            f"prompts {', '.join(map(str, prompts[:4]))}{', …' * (len(prompts) > 4)}",
            rule=f"all calls for some groups within scorer.deadline_s={self._config.deadline_s:g}",
            remedy="give the function a deadline of its own, lower scorer.timeout_s, or raise scorer.deadline_s",
        )


def _row(groups: Sequence[Group], place: Place) -> Row:
    prompt = groups[place[0]].prompt
    return prompt.index, prompt.conversation, groups[place[0]].texts[place[1]], prompt.extra


def _smaller(part: Sequence[Place]) -> list[list[Place]]:
    """Its groups; of one group, its completions."""
    groups = [list(places) for _, places in groupby(part, key=lambda place: place[0])]
    return groups if len(groups) > 1 else [[place] for place in part] if len(part) > 1 else []
