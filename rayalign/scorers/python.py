"""A reward that is a Python function of one's own."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import platform
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rayalign.errors import ConfigError, ScoreError, ScorerLost
from rayalign.record import Unfit
from rayalign.registry import did_you_mean
from rayalign.scorers.base import ScoreFunction, ScorerConfig
from rayalign.scorers.failing import Tolerance, TooLate, Worker, judged, named
from rayalign.types import Group, Judgement

log = logging.getLogger("rayalign")
TEXTS = ("prompts", "completions")
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)


class Python(ScorerConfig, Tolerance):
    """A function of one's own: score(prompts, completions, …) → one number a completion.

    It is called by keyword, with lists of the same length: `prompts` and `completions` are texts (a prompt of
    several messages is one, each behind its role), and every other parameter gets the column of the prompt file that
    has its name, or what `arguments` says. A function that takes `**columns` gets all columns. Each scorer actor
    imports it once, and keeps what its module holds. Where a call fails, or takes longer than `timeout_s`, its groups
    are scored one by one, and the completions of a group that fails too, so that the one at fault is known.
    """

    paper: ClassVar = "Lambert et al. 2024, arXiv:2411.15124 (rewards that are functions)"
    name: Literal["python"] = "python"
    function: str = Field(
        description="package.module:name of a function, importable from where the command runs",
        examples=["my_pkg.rewards:score"],
    )
    arguments: dict[str, Any] = Field({}, description="more keywords, the same in every call")
    timeout_s: float | None = Field(
        None, gt=0, description="seconds after which a call of the function has failed; default a quarter of deadline_s"
    )

    @model_validator(mode="after")
    def _callable(self) -> Python:
        """Before anything is started: whether the function is there, and takes what it is given."""
        _check(self._function(), self)
        return self

    def _function(self) -> Callable[..., Any]:
        module_name, colon, attribute = self.function.partition(":")
        if not (module_name and colon and attribute):
            raise _unfit(
                "this does not name a function",
                rule="package.module:name",
                remedy="put a colon between the module and the function, as my_pkg.rewards:score",
            )
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # the module may fail in any way while it is imported
            missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
            raise _unfit(
                "there is no such module" if missing else f"{module_name} fails while it is imported",
                rule="package.module:name, importable from where the command runs"
                if missing
                else f"a module that imports; this one raised {type(error).__name__}: {error}",
                remedy=f"run from the folder that holds {module_name.split('.')[0]}, or install it; check the spelling"
                if missing
                else f"mend it until `python -c 'import {module_name}'` passes",
            ) from error
        if not hasattr(module, attribute):
            here = [name for name, each in vars(module).items() if inspect.isfunction(each)]
            raise _unfit(
                f"{module_name} holds no {attribute}",
                rule="package.module:name, where the module defines the function",
                remedy=did_you_mean(attribute, here) if here else f"define {attribute} in {module_name}",
            )
        return getattr(module, attribute)

    def start(self) -> ScoreFunction:
        """Raises ConfigError when the function is not there, on another node than the one that read the config, say."""
        try:
            function = self._function()
        except Unfit as error:
            where, value = "key scorer.function", f"{self.function} on {platform.node()}"
            raise ConfigError(error.what, where=where, value=value, rule=error.rule, remedy=error.remedy) from error
        return _Calls(self, function)

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


class _Fault(Exception):
    """A call that gave no scores."""

    def __init__(self, error: ScoreError):
        super().__init__(error.what)
        self.error = error


class _Calls:
    """The ScoreFunction: groups → judgements, by as few calls as will do."""

    def __init__(self, config: Python, function: Callable[..., Any]):
        self._config, self._function = config, function
        self._columns = _columns(function, config.arguments)
        self._worker = Worker()
        self._timeout_s = config.timeout_s or config.deadline_s / 4
        self._until = 0.0

    def __call__(self, groups: Sequence[Group]) -> list[Sequence[float] | Judgement]:
        self._until = time.monotonic() + 0.9 * self._config.deadline_s
        flat: list[float | None]
        try:
            flat = list(self._scores(groups))
        except _Fault as fault:
            flat = self._one_by_one(groups, fault.error)
        if self._config.on_error != "error":
            return list(judged(groups, flat, self._config.on_error))
        numbers = iter(flat)
        return [[next(numbers) for _ in group.texts] for group in groups]  # type: ignore[misc]

    def close(self) -> None:
        self._worker.close()

    def _one_by_one(self, groups: Sequence[Group], error: ScoreError) -> list[float | None]:
        """After all of them failed together: None for completions that fail alone. Raises ScoreError where failing
        ends the run."""
        found: list[float | None] = []
        for group in groups:
            try:
                found += self._scores([group])
            except _Fault:
                found += [self._alone(group, place) for place in range(len(group.texts))]
        if self._config.on_error == "error":  # none of them fails alone
            raise error
        return found

    def _alone(self, group: Group, place: int) -> float | None:
        one = replace(group, texts=(group.texts[place],), completions=(group.completions[place],))
        try:
            return self._scores([one])[0]
        except _Fault as fault:
            if self._config.on_error == "error":
                raise named(fault.error, group, place) from fault.error
            log.warning("%s", named(fault.error, group, place))
            return None

    def _scores(self, groups: Sequence[Group]) -> list[float]:
        """One call. Raises _Fault, and ScoreError where the function cannot be called."""
        flat = [(group, text) for group in groups for text in group.texts]
        texts = {"prompts": [g.prompt.conversation for g, _ in flat], "completions": [text for _, text in flat]}
        arguments = {**texts, **self._columns(flat), **self._config.arguments}
        where = f"scorer.function {self._config.function}"
        allowed = min(self._timeout_s, self._until - time.monotonic())
        try:
            if allowed <= 0:
                raise TooLate
            return _numbers(self._worker(self._function, allowed, **arguments), [text for _, text in flat], where)
        except TooLate:
            error = ScoreError(
                "the scoring function gave nothing within the deadline",
                where=where,
                value=f"{max(allowed, 0.0):.3g} s for {len(flat)} completions",
                rule=f"scorer.timeout_s={self._timeout_s:g}, and all calls for some groups in scorer.deadline_s",
                remedy="give it a deadline of its own for what it waits for, or raise scorer.deadline_s",
            )
            raise _Fault(error) from None
        except ScorerLost:
            raise
        except ScoreError as error:
            raise _Fault(error) from error.__cause__
        except Exception as error:  # it may fail in any way
            raise _Fault(_failed(error, where)) from error


def _failed(error: Exception, where: str) -> ScoreError:
    at = traceback.extract_tb(error.__traceback__)[-1]
    return ScoreError(
        "the scoring function failed",
        where=where,
        value=f"{type(error).__name__}: {error}, at {at.filename}:{at.lineno}",
        rule="a number for every completion, the empty one included",
        remedy="mend the function; try it on the texts of samples.jsonl; scorer.on_error=skip goes on without it",
    )


def _check(function: Any, config: Python) -> None:
    """Raises Unfit when this cannot be called as it will be."""
    if not callable(function) or inspect.isclass(function):
        what = (
            "a class, no function"
            if inspect.isclass(function)
            else f"no function, but of type {type(function).__name__}"
        )
        raise _unfit(
            f"{config.function.partition(':')[2]} is {what}",
            rule="a function of prompts and completions that gives one number a completion",
            remedy="name a function; an object that is made in the module and can be called will do, too",
        )
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        raise _unfit(
            "this function is asynchronous",
            rule="def, not async def: scorer actors call it and wait",
            remedy="write it with def; inside, asyncio.run(…) may ask for many things at once",
        )
    parameters = _parameters(function)
    if parameters is None:  # of C code, which does not say
        return
    by_keyword = {name for name, each in parameters.items() if each.kind not in POSITIONAL}
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    lacking = [name for name in (*TEXTS, *config.arguments) if name not in by_keyword and not takes_any]
    if lacking:
        raise _unfit(
            f"this function takes no {' and no '.join(lacking)}",
            rule="parameters prompts and completions, then columns of the prompt file and scorer.arguments, by keyword",
            remedy=f"write it as def {config.function.partition(':')[2]}(prompts, completions, **columns)",
        )


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def _columns(
    function: Callable[..., Any], arguments: Mapping[str, Any]
) -> Callable[[Sequence[tuple[Group, str]]], dict[str, list[Any]]]:
    """What gives the columns that the function asks for, aligned with the completions."""
    parameters = _parameters(function) or {}
    kinds = [each.kind for each in parameters.values()]
    everything = inspect.Parameter.VAR_KEYWORD in kinds
    named = {name: each for name, each in parameters.items() if name not in (*TEXTS, *arguments)}
    named = {
        name: each for name, each in named.items() if each.kind not in (*POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    }

    def columns(flat: Sequence[tuple[Group, str]]) -> dict[str, list[Any]]:
        there = {name for group, _ in flat for name in group.prompt.extra}
        for name, parameter in named.items():
            if name not in there and parameter.default is inspect.Parameter.empty:
                raise ScoreError(
                    f"the scoring function wants a column {name!r} that these prompts do not have",
                    where=f"prompt {flat[0][0].prompt.index}",
                    value=f"columns {', '.join(sorted(there)) or 'none besides the prompt'}",
                    rule="every parameter besides prompts and completions is a column of data.prompts",
                    remedy=f"add the column, give {name} a default, or set scorer.arguments.{name}",
                )
        wanted = there if everything else there & set(named)
        wanted -= {*TEXTS, *arguments}
        return {name: [group.prompt.extra.get(name) for group, _ in flat] for name in sorted(wanted)}

    return columns


def _numbers(given: Any, texts: Sequence[str], where: str) -> list[float]:
    """The function's numbers as floats, in its order. Raises ScoreError when they are something else."""
    count = len(texts)
    rule = f"a list of {count} numbers, one for each completion"
    given = given.tolist() if hasattr(given, "tolist") else given  # of numpy or torch
    if not isinstance(given, Sequence) or isinstance(given, str):
        remedy = "return a list, in the order of completions; a function of one completion has to loop over all"
        value = f"{type(given).__name__}: {given!r}"
        raise ScoreError("the scoring function gave no list", where=where, value=value, rule=rule, remedy=remedy)
    if len(given) != count:
        remedy = "return a number for every completion, in their order"
        value = f"{len(given)} of them"
        raise ScoreError(
            "the scoring function gave another number of scores", where=where, value=value, rule=rule, remedy=remedy
        )
    for place, score in enumerate(given):
        try:
            float(score)
        except (TypeError, ValueError):
            remedy = "return a number for it; 0.0, say, where there is nothing to score"
            value = f"{score!r} for completion {place} of the call"
            raise ScoreError("a score is no number", where=where, value=value, rule=rule, remedy=remedy) from None
        if not math.isfinite(float(score)):
            remedy = "make it return a finite number for every text, the empty one included"
            value = f"{float(score)} for {texts[place]!r}"
            raise ScoreError("a score is not a finite number", where=where, value=value, rule=rule, remedy=remedy)
    return [float(score) for score in given]


def _unfit(what: str, *, rule: str, remedy: str) -> Unfit:
    return Unfit(what, key="function", rule=rule, remedy=remedy)
