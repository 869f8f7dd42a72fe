"""What does not fit together is refused before anything starts."""

from __future__ import annotations

import pytest

from rayalign.api import run_training
from rayalign.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model__path": "/no/such/model"}, ["key model.path", "there is no such folder"]),
        ({"rollout__prompts": 17}, ["key rollout.prompts", "at most 16", "held_out"]),
        ({"train__minibatches": 5}, ["key train.minibatches", "cannot be split", "rollout.prompts=4"]),
        ({"learner": {"name": "deepspeed", "ranks": 5}}, ["key learner.ranks", "cannot be split"]),
        ({"learner": {"name": "deepspeed", "ranks": 2}}, ["key learner.ranks", "placement"]),
        ({"engine__count": 2}, ["key engine.count", "placement"]),
        ({"sampling__temperature": 0}, ["key sampling.temperature", "all the same"]),
        ({"engine__max_context": 4096}, ["key engine.max_context", "at most 512"]),
        ({"sampling__max_tokens": 64}, ["key sampling.max_tokens", "below engine.max_context=64"]),
    ],
)
def test_parts_that_do_not_fit(make, tmp_path, changes, expected):
    with pytest.raises(ConfigError) as error:
        run_training(make(**changes))
    for part in expected:
        assert part in str(error.value), str(error.value)
    assert not (tmp_path / "run").exists()
