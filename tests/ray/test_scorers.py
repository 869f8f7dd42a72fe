"""Scorers as actors on a real Ray: models and functions of one's own score there as they do in this process."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from rayalign.errors import ScoreError
from rayalign.label import run_labelling
from tests.loop.conftest import records
from tests.ray.conftest import LIGHT
from tests.tiny_models import build_tokenizer

FUNCTION = """
def score(prompts, completions, weight):
    return [weight * len(text) for text in completions]
"""
HANGS = """
import threading

def score(prompts, completions):
    if any(prompt.endswith("film 3") for prompt in prompts):
        threading.Event().wait()
    return [0.0 for _ in completions]
"""


@pytest.fixture
def reward_model(model, tmp_path):
    """A random one, of the tiny llama's shape."""
    config = AutoConfig.from_pretrained(model)
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "reward")
    build_tokenizer().save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward")


@pytest.fixture
def scorer(reward_model, tmp_path, monkeypatch):
    """A mix of a reward model and a function in a module of the folder that the command runs in."""
    (tmp_path / "my_ray_rewards.py").write_text(FUNCTION)
    monkeypatch.syspath_prepend(str(tmp_path))
    function = {"name": "python", "function": "my_ray_rewards:score", "arguments": {"weight": 0.5}}
    reward = {"name": "reward_model", "model": reward_model, "threads": 1}
    parts = [{"scorer": reward, "weight": 3.0}, {"scorer": function, "label": "length"}]
    return {"name": "mix", "scorers": parts}


def test_two_actors_score_as_this_process_does(make, tmp_path, scorer, shared):
    label = {"algorithm": {"name": "label", "samples": 4}}
    here = run_labelling(make(scorer=scorer, run_dir=str(tmp_path / "here"), **label)).run_dir
    two = {**LIGHT, **label, "scorer": {**scorer, "count": 2}}
    there = run_labelling(make(run_dir=str(tmp_path / "there"), **two)).run_dir
    samples = [
        {(each["prompt_index"], each["completion"]): each["score"] for each in records(folder, "samples")}
        for folder in (here, there)
    ]
    assert samples[0].keys() == samples[1].keys() and len(samples[0]) > 32
    assert samples[1] == pytest.approx(samples[0], abs=1e-4) and len(set(samples[0].values())) > 32
    one, two = (records(folder, "metrics")[0] for folder in (here, there))
    assert two["scores/reward_model"] == pytest.approx(one["scores/reward_model"], abs=1e-4)
    assert two["scores/length"] == pytest.approx(one["scores/length"]) and one["scores/length"] > 0


def test_a_function_that_hangs_names_the_completion_before_its_actor_counts_as_lost(
    make, tmp_path, monkeypatch, shared
):
    (tmp_path / "my_hanging_rewards.py").write_text(HANGS)
    monkeypatch.syspath_prepend(str(tmp_path))
    scorer = {"name": "python", "function": "my_hanging_rewards:score", "deadline_s": 20.0, "max_replacements": 0}
    with pytest.raises(ScoreError, match="gave nothing in time, for completion 0 of prompt 3: ") as raised:
        run_labelling(make(**LIGHT, algorithm={"name": "label", "samples": 4}, scorer=scorer))
    assert raised.value.value == "nothing after 2 s for 1 completion"
