from __future__ import annotations

import pytest
from pydantic import ValidationError

from rayalign.errors import ConfigError
from rayalign.learners.deepspeed import DeepSpeedLearnerConfig
from rayalign.learners.settings import (
    LearnerSettings,
    LearnerSpec,
    OptimizerConfig,
    apart_ranks,
    by_group,
    learning_rate,
)


def rates(total=10, **changes):
    config = OptimizerConfig(lr=1.0, **changes)
    return [learning_rate(config, step, total) for step in range(total)]


def test_warm_up_starts_above_zero_and_reaches_the_rate():
    assert rates(warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear_and_cosine_fall_from_the_rate_to_their_floor():
    assert rates(5, schedule="linear") == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    cosine = rates(5, schedule="cosine", warmup_steps=1, min_lr_ratio=0.5)
    assert cosine[:2] == [1.0, 1.0] and cosine == sorted(cosine, reverse=True) and cosine[3] == pytest.approx(0.75)
    config = OptimizerConfig(lr=2.0, schedule="cosine", min_lr_ratio=0.25)
    assert learning_rate(config, 99, 10) == pytest.approx(0.5)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError):
        learning_rate(OptimizerConfig(), -1, 3)
    with pytest.raises(ValueError):
        LearnerSpec("policy", "somewhere", trainable=True)
    with pytest.raises(ValueError):
        LearnerSpec("reference", "somewhere", trainable=False, temperature=0.0)
    with pytest.raises(ValidationError):
        LearnerSettings(micro_batch_token=3)


@pytest.mark.parametrize(
    ("learner", "where", "what"),
    [
        ({"name": "torch", "roles": {"critic": {"zero_stage": 3}}}, "learner.roles.critic.zero_stage", "one process"),
        ({"name": "torch", "roles": {"critic": {"ranks": 2}}}, "learner.roles.critic.ranks", "one process"),
        ({"name": "deepspeed", "roles": {"critic": {"zero_stge": 3}}}, "learner.roles.critic.zero_stge", "unknown key"),
        ({"name": "deepspeed", "roles": {"critic": {"ranks": 0}}}, "learner.roles.critic.ranks", "cannot be used"),
        ({"name": "deepspeed", "roles": {"policy": {"ranks": 2}}}, "learner.roles", "the policy's settings"),
    ],
)
def test_settings_of_a_role_that_cannot_be(make, learner, where, what):
    with pytest.raises(ConfigError) as raised:
        make(learner=learner)
    assert raised.value.where.endswith(f"key {where}") and what in raised.value.what and raised.value.remedy


def test_a_role_has_what_it_says_and_else_the_policys():
    roles = {"critic": {"ranks": 3, "zero_stage": 3}, "reference": {"apart": True}}
    config = DeepSpeedLearnerConfig(ranks=2, zero_stage=1, micro_batch_tokens=99, roles=roles)
    critic, reference, other = (config.of_role(role) for role in ("critic", "reference", "judge"))
    assert (critic.ranks, critic.zero_stage, critic.micro_batch_tokens, critic.roles) == (3, 3, 99, {})
    assert (reference.ranks, reference.zero_stage) == (2, 1) == (other.ranks, other.zero_stage)
    assert [config.is_apart(role) for role in ("critic", "reference", "judge")] == [True, True, False]
    specs = [LearnerSpec(role, "m", trainable=False, settings=config.of_role(role)) for role in ("policy", *roles)]
    groups = {name: [spec.role for spec in inside] for name, inside in by_group(config, specs).items()}
    assert groups == {"learner": ["policy"], "critic": ["critic"], "reference": ["reference"]}
    assert apart_ranks(config, specs) == {"critic": 3, "reference": 2}
    assert DeepSpeedLearnerConfig(**config.model_dump()) == config  # as a saved config is read again
