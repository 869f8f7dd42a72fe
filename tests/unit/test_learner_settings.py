from __future__ import annotations

import pytest
from pydantic import ValidationError

from rayalign.learners.settings import LearnerSettings, LearnerSpec, OptimizerConfig, learning_rate


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
