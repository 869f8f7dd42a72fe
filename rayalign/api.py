"""What the command line does, from Python: `run_training(load_config("configs/demo.yaml"))`."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayalign.build import (
    Parts,
    collector_for,
    default_max_gap,
    examples_for,
    has_cached_reference,
    learner_temperature,
    load_tokenizer,
    model_path,
    prompts_for,
    start_parts,
    with_cached_reference,
)
from rayalign.checkpoint import Checkpoints
from rayalign.checks import check_critic, check_parts, check_rollouts, check_scorer, check_training
from rayalign.console import Console, logged, print_before_after, print_evaluation
from rayalign.data.examples import ExampleSet
from rayalign.data.plain import PlainText, load_texts
from rayalign.data.prompts import PromptSet
from rayalign.errors import ConfigError
from rayalign.evaluate import Evaluation, evaluate, measure, measures
from rayalign.interrupt import Interrupt
from rayalign.metrics import Recorder, read_records
from rayalign.opponents import check_opponents, contest_for, generations_for, played_rows, settled
from rayalign.reading import Reading
from rayalign.rollouts import Collector, Rollouts
from rayalign.run import Run
from rayalign.run_dir import run_directory
from rayalign.schema import Config
from rayalign.selfplay import Generations
from rayalign.trackers import start_trackers
from rayalign.train import train
from rayalign.types import Sampling

QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True)
class Data:
    """What a run samples from and learns from; `examples` is None where it learns from its samples, `texts` where it
    learns from no plain texts besides."""

    prompts: PromptSet
    examples: ExampleSet | None
    texts: PlainText | None

    def describe(self) -> str:
        prompts, parts = self.prompts, [self.examples.describe()] if self.examples else []
        if prompts.training or prompts.held_out:
            skipped = f", {prompts.skipped} skipped as too long" if prompts.skipped else ""
            skipped += f", {prompts.cut} reference answers cut" if prompts.cut else ""
            count = f"{len(prompts.training)} training prompts, " if prompts.training else "prompts: "
            parts.append(f"{count}{len(prompts.held_out)} held out{skipped}")
        return "; ".join(parts)

    def fingerprints(self) -> dict[str, str]:
        """By key of the config."""
        found = {"data.examples": self.examples.fingerprint} if self.examples else {}
        if self.prompts.training or self.prompts.held_out:
            found["data.prompts"] = self.prompts.fingerprint
        return found


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        run_dir: its folder.
        step: training steps done.
        stopped: whether it was asked to stop before its last step.
        evaluations: by step; the last step's is that of the weights that were left.
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
    tokenizer = load_tokenizer(config)
    check_training(config)
    check_critic(config)
    check_scorer(config)
    prompts = prompts_for(config, tokenizer)
    examples = examples_for(config, tokenizer)
    texts = load_texts(config.algorithm, tokenizer, seed=config.seed)
    check_rollouts(config, prompts, examples)
    check_opponents(config, examples)
    config = settled(config, examples.rows if examples else None)
    data = Data(prompts, examples, texts)
    with run_directory(config, name, data.fingerprints()) as run_dir:
        return _run(config, tokenizer, data, run_dir)


def _run(config: Config, tokenizer: Any, data: Data, run_dir: Path) -> Result:
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=config.checkpoint.keep)
    newest = checkpoints.newest() if config.resume else None
    first = int(newest.name.removeprefix("step-")) if newest else 0
    console = Console()
    with logged(console, run_dir / "log" / "driver.log"):
        trackers = start_trackers(config.trackers, run_dir, first, resume=config.resume)
        recorder = Recorder(run_dir, trackers, first)
        try:
            console.say(f"run {run_dir}: {data.describe()}")
            with start_parts(config, tokenizer, run_dir, console) as parts:
                return _train(config, parts, tokenizer, data, run_dir, checkpoints, recorder, console)
        finally:
            recorder.close()
            report_of(run_dir, console)


def _train(
    config: Config,
    parts: Parts,
    tokenizer: Any,
    data: Data,
    run_dir: Path,
    checkpoints: Checkpoints,
    recorder: Recorder,
    console: Console,
) -> Result:
    collector, interrupt = collector_for(config, parts, tokenizer), Interrupt()
    rollouts = _rollouts(config, collector, data, console, run_dir, interrupt)
    roles, sampling = parts.roles, sampling_of(config, data.examples)
    contest = contest_for(config, parts, collector, data.examples, run_dir, sampling, console.say)
    held_out = contest.prompts if contest and config.scored else data.prompts.held_out[: config.evaluation.prompts]
    if has_cached_reference(config) and data.examples is not None:
        roles = with_cached_reference(config, roles, data.examples, console.say)
    before = {r["step"]: Evaluation.from_record(r) for r in read_records(run_dir / "evaluations.jsonl")}
    run = Run(
        algorithm=config.algorithm.planned(config.train.epochs * config.train.minibatches),
        collector=collector,
        rollouts=rollouts,
        roles=roles,
        recorder=recorder,
        checkpoints=checkpoints,
        tokenizer=tokenizer,
        sampling=sampling,
        training=config.train,
        rollout=config.rollout,
        evaluation=config.evaluation,
        checkpoint=config.checkpoint,
        seed=config.seed,
        held_out=held_out,
        held_out_rows=data.examples.held_out[: config.evaluation.rows] if data.examples else (),
        probe=_probe(config, data),
        max_gap=default_max_gap(config),
        learner_temperature=learner_temperature(config),
        turns=parts.turns,
        memory=parts.memory,
        say=console.say,
        advance=console.step,
        progress=console.sampled,
        resume=config.resume,
        evaluations=before,
        interrupt=interrupt,
        contest=contest,
        texts=data.texts,
    )
    counts = data.examples.counts if data.examples else {}
    try:
        with run.interrupt.listen(console.say), console.bars(config.train.steps):
            state = train(run)
    finally:
        rollouts.close()
        if data.examples and data.examples.counts != counts:  # what is known of some rows only when they are taken
            console.say(f"data: {data.examples.describe()}")
    evaluations = run.evaluations | ({state.step: run.final} if run.final is not None else {})
    if {0, state.step} <= evaluations.keys() and state.step:
        print_before_after(evaluations[0], evaluations[state.step], show=config.evaluation.show, seed=config.seed)
    stopped = state.step < config.train.steps and not run.converged()
    if state.step < config.train.steps and not stopped:
        console.say(f"{config.train.stop.metric} got no better: the run ends after step {state.step}")
    console.say(
        f"stopped after step {state.step}; go on with: resume=true run_dir={run_dir}" if stopped else f"done: {run_dir}"
    )
    return Result(run_dir, state.step, stopped, evaluations)


def sampling_of(config: Config, examples: ExampleSet | None) -> Sampling:
    """As the config says, ending where the answers of the data set end."""
    sampling = config.sampling.sampling()
    ends = examples.end if examples and len(examples.end) == 1 else ()
    return replace(sampling, stop_token_ids=(*sampling.stop_token_ids, *ends))


def _probe(config: Config, data: Data) -> list[tuple[int, ...]]:
    """Token ids on which the first push of weights is verified."""
    count = config.sync.probe_prompts
    prompts = (*data.prompts.training, *data.prompts.held_out)[:count]
    if not prompts and config.self_play and data.examples is not None:
        rows = (data.examples.row(number) for number in range(min(count, data.examples.rows or 0)))
        prompts = tuple(row.prompt for row in rows if row is not None)
    return [prompt.token_ids[: config.engine.max_context - 1] for prompt in prompts]


def _rollouts(
    config: Config, collector: Collector | None, data: Data, console: Console, run_dir: Path, interrupt: Interrupt
) -> Rollouts | Reading | Generations:
    """Where the groups of each step come from: sampled and scored, or read, or both in turn."""
    if collector is not None and data.examples is not None and config.self_play:
        sampling = sampling_of(config, data.examples)
        return generations_for(
            config, collector, data.examples, run_dir, console, sampling, lambda: interrupt.requested
        )
    if collector is None or data.examples is not None:
        return Reading(data.examples, count=config.rollout.prompts)
    return Rollouts(
        collector,
        data.prompts.training,
        config.algorithm.request(config.sampling.sampling()),
        seed=config.seed,
        count=config.rollout.prompts,
        depth=config.rollout.depth,
        resample_every=config.rollout.resample_every,
        at_once=config.rollout.set_size(len(data.prompts.training), config.train.steps),
        progress=console.sampled,
        useful=config.algorithm.useful,
        refill=getattr(config.algorithm, "refill", 0),
    )


def run_evaluation(config: Config, *, model: str | None = None) -> Evaluation:
    """Evaluate a checkpoint on the config's held-out prompts, against the config's model as reference.

    Args:
        model: folder of the policy, for instance checkpoints/step-30; none: the config's own model.
    """
    quiet_libraries()
    policy = model_path(model or config.model.path)
    tokenizer = load_tokenizer(config, policy)
    check_parts(config)
    check_scorer(config)
    held_out = prompts_for(config, tokenizer).held_out[: config.evaluation.prompts]
    examples = examples_for(config, tokenizer)
    if config.scored:
        held_out = held_out or tuple(row.prompt for row in played_rows(config, examples))
    rows = examples.held_out[: config.evaluation.rows] if examples else ()
    if not held_out and not rows:
        raise ConfigError(
            "nothing is held out",
            where="key data.held_out",
            value=config.data.held_out,
            rule="above 0, and evaluation.prompts or evaluation.rows above 0",
            remedy="set data.held_out=0.2",
        )
    console = Console()
    folder = Path("runs") / f"evaluate-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    found = Evaluation(0, ())
    with (
        logged(console, folder / "log" / "driver.log"),
        start_parts(config, tokenizer, folder, console, policy=policy, train=False) as parts,
        console.bars(),
    ):
        if held_out:
            found = evaluate(
                collector_for(config, parts, tokenizer),
                parts.roles,
                held_out,
                sampling_of(config, examples),
                samples=config.evaluation.samples,
                seed=config.seed,
                learner_temperature=learner_temperature(config),
                progress=console.sampled,
                further=measures(config.algorithm, parts.roles, rows),
            )
        if rows:
            found = replace(found, metrics=found.metrics | measure(rows, config.algorithm, parts.roles))
    record = {"model": policy, **found.record()}
    (folder / "evaluation.json").write_text(json.dumps(record, ensure_ascii=False, indent=1))
    print_evaluation(found, Path(policy).name)
    console.say(f"written to {folder / 'evaluation.json'}")
    return found


def report_of(run_dir: Path, console: Console) -> None:
    """A report of what was reached, however the run ended. One that cannot be written is said, and is no failure."""
    from rayalign.report import write_report

    if not (run_dir / "metrics.jsonl").stat().st_size:
        return
    try:
        console.say(f"report {write_report([run_dir])}")
    except Exception as error:  # a full disk, say: what the run did is in its files all the same
        console.say(f"no report was written: {type(error).__name__}: {error}")


def quiet_libraries() -> None:
    """No bars, banners or telemetry of libraries between our own lines."""
    import torch

    os.environ.update({key: os.environ.get(key, value) for key, value in QUIET.items()})
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed prints that it found no accelerator
    from transformers.utils import logging

    logging.disable_progress_bar()
