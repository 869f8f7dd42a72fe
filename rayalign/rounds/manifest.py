"""What a stage was made of, and what it left: enough to tell whether it has to run again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rayalign.config import Stage
from rayalign.config.references import texts
from rayalign.config.rounds import STAGE
from rayalign.data.files import content
from rayalign.errors import CheckpointError
from rayalign.run_dir import FREE, OPEN, decides

FILE = "manifest.json"
# What a stage makes depends on these. Others, as engine.max_running or evaluation.prompts, do not run it again.
DECIDING = ("model", "data", "algorithm", "scorer", "sampling", "rollout", "train", "optimizer", "seed")
FILES = (".path", ".prompts", ".model", ".template", ".lexicon")  # ends of keys that may name a file or a folder


@dataclass(frozen=True)
class Manifest:
    """Of one stage, in its folder.

    Attributes:
        fingerprint: of its config and of its inputs.
        config: what its fingerprint is of: the keys that decide what it makes.
        inputs: key of the config → fingerprint of the file, the model or the stage that it names.
        outputs: "model" and "data" → path; empty until it ended. In the file they are relative to the folder, which
            may be moved.
        metrics: what it came to.
        began, ended: times; `ended` is None until then.
    """

    stage: str
    fingerprint: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    began: str = ""
    ended: str | None = None

    @property
    def whole(self) -> bool:
        """Whether it ended, and what it left is still there."""
        return self.ended is not None and all(Path(path).exists() for path in self.outputs.values())

    def goes_on(self, there: Manifest) -> bool:
        """Whether a stage can be made of the one that is there: it is the same, has more iterations, or other rows are
        written of the same answers."""
        parts, known = [], []
        for each in (there, self):
            iterations = each.config["algorithm"].get("iterations")
            follows = () if iterations is None else ("steps",)  # as many as iterations have
            parts.append(decides({**each.config, "train": decides(each.config["train"], follows)}, FREE + OPEN))
            known.append(iterations or 1)
        return there.inputs == self.inputs and parts[0] == parts[1] and known[0] <= known[1]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        writing = folder / f".{FILE}.writing"
        outputs = {kind: str(Path(path).relative_to(folder)) for kind, path in self.outputs.items()}
        writing.write_text(json.dumps({**asdict(self), "outputs": outputs}, indent=1, ensure_ascii=False), "utf-8")
        writing.replace(folder / FILE)


def read_manifest(folder: Path) -> Manifest | None:
    """None where the stage never began. Raises CheckpointError when it is damaged."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text("utf-8"))
        return Manifest(**{**found, "outputs": {kind: str(folder / path) for kind, path in found["outputs"].items()}})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            "this manifest of a stage is damaged",
            where=str(file),
            value=f"{type(error).__name__}: {error}",
            rule="as it was written: what the stage was made of, and what it left",
            remedy="move the stage's folder away to run it again, or put the file back from a copy",
        ) from None


def planned(stage: Stage, before: Mapping[str, Manifest]) -> Manifest:
    """The manifest of a stage that is about to run.

    Args:
        before: folder → manifest of the stages that ran before.
    """
    whole = stage.config.to_dict()
    config = {key: decides(whole[key]) for key in DECIDING}
    if whole["learner"].get("train_vision"):
        config["learner"] = {"train_vision": True}
    inputs = {}
    for path, text in texts(config):
        key = ".".join(map(str, path))
        named = key.endswith(FILES) or "/" in text
        if text.startswith(STAGE):
            inputs[key] = before[text.removeprefix(STAGE)].fingerprint
        elif named and (known := content(Path(text).expanduser())):
            inputs[key] = known
    text = json.dumps([config, inputs], sort_keys=True)
    return Manifest(stage.name, _digest(text.encode()), config, inputs)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
