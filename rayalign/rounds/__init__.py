"""A config with `rounds`: its stages run one after the other and hand over weights and rows.

run_dir/rounds.yaml             what was asked for
run_dir/stages/NAME/            an ordinary run, with a report of its own; NAME-2 in the second repetition
run_dir/stages/NAME/manifest.json   what it was made of, and what it left
run_dir/replaced/               stages that were made of something else, as they were
run_dir/report.html             all stages, with links
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rayalign.api import Result, quiet_libraries, run_training
from rayalign.build import examples_for, load_tokenizer, prompts_for
from rayalign.checks import check_critic, check_labelling, check_rollouts, check_scorer, check_training
from rayalign.config import Rounds, Stage, parse_config, save_config
from rayalign.config.references import renamed
from rayalign.console import Console
from rayalign.data.plain import load_texts
from rayalign.errors import CheckpointError, RayalignError
from rayalign.label import Labelled, run_labelling
from rayalign.metrics import read_records
from rayalign.opponents import check_opponents
from rayalign.rounds.folder import STAGES, WRITTEN, folder_of, rounds_folder
from rayalign.rounds.manifest import Manifest, planned, read_manifest
from rayalign.rounds.page import write_page
from rayalign.schema import Config

REPLACED = "replaced"


@dataclass(frozen=True)
class Finished:
    """How a job of several stages ended.

    Attributes:
        run_dir: its folder.
        stages: folder → manifest, of the stages that ended.
        ran: folders of those that ran now; the others had ended before.
        stopped: whether it was asked to stop before its last stage ended.
    """

    run_dir: Path
    stages: dict[str, Manifest]
    ran: tuple[str, ...]
    stopped: bool

    def output(self, folder: str, kind: str = "model") -> Path:
        """The checkpoint ("model") or the rows ("data") that a stage left."""
        return Path(self.stages[folder].outputs[kind])


def run_job(job: Config | Rounds, *, name: str = "run") -> Result | Labelled | Finished:
    """What a config asks for: a training, a labelling, or stages of both. Raises RayalignError."""
    if isinstance(job, Rounds):
        return run_rounds(job, name=name)
    return run_training(job, name=name) if job.learns else run_labelling(job, name=name)


def run_rounds(rounds: Rounds, *, name: str = "rounds") -> Finished:
    """Run the stages that have not ended yet, or were made of something else.

    Raises:
        RayalignError: of the checks, before anything is started; or of a stage, with its name. What ended stays.
    """
    quiet_libraries()
    console = Console()
    run_dir = folder_of(rounds, name)
    check_stages(rounds)
    with rounds_folder(run_dir, rounds):
        save_config(rounds, run_dir / WRITTEN)
        done: dict[str, Manifest] = {}
        ran: list[str] = []
        for number, stage in enumerate(rounds.stages, start=1):
            folder = run_dir / STAGES / stage.folder
            title = f"stage {number} of {len(rounds.stages)}, {stage.folder}"
            wanted, there = planned(stage, done), read_manifest(folder)
            if there is not None and there.fingerprint == wanted.fingerprint and there.whole:
                console.say(f"{title}: ended {there.ended} and is not run again")
                done[stage.folder] = there
                continue
            console.say(f"{title}: {_in_words(stage)}")
            ended = _run_stage(stage, wanted, there, folder, done, run_dir, console)
            if ended is not None:
                done[stage.folder] = ended
                ran.append(stage.folder)
            write_page(run_dir, rounds, done)
            if ended is None:
                console.say(f"stopped in {title}; go on with: resume=true run_dir={run_dir}")
                return Finished(run_dir, done, tuple(ran), True)
        console.say(f"done: {len(done)} stages; report {write_page(run_dir, rounds, done)}")
        return Finished(run_dir, done, tuple(ran), False)


def _in_words(stage: Stage) -> str:
    parts = [f"{key} from {folder}" for key, folder in stage.references.items()]
    return stage.config.algorithm.name + (f", {', '.join(parts)}" if parts else "")


def check_stages(rounds: Rounds) -> None:
    """All that can be told before the first stage starts: parts, prompts and rows of each of them, as far as no
    earlier stage makes them. Raises RayalignError that names the stage."""
    for stage in rounds.once:
        try:
            _check_stage(rounds, stage)
        except RayalignError as error:
            error.where = f"stage {stage.name}, {error.where}" if error.where else f"stage {stage.name}"
            raise


def _check_stage(rounds: Rounds, stage: Stage) -> None:
    config = rounds.standing(stage)
    if config.learns:
        check_training(config)
        check_critic(config)
    else:
        check_labelling(config)
    if not any(key.startswith("scorer.") for key in stage.references):
        check_scorer(config)
    tokenizer = load_tokenizer(config)
    prompts = prompts_for(config, tokenizer)
    from_stages = any(key.startswith("data.examples") for key in stage.references)
    examples = None if from_stages else examples_for(config, tokenizer)
    load_texts(config.algorithm, tokenizer, seed=config.seed)
    if config.learns and not from_stages:
        check_rollouts(config, prompts, examples)
        check_opponents(config, examples)


def _run_stage(
    stage: Stage,
    wanted: Manifest,
    there: Manifest | None,
    folder: Path,
    done: dict[str, Manifest],
    run_dir: Path,
    console: Console,
) -> Manifest | None:
    """Begin a stage, or go on with it. None: it was asked to stop."""
    if there is not None and not wanted.goes_on(there):
        console.say(f"{stage.folder} was made of something else, and is kept as {_put_away(folder, run_dir)}")
    begun = replace(wanted, began=there.began if there and folder.is_dir() else _now())
    begun.write(folder)
    config = _resolved(stage, done).model_copy(
        update={"run_dir": str(folder), "resume": (folder / "config.yaml").is_file()}
    )
    try:
        result = run_job(config, name=stage.folder)
    except RayalignError as error:
        error.where = f"stage {stage.folder}, {error.where}" if error.where else f"stage {stage.folder}"
        raise
    if result.stopped:
        return None
    ended = replace(begun, **_left(result), ended=_now())
    ended.write(folder)
    return ended


def _left(result: Any) -> dict[str, Any]:
    """What a run left behind, as a manifest has it."""
    if isinstance(result, Labelled):
        return {"outputs": {"data": str(result.file)}, "metrics": result.metrics, "steps": result.rows}
    newest = result.run_dir / "checkpoints" / f"step-{result.step}"
    evaluations = read_records(result.run_dir / "evaluations.jsonl")
    found = evaluations[-1]["metrics"] if evaluations else {}
    metrics = {key: value for key, value in found.items() if not key.endswith(("/low", "/high"))}
    return {"outputs": {"model": str(newest)}, "metrics": metrics, "steps": result.step}


def _resolved(stage: Stage, done: dict[str, Manifest]) -> Config:
    """With paths where it names other stages."""

    def path(key: str, folder: str) -> str:
        kind = "data" if key.startswith("data.") else "model"
        return done[folder].outputs[kind]

    return parse_config(renamed(stage.config.to_dict(), path), source=f"stage {stage.folder}")


def _put_away(folder: Path, run_dir: Path) -> Path:
    """A stage that was made of something else: moved, not lost."""
    place = run_dir / REPLACED / f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while place.exists():
        number += 1
        place = place.with_name(f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}-{number}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(place)
    except OSError as error:
        raise CheckpointError(
            "a stage that has to run again cannot be put away",
            where=str(folder),
            value=f"{type(error).__name__}: {error}",
            remedy=f"move it yourself, or choose another run_dir than {run_dir}",
        ) from error
    return place


def _now() -> str:
    return datetime.now().isoformat(sep=" ", timespec="seconds")
