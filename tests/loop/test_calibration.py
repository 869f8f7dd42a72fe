"""Calibration through the real loop: candidates read, sampled once or anew, with a reference answer beside."""

from __future__ import annotations

import json

import pytest

from rayalign.api import run_evaluation, run_training
from rayalign.build import load_tokenizer, prompts_for
from rayalign.config import parse_config
from rayalign.errors import TrainingStopped
from tests.loop.conftest import records, timeless
from tests.parts import PowerCut, tiny_config

ANSWERS = ["a great film", "a fine film", "not very good", "awful"]
MEASURED = {"ranking/kendall_tau", "ranking/top1", "gold/nll", "gold/perplexity"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts_with_gold(path, count=20):
    return write(path, [{"prompt": f"write about film {i}", "gold": f"a great film {i}"} for i in range(count)])


@pytest.fixture
def sampled(tmp_path, model):
    """A config whose candidates are the policy's own; `sampling`, `rollout` and so on may be given."""

    def build(algorithm=None, **changes):
        usual = {"name": "dpm_calibration", "samples": 4, "margin": 0.05}
        base = tiny_config(
            tmp_path,
            model,
            data__prompts=prompts_with_gold(tmp_path / "gold.jsonl"),
            algorithm={**usual, **(algorithm or {})},
            evaluation={"prompts": 4, "samples": 4},
            optimizer={"lr": 3e-3},
        )
        return parse_config({**base, **changes})

    return build


@pytest.fixture
def read(tmp_path, model):
    """A config that learns from ranked rows: 24 prompts, whose answers are all ranked alike."""

    def build(algorithm=None, rows=None, **changes):
        base = tiny_config(tmp_path, model, train__steps=12, rollout__prompts=6)
        for key in ("scorer", "sampling", "engine"):
            del base[key]
        ranked = [
            {
                "prompt": f"film {i}",
                "completions": ANSWERS[i % 4 :] + ANSWERS[: i % 4],
                "scores": [float(-ANSWERS.index(each)) for each in ANSWERS[i % 4 :] + ANSWERS[: i % 4]],
                "gold": "a great film" if i % 3 else None,
            }
            for i in range(24)
        ]
        base |= {
            "algorithm": {"name": "dpm_calibration", "margin": 0.05, **(algorithm or {})},
            "data": {"examples": write(tmp_path / "ranked.jsonl", rows or ranked), "held_out": 0.25},
            "optimizer": {"lr": 3e-3},
            "evaluation": {},
        }
        return parse_config({**base, **changes})

    return build


def evaluations(run_dir):
    return {record["step"]: record["metrics"] for record in records(run_dir, "evaluations")}


@pytest.mark.parametrize("algorithm", [{}, {"likelihood": "mean_prob", "reduction": "offset_mean", "margin": 0.01}])
def test_rows_that_are_read_come_to_be_ranked(read, algorithm):
    found = run_training(read(algorithm))
    before, after = (evaluations(found.run_dir)[step] for step in (0, 12))
    assert {f"held_out/{name}" for name in MEASURED} <= before.keys() == after.keys()
    assert before["held_out/ranking/kendall_tau"] < 0.7 < after["held_out/ranking/kendall_tau"]
    assert after["held_out/ranking/top1"] == 1.0
    assert after["held_out/gold/perplexity"] < before["held_out/gold/perplexity"]
    steps = records(found.run_dir)
    assert steps[0].keys() >= MEASURED and steps[-1]["loss"] < steps[0]["loss"]
    assert not [name for step in steps for name in step if name in ("gold/nats", "gold/tokens")]
    assert all(step["examples/kept"] == 6.0 for step in steps)
    assert 0 < sum(step["gold/missing"] for step in steps) < 6 * 12


def test_likelihoods_of_reference_answers_are_lost_where_they_do_not_weigh(read):
    kept = run_training(read({"mle_weight": 1.0, "margin": 0.3}))
    lost = run_training(read({"mle_weight": 0.0, "margin": 0.3}, run_dir=str(kept.run_dir) + "-lost"))
    ends = [evaluations(found.run_dir)[12]["held_out/gold/perplexity"] for found in (kept, lost)]
    assert ends[0] < 0.5 * ends[1]


@pytest.mark.parametrize("often", [{"resample_every": "never"}, {"resample_every": 2, "at_once": 2}, {}])
def test_candidates_are_sampled_once_or_anew(sampled, often):
    found = run_training(sampled(rollout={"prompts": 4, **often}))
    steps = records(found.run_dir)
    versions = [step["rollout/version"] for step in steps]
    every = often.get("resample_every", 1)
    assert versions == ([0.0] * 4 if every == "never" else [float(i - i % every) for i in range(4)])
    assert all(step["gold/missing"] == 0.0 and step.keys() >= MEASURED for step in steps)
    before, after = (evaluations(found.run_dir)[step] for step in (0, 4))
    wanted = {f"held_out/{name}" for name in MEASURED} | {"held_out/candidates/kept", "reward"}
    assert wanted <= before.keys() and wanted <= after.keys()  # on samples of held-out prompts, by the same code
    assert after["held_out/gold/perplexity"] < before["held_out/gold/perplexity"]


def test_an_evaluation_alone_says_the_same(sampled, monkeypatch, tmp_path):
    config = sampled()
    found = run_training(config)
    monkeypatch.chdir(tmp_path)
    again = run_evaluation(config, model=str(found.run_dir / "checkpoints/step-4")).metrics
    last = evaluations(found.run_dir)[4]
    for name in ("held_out/ranking/kendall_tau", "held_out/ranking/top1", "held_out/gold/perplexity", "reward"):
        assert again[name] == pytest.approx(last[name], rel=1e-4), name


@pytest.mark.parametrize("often", [{"resample_every": "never"}, {"resample_every": 2, "at_once": 2}])
def test_a_run_that_was_cut_short_goes_on_as_if_it_had_not_been(sampled, tmp_path, often):
    def config(**more):
        return sampled(rollout={"prompts": 4, **often}, checkpoint={"every": 1}, **more)

    whole = run_training(config(run_dir=str(tmp_path / "whole")))
    with pytest.raises(PowerCut):
        run_training(config(trackers=[{"name": "tests.parts:Stop", "step": 3}]))
    again = run_training(config(resume=True))
    steps = [timeless(record) for record in records(again.run_dir)]
    assert steps == [timeless(record) for record in records(whole.run_dir)]
    ends = [evaluations(found.run_dir)[4]["held_out/ranking/kendall_tau"] for found in (whole, again)]
    assert ends[0] == ends[1]


def test_a_scorer_that_tells_nothing_apart_ends_the_run_with_counts(sampled):
    with pytest.raises(TrainingStopped) as error:
        run_training(sampled(scorer={"name": "tests.parts:SameScore"}, rollout={"prompts": 4, "max_empty": 2}))
    assert "max_empty=2" in error.value.rule


def test_prompts_without_reference_answers_are_learned_from_all_the_same(sampled, tmp_path):
    path = write(tmp_path / "plain.jsonl", [{"prompt": f"write about film {i}"} for i in range(20)])
    config = sampled(data={"prompts": path, "held_out": 0.2})
    assert {prompt.gold_ids for prompt in prompts_for(config, load_tokenizer(config)).training} == {()}
    steps = records(run_training(config).run_dir)
    assert all(step["gold/missing"] == step["examples/kept"] and "gold/nll" not in step for step in steps)


LABELLED = [
    {"name": "candidates", "algorithm": {"name": "label", "samples": 4, "shard": 8, "write": "ranked"}},
    {
        "name": "calibrate",
        "algorithm": {"name": "dpm_calibration", "margin": 0.05},
        "data": {"examples": "stage:candidates"},
        "scorer": {"name": "ratings"},
        "evaluation": {"prompts": 4, "samples": 2},
    },
]


def test_labelled_rows_carry_reference_answers_to_the_stage_that_learns_from_them(rounds, tmp_path):
    prompts = prompts_with_gold(tmp_path / "gold.jsonl")
    held = write(tmp_path / "held_out.jsonl", [{"prompt": f"write about opera {i}"} for i in range(4)])
    stages = [
        {**LABELLED[0], "data": {"prompts": prompts}},
        {**LABELLED[1], "data": {"examples": "stage:candidates", "prompts": held}},
    ]
    found = rounds(stages)
    rows = [json.loads(line) for line in found.output("candidates", "data").read_text().splitlines()]
    assert all(row["gold"].startswith("a great film") for row in rows)
    folder = found.run_dir / "stages/calibrate"
    steps = records(folder)
    assert all(step["gold/missing"] == 0.0 and step.keys() >= MEASURED for step in steps)
    for metrics in evaluations(folder).values():
        assert {f"held_out/{name}" for name in MEASURED} <= metrics.keys()
        assert {"reward", "ratings/coverage"} <= metrics.keys()
    assert rounds(stages, resume=True).ran == ()
