"""Checkpoints: written whole or not at all, and enough to go on as if never stopped.

checkpoints/step-12/          the policy as a Hugging Face checkpoint, tokenizer included
checkpoints/step-12/trainer/  state.json, rollouts.pkl, and one folder a role
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from rayalign.errors import CheckpointError, RayalignError
from rayalign.protocols import Roles
from rayalign.record import Record
from rayalign.rollouts import Rollout

FULL = 256 * 2**20  # bytes that are free on a disk on which a checkpoint finds no room


class CheckpointConfig(Record):
    """Checkpoints: policy in Hugging Face format, and all that a resumed run needs."""

    every: int = Field(50, ge=0, description="steps between checkpoints; 0: at the end only")
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept")


@dataclass(frozen=True)
class TrainerState:
    """What the loop itself has to remember: steps done, rollouts in a row without an example, and the
    rollouts that were drawn but not used up."""

    step: int
    empty_rollouts: int = 0
    rollouts: tuple[Rollout, ...] = ()


class Checkpoints:
    """The folder checkpoints/ of a run."""

    def __init__(self, folder: Path, *, keep: int):
        self._folder, self._keep = folder, keep

    def save(self, state: TrainerState, roles: Roles, tokenizer: Any) -> Path:
        """Write step-N beside its place, then move it there; keep the newest `keep`."""
        final = self._folder / f"step-{state.step}"
        writing = self._folder / f".step-{state.step}.writing"
        try:
            shutil.rmtree(writing, ignore_errors=True)
            self._write(writing, state, roles, tokenizer)
            shutil.rmtree(final, ignore_errors=True)
            writing.replace(final)
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
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self._folder / f"step-{old}", ignore_errors=True)
        return final

    @staticmethod
    def _write(folder: Path, state: TrainerState, roles: Roles, tokenizer: Any) -> None:
        trainer = folder / "trainer"
        trainer.mkdir(parents=True)
        roles.policy.export(folder)
        _padded_as(folder, tokenizer).save_pretrained(folder)
        for name, learner in roles.items():
            (trainer / name).mkdir()
            learner.save(trainer / name)
        (trainer / "rollouts.pkl").write_bytes(pickle.dumps(state.rollouts))
        (trainer / "state.json").write_text(json.dumps({"step": state.step, "empty_rollouts": state.empty_rollouts}))
        _flush(folder)

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self._folder.glob("step-*"))
        return sorted(int(match.group(1)) for match in names if match)

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
    return TrainerState(state["step"], state["empty_rollouts"], tuple(rollouts))


def _flush(folder: Path) -> None:
    """To the disk before the rename that makes the checkpoint visible, so that a power cut leaves no torn one."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
