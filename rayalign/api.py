"""What the command line does, from Python: `run_training(load_config("configs/demo.yaml"))`."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayalign.build import (
    Parts,
    check,
    collector_for,
    default_max_gap,
    load_tokenizer,
    model_path,
    prompts_for,
    start_parts,
    versions,
)
from rayalign.checkpoint import Checkpoints
from rayalign.config import save_config
from rayalign.console import Console, log_to_file, print_before_after, print_evaluation, show_warnings
from rayalign.data.prompts import PromptSet
from rayalign.errors import ConfigError
from rayalign.evaluate import Evaluation, evaluate
from rayalign.metrics import Recorder, read_records
from rayalign.rollouts import Rollouts
from rayalign.run import Run
from rayalign.schema import Config
from rayalign.train import train

QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        run_dir: its folder.
        step: training steps done.
        stopped: whether it was asked to stop before its last step.
        evaluations: by step.
    """

    run_dir: Path
    step: int
    stopped: bool
    evaluations: dict[int, Evaluation]


def run_training(config: Config, *, name: str = "run") -> Result:
    """Train as the config says. Everything is checked before anything is started.

    Args:
        name: of the run directory, when the config gives none.

    Raises:
        RayalignError: see rayalign.errors; the run directory then holds what was reached.
    """
    quiet_libraries()
    check(config)
    tokenizer = load_tokenizer(config)
    prompts = prompts_for(config, tokenizer)
    run_dir = prepare_run_dir(config, name)
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=config.checkpoint.keep)
    console = Console()
    _log_to(console, run_dir / "log" / "driver.log")
    console.say(f"run {run_dir}: {_describe(prompts)}")
    with start_parts(config, tokenizer, run_dir, console) as parts:
        return _train(config, parts, tokenizer, prompts, run_dir, checkpoints, console)


def _train(
    config: Config,
    parts: Parts,
    tokenizer: Any,
    prompts: PromptSet,
    run_dir: Path,
    checkpoints: Checkpoints,
    console: Console,
) -> Result:
    newest = checkpoints.newest() if config.resume else None
    first = int(newest.name.removeprefix("step-")) if newest else 0
    recorder = Recorder(run_dir, [tracker.start(run_dir, first) for tracker in config.trackers], first)
    collector = collector_for(config, parts, tokenizer)
    sampling = config.sampling.sampling()
    rollouts = Rollouts(
        collector,
        prompts.training,
        config.algorithm.request(sampling),
        seed=config.seed,
        count=config.rollout.prompts,
        depth=config.rollout.depth,
        resample_every=config.rollout.resample_every,
        progress=console.sampled,
    )
    before = {r["step"]: Evaluation.from_record(r) for r in read_records(run_dir / "evaluations.jsonl")}
    run = Run(
        algorithm=config.algorithm,
        collector=collector,
        rollouts=rollouts,
        roles=parts.roles,
        recorder=recorder,
        checkpoints=checkpoints,
        tokenizer=tokenizer,
        sampling=sampling,
        training=config.train,
        rollout=config.rollout,
        evaluation=config.evaluation,
        checkpoint=config.checkpoint,
        seed=config.seed,
        held_out=prompts.held_out[: config.evaluation.prompts],
        probe=[prompt.token_ids for prompt in prompts.training[: config.sync.probe_prompts]],
        max_gap=default_max_gap(config),
        turns=parts.turns,
        memory=parts.memory,
        say=console.say,
        advance=console.step,
        resume=config.resume,
        evaluations=before,
    )
    try:
        with run.interrupt.listen(console.say), console.bars(config.train.steps):
            state = train(run)
    finally:
        rollouts.close()
        recorder.close()
    if {0, state.step} <= run.evaluations.keys() and state.step:
        print_before_after(
            run.evaluations[0], run.evaluations[state.step], show=config.evaluation.show, seed=config.seed
        )
    stopped = state.step < config.train.steps
    console.say(
        f"stopped after step {state.step}; go on with: resume=true run_dir={run_dir}" if stopped else f"done: {run_dir}"
    )
    return Result(run_dir, state.step, stopped, run.evaluations)


def run_evaluation(config: Config, *, model: str | None = None) -> Evaluation:
    """Evaluate a checkpoint on the config's held-out prompts, against the config's model as reference.

    Args:
        model: folder of the policy, for instance checkpoints/step-48; none: the config's own model.
    """
    quiet_libraries()
    check(config)
    policy = model_path(model or config.model.path)
    tokenizer = load_tokenizer(config, policy)
    held_out = prompts_for(config, tokenizer).held_out[: config.evaluation.prompts]
    if not held_out:
        raise ConfigError(
            "no prompt is held out",
            where="key data.held_out",
            value=config.data.held_out,
            rule="above 0, and evaluation.prompts above 0",
            remedy="set data.held_out=0.2",
        )
    console = Console()
    folder = Path("runs") / f"evaluate-{time.strftime('%Y%m%d-%H%M%S')}"
    _log_to(console, folder / "log" / "driver.log")
    with (
        start_parts(config, tokenizer, folder, console, policy=policy, train=False) as parts,
        console.bars(len(held_out) * config.evaluation.samples),
    ):
        found = evaluate(
            collector_for(config, parts, tokenizer),
            parts.roles,
            held_out,
            config.sampling.sampling(),
            samples=config.evaluation.samples,
            seed=config.seed,
            progress=console.sampled,
        )
    record = {"model": policy, **found.record()}
    (folder / "evaluation.json").write_text(json.dumps(record, ensure_ascii=False, indent=1))
    print_evaluation(found, Path(policy).name)
    console.say(f"samples in {folder / 'evaluation.json'}")
    return found


def prepare_run_dir(config: Config, name: str) -> Path:
    """A new folder, or with resume=true an old one. Raises ConfigError when that is not what is there."""
    run_dir = Path(config.run_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}").expanduser()
    exists = (run_dir / "config.yaml").exists()
    if config.resume and config.run_dir is None:
        raise ConfigError(
            "there is nothing to resume",
            where="key resume",
            rule="resume=true goes with run_dir=…",
            remedy="name the run directory to go on with",
        )
    if config.resume and not exists:
        raise ConfigError(
            "there is no run in this folder",
            where="key run_dir",
            value=str(run_dir),
            rule="resume=true goes on with an existing run",
            remedy="leave resume out to start a new one",
        )
    if not config.resume and _holds_something(run_dir):
        raise ConfigError(
            "this run directory exists",
            where="key run_dir",
            value=str(run_dir),
            rule="a new or empty folder, or one of a run that never took a step",
            remedy="resume=true goes on with it; or choose another run_dir",
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "this folder cannot be made", where="key run_dir", value=str(run_dir), remedy=str(error)
        ) from None
    save_config(config, run_dir / "config.yaml")
    (run_dir / "versions.json").write_text(json.dumps(versions(), indent=1))
    return run_dir


def _holds_something(run_dir: Path) -> bool:
    """Whether anything would be lost: more than what a run leaves that failed before its first step."""
    if run_dir.is_file():
        return True
    found = [path for path in run_dir.rglob("*") if path.is_file() and path.stat().st_size] if run_dir.exists() else []
    before_the_first_step = ("config.yaml", "versions.json", "log", "tensorboard")
    return any(path.relative_to(run_dir).parts[0] not in before_the_first_step for path in found)


def quiet_libraries() -> None:
    """No bars, banners or telemetry of libraries between our own lines."""
    import torch

    os.environ.update({key: os.environ.get(key, value) for key, value in QUIET.items()})
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed prints that it found no accelerator
    from transformers.utils import logging

    logging.disable_progress_bar()


def _log_to(console: Console, log_path: Path) -> None:
    """Library noise of this process into its log file; our own warnings as lines."""
    log_to_file(log_path)
    show_warnings(console)


def _describe(prompts: PromptSet) -> str:
    skipped = f", {prompts.skipped} skipped as too long" if prompts.skipped else ""
    return f"{len(prompts.training)} training prompts, {len(prompts.held_out)} held out{skipped}"
