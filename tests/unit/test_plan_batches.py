"""From prompts to optimiser steps, with numbers worked by hand."""

from __future__ import annotations

import io
from typing import ClassVar

import pytest
from rich.console import Console

from rayalign.algorithms.online_preference import OnlinePreference
from rayalign.plan import make_plan, print_plan
from rayalign.plan.batches import count_batches, examples_of_a_prompt, prompt_lengths, tokens_of_a_step
from rayalign.plan.learners import learner_memory
from rayalign.plan.records import Lengths, Tokens
from rayalign.plan.shapes import read_shape
from rayalign.types import Column
from tests.parts import write_prompts

LENGTHS = Lengths(10.0, 12, 16, 4, 0, True, "")


def test_a_step_by_hand(make):
    config = make(
        rollout__prompts=8,
        algorithm={"name": "online_preference", "samples": 4, "pairs": "all"},
        train={"steps": 10, "epochs": 2, "minibatches": 3},
        learner={"name": "deepspeed", "ranks": 2, "micro_batch_tokens": 100},
        placement={"name": "ray"},
    )
    batches, micro = count_batches(config, LENGTHS)
    assert (batches.completions, batches.examples, batches.rows) == (32, 8 * 6, 2)
    assert (batches.minibatch, batches.share) == (16, 8)  # 48 in 3 parts, on 2 ranks
    # A pair is 2 rows of 12 + 8 = 20 tokens, so that 2 pairs fit 100 tokens: 4 micro-batches of 80.
    assert (batches.micro_batches, micro.tokens, micro.longest, micro.positions) == (4, 80, 20, 32)
    assert (batches.optimizer_steps, batches.optimizer_steps_in_run) == (6, 60)
    assert batches.passes == 10 / 2  # 16 training prompts fill 2 rollouts
    assert tokens_of_a_step(config, LENGTHS, batches) == Tokens(80.0, 256.0, 48 * 2 * 18.0 * 2, 48 * 2 * 18.0)


@pytest.mark.parametrize(("train", "before"), [({"steps": 10, "epochs": 2, "minibatches": 2}, 1), ({"steps": 10}, 0)])
def test_tokens_of_all_passes_of_ppo(make, train, before):
    """8 × 2 answers of 18 tokens: old log-probs (where needed), values, and the epochs of policy and critic."""
    algorithm = {"name": "ppo", "samples": 2, "kl": {"in": "loss", "estimator": "k3"}}
    config, answers = make(rollout__prompts=8, algorithm=algorithm, train=train), 8 * 2 * 18.0
    batches, _ = count_batches(config, LENGTHS)
    epochs = train.get("epochs", 1)
    wanted = Tokens(80.0, 128.0, answers * epochs, answers, before=answers * before, critic=answers * (epochs + 1))
    assert tokens_of_a_step(config, LENGTHS, batches) == wanted
    out = io.StringIO()
    print_plan(make_plan(config), Console(file=out, width=200))
    assert ("by the policy before that" in out.getvalue()) == bool(before) and "by the critic" in out.getvalue()
    assert ("2 epochs" in out.getvalue()) == bool(before)


def test_tokens_by_the_reference_are_none_where_only_the_policy_is_asked(make):
    class OwnLogps(OnlinePreference):
        needs: ClassVar = (("policy", Column.LOGPS),)

    config = make().model_copy(update={"algorithm": OwnLogps(loss={"name": "dpo"})})
    tokens = tokens_of_a_step(config, LENGTHS, count_batches(config, LENGTHS)[0])
    assert tokens.reference == 0.0 < tokens.trained
    shape = read_shape(config.model.path)
    roles = learner_memory(config, shape, count_batches(config, LENGTHS)[1], on_gpu=False)
    assert "reference" not in [role.role for role in roles]


def test_a_pair_larger_than_a_micro_batch_stands_alone(make):
    batches, micro = count_batches(make(learner__micro_batch_tokens=1), LENGTHS)
    assert (batches.micro_batches, micro.tokens) == (4, 40)


def test_best_and_worst_make_one_pair(make):
    assert len(examples_of_a_prompt(make(), LENGTHS)) == 1


@pytest.mark.parametrize(
    ("steps", "resample", "evaluation", "checkpoint", "expected"),
    [  # rollouts, pushes, evaluations, checkpoints
        (10, 1, {"prompts": 0}, 0, (10, 11, 0, 1)),
        (10, 1, {"prompts": 4}, 5, (10, 11, 2, 2)),
        (10, 3, {"prompts": 4}, 4, (4, 1 + 4, 2, 3)),  # before rollouts 3, 6, 9, and before the evaluation at 10
        (10, 3, {"prompts": 4, "every": 4}, 4, (4, 1 + 6, 4, 3)),  # evaluations at 0, 4, 8, 10
    ],
)
def test_what_a_run_does_by_hand(make, steps, resample, evaluation, checkpoint, expected):
    config = make(
        train={"steps": steps},
        rollout__resample_every=resample,
        evaluation=evaluation,
        checkpoint={"every": checkpoint},
    )
    found, _ = count_batches(config, LENGTHS)
    assert (found.rollouts, found.pushes, found.evaluations, found.checkpoints) == expected


@pytest.mark.parametrize(
    ("rollout", "steps", "expected"),
    [  # rollouts, pushes; 16 prompts, 4 of them a rollout
        ({"resample_every": 4, "at_once": 4}, 8, (8, 1 + 2)),
        ({"resample_every": 4, "at_once": 2}, 10, (6, 1 + 2)),
        ({"resample_every": "never"}, 3, (3, 1)),
        ({"resample_every": "never"}, 100, (4, 1)),
        ({"resample_every": "never", "at_once": 2}, 100, (2, 1)),
    ],
)
def test_sets_of_samples_by_hand(make, rollout, steps, expected):
    config = make(rollout={"prompts": 4, **rollout}, train__steps=steps)
    found, _ = count_batches(config, LENGTHS)
    assert (found.rollouts, found.pushes) == expected


@pytest.mark.parametrize("samples", [3, 4, 25])
def test_every_sample_of_kto_may_be_an_example(make, samples):
    """None of them is planned to be as good as the mean of all."""
    config = make(algorithm={"name": "kto", "samples": samples})
    assert len(examples_of_a_prompt(config, LENGTHS)) == samples


def test_lengths_are_measured_where_tokenizer_and_file_are_there(make, tmp_path, model):
    found = prompt_lengths(make())
    assert found.measured and (found.training, found.held_out) == (16, 4)
    assert 1 < found.mean <= found.longest < 64 - 8
    shape = tmp_path / "shape"
    shape.mkdir()
    (shape / "config.json").write_text((model / "config.json").read_text())
    without = prompt_lengths(make(model__path=str(shape)))
    assert not without.measured and (without.training, without.held_out, without.longest) == (16, 4, 64 - 8)
    assert "no tokenizer" in without.source
    assert prompt_lengths(make(data={"prompts": "nobody/data"})).training is None


def test_a_missing_prompt_file_gives_bounds(make, tmp_path):
    write_prompts(tmp_path / "there.jsonl")
    found = prompt_lengths(make(data={"prompts": str(tmp_path / "not-there.jsonl")}))
    assert (found.measured, found.training, found.longest) == (False, None, 56) and "not-there" in found.source


@pytest.mark.parametrize(
    ("name", "written", "what"),
    [
        ("not-there.jsonl", None, "there is no such file"),
        ("not/there/at-all", None, "there is no such file"),
        ("broken.jsonl", '{"prompt": ', "this line is not JSON"),
        ("prompts.txt", "hello", "this kind of file is not read"),
        ("other.jsonl", '{"question": "why?"}\n' * 20, "there is no column 'prompt'"),
    ],
)
def test_prompts_that_a_run_could_not_read_are_a_problem(make, tmp_path, name, written, what):
    path = tmp_path / name
    if written is not None:
        path.write_text(written)
    plan = make_plan(make(data={"prompts": str(path)}), nodes="1x2cpu/64GiB")
    (problem,) = plan.problems
    assert not plan.fits and plan.fit.fits and plan.advice is None
    assert what in problem.what and name in problem.where and problem.value and problem.rule and problem.remedy


def test_too_few_prompts_for_a_rollout_are_a_problem_with_a_remedy(make):
    (problem,) = (plan := make_plan(make(rollout__prompts=17), nodes="1x2cpu/64GiB")).problems
    assert plan.advice is None and problem.where == "key rollout.prompts" and "to 16" in problem.remedy
