"""YAML file + `key=value` overrides → a checked `Config`, or a ConfigError with place, value, rule and remedy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rayalign.config.rounds import Rounds, Stage
from rayalign.config.source import Dumper, Source, read
from rayalign.config.stages import parse_rounds, validated
from rayalign.errors import ConfigError
from rayalign.schema import Config

__all__ = ["Rounds", "Stage", "load_config", "load_job", "parse_config", "parse_job", "save_config"]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides like `train.steps=5`, and check everything.

    Raises:
        ConfigError: with the file and line, the key, the value, the rule and the remedy.
    """
    job = load_job(path, overrides)
    if isinstance(job, Rounds):
        folder = job.run_dir or f"runs/{Path(path).stem}-…"
        raise ConfigError(
            "this config is of several runs",
            where=f"{path}, key rounds",
            value=f"the stages {', '.join(dict.fromkeys(stage.name for stage in job.stages))}",
            rule="the config of one run; rayalign train and rayalign plan take one with rounds",
            remedy=f"name the config of one stage, {folder}/stages/{job.stages[0].folder}/config.yaml, say",
        )
    return job


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Config | Rounds:
    """As `load_config`; a file with the key `rounds` gives all its stages."""
    source = read(Path(path))
    for override in overrides:
        source.override(override)
    return parse_rounds(source) if "rounds" in source.data else validated(source)


def parse_config(data: dict[str, Any], *, source: str = "config") -> Config:
    """A config from plain data, as a YAML file would hold it."""
    return validated(Source(source, data))


def parse_job(data: dict[str, Any], *, source: str = "config") -> Config | Rounds:
    """As `load_job`, from plain data."""
    whole = Source(source, data)
    return parse_rounds(whole) if "rounds" in data else validated(whole)


def save_config(config: Config | Rounds, path: Path) -> None:
    """Write what `load_job` reads back as the same config, or as the same stages."""
    path.write_text(yaml.dump(config.to_dict(), Dumper=Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8")
