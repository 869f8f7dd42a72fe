"""What does not fit together is refused before anything starts."""

from __future__ import annotations

import pytest

from rayalign.api import run_training
from rayalign.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model__path": "/no/such/model"}, ["key model.path", "there is no such folder"]),
        ({"rollout__prompts": 17}, ["key rollout.prompts", "at most 16", "held_out"]),
        ({"train__minibatches": 5}, ["key train.minibatches", "cannot be split", "rollout.prompts=4"]),
        (
            {"learner": {"name": "deepspeed", "ranks": 5}, "placement": {"name": "ray"}},
            ["key learner.ranks", "cannot be split"],
        ),
        ({"learner": {"name": "deepspeed", "ranks": 2}}, ["key learner.ranks", "placement"]),
        ({"model__path": "no-such-owner/no-such-model"}, ["key model.path", "no tokenizer could be loaded"]),
        ({"engine__count": 2}, ["key engine.count", "placement"]),
        ({"sampling__temperature": 0}, ["key sampling.temperature", "all the same"]),
        ({"engine__max_context": 4096}, ["key engine.max_context", "at most 512"]),
        (
            {"train__stop": {"metric": "reward"}, "evaluation": {"every": 1, "prompts": 4}, "data__held_out": 0},
            ["key train.stop", "data.held_out=0, evaluation.prompts=4", "set data.held_out=0.1"],
        ),
        (
            {"train__stop": {"metric": "reward"}, "evaluation": {"every": 1, "prompts": 0}},
            ["key train.stop", "data.held_out=0.2, evaluation.prompts=0", "set evaluation.prompts=40"],
        ),
        ({"sampling__max_tokens": 64}, ["key sampling.max_tokens", "below engine.max_context=64"]),
    ],
)
def test_parts_that_do_not_fit(make, tmp_path, changes, expected):
    with pytest.raises(ConfigError) as error:
        run_training(make(**changes))
    for part in expected:
        assert part in str(error.value), str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["nope.txt", "nope.jsonl", "./nope"])
def test_plain_texts_that_are_not_there(make, tmp_path, name):
    with pytest.raises(DataError, match=f"^key algorithm.ptx.path, {name.strip('./')}: there is no such file"):
        run_training(make(algorithm={"name": "ppo", "ptx": {"path": name}}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 1}, "key seed"),
        ({"rollout__prompts": 3}, "key rollout.prompts"),
        ({"algorithm__loss": {"name": "dpo", "beta": 0.2}}, "key algorithm.loss.beta"),
        ({"evaluation__prompts": 2}, "key evaluation.prompts"),
    ],
)
def test_a_resumed_run_is_the_same_run(train, changes, key):
    train(train__steps=1)
    with pytest.raises(ConfigError, match="cannot change when a run is resumed") as error:
        train(train__steps=2, resume=True, **changes)
    assert key in str(error.value)
    assert train(train__steps=2, resume=True, optimizer__lr=1e-4).step == 2
