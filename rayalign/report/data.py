"""What a run left in its folder, read as plain data: a report is also made of runs of other versions."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rayalign.errors import ConfigError, DataError
from rayalign.metrics import records
from rayalign.record import redacted

FILES = ("config.yaml", "metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "versions.json")


@dataclass(frozen=True)
class Series:
    """One metric of a run over its steps, where it was logged: float64 arrays [n]. Values may be NaN."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> np.ndarray:
        return self.values[np.isfinite(self.values)]


@dataclass(frozen=True)
class Run:
    """One run. Samples stay in their file: there may be many.

    Attributes:
        name: of the folder; with its parent's name where two would be called the same.
        path: as it was given.
        config: without keys, tokens and passwords; a report is passed on.
        metrics, evaluations: their records, one a step, in the order of the steps.
        updated: when the last record was written.
    """

    name: str
    path: Path
    config: dict[str, Any]
    versions: dict[str, str]
    metrics: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]
    updated: datetime | None

    @property
    def last_step(self) -> int:
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def planned_steps(self) -> int | None:
        train = self.config.get("train")
        steps = train.get("steps") if isinstance(train, dict) else None
        return steps if isinstance(steps, int) else None

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Of all metrics, in the order in which they first appear."""
        return tuple(dict.fromkeys(key for r in self.metrics for key in r if key != "step" and _is_number(r[key])))

    def series(self, key: str) -> Series:
        found = [(r["step"], r[key]) for r in self.metrics if key in r and _is_number(r[key])]
        steps, values = np.array(found, dtype=float).reshape(-1, 2).T
        return Series(steps, values)

    def evaluated(self, key: str) -> list[tuple[int, float, float, float]]:
        """(step, mean, low, high) of each evaluation that measured it; the interval is NaN where there is none."""
        found = []
        for record in self.evaluations:
            values = [record["metrics"].get(name, np.nan) for name in (key, f"{key}/low", f"{key}/high")]
            if all(_is_number(value) for value in values) and np.isfinite(values[0]):
                mean, low, high = map(float, values)
                found.append((int(record["step"]), mean, low, high))
        return found


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each once.

    Raises:
        ConfigError: a path that is no run.
        DataError: a file of a run that cannot be read.
    """
    if not paths:
        raise ConfigError(
            "a report needs a run",
            where="command line",
            value="no folder",
            rule="one or more folders of runs",
            remedy="rayalign report runs/NAME",
        )
    whole = [each for path in paths for each in _stages(path)]
    folders = list({path.resolve(): path for path in map(locate, whole)}.values())
    return [_load(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _stages(path: Path) -> list[Path]:
    """Of a job of rounds the folders of the stages that did something, in the order in which they began."""
    folder = path.expanduser()
    if not (folder / "rounds.yaml").is_file():
        return [path]
    found = [each.parent for each in folder.glob("stages/*/metrics.jsonl") if each.stat().st_size]
    began = {each: _mapping(each / "manifest.json").get("began", "") for each in found}
    return sorted(found, key=lambda each: (began[each], each)) or [path]


def locate(path: Path) -> Path:
    """The folder of the run that a path means: the folder itself, or one of the files in it."""
    path = path.expanduser()
    if path.name in FILES and path.is_file():
        path = path.parent
    if _is_run(path):
        return path
    what = "there is no run in this folder" if path.is_dir() else "there is no such run"
    raise ConfigError(
        what,
        where=str(path),
        value=_found(path),
        rule="the folder of a run, with metrics.jsonl or config.yaml in it",
        remedy=_nearest(path),
    )


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of some items, evenly chosen, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, count)]


def _load(folder: Path, name: str) -> Run:
    metrics = folder / "metrics.jsonl"
    newest = next((file for file in (metrics, folder / "config.yaml") if file.is_file()), None)
    return Run(
        name=name,
        path=folder,
        config=redacted(_mapping(folder / "config.yaml")),
        versions={str(k): str(v) for k, v in _mapping(folder / "versions.json").items()},
        metrics=_by_step(metrics),
        evaluations=tuple(
            {"step": r["step"], "metrics": _dict(r.get("metrics")), "samples": _dicts(r.get("samples"))}
            for r in _by_step(folder / "evaluations.jsonl")
        ),
        updated=datetime.fromtimestamp(newest.stat().st_mtime) if newest else None,
    )


def _by_step(path: Path) -> tuple[dict[str, Any], ...]:
    """One record a step, the last that was written, in the order of the steps."""
    found = {r["step"]: r for r in records(path) if _is_number(r.get("step"))}
    return tuple(found[step] for step in sorted(found))


def _mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file of keys and values; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        return _dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        raise DataError(
            "this file of a run is damaged",
            where=f"{path}:{mark.line + 1}" if mark else str(path),
            value=getattr(error, "problem", None) or getattr(error, "reason", error),
            rule="as the run wrote it at its start",
            remedy="put it back from a copy, or move it away: a report is also made without it",
        ) from None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("metrics.jsonl", "config.yaml"))


def _names(folders: Sequence[Path]) -> list[str]:
    names = [folder.resolve().name for folder in folders]
    return [
        "/".join(folder.resolve().parts[-2:]) if names.count(name) > 1 else name
        for folder, name in zip(folders, names, strict=True)
    ]


def _found(path: Path) -> str:
    if not path.is_dir():
        return "a file" if path.exists() else "nothing of this name"
    inside = sorted(each.name for each in path.iterdir())
    return f"a folder with {', '.join(inside[:5])}{', …' if len(inside) > 5 else ''}" if inside else "an empty folder"


def _nearest(path: Path) -> str:
    """What was probably meant: the run around this folder, one below it, or one of a similar name."""
    if (path / "evaluation.json").is_file():
        return "this folder holds one evaluation, printed when it was made; a report is of a training run"
    around = next((folder for folder in path.parents if _is_run(folder) and folder != Path(".")), None)
    if around:
        return f"did you mean {around}?"
    below = _runs_below(path)
    if below:
        return f"did you mean {below[0]}?" if len(below) == 1 else f"name one or more: {', '.join(map(str, below[:5]))}"
    siblings = {each.name: each for each in [*_runs_below(Path("runs")), *_runs_below(path.parent)]}
    near = difflib.get_close_matches(path.name, siblings, n=1)
    if near:
        return f"did you mean {siblings[near[0]]}?"
    return (
        f"name one of: {', '.join(map(str, list(siblings.values())[:5]))}" if siblings else "rayalign train makes one"
    )


def _runs_below(folder: Path) -> list[Path]:
    """Newest first."""
    found = [each for each in folder.iterdir() if each.is_dir() and _is_run(each)] if folder.is_dir() else []
    return sorted(found, key=lambda each: each.stat().st_mtime, reverse=True)
