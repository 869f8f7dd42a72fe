"""What stages of `rounds` name of one another: whether it is there, comes before, and is what is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rayalign.config.rounds import STAGE, Stage
from rayalign.config.source import Source
from rayalign.data.columns import read_columns
from rayalign.errors import ConfigError, DataError
from rayalign.registry import did_you_mean
from rayalign.schema import Config


def check_order(source: Source, names: Sequence[str]) -> None:
    """Whether each stage that another one names is there, and comes before it. Raises ConfigError."""
    stages = source.data["rounds"]
    waits = {
        names[place]: [(key, value.removeprefix(STAGE)) for key, value in texts(stage) if value.startswith(STAGE)]
        for place, stage in enumerate(stages)
    }
    shared = {key: value for key, value in source.data.items() if key != "rounds"}
    for key, value in texts(shared):
        if value.startswith(STAGE):
            raise ConfigError(
                "what all stages share cannot come from one of them",
                where=source.place(key),
                value=value,
                rule="stage:NAME in a stage that comes after the one it names",
                remedy="move this key into the stages that need it",
            )
    for place, (name, found) in enumerate(waits.items()):
        for key, wanted in found:
            at = source.place(("rounds", place, *key))
            if wanted not in names:
                raise ConfigError(
                    f"no stage is called {wanted or 'nothing'}",
                    where=at,
                    value=f"{STAGE}{wanted}",
                    rule=f"stage:NAME with one of {', '.join(names)}",
                    remedy=did_you_mean(wanted, names),
                )
            if names.index(wanted) >= place:
                circle = _circle(name, {each: [to for _, to in to_all] for each, to_all in waits.items()})
                later = f"{wanted} comes after {name}" if wanted != name else f"{name} names itself"
                raise ConfigError(
                    f"these stages wait for one another: {' → '.join(circle)}"
                    if circle
                    else "a stage waits for a later one",
                    where=at,
                    value=f"{STAGE}{wanted}: {later}",
                    rule="stage:NAME of a stage that comes before",
                    remedy="leave model.path out to start from the newest policy, that of the last repetition, too"
                    if key[0] == "model"
                    else f"put {wanted} before {name}"
                    if not circle
                    else "name a file, or a stage that comes before",
                )


def _circle(start: str, waits: Mapping[str, Sequence[str]]) -> list[str]:
    """start → … → start along what stages wait for; empty where there is no way back."""
    queue: list[list[str]] = [[start]]
    seen: set[str] = set()
    while queue:
        way = queue.pop(0)
        for to in waits.get(way[-1], ()):
            if to == start:
                return [*way, to]
            if to not in seen:
                seen.add(to)
                queue.append([*way, to])
    return []


def texts(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """(path, text) of all texts in nested mappings and lists."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping | list):
        for key, each in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from texts(each, (*path, key))


def check_references(source: Source, config: Config, references: Mapping[str, str], before: Sequence[Stage]) -> None:
    """Whether the stages have what is wanted of them: rows, or weights of the right kind. Raises ConfigError."""
    for key, folder in references.items():
        stage = next(each for each in before if each.folder == folder)
        what, network, wanted = stage.config.algorithm.name, stage.config.algorithm.network, ""
        problem = ""
        if key == "data.prompts":
            problem, rule = "a stage writes rows with answers, no prompts", "a file, or a hub id"
        elif key.startswith("data."):
            if stage.config.learns:
                problem, rule = f"the stage {stage.name} ({what}) writes no data", "a stage with algorithm: label"
            elif refused := _rows_refused(stage, config):
                problem, rule = f"the rows of the stage {stage.name} are none for {config.algorithm.name}", refused
        elif not stage.config.learns:
            problem, rule = f"the stage {stage.name} ({what}) trains nothing", "a stage that trains a model"
        elif key == "model.path" and network == "score" and config.algorithm.network != "score":
            problem, rule = f"the stage {stage.name} trains a {_trains(stage)}", "a stage that trains a language model"
        elif (wanted := _wanted(key, config)) and _trains(stage) != wanted:
            problem, rule = (
                f"the stage {stage.name} ({what}) trains no {wanted}",
                f"algorithm: {TRAINED_BY[wanted]} there",
            )
        elif key.startswith("scorer.") and not wanted and network == "score":
            problem, rule = f"the stage {stage.name} trains a {_trains(stage)}", "a stage that trains a language model"
        if problem:
            path = tuple(int(part) if part.isdigit() else part for part in key.split("."))
            fitting = [each.name for each in before if _fits(each, key, config)]
            raise ConfigError(
                problem,
                where=source.place(path),
                value=f"{STAGE}{stage.name}",
                rule=rule,
                remedy="name what the stages before it sample from, or put its rows under data.examples"
                if key == "data.prompts"
                else f"name {fitting[-1]}"
                if fitting
                else "add such a stage before this one",
            )


def _fits(stage: Stage, key: str, config: Config) -> bool:
    if key.startswith("data."):
        return key != "data.prompts" and not stage.config.learns and not _rows_refused(stage, config)
    return stage.config.learns and _trains(stage) == (_wanted(key, config) or "language model")


def _trains(stage: Stage) -> str:
    """What comes of a stage that trains."""
    if stage.config.algorithm.network != "score":
        return "language model"
    return "preference model" if getattr(stage.config.algorithm, "classes", ()) else "reward model"


def _wanted(key: str, config: Config) -> str:
    """The kind of score network that the record wants in which the key stands; "" for any other record."""
    record: Any = config.to_dict()
    for part in key.split(".")[:-1]:
        record = record[int(part)] if isinstance(record, list) else record[part]
    return WANTED.get(record.get("name"), "") if key.startswith("scorer.") else ""


WANTED = {"reward_model": "reward model", "dpm": "preference model"}  # by scorers
TRAINED_BY = {"reward model": "reward_model", "preference model": "disagreement"}
WRITTEN = {
    "best": ("prompt", "completion", "score"),
    "ranked": ("prompt", "completions", "scores"),
    "pairs": ("prompt", "chosen", "rejected", "probability"),
}


def _rows_refused(stage: Stage, config: Config) -> str:
    """Why the algorithm takes no rows as this stage will write them; "" where it takes them, or where only the scorer
    knows which ones it will write."""
    write = stage.config.algorithm.write  # type: ignore[attr-defined]
    refused = ""
    for columns in (WRITTEN[each] for each in ((write,) if write else ("ranked", "pairs"))):
        try:
            read_columns(columns, {}, config.algorithm.rows, "")
            return ""
        except DataError as error:
            refused = error.rule or error.what
    return refused


def renamed(value: Any, to: Callable[[str, str], str], key: str = "") -> Any:
    """With what `to` gives for each stage:NAME: of its dotted key and of the name."""
    if isinstance(value, str) and value.startswith(STAGE):
        return to(key, value.removeprefix(STAGE))
    if isinstance(value, Mapping):
        return {name: renamed(each, to, f"{key}.{name}" if key else str(name)) for name, each in value.items()}
    return [renamed(each, to, key) for each in value] if isinstance(value, list) else value
