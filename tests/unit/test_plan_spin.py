"""Plans of self-play: what they count is what a run does, and what they do not know they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayalign.api import run_training
from rayalign.config import load_config, parse_config
from rayalign.plan import make_plan
from tests.parts import tiny_config

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ROOT / "tests/unit/shapes"


@pytest.fixture
def config(tmp_path, model):
    def build(**algorithm):
        rows = [{"prompt": f"write about film {n}", "completion": f"a film {n}"} for n in range(20)]
        file = tmp_path / "sft.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        base = tiny_config(tmp_path, model)
        del base["train"]
        data = {"examples": str(file), "chat_template": False, "held_out": 0.2}
        changes = {
            "algorithm": {"name": "spin", **algorithm},
            "data": data,
            "evaluation": {"prompts": 3, "samples": 2},
            "checkpoint": {"every": 3, "keep": 99},
        }
        return parse_config(base | changes)

    return build


def test_what_is_counted_is_what_a_run_does(config):
    settings = config(iterations=3, steps=[2, 3])
    batches = make_plan(settings, nodes="1x2cpu/16GiB").fit.batches
    run_dir = run_training(settings).run_dir
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert batches.steps == len(records) == 8
    assert batches.pushes == 1 + sum("sync/version" in record for record in records)
    evaluations = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert batches.evaluations == len(evaluations) == 4
    assert batches.evaluation_completions == len(evaluations[0]["samples"]) == 6
    assert batches.checkpoints == len(list((run_dir / "checkpoints").iterdir())) == 5  # 2, 3, 5, 6, 8
    assert batches.rows == 2 and batches.examples == 4 == records[0]["pairs/kept"]


def test_epochs_are_counted_on_the_rows(config):
    plan = make_plan(config(iterations=2, epochs=2), nodes="1x2cpu/16GiB")
    assert plan.fit.batches.steps == 2 * 16 // 4 + 2 * 32 // 4
    assert any("16 answers of up to 8 tokens by 1 engine, at most 128 tokens" in note for note in plan.fit.notes)


def test_answers_of_full_length_are_counted_in_memory(config):
    settings = config(steps=2)
    plan = make_plan(settings, nodes="1x2cpu/16GiB")
    longer = make_plan(
        settings.model_copy(update={"sampling": settings.sampling.model_copy(update={"max_tokens": 40})}),
        nodes="1x2cpu/16GiB",
    )
    assert longer.lengths.rows.longest == plan.lengths.rows.longest + 32
    assert longer.fit.micro.tokens > plan.fit.micro.tokens


def test_what_is_not_known_of_a_hub_data_set_is_said(monkeypatch):
    monkeypatch.chdir(ROOT)
    path = f"model.path={SHAPES / 'Llama-3.1-8B'}"
    plan = make_plan(load_config("configs/spin_8gpu.yaml", [path]), nodes="1x8xA100-80/1800GiB")
    assert any("every training prompt, by 4 engines" in note for note in plan.fit.notes)
    assert plan.fit.batches.steps == 1530 + 3 * 3060 and plan.fit.batches.evaluations == 5
    unknown = load_config("configs/spin_8gpu.yaml", [path, "algorithm.steps=null", "algorithm.epochs=2"])
    notes = make_plan(unknown, nodes="1x8xA100-80/1800GiB").fit.notes
    assert any("how many steps an iteration has is not known" in note for note in notes)
