"""The loop in this process: it learns, records what it promises, and takes samples of the right age."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayalign import load_config, run_evaluation, run_training
from rayalign.config import parse_config
from rayalign.errors import ScoreError, TrainingStopped
from tests.loop.conftest import records, timeless
from tests.parts import tiny_config

KEYS = (
    "step loss lr grad_norm reward/mean reward/std kl/k1 kl/k3 rewards/margins rewards/accuracies "
    "completion/length_mean completion/truncated pairs/dropped sync/version sync/logp_gap_mean sync/logp_gap_max "
    "rollout/tokens_per_s time/rollout_s time/score_s time/annotate_s time/update_s time/sync_s time/step_s "
    "memory/peak_gib"
)


def test_a_policy_learns_what_the_scorer_likes(train):
    result = train(train__steps=30, rollout__prompts=8, evaluation__prompts=4, optimizer__lr=2e-3)
    before, after = result.evaluations[0].metrics, result.evaluations[30].metrics
    assert after["reward/low"] > before["reward/high"]
    assert before["kl/k1"] == 0.0
    assert after["kl/k3"] > 0.0
    steps = records(result.run_dir)
    assert [r["step"] for r in steps] == list(range(1, 31))
    assert all(key in record for record in steps for key in KEYS.split())
    assert all(r["sync/logp_gap_max"] < 1e-3 for r in steps)
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_a_run_directory_holds_all_that_is_promised(train, model):
    run_dir = train(evaluation__prompts=2, checkpoint__every=2, trackers=[{"name": "tensorboard"}]).run_dir
    again = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert parse_config(again).train.steps == 4
    assert {p.name for p in (run_dir / "checkpoints").iterdir()} == {"step-2", "step-4"}
    policy = AutoModelForCausalLM.from_pretrained(run_dir / "checkpoints" / "step-4")
    start = AutoModelForCausalLM.from_pretrained(model)
    assert any((a != b).any() for a, b in zip(policy.parameters(), start.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(run_dir / "checkpoints" / "step-4").chat_template
    samples = records(run_dir, "samples")
    assert len(samples) == 4 * 4 * 4
    assert {"step", "version", "prompt", "completion", "score", "finish_reason"} <= samples[0].keys()
    assert [r["step"] for r in records(run_dir, "evaluations")] == [0, 4]
    assert list((run_dir / "tensorboard").glob("events*"))
    assert (run_dir / "log" / "driver.log").exists()
    assert "torch" in json.loads((run_dir / "versions.json").read_text())


def test_prompts_of_one_token_are_pushed_for_as_well(train, model, tmp_path):
    """The first push is compared on prompts, and a log-prob takes two tokens."""
    words = [chr(letter) for letter in range(ord("a"), ord("z") + 1)]
    tokenizer = AutoTokenizer.from_pretrained(model)
    short = [w for w in words if len(tokenizer(w, add_special_tokens=False)["input_ids"]) == 1]
    file = tmp_path / "short.jsonl"
    file.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in short))
    result = train(data__prompts=str(file), data__chat_template=False, train__steps=1)
    assert short and records(result.run_dir)[0]["sync/logp_gap_max"] < 1e-3


def test_the_evaluation_before_the_first_step_can_be_left_out(train, tmp_path):
    whole = train(evaluation__prompts=2, evaluation__every=2)
    assert [*whole.evaluations] == [0, 2, 4]
    late = train(run_dir=str(tmp_path / "late"), evaluation__prompts=2, evaluation__every=2, evaluation__before=False)
    assert [*late.evaluations] == [2, 4]
    assert late.evaluations[4].metrics == whole.evaluations[4].metrics


def test_evaluation_of_a_checkpoint_equals_the_one_made_in_training(train, make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(evaluation__prompts=3)
    path = result.run_dir / "checkpoints" / "step-4"
    again = run_evaluation(make(evaluation__prompts=3), model=str(path))
    assert again.metrics == pytest.approx(result.evaluations[4].metrics, abs=1e-5)
    assert [s.completion for s in again.samples] == [s.completion for s in result.evaluations[4].samples]


@pytest.mark.parametrize(("depth", "every"), [(0, 1), (1, 1), (2, 1), (0, 3), (1, 2)])
def test_rollout_t_is_sampled_by_the_version_that_depth_says(train, depth, every):
    steps = records(train(train__steps=7, rollout__depth=depth, rollout__resample_every=every).run_dir)
    for record in steps:
        index = (record["step"] - 1) // every
        assert record["rollout/version"] == max(0, index - depth) * every
        assert ("kl/k1" in record) == (record["rollout/version"] == record["step"] - 1)  # else of an older policy
    used = [record["reward/mean"] for record in steps]
    assert [used[i] == used[i - 1] for i in range(1, 7)] == [i % every != 0 for i in range(1, 7)]
    assert ["time/rollout_s" in record for record in steps] == [i % every == 0 for i in range(7)]


def test_depth_is_reproducible(train, tmp_path):
    first = records(train(rollout__depth=1, run_dir=str(tmp_path / "a")).run_dir)
    second = records(train(rollout__depth=1, run_dir=str(tmp_path / "b")).run_dir)
    assert [timeless(r) for r in first] == [timeless(r) for r in second]


def test_minibatches_epochs_and_a_moving_reference(train):
    steps = records(
        train(
            train__epochs=2,
            train__minibatches=2,
            algorithm__reference={"update": "average", "decay": 0.5},
            algorithm__pairs="all",
            optimizer__warmup_steps=4,
        ).run_dir
    )
    assert [r["lr"] for r in steps] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert steps[0]["pairs/kept"] + steps[0]["pairs/dropped"] == 4 * 6
    assert steps[0]["rewards/margins"] != 0.0  # the second optimiser step already sees a moved policy


def test_ties_are_skipped_and_logged_then_learning_goes_on(train):
    run_dir = train(scorer={"name": "tests.parts:SameScore", "ties": 8}).run_dir
    steps = records(run_dir)
    assert [r["pairs/dropped"] for r in steps] == [4, 4, 0, 0]
    assert ["loss" in r for r in steps] == [False, False, True, True]


@pytest.mark.parametrize("every", [1, 2])
def test_many_rollouts_of_ties_stop_the_run_with_the_reason(train, tmp_path, every):
    """However often each of them is used."""
    with pytest.raises(TrainingStopped, match="3 rollouts in which no prompt left an example") as error:
        train(
            scorer={"name": "tests.parts:SameScore"},
            rollout__max_empty=3,
            rollout__resample_every=every,
            train__steps=9,
        )
    assert "samples.jsonl" in str(error.value)
    assert len(records(Path(tmp_path / "run"))) == 1 + 2 * every


def test_a_reference_that_is_due_on_a_tied_step_still_follows(train):
    steps = records(
        train(
            train__steps=3,
            scorer={"name": "tests.parts:SameScore", "ties": 0, "tied_again": 4},
            algorithm__reference={"update": "replace", "every": 2},
        ).run_dir
    )
    assert ["loss" in r for r in steps] == [True, False, True]
    assert steps[2]["kl/k3"] == 0.0  # step 2 had no pair, and the reference was replaced after it


def test_no_prompt_is_twice_in_a_rollout_and_an_epoch_uses_each_once(train):
    samples = records(train(train__steps=7, rollout__prompts=5).run_dir, "samples")  # 16 prompts: 3 rollouts an epoch
    rollouts = [[s["prompt_index"] for s in samples if s["step"] == step] for step in range(1, 8)]
    assert all(len(set(rollout)) == 5 for rollout in rollouts)
    assert len({index for rollout in rollouts[:3] for index in rollout}) == 15
    assert len({index for rollout in rollouts[3:6] for index in rollout}) == 15
    assert rollouts[0] != rollouts[3]


def test_kl_is_not_claimed_for_samples_of_a_truncated_distribution(train):
    run = train(train__steps=1, sampling__top_k=5, evaluation__prompts=2)
    assert "kl/k1" not in records(run.run_dir)[0]
    assert "kl/k1" not in run.evaluations[1].metrics
    assert "reward" in run.evaluations[1].metrics


@pytest.mark.parametrize(("kind", "expected"), [("nan", "not a finite number"), ("short", "number of scores is wrong")])
def test_a_broken_scorer_is_named(train, kind, expected):
    with pytest.raises(ScoreError, match=expected) as error:
        train(scorer={"name": "tests.parts:BrokenScore", "kind": kind})
    assert "scorer-0, prompt" in str(error.value)


def test_a_few_lines_of_python_are_enough(tmp_path, model):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tmp_path, model)))
    result = run_training(load_config(path, ["train.steps=1"]))
    assert (result.step, result.stopped) == (1, False)
