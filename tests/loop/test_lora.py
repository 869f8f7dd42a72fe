"""LoRA through the whole loop: sampled and offline, with a reference that stays or follows, resumed exactly."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rayalign.api import run_evaluation, run_training
from rayalign.config import parse_config
from rayalign.errors import ConfigError
from tests.loop.conftest import records, timeless
from tests.parts import PowerCut

LORA = {"rank": 4, "alpha": 8}
REFERENCES = {
    "fixed": {},
    "replaced": {"update": "replace", "every": 2},
    "average": {"update": "average", "decay": 0.5},
}


@pytest.fixture
def offline(tmp_path, make):
    """Pairs in which the better answer is the one about tea."""
    rows = [
        {"prompt": f"say something about day {i}", "chosen": f"tea is number {i}", "rejected": f"no idea at all {i}"}
        for i in range(24)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def build(algorithm, lora=LORA, **changes):
        base = make(model__lora=lora, optimizer__lr=1e-2, rollout__prompts=6, train__steps=8, **changes).to_dict()
        for key in ("scorer", "sampling", "engine", "evaluation"):
            del base[key]
        data = {"examples": str(file), "chat_template": False, "held_out": 0.25, "max_tokens": 48}
        return parse_config(base | {"algorithm": algorithm, "data": data})

    return build


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_policy_that_is_sampled_learns(train, tmp_path, model, reference):
    result = train(
        model__lora=LORA,
        optimizer__lr=2e-2,
        train__steps=8,
        evaluation__prompts=4,
        algorithm__reference=REFERENCES[reference],
    )
    steps = records(result.run_dir)
    assert all(step["sync/logp_gap_max"] < 1e-4 for step in steps)  # merged in the push, not in the learner
    first, last = result.evaluations[0], result.evaluations[8]
    assert last.metrics["reward"] > first.metrics["reward"] and first.metrics["kl/k3"] == 0.0
    assert (last.metrics["kl/k3"] > 1e-3) == (reference != "replaced")  # replaced after the last step
    checkpoint = result.run_dir / "checkpoints/step-8"
    whole = dict(AutoModelForCausalLM.from_pretrained(checkpoint).named_parameters())
    moved = {
        n for n, p in AutoModelForCausalLM.from_pretrained(model).named_parameters() if not torch.equal(p, whole[n])
    }
    assert moved and all(name.endswith("_proj.weight") for name in moved)
    saved = load_file(checkpoint / "trainer/policy/weights.safetensors")
    assert all(".lora_" in name for name in saved)


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("killed_at", [2, 3])
def test_a_killed_run_goes_on_as_if_it_had_not_been(train, tmp_path, reference, killed_at):
    settings = {
        "model__lora": LORA,
        "checkpoint__every": 1,
        "checkpoint__keep": 9,
        "evaluation__prompts": 2,
        "algorithm__reference": REFERENCES[reference],
    }
    whole = train(**settings, run_dir=str(tmp_path / "whole")).run_dir
    killed = {**settings, "run_dir": str(tmp_path / "killed")}
    with pytest.raises(PowerCut):
        train(**killed, trackers=[{"name": "tests.parts:Stop", "step": killed_at}])
    resumed = train(**killed, resume=True).run_dir
    assert [timeless(r) for r in records(resumed)] == [timeless(r) for r in records(whole)]
    assert records(resumed, "evaluations") == records(whole, "evaluations")


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "preference"},
        {"name": "preference", "kl_weight": 0.01},
        {"name": "preference", "kl_weight": 0.01, "reference": {"update": "average", "decay": 0.9}},
    ],
)
def test_a_data_set_is_learned_and_a_merged_checkpoint_is_evaluated(offline, tmp_path, monkeypatch, algorithm):
    monkeypatch.chdir(tmp_path)
    result = run_training(offline(algorithm))
    before, after = (result.evaluations[step].metrics for step in (0, 8))
    assert after["held_out/rewards/margins"] > before["held_out/rewards/margins"] + 0.1
    again = run_evaluation(offline(algorithm), model=str(result.run_dir / "checkpoints/step-8")).metrics
    if "reference" not in algorithm:  # evaluations after the run compare with the initial model
        margin = again["held_out/rewards/margins"]
        assert margin == pytest.approx(after["held_out/rewards/margins"], abs=1e-4)


def test_a_reward_model_keeps_its_head(offline):
    result = run_training(offline({"name": "reward_model"}))
    before, after = (result.evaluations[step].metrics["held_out/rewards/accuracies"] for step in (0, 8))
    assert after >= before and after > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(result.run_dir / "checkpoints/step-8")
    assert model.score.weight.abs().max() > 0


def test_cached_log_probs_are_those_of_the_model_without_adapter(offline, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    live = run_training(offline({"name": "preference"}, run_dir=str(tmp_path / "live"))).run_dir
    cached = {"name": "preference", "reference": {"cached": True}}
    found = run_training(offline(cached, run_dir=str(tmp_path / "cached"))).run_dir
    for old, new in zip(records(live), records(found), strict=True):
        assert new["loss"] == pytest.approx(old["loss"], abs=1e-6)


def test_an_adapter_alone_is_kept_beside_the_tokenizer_and_is_no_model(offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = offline({"name": "preference"}, lora={**LORA, "merge": False})
    checkpoint = run_training(config).run_dir / "checkpoints/step-8"
    assert (checkpoint / "adapter_model.safetensors").is_file() and (checkpoint / "tokenizer.json").is_file()
    assert not (checkpoint / "model.safetensors").exists()
    assert any("lora_A" in name for name, _ in AutoModelForCausalLM.from_pretrained(checkpoint).named_parameters())
    with pytest.raises(ConfigError, match="this folder holds no model"):
        run_evaluation(config, model=str(checkpoint))
