"""What a run of self-play is put together from, besides what any run has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rayalign.build import Parts
from rayalign.console import Console
from rayalign.data.examples import ExampleSet
from rayalign.errors import ConfigError
from rayalign.rollouts import Collector
from rayalign.schema import Config
from rayalign.selfplay import Contest, Generations
from rayalign.selfplay.asking import Opponent
from rayalign.types import Group, Sampling


def settled(config: Config, rows: int | None) -> Config:
    """The config with as many training steps as its iterations have, where these follow from the number of rows."""
    if not config.self_play or not rows:
        return config
    algorithm = config.algorithm.over(rows, config.rollout.prompts)  # type: ignore[attr-defined]
    train = config.train.model_copy(update={"steps": algorithm.total_steps})
    return config.model_copy(update={"algorithm": algorithm, "train": train})


def check_opponents(config: Config, examples: ExampleSet | None) -> None:
    """Whether an engine can answer the rows. Raises ConfigError."""
    if not config.self_play or examples is None:
        return
    first = examples.row(0)
    if first is not None and first.prompt.images:
        raise ConfigError(
            "an opponent sees no images",
            where="key data.examples",
            value="rows with images",
            rule=f"rows of texts: {config.algorithm.name} has an engine answer their prompts",
            remedy="take the column of images out of the data",
        )


def generations_for(
    config: Config,
    collector: Collector,
    examples: ExampleSet,
    run_dir: Path,
    console: Console,
    sampling: Sampling,
    stopped: Callable[[], bool],
) -> Generations:
    """The opponents' answers, by the engines that the collector asks."""
    opponent = Opponent(
        engine=collector.engine,
        sampling=sampling,
        decode=collector.decode,
        seed=config.seed,
        room=_room(config),
        refuse_long=config.data.long_prompts == "refuse",
        open=2 * config.engine.count * config.engine.max_running,
    )
    return Generations(
        examples,
        opponent,
        config.algorithm,  # type: ignore[arg-type]
        run_dir,
        count=config.rollout.prompts,
        identity=config.model.path,  # as it stands there: it cannot change on resume, wherever the folder lies then
        progress=console.sampled,
        say=console.say,
        stopped=stopped,
    )


def contest_for(
    config: Config,
    parts: Parts,
    collector: Collector | None,
    examples: ExampleSet | None,
    run_dir: Path,
    sampling: Sampling,
    say: Callable[[str], None],
) -> Contest | None:
    """None where nothing is held out, or no prompt of it is to be answered."""
    rows = played_rows(config, examples)
    if not rows or collector is None or examples is None:
        return None
    return Contest(
        rows,
        collector,
        parts.scorer,
        run_dir,
        sampling=sampling,
        samples=config.evaluation.samples,
        seed=config.seed,
        identity={"data": examples.fingerprint, "model": config.model.path},
        say=say,
    )


def played_rows(config: Config, examples: ExampleSet | None) -> list[Group]:
    """Held-out rows whose prompts are answered in evaluations: evaluation.prompts of those that leave room."""
    if not config.self_play or examples is None:
        return []
    found, wanted = [], config.evaluation.prompts
    for row in examples.held_out if wanted else ():
        if len(row.prompt.token_ids) <= _room(config):
            found.append(row)
        if len(found) == wanted:
            break
    return found


def _room(config: Config) -> int:
    """Tokens of the longest prompt that an answer fits behind."""
    return config.engine.max_context - config.sampling.max_tokens
