"""A job of several runs as data: its stages, in the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rayalign.schema import Config

STAGE = "stage:"  # and a name: the weights, or the rows, of a stage that came before


@dataclass(frozen=True)
class Stage:
    """One run of a job of several.

    Attributes:
        name: as in the file.
        folder: of its run, under stages/: the name, in the second repetition NAME-2.
        config: where it refers to another stage, "stage:FOLDER".
        references: dotted key → folder of the stage that it names.
    """

    name: str
    folder: str
    config: Config
    references: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rounds:
    """A job of several runs, in the order in which they run.

    Attributes:
        data: as YAML would hold it.
    """

    stages: tuple[Stage, ...]
    data: Mapping[str, Any]
    repeat: int
    run_dir: str | None
    resume: bool

    def to_dict(self) -> dict[str, Any]:
        """As YAML would hold it: what was written, without defaults."""
        return dict(self.data)

    def resolved(self) -> dict[str, Any]:
        """As YAML would hold it, every stage with all of its keys; a model.path only where the stage says its own."""
        stages = []
        for stage, written in zip(self.once, self.data["rounds"], strict=True):
            whole = {key: value for key, value in stage.config.to_dict().items() if key not in ("run_dir", "resume")}
            own = written.get("model")
            if not isinstance(own, str) and "path" not in (own or {}):
                del whole["model"]["path"]
            stages.append({"name": stage.name, **whole})
        path = (self.data.get("model") or {}).get("path")
        shared = {"model": {"path": path}} if path is not None else {}
        return {**shared, "rounds": stages, "repeat": self.repeat, "run_dir": self.run_dir, "resume": self.resume}

    @property
    def once(self) -> tuple[Stage, ...]:
        """The stages of the first repetition."""
        return self.stages[: len(self.stages) // self.repeat]

    def standing(self, stage: Stage) -> Config:
        """The stage's config with the model that it descends from, which is there before anything has run."""
        model = stage.config.model.model_copy(update={"path": self.initial_model(stage)})
        return stage.config.model_copy(update={"model": model})

    def stage(self, folder: str) -> Stage:
        return next(stage for stage in self.stages if stage.folder == folder)

    def initial_model(self, stage: Stage) -> str:
        """The folder or hub id that a stage's weights come from in the end: it has their tokenizer and their shape."""
        path = stage.config.model.path
        return self.initial_model(self.stage(path.removeprefix(STAGE))) if path.startswith(STAGE) else path
