"""d-PM through the real loop: from votes to a scorer; runs stop when held-out rows say so, and resume exactly."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rayalign.api import run_training
from rayalign.build import examples_for, load_tokenizer
from rayalign.config import parse_config
from rayalign.errors import ConfigError
from rayalign.evaluate import EarlyStop, Evaluation
from rayalign.scorers.base import score_groups
from rayalign.scorers.dpm import DpmScorer
from tests.loop.conftest import records, timeless
from tests.parts import PowerCut, tiny_config
from tests.scored import group

ALGORITHM = {"name": "disagreement", "classes": ["bad", "neutral", "good"], "smoothing": 0.1}
STOP = {"metric": "held_out/nll", "patience": 2}


@pytest.fixture
def data(tmp_path):
    """What people say of films, who agree more or less."""
    votes = ([0, 1, 3], [4, 0, 0], [1, 2, 1], [0, 0, 0])
    answers = ("a great film", "awful", "the actor and the space", "it was")
    rows = [{"prompt": f"write of film {i}", "completion": answers[i % 4], "votes": votes[i % 4]} for i in range(120)]
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "votes.jsonl")


def config_of(folder, model, data, **changes):
    usual = {
        "algorithm": ALGORITHM, "data": {"examples": data, "held_out": 0.3}, "scorer": None, "train__steps": 8,
        "optimizer__lr": 3e-3, "rollout__prompts": 16, "evaluation": {"prompts": 0, "every": 2},
    }  # fmt: skip
    return parse_config(tiny_config(folder, model, **(usual | changes)))


def test_votes_become_a_scorer(tmp_path, model, data, capsys):
    config = config_of(tmp_path, model, data)
    result = run_training(config)
    before, after = (result.evaluations[step].metrics for step in (0, 8))
    assert after["held_out/nll"] < before["held_out/nll"] - 0.1 and after["held_out/votes/none"] > 0
    assert after["held_out/accuracy"] > 0.9 and after["held_out/calibration/ece"] < 0.5
    checkpoint = result.run_dir / "checkpoints" / "step-8"
    known = json.loads((checkpoint / "config.json").read_text())
    assert known["id2label"] == {"0": "bad", "1": "neutral", "2": "good"} and known["class_weights"] == [-1.0, 0.0, 1.0]
    assert f"temperature {known['fitted_temperature']:.3g}" in capsys.readouterr().err
    assert after["fitted_temperature"] == known["fitted_temperature"]
    last, final = records(result.run_dir, "evaluations")[-2:]
    assert final["step"] == last["step"] == 8 and final["metrics"] == after
    assert after["held_out/nll"] < last["metrics"]["held_out/nll"]
    rows = examples_for(config, load_tokenizer(config)).step(0, 8)
    (found,) = score_groups(DpmScorer(model=str(checkpoint)).start(), [group(0, "a great film", "awful")], who="s")
    assert found.scores[0] > found.scores[1] + 0.2
    loaded = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    ids = torch.tensor([rows[0].prompt.token_ids + rows[0].completions[0].token_ids])
    (scored,) = DpmScorer(model=str(checkpoint)).start().distributions([rows[0]])
    torch.testing.assert_close(scored[0].float(), loaded(ids).logits[0].log_softmax(-1).detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [{"mass": "moving_average", "detach_posterior": False}, {"preset": "published"}])
def test_a_run_that_was_cut_off_goes_on_as_if_it_never_had_been(tmp_path, model, data, settings):
    algorithm = {"algorithm": ALGORITHM | settings, "checkpoint": {"every": 2}, "train__steps": 6}
    whole = run_training(config_of(tmp_path, model, data, **algorithm, run_dir=str(tmp_path / "whole")))
    cut = {**algorithm, "run_dir": str(tmp_path / "cut")}
    with pytest.raises(PowerCut):
        run_training(config_of(tmp_path, model, data, **cut, trackers=[{"name": "tests.parts:Stop", "step": 5}]))
    run_training(config_of(tmp_path, model, data, **cut, resume=True))
    cut_off, uncut = (
        [timeless(record) for record in records(each, "metrics")] for each in (tmp_path / "cut", whole.run_dir)
    )
    assert cut_off == uncut and len(uncut) == 6
    one, other = (
        (tmp_path / name / "checkpoints" / "step-6" / "model.safetensors").read_bytes() for name in ("whole", "cut")
    )
    assert one == other


def test_it_stops_when_held_out_rows_get_no_better_and_leaves_the_best_weights(tmp_path, model, data):
    """With a rate that rises until it ruins the model."""
    changes = {
        "optimizer": {"lr": 0.1, "warmup_steps": 40},
        "train": {"steps": 40, "stop": {**STOP}},
    }
    algorithm = {"algorithm": ALGORITHM | {"temperature_scaling": False}, "checkpoint": {"every": 0, "keep": 1}}
    result = run_training(config_of(tmp_path, model, data, **changes, **algorithm))
    nll = {step: each.metrics["held_out/nll"] for step, each in result.evaluations.items()}
    best = min(nll, key=nll.get)
    assert 0 < best < result.step < 40 and not result.stopped and result.step == best + 4
    steps = sorted(path.name for path in (result.run_dir / "checkpoints").iterdir())
    assert steps == sorted([f"step-{best}", f"step-{result.step}"])
    one, other = (result.run_dir / "checkpoints" / name / "model.safetensors" for name in steps)
    assert one.read_bytes() == other.read_bytes()
    assert records(result.run_dir, "evaluations")[-1]["metrics"] == result.evaluations[result.step].metrics
    assert nll[result.step] == nll[best]
    again = run_training(config_of(tmp_path, model, data, **changes, **algorithm, resume=True))
    assert again.step == result.step and again.evaluations == result.evaluations
    changes["train"]["stop"]["patience"] = 3
    further = run_training(config_of(tmp_path, model, data, **changes, **algorithm, resume=True))
    whole = run_training(config_of(tmp_path, model, data, **changes, **algorithm, run_dir=str(tmp_path / "whole")))
    assert further.step == result.step + 2 and further.evaluations == whole.evaluations


def test_the_best_weights_may_be_gone(tmp_path, model, data, capsys):
    """Where a run is told to stop, and to keep them, after its last step."""
    changes = {"optimizer": {"lr": 0.1, "warmup_steps": 40}, "checkpoint": {"every": 0, "keep": 1}}
    ended = run_training(config_of(tmp_path, model, data, **changes, train__steps=30, data__held_out=0.1))
    capsys.readouterr()
    stop = {"steps": 30, "stop": STOP}
    again = run_training(config_of(tmp_path, model, data, **changes, train=stop, data__held_out=0.1, resume=True))
    told = capsys.readouterr().err
    assert "the best, no checkpoint is left, on held_out/nll" in told and again.evaluations == ended.evaluations
    assert "no temperature was fitted: too few of 12 held-out rows" in told


def test_the_best_evaluation_is_the_first_of_equals():
    def of(*values, **settings):
        stop = EarlyStop(**{"metric": "held_out/nll", "patience": 2, **settings})
        found = {10 * place: Evaluation(10 * place, (), {stop.metric: value}) for place, value in enumerate(values)}
        return stop.best(found), stop.due(found)

    assert of() == (None, False) and of(3.0) == (0, False)
    assert of(3.0, 2.0, 2.0) == (10, False) and of(3.0, 2.0, 2.0, 2.5) == (10, True)
    assert of(3.0, 2.0, 1.99, 1.98, min_change=0.05) == (10, True)
    assert of(3.0, 4.0, 3.5, metric="m", higher_is_better=True) == (10, False)
    assert of(0.0, 0.1, 0.2, 0.3, metric="reward") == (30, False)
    assert of(math.nan, 4.0, 5.0) == (10, False) and of(math.nan, math.inf, math.nan) == (None, True)
    some = {0: Evaluation(0, (), {"held_out/nll": 1.0}), 5: Evaluation(5, ())}
    assert EarlyStop(metric="held_out/nll").best(some) == 0  # of one evaluation it is missing
    with pytest.raises(ConfigError, match="no such metric") as caught:
        EarlyStop(metric="loss").best({0: Evaluation(0, (), {"held_out/loss": 1.0})})
    assert "held_out/loss" in caught.value.rule


def test_a_stop_without_evaluations_is_refused(tmp_path, model, data):
    with pytest.raises(ConfigError, match="nothing of when to stop") as caught:
        run_training(config_of(tmp_path, model, data, train={"steps": 4, "stop": STOP}, evaluation={"prompts": 0}))
    assert caught.value.where == "key train.stop"
    with pytest.raises(ConfigError, match="whether more of this metric is better is not known") as caught:
        config_of(tmp_path, model, data, train={"stop": {"metric": "spin/gap"}})
    assert "higher_is_better" in caught.value.where


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"data__held_out": 0}, "set data.held_out=0.1"),
        ({"evaluation": {"every": 2, "rows": 0}}, "set evaluation.rows=200"),
    ],
)
def test_a_stop_with_nothing_held_out_is_refused(tmp_path, model, data, changes, remedy):
    with pytest.raises(ConfigError, match="nothing is evaluated that could say when to stop") as caught:
        run_training(config_of(tmp_path, model, data, train={"steps": 4, "stop": STOP}, **changes))
    assert caught.value.where == "key train.stop" and remedy in caught.value.remedy
    assert not (tmp_path / "run").exists()
