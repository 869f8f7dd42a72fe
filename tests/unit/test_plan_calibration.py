"""Plans of calibrations: K candidates and the reference answer are the rows of an example."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from rayalign.config import load_config, load_job
from rayalign.plan import make_plan, print_plan
from rayalign.plan.batches import examples_of_a_prompt
from rayalign.plan.rounds import plan_stages

ROOT = Path(__file__).resolve().parents[2]
SMOL = f"model.path={Path(__file__).parent / 'shapes/SmolLM2-135M-Instruct'}"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def of_tiny(model, tmp_path):
    """A shipped config with the tiny model, whose tokenizer is there, and its prompts with or without gold answers."""

    def build(*overrides, gold=None):
        rows = [{"prompt": f"write about film {i}", "gold": gold} for i in range(40)]
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = [f"model.path={model}", f"data.prompts={path}", *overrides]
        return make_plan(load_config("configs/dpm_calibration.yaml", given), nodes="1x2cpu/16GiB")

    return build


def test_reference_answers_are_rows_where_there_are_some(of_tiny):
    without, short, long = (of_tiny(gold=gold) for gold in (None, "fine", "fine " * 40))
    assert [plan.fit.batches.rows for plan in (without, short, long)] == [8, 9, 9]
    assert [plan.lengths.gold for plan in (without, short)] == [0, 5]  # four letters and the end
    assert all(plan.fit.batches.examples == 4 and plan.fit.batches.completions == 32 for plan in (without, short))
    assert long.lengths.gold > 40 and long.tokens.sampled == without.tokens.sampled

    def longest(plan):
        config = load_config("configs/dpm_calibration.yaml", [f"model.path={plan.model}"])
        return max(map(len, examples_of_a_prompt(config, plan.lengths)[0].sequences))

    assert longest(without) == longest(short) < longest(long) == long.lengths.longest + long.lengths.gold


def test_no_reference_model_unless_the_regulariser_is_on(of_tiny):
    plain, regularised = of_tiny(), of_tiny("algorithm.kl_weight=0.1")
    assert plain.tokens.reference == 0 < regularised.tokens.reference


def test_without_a_tokenizer_reference_answers_are_bounded():
    plan = make_plan(load_config("configs/dpm_calibration.yaml", [SMOL]), nodes="1x2cpu/16GiB")
    assert plan.fits and not plan.lengths.measured
    assert plan.lengths.gold == 40 and plan.fit.batches.rows == 9
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=120))
    assert "this fits" in out.getvalue()


def test_a_stage_that_learns_from_labelled_rows_has_their_reference_answers(model):
    job = load_job("configs/dpm_cpu.yaml", [f"model.path={model}", "engine.max_context=192"])
    plans = {each.stage.name: each.plan for each in plan_stages(job, nodes="1x2cpu/16GiB")}
    rows = plans["calibrate"].lengths.rows
    assert (rows.training, rows.held_out, len(rows.scores)) == (72, 12, 8)  # of 84 prompts
    assert rows.gold > 60  # of a tokenizer whose tokens are letters
    batches = plans["calibrate"].fit.batches
    assert (batches.rows, batches.examples, batches.passes) == (9, 4, 1.0)
    assert plans["candidates"].fit.batches.completions == 28 * 8
