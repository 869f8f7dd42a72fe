"""YAML file + `key=value` overrides → a checked `Config`, or a ConfigError with place, value, rule and remedy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rayalign.config.explain import explain
from rayalign.config.source import Dumper, Source, read
from rayalign.schema import Config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides like `train.steps=5`, and check everything.

    Raises:
        ConfigError: with the file and line, the key, the value, the rule and the remedy.
    """
    source = read(Path(path))
    for override in overrides:
        source.override(override)
    return _check(source)


def parse_config(data: dict[str, Any], *, source: str = "config") -> Config:
    """A config from plain data, as a YAML file would hold it."""
    return _check(Source(source, data))


def save_config(config: Config, path: Path) -> None:
    """Write what `load_config` reads back as the same config."""
    path.write_text(yaml.dump(config.to_dict(), Dumper=Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _check(source: Source) -> Config:
    try:
        return Config.model_validate(source.data)
    except ValidationError as error:
        raise explain(error, source) from None
