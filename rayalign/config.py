"""YAML file + `key=value` overrides → a checked `Config`, or a ConfigError that names path, value and rule."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from rayalign.errors import ConfigError
from rayalign.registry import InvalidPart, did_you_mean
from rayalign.schema import Config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides like `train.steps=5`, and check everything.

    Raises:
        ConfigError: with the file, the key, the value, the rule and the remedy.
    """
    path = Path(path)
    data = _read(path)
    for override in overrides:
        _apply(data, override)
    return parse_config(data, source=str(path))


def parse_config(data: dict[str, Any], *, source: str = "config") -> Config:
    """A config from plain data, as a YAML file would hold it."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise _as_config_error(error, Config, [], source) from None
    except InvalidPart as part:
        raise _as_config_error(part.error, part.record, part.path, source) from None


def save_config(config: Config, path: Path) -> None:
    path.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        raise ConfigError(
            "there is no such config file",
            where=str(path),
            remedy=f"did you mean {path.parent / near[0]}?"
            if near
            else "see configs/ for the configs that are shipped",
        )
    try:
        data = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(
            "this is not YAML",
            where=f"{path}:{mark.line + 1}" if mark else str(path),
            value=getattr(error, "problem", None) or str(error),
            rule="a YAML mapping of keys to values",
            remedy="look for a missing colon, a tab, or wrong indentation there",
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(
            "this config is empty or not a mapping", where=str(path), rule="keys and values, as in configs/"
        )
    return data


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            "this is not an override",
            where="command line",
            value=override,
            rule="key=value, for instance train.steps=5",
        )
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        value = text
    *parents, last = key.split(".")
    node = data
    for parent in parents:
        if isinstance(node.get(parent), str):  # `scorer: judge` is short for `scorer: {name: judge}`
            node[parent] = {"name": node[parent]}
        if not isinstance(node.get(parent), dict):
            node[parent] = {}
        node = node[parent]
    node[last] = value


def _as_config_error(error: ValidationError, record: type[BaseModel], path: list[str], source: str) -> ConfigError:
    """The first problem, as a person would put it, and how many more there are."""
    problems = error.errors()
    problem = problems[0]
    location = [part for part in problem["loc"] if not str(part).startswith("function-")]
    key = ".".join(str(part) for part in [*path, *location])
    more = f" ({len(problems) - 1} more after this one)" if len(problems) > 1 else ""
    where = f"{source}, key {key}" if key else source
    kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        hint = did_you_mean(str(location[-1]), _known_keys(record, location[:-1]))
        return ConfigError(f"unknown key{more}", where=where, value=str(location[-1]), remedy=hint)
    if kind == "missing":
        return ConfigError(f"this key is missing{more}", where=where, rule="it has no default", remedy=f"add {key}: …")
    return ConfigError(f"this value cannot be used{more}", where=where, value=problem["input"], rule=message)


def _known_keys(record: Any, location: Sequence[str | int]) -> list[str]:
    """The keys of the record that lies at this place below `record`."""
    for part in location:
        field = next((f for name, f in record.model_fields.items() if part in (name, f.alias)), None)
        if field is None:  # an index, or a name: the record is already the right one
            continue
        candidates = (field.annotation, *get_args(field.annotation))
        record = next((a for a in candidates if isinstance(a, type) and issubclass(a, BaseModel)), record)
    return [field.alias or name for name, field in record.model_fields.items()]
