"""The plan of a job: of one run, or of each stage in turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.console import Console

from rayalign.config import Rounds, Stage, parse_config
from rayalign.config.references import renamed
from rayalign.plan import Plan, make_plan
from rayalign.plan.batches import data_lengths, prompt_lengths
from rayalign.plan.labels import labelled_rows
from rayalign.plan.opponents import with_opponent
from rayalign.plan.records import Lengths, Rows
from rayalign.plan.show import print_plan, wide
from rayalign.schema import Config


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage. Where it starts from another stage, that is planned by the model both descend from."""

    stage: Stage
    plan: Plan


def plan_job(job: Config | Rounds, *, nodes: str | None = None, console: Console | None = None) -> bool:
    """Print the plan of a run, or of each stage. Whether all of it fits. Raises ConfigError, see `make_plan`."""
    if not isinstance(job, Rounds):
        plan = make_plan(job, nodes=nodes)
        print_plan(plan, console)
        return plan.fits
    out = wide(console)
    plans = list(plan_stages(job, nodes=nodes))
    for number, each in enumerate(plans, start=1):
        out.rule(f"stage {number} of {len(plans)}: {each.stage.name} ({each.stage.config.algorithm.name})")
        print_plan(each.plan, out)
    out.rule("all stages")
    for each in plans:
        inputs = ", ".join(f"{key} from {folder}" for key, folder in each.stage.references.items())
        verdict = "fits" if each.plan.fits else "does NOT fit"
        out.print(f"{each.stage.name}: {verdict}{f'; {inputs}' if inputs else ''}", markup=False)
    if job.repeat > 1:
        out.print(f"all of it {job.repeat} times, each time from the newest policy", markup=False)
    out.print("not known before it runs: how many rows the stages write, and how long answers are", markup=False)
    return all(each.plan.fits for each in plans)


def plan_stages(rounds: Rounds, *, nodes: str | None = None) -> Iterator[StagePlan]:
    """Of each stage of the first repetition; the later ones are like it. Raises ConfigError."""
    for stage in rounds.once:
        config = _standing_for(rounds, stage)
        yield StagePlan(stage, make_plan(config, nodes=nodes, rows=_rows(rounds, stage, config)))


def _standing_for(rounds: Rounds, stage: Stage) -> Config:
    """With models that are there already in the place of those that stages will have trained: of the same shape."""

    def path(key: str, folder: str) -> str:
        return f"stage:{folder}" if key.startswith("data.") else rounds.initial_model(rounds.stage(folder))

    return parse_config(renamed(stage.config.to_dict(), path), source=f"stage {stage.name}")


def _rows(rounds: Rounds, stage: Stage, config: Config) -> Rows | None:
    """What a stage learns from that a labelling before it will have written; None where all its data are there."""
    folder = next((folder for key, folder in stage.references.items() if key.startswith("data.examples")), None)
    if folder is None:
        return None
    labelling = _standing_for(rounds, rounds.stage(folder))
    before = _rows(rounds, rounds.stage(folder), labelling)
    lengths: Lengths = (
        data_lengths(labelling) if before is None else Lengths(0.0, 0, 0, 0, 0, True, "nothing is sampled", rows=before)
    )
    rows = labelled_rows(labelling, lengths, config.data.held_out)
    rows = replace(rows, gold=_gold(labelling, config, rows))
    return with_opponent(config, rows, [rows.longest - rows.answer])


def _gold(labelling: Config, config: Config, rows: Rows) -> int:
    """Tokens of the longest reference answer that goes along with rows that are labelled."""
    if not getattr(config.algorithm, "takes_gold", False):
        return 0
    if not labelling.algorithm.samples:  # type: ignore[attr-defined]
        return rows.answer
    return prompt_lengths(labelling.model_copy(update={"algorithm": config.algorithm})).gold
