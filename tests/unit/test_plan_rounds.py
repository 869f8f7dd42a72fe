"""Plans of labellings and of rounds: what runs where, and what is not known before."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from rayalign.config import Rounds, load_job
from rayalign.plan import make_plan, print_plan
from rayalign.plan.rounds import plan_job, plan_stages

ROOT = Path(__file__).resolve().parents[2]
SHAPES = Path(__file__).parent / "shapes"
ROUNDS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if "\nrounds:\n" in path.read_text())
NODES = {"1gpu": "1x1xA100-80/400GiB", "8gpu": "1x8xA100-80/1800GiB"}
SIMILAR = {  # of the same shape, or larger
    "Llama-3.1-8B-Instruct": "Llama-3.1-8B",
    "Llama-3.1-70B-Instruct": "Llama-3.1-70B",
    "Qwen2.5-0.5B-Instruct": "Qwen2.5-1.5B-Instruct",
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def shaped(path, *more):
    """A config with folders of shapes in the place of its models."""
    text = Path(path).read_text()
    overrides = []
    found = load_job(path)
    configs = {"": found}
    if isinstance(found, Rounds):
        configs = {stage.name: stage.config for stage in reversed(found.stages)}  # of the first repetition
    for name, config in configs.items():
        keys = {
            "model.path": config.model.path,
            "scorer.ask.model": getattr(getattr(config.scorer, "ask", None), "model", None),
        }
        for key, value in keys.items():
            if value and not value.startswith("stage:") and value in text:
                prefix = f"rounds.{name}." if name else ""
                overrides.append(f"{prefix}{key}={SHAPES / SIMILAR.get(Path(value).name, Path(value).name)}")
    return load_job(path, [*overrides, *more])  # fmt: skip


@pytest.mark.parametrize("path", ROUNDS, ids=lambda path: path.stem)
def test_every_shipped_job_of_rounds_plans(path):
    nodes = next((nodes for part, nodes in NODES.items() if part in path.stem), "1x2cpu/16GiB")
    job, out = shaped(path), io.StringIO()
    for stage, plan in ((each.stage, each.plan) for each in plan_stages(job, nodes=nodes)):
        assert plan.fits, (stage.name, plan.problems)
        kinds = {place.actor.split("-")[0] for place in plan.fit.places}
        assert ("learner" in kinds) == stage.config.learns
        assert ("engine" in kinds) == stage.config.samples
    assert plan_job(job, nodes=nodes, console=Console(file=out, width=100))
    told = out.getvalue()
    assert all(f"{stage.name}: fits" in told for stage in job.stages)
    assert ("all of it 2 times" in told) == (job.repeat == 2)


def test_a_labelling_is_planned_in_shards_and_without_a_learner():
    config = shaped(ROOT / "configs/label.yaml")
    plan = make_plan(config, nodes="1x2cpu/16GiB")
    assert plan.fits and {place.actor for place in plan.fit.places} == {"engine-0", "scorer-0"}
    assert (plan.fit.batches.steps, plan.fit.batches.completions, plan.disk.most) == (3, 256, 0.0)
    assert {role.actor for role in plan.fit.memory} == {"engine", "scorer"}
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=100))
    told = " ".join(out.getvalue().split())
    assert "one shard, and the run" in told and "768 answers to be scored" in told and "optimiser" not in told


def test_what_a_stage_will_have_written_is_bounded_by_what_it_samples():
    job = shaped(ROOT / "configs/rounds_llama3.yaml")
    plans = {each.stage.name: each.plan for each in plan_stages(job, nodes="1x2cpu/16GiB")}
    rows = plans["dpo"].lengths.rows
    assert (rows.training, rows.held_out) == (173, 19)  # of 192 prompts
    assert len(rows.scores) == 8 and rows.answer == 41
    assert "has not run" in rows.source
    assert plans["dpo"].fit.batches.examples == 12 and plans["sft"].fit.batches.examples == 24
    pairs = {each.stage.name: each.plan for each in plan_stages(shaped(ROOT / "configs/rounds_rlaif.yaml"))}
    assert pairs["reward"].lengths.rows.training + pairs["reward"].lengths.rows.held_out == 192 * 3


def test_a_job_that_does_not_fit_says_which_stage():
    job, out = shaped(ROOT / "configs/rounds_llama3.yaml"), io.StringIO()
    assert not plan_job(job, nodes="1x2cpu/2GiB", console=Console(file=out, width=100))
    assert "sft: does NOT fit; model.path" not in out.getvalue() and "dpo: does NOT fit; " in out.getvalue()
