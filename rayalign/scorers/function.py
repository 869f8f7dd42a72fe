"""A function of one's own that scores: found by its name, called by keyword, and its numbers looked at.

Nothing here needs torch, so that a process of its own for the function has little to import.
"""

from __future__ import annotations

import importlib
import inspect
import math
import platform
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rayalign.errors import ConfigError, ScoreError
from rayalign.record import Unfit
from rayalign.registry import did_you_mean

Row = tuple[int, str, str, Mapping[str, Any]]  # a prompt's number, its text, a completion of it, the prompt's columns
TEXTS = ("prompts", "completions")
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)


class CallFailed(ScoreError):
    """A call of the function that gave no scores that can be used; one for fewer completions may."""


class Reward:
    """The function, called for some completions.

    Args:
        name: package.module:name.
        arguments: more keywords, the same in every call.

    Raises:
        ConfigError: it is not there, on another node than the one that read the config, say.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any]):
        try:
            self._function = find(name)
        except Unfit as error:
            where, value = "key scorer.function", f"{name} on {platform.node()}"
            raise ConfigError(error.what, where=where, value=value, rule=error.rule, remedy=error.remedy) from error
        self._where, self._arguments = f"scorer.function {name}", arguments
        self._columns = _columns(self._function, arguments)

    def __call__(self, rows: Sequence[Row]) -> list[float]:
        """A number for each row. Raises CallFailed, and ScoreError where it cannot be called with such rows."""
        texts = [text for _, _, text, _ in rows]
        prompts = [prompt for _, prompt, _, _ in rows]
        arguments = {"prompts": prompts, "completions": texts, **self._columns(rows), **self._arguments}
        try:
            return numbers(self._function(**arguments), texts, self._where)
        except CallFailed:
            raise
        except (Exception, SystemExit) as error:  # it may fail in any way
            at = traceback.extract_tb(error.__traceback__)[-1]
            raise CallFailed(
                "the scoring function failed",
                where=self._where,
                value=f"{type(error).__name__}: {error}, at {at.filename}:{at.lineno}",
                rule="a number for every completion, the empty one included",
                remedy="mend the function; try it on the texts of samples.jsonl; scorer.on_error=skip goes on without "
                "it",
            ) from error


def find(name: str) -> Callable[..., Any]:
    """What package.module:name names. Raises Unfit when it is not there."""
    module_name, colon, attribute = name.partition(":")
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


def check(function: Any, name: str, arguments: Mapping[str, Any]) -> None:
    """Raises Unfit when this cannot be called as it will be."""
    own_name = name.partition(":")[2]
    if not callable(function) or inspect.isclass(function):
        what = (
            "a class, no function"
            if inspect.isclass(function)
            else f"no function, but of type {type(function).__name__}"
        )
        raise _unfit(
            f"{own_name} is {what}",
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
    lacking = [name for name in (*TEXTS, *arguments) if name not in by_keyword and not takes_any]
    if lacking:
        raise _unfit(
            f"this function takes no {' and no '.join(lacking)}",
            rule="parameters prompts and completions, then columns of the prompt file and scorer.arguments, by keyword",
            remedy=f"write it as def {own_name}(prompts, completions, **columns)",
        )


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def _columns(
    function: Callable[..., Any], arguments: Mapping[str, Any]
) -> Callable[[Sequence[Row]], dict[str, list[Any]]]:
    """What gives the columns that the function asks for, aligned with the completions."""
    parameters = _parameters(function) or {}
    kinds = [each.kind for each in parameters.values()]
    everything = inspect.Parameter.VAR_KEYWORD in kinds
    named = {name: each for name, each in parameters.items() if name not in (*TEXTS, *arguments)}
    named = {
        name: each for name, each in named.items() if each.kind not in (*POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    }

    def columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
        there = {name for *_, extra in rows for name in extra}
        for name, parameter in named.items():
            if name not in there and parameter.default is inspect.Parameter.empty:
                raise ScoreError(
                    f"the scoring function wants a column {name!r} that these prompts do not have",
                    where=f"prompt {rows[0][0]}",
                    value=f"columns {', '.join(sorted(there)) or 'none besides the prompt'}",
                    rule="every parameter besides prompts and completions is a column of data.prompts",
                    remedy=f"add the column, give {name} a default, or set scorer.arguments.{name}",
                )
        wanted = there if everything else there & set(named)
        wanted -= {*TEXTS, *arguments}
        return {name: [extra.get(name) for *_, extra in rows] for name in sorted(wanted)}

    return columns


def numbers(given: Any, texts: Sequence[str], where: str) -> list[float]:
    """The function's numbers as floats, in its order. Raises CallFailed when they are something else."""
    count = len(texts)
    rule = f"a list of {count} numbers, one for each completion"
    given = given.tolist() if hasattr(given, "tolist") else given  # of numpy or torch
    if not isinstance(given, Sequence) or isinstance(given, str):
        remedy = "return a list, in the order of completions; a function of one completion has to loop over all"
        value = f"{type(given).__name__}: {given!r}"
        raise CallFailed("the scoring function gave no list", where=where, value=value, rule=rule, remedy=remedy)
    if len(given) != count:
        remedy = "return a number for every completion, in their order"
        value = f"{len(given)} of them"
        raise CallFailed(
            "the scoring function gave another number of scores", where=where, value=value, rule=rule, remedy=remedy
        )
    for place, score in enumerate(given):
        try:
            float(score)
        except (TypeError, ValueError):
            remedy = "return a number for it; 0.0, say, where there is nothing to score"
            value = f"{score!r} for completion {place} of the call"
            raise CallFailed("a score is no number", where=where, value=value, rule=rule, remedy=remedy) from None
        if not math.isfinite(float(score)):
            remedy = "make it return a finite number for every text, the empty one included"
            value = f"{float(score)} for {texts[place]!r}"
            raise CallFailed("a score is not a finite number", where=where, value=value, rule=rule, remedy=remedy)
    return [float(score) for score in given]


def _unfit(what: str, *, rule: str, remedy: str) -> Unfit:
    return Unfit(what, key="function", rule=rule, remedy=remedy)
