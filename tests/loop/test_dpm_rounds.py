"""d-PM whole, as stages: votes → preference model → diverse candidates → calibration → human ratings; and resumed."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForSequenceClassification

from rayalign.errors import ConfigError
from tests.loop.conftest import records, timeless
from tests.parts import PowerCut

SEARCH = {"name": "diverse_beam", "beams": 4, "groups": 4, "penalty": 4.0, "max_tokens": 8}
CLASSES = ["bad", "neutral", "good"]
WORDS = ("awful", "fine", "great")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def stages(tmp_path):
    """Of a whole job; the calibration searches anew with `online`, else it learns from labelled rows."""
    votes = [
        {
            "prompt": f"write about film {i}",
            "completion": f"a {WORDS[i % 3]} film",
            "votes": [3.0 * (i % 3 == 0), 1.0, 3.0 * (i % 3 == 2)],
        }
        for i in range(36)
    ]
    files = {
        "votes": write(tmp_path / "votes.jsonl", votes),
        "gold": write(
            tmp_path / "gold.jsonl",
            [{"prompt": f"write about opera {i}", "gold": f"a great opera {i}"} for i in range(16)],
        ),
        "held": write(tmp_path / "held.jsonl", [{"prompt": f"write about a play {i}"} for i in range(4)]),
    }

    def build(*, online=False, trackers=()):
        scorer = {"name": "dpm", "model": "stage:annotators", "dtype": "float32"}
        annotators = {
            "name": "annotators",
            "algorithm": {"name": "disagreement", "classes": CLASSES},
            "data": {"examples": files["votes"], "prompts": None},
            "scorer": None,
        }
        evaluated = {"evaluation": {"prompts": 4, "samples": 2}, "trackers": list(trackers)}
        if online:
            ratings = {"scorer": {"name": "ratings", "words": "all"}, "weight": 0.0}
            calibrate = {
                "algorithm": {"name": "dpm_calibration", "samples": 4},
                "data": {"prompts": files["gold"]},
                "sampling": SEARCH,
                "scorer": {"name": "mix", "scorers": [{"scorer": scorer}, ratings]},
                "rollout": {"prompts": 4, "resample_every": 2, "at_once": 2},
                "train": {"steps": 4},
            }
            return [annotators, {"name": "calibrate", **calibrate, **evaluated}]
        candidates = {
            "name": "candidates",
            "algorithm": {"name": "label", "samples": 4, "write": "ranked", "shard": 8},
            "data": {"prompts": files["gold"]},
            "sampling": SEARCH,
            "scorer": scorer,
        }
        calibrate = {
            "algorithm": "dpm_calibration",
            "data": {"examples": "stage:candidates", "prompts": files["held"]},
            "scorer": {"name": "ratings", "words": "all"},
            "train": {"steps": 3},
        }
        return [annotators, candidates, {"name": "calibrate", **calibrate, **evaluated}]

    return build


def evaluated(folder):
    return [record["metrics"] for record in records(folder, "evaluations")]


def test_votes_become_a_ranking_that_the_policy_is_calibrated_to(rounds, stages):
    found = rounds(stages())
    assert found.ran == ("annotators", "candidates", "calibrate")
    model = AutoModelForSequenceClassification.from_pretrained(found.output("annotators"))
    assert list(model.config.id2label.values()) == CLASSES
    rows = [json.loads(line) for line in found.output("candidates", "data").read_text().splitlines()]
    assert rows and all(row["gold"].startswith("a great opera") for row in rows)
    assert all(len(set(row["completions"])) == len(row["completions"]) <= 4 for row in rows)
    assert all(-1 <= score <= 1 for row in rows for score in row["scores"])
    labelled = records(found.run_dir / "stages/candidates")
    assert all(record["candidates/distinct"] <= 4 and record["dpm/entropy"] > 0 for record in labelled)
    assert all("best_of_n/gain" in record and "best_of_n/kl_bound" not in record for record in labelled)  # no samples
    folder = found.run_dir / "stages/calibrate"
    assert all(step["gold/missing"] == 0 and step["examples/kept"] > 0 for step in records(folder))
    for metrics in evaluated(folder):
        wanted = {"reward", "ratings/coverage", "held_out/ranking/kendall_tau", "held_out/gold/perplexity"}
        assert wanted <= metrics.keys()
    assert rounds(stages(), resume=True).ran == ()


def test_candidates_are_searched_anew_by_the_newest_policy(rounds, stages):
    found = rounds(stages(online=True))
    folder = found.run_dir / "stages/calibrate"
    steps = records(folder)
    assert [step["rollout/version"] for step in steps] == [0.0, 0.0, 2.0, 2.0]
    assert all(step["candidates/distinct"] > 1 and "kl/k1" not in step for step in steps)
    for metrics in evaluated(folder):
        wanted = {"scores/ratings", "scores/dpm", "held_out/ranking/kendall_tau", "held_out/gold/perplexity"}
        assert wanted <= metrics.keys()
        assert "candidates/distinct" not in metrics  # evaluations sample, they search nothing


@pytest.mark.parametrize("online", [False, True])
def test_a_job_that_was_cut_in_the_calibration_goes_on(rounds, stages, tmp_path, online):
    whole = rounds(stages(online=online), run_dir=str(tmp_path / "whole"))
    with pytest.raises(PowerCut):
        rounds(stages(online=online, trackers=[{"name": "tests.parts:Stop", "step": 2}]))
    again = rounds(stages(online=online), resume=True)
    assert again.ran == ("calibrate",)
    first, second = (
        [timeless(record) for record in records(found.run_dir / "stages/calibrate")] for found in (whole, again)
    )
    assert first == second


def test_the_scorer_of_a_stage_that_trains_no_preference_model_is_refused(rounds, stages):
    whole = stages()
    whole[0] = {**whole[0], "algorithm": "reward_model"}
    with pytest.raises(ConfigError) as error:
        rounds(whole)
    assert "trains no preference model" in str(error.value) and "disagreement" in str(error.value)


def test_samples_and_beams_have_to_agree(rounds, stages):
    whole = stages(online=True)
    whole[1]["algorithm"] = {"name": "dpm_calibration", "samples": 3}
    with pytest.raises(ConfigError) as error:
        rounds(whole)
    assert "algorithm.samples=4" in str(error.value)
