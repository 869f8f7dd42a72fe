"""Checkpoints: written whole or not at all, and enough to go on as if never stopped.

checkpoints/step-12/          the policy as a Hugging Face checkpoint, tokenizer included; of the last step that of
                              the best one where train.stop chose it, with its fitted temperature where it has one
checkpoints/step-12/trainer/  state.json, rollouts.pkl, and one folder a role
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from rayalign.errors import CheckpointError, RayalignError, TrainingStopped
from rayalign.protocols import Roles
from rayalign.record import Record
from rayalign.samples import Rollout
from rayalign.types import Example

FULL = 256 * 2**20  # bytes that are free on a disk on which a checkpoint finds no room


class CheckpointConfig(Record):
    """Checkpoints: policy in Hugging Face format, and all that a resumed run needs."""

    every: int = Field(50, ge=0, description="steps between checkpoints; 0: at the end only")
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept")


@dataclass(frozen=True)
class TrainerState:
    """What the loop itself has to remember: steps done, rollouts in a row without an example, the rollouts that were
    drawn but not used up, and an algorithm's numbers that follow the training (a KL coefficient, say)."""

    step: int
    empty_rollouts: int = 0
    rollouts: tuple[Rollout, ...] = ()
    adaptive: Mapping[str, float] = field(default_factory=dict)


class Checkpoints:
    """The folder checkpoints/ of a run.

    Attributes:
        spared: a step whose checkpoint is kept besides the newest.
    """

    def __init__(self, folder: Path, *, keep: int):
        self._folder, self._keep = folder, keep
        self.spared: int | None = None

    def save(self, state: TrainerState, roles: Roles, tokenizer: Any) -> Path:
        """Write step-N beside its place, then move it there; keep the newest `keep`."""
        with self._beside(state.step) as (writing, final):
            self._write(writing, state, roles, tokenizer)
            shutil.rmtree(final, ignore_errors=True)
            writing.replace(final)
        for old in set(self.steps()[: -self._keep]) - {self.spared}:
            shutil.rmtree(self._folder / f"step-{old}", ignore_errors=True)
        return final

    def export(self, step: int, roles: Roles, tokenizer: Any) -> Path:
        """The policy as it is now, in place of the one in step-N. What resuming needs stays as it is there."""
        with self._beside(step) as (writing, final):
            self._export(writing, roles, tokenizer)
            _flush(writing)
            for file in [path for path in writing.rglob("*") if path.is_file()]:
                target = final / file.relative_to(writing)
                target.parent.mkdir(exist_ok=True)
                file.replace(target)
        return final

    @contextmanager
    def _beside(self, step: int) -> Iterator[tuple[Path, Path]]:
        """A folder to write to, which is gone afterwards, and step-N. Raises CheckpointError."""
        writing, final = self._folder / f".step-{step}.writing", self._folder / f"step-{step}"
        try:
            shutil.rmtree(writing, ignore_errors=True)
            yield writing, final
        except Exception as error:  # OSError, what safetensors and torch make of it, and actors of that
            if isinstance(error, RayalignError) and shutil.disk_usage(self._folder).free > FULL:
                raise
            raise CheckpointError(
                "this checkpoint could not be written; older ones are untouched",
                where=str(final),
                value=f"{type(error).__name__}: {error}".partition("\n")[0],
                remedy="free disk space, then resume=true",
            ) from error
        finally:
            shutil.rmtree(writing, ignore_errors=True)

    @staticmethod
    def _export(folder: Path, roles: Roles, tokenizer: Any) -> None:
        folder.mkdir(parents=True)
        roles.policy.export(folder)
        _padded_as(folder, tokenizer).save_pretrained(folder)

    def _write(self, folder: Path, state: TrainerState, roles: Roles, tokenizer: Any) -> None:
        self._export(folder, roles, tokenizer)
        trainer = folder / "trainer"
        trainer.mkdir()
        for name, learner in roles.items():
            (trainer / name).mkdir()
            learner.save(trainer / name)
        (trainer / "rollouts.pkl").write_bytes(pickle.dumps(state.rollouts))
        own = {"step": state.step, "empty_rollouts": state.empty_rollouts, "adaptive": dict(state.adaptive)}
        (trainer / "state.json").write_text(json.dumps(own))
        _flush(folder)

    def with_examples(self, error: TrainingStopped, step: int, examples: Sequence[Example]) -> TrainingStopped:
        """The error, with where the examples of the step that it is about were written: RUN/failed/step-N.pt, which
        torch.load(…, weights_only=False) reads as plain data, a dict for each example."""
        path = self._folder.parent / "failed" / f"step-{step}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"step": step, "error": str(error), "examples": [asdict(example) for example in examples]}, path)
        value = f"{error.value}; the step's examples are in {path}"
        return TrainingStopped(error.what, where=error.where, value=value, rule=error.rule, remedy=error.remedy)

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self._folder.glob("step-*"))
        return sorted(int(match.group(1)) for match in names if match)

    def at(self, step: int) -> Path | None:
        return self._folder / f"step-{step}" if step in self.steps() else None

    def newest(self) -> Path | None:
        steps = self.steps()
        return self._folder / f"step-{steps[-1]}" if steps else None


def _padded_as(folder: Path, tokenizer: Any) -> Any:
    """The tokenizer, padding as the exported model expects it: a scalar head reads the last token that is no padding,
    so that padding with the end token, which answers end with, would make it read another one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}  # an adapter alone has none
    wanted = config.get("pad_token_id")
    scores = any("SequenceClassification" in name for name in config.get("architectures") or ())
    if not scores or wanted in (None, tokenizer.pad_token_id):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(wanted)
    return tokenizer


def load_state(path: Path, roles: Roles) -> TrainerState:
    """Put the learners back where they were; returns the loop's own state."""
    trainer = path / "trainer"
    try:
        state = json.loads((trainer / "state.json").read_text())
        rollouts: Sequence[Rollout] = pickle.loads((trainer / "rollouts.pkl").read_bytes())
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            "this is not a whole checkpoint",
            where=str(path),
            value=f"{type(error).__name__}: {error}",
            remedy="delete it to resume from the one before",
        ) from error
    for name, learner in roles.items():
        learner.restore(trainer / name)
    return TrainerState(state["step"], state["empty_rollouts"], tuple(rollouts), state.get("adaptive", {}))


def _flush(folder: Path) -> None:
    """To the disk before the rename that makes the checkpoint visible, so that a power cut leaves no torn one."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
