"""A reward that is a Python function of one's own."""

from __future__ import annotations

import importlib
import inspect
import platform
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rayalign.errors import ConfigError, ScoreError
from rayalign.record import Unfit
from rayalign.registry import did_you_mean
from rayalign.scorers.base import ScoreFunction, ScorerConfig
from rayalign.types import Group

TEXTS = ("prompts", "completions")
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)


class Python(ScorerConfig):
    """A function of one's own: score(prompts, completions, …) → one number a completion.

    It is called by keyword, with lists of the same length: `prompts` and `completions` are texts (a prompt of
    several messages is one, each behind its role), and every other parameter gets the column of the prompt file that
    has its name, or what `arguments` says. A function that takes `**columns` gets all columns. Each scorer actor
    imports it once, and keeps what its module holds.
    """

    paper: ClassVar = "Lambert et al. 2024, arXiv:2411.15124 (rewards that are functions)"
    name: Literal["python"] = "python"
    function: str = Field(
        description="package.module:name of a function, importable from where the command runs",
        examples=["my_pkg.rewards:score"],
    )
    arguments: dict[str, Any] = Field({}, description="more keywords, the same in every call")

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
        wanted = _columns(function, self.arguments)

        def score_groups(groups: Sequence[Group]) -> list[list[float]]:
            flat = [(group, text) for group in groups for text in group.texts]
            texts = {"prompts": [g.prompt.conversation for g, _ in flat], "completions": [text for _, text in flat]}
            found = _numbers(self._called(function, {**texts, **wanted(flat), **self.arguments}), len(flat), self)
            numbers = iter(found)
            return [[next(numbers) for _ in group.texts] for group in groups]

        return score_groups

    def _called(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        try:
            return function(**arguments)
        except Exception as error:  # it may fail in any way
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise ScoreError(
                "the scoring function failed",
                where=f"scorer.function {self.function}",
                value=f"{type(error).__name__}: {error}, at {where.filename}:{where.lineno}",
                rule="a number for every completion, the empty one included",
                remedy="mend the function; try it on the texts of samples.jsonl",
            ) from error


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


def _numbers(given: Any, count: int, config: Python) -> list[float]:
    """The function's numbers as floats, in its order. Raises ScoreError when they are something else."""
    where, rule = f"scorer.function {config.function}", f"a list of {count} numbers, one for each completion"
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
    return [float(score) for score in given]


def _unfit(what: str, *, rule: str, remedy: str) -> Unfit:
    return Unfit(what, key="function", rule=rule, remedy=remedy)
