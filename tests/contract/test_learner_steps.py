"""What a step is made of: minibatches that weigh as many examples as they have, passes over the rows they need."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rayalign.algorithms.kto import KTO
from rayalign.algorithms.online_preference import OnlinePreference
from rayalign.learners.steps import Sums
from rayalign.learners.torch import TorchLearnerConfig
from rayalign.protocols import UpdatePlan
from rayalign.types import Batch, Column, Example, Terms
from rayalign.types import Sequence as Row
from tests.contract.learner_cases import OPTIMIZER, pairs, specs
from tests.tiny_models import build_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_llama(tmp_path_factory.mktemp("model"), tied=True)


def build(model, **settings):
    config = TorchLearnerConfig(threads=1, **settings)
    policy, reference = specs(model, config)
    policy = replace(policy, optimizer=OPTIMIZER.model_copy(update={"lr": 1e-12, "weight_decay": 0.0}))
    return config.build([policy, reference], rank=0, world_size=1, address=("127.0.0.1", 1))


def test_metrics_are_means_over_examples_however_many_each_minibatch_has(model):
    roles = build(model)
    examples, algorithm = pairs(5), OnlinePreference(loss="simpo")
    whole = roles["policy"].measure(examples, algorithm)
    for minibatches in (2, 3):
        parts = roles["policy"].update(examples, algorithm, UpdatePlan(0, epochs=2, minibatches=minibatches, seed=4))
        assert {name: parts[name] for name in whole} == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_metrics_are_of_all_examples_however_little_they_are_trusted(model):
    """Nothing is learned from the second and the fourth; what the policy does with them is a fact all the same."""
    learner, algorithm, examples = build(model)["policy"], OnlinePreference(loss="simpo"), pairs(4)
    trusted = [
        replace(each, sequences=tuple(replace(row, trust=1.0 - place % 2) for row in each.sequences))
        for place, each in enumerate(examples)
    ]
    whole, found = learner.measure(examples, algorithm), learner.measure(trusted, algorithm)
    half = learner.measure([examples[0], examples[2]], algorithm)
    assert found.pop("loss") == pytest.approx(half["loss"] / 2) and whole.pop("loss") > 0
    assert found and found == pytest.approx(whole, rel=1e-5)


def labels() -> list[Example]:
    """(answer, mismatched answer), the latter much longer."""
    values = {"good": 1.0, "share": 1.0, "weight": 1.0}
    return [
        Example((Row((5, 6), (7 + i, 8)), Row((5, 6), tuple(range(9, 29)))), values) for i in range(4)
    ]  # fmt: skip


def seen_by(learner):
    """What the learner computes columns of: (rows, columns) of each micro-batch, in order."""
    found, compute = [], learner.columns

    def columns(batch: Batch, wanted, temperature=None):
        found.append((len(batch.input_ids), tuple(wanted)))
        return compute(batch, wanted, temperature)

    learner.columns = columns
    return found


def test_rows_of_the_loss_and_of_statistics_have_micro_batches_of_their_own(model):
    """Four answers of 4 tokens are one micro-batch of 16; four mismatched ones of 22 tokens are four."""
    roles = build(model, micro_batch_tokens=24)
    examples = roles["reference"].annotate(labels(), [Column.LOGPS])
    found = seen_by(roles["policy"])
    metrics = roles["policy"].update(examples, KTO(kl_weight=0.1), UpdatePlan(0))
    assert found == [(1, (Column.LOGPS,))] * 4 + [(4, (Column.LOGPS, Column.REFERENCE_KL))]
    assert metrics["padding"] == 0.0


def test_sums_stay_on_the_device_until_they_are_read():
    sums = Sums()
    for loss in (1.0, 2.0):
        sums.add(torch.tensor(loss), Terms(torch.zeros(2), {"a": torch.tensor([loss, 9.0])}), 2)
    assert all(isinstance(part, torch.Tensor) for part in sums.parts.values())
    assert sums.named() == {"loss": 3.0, "a": 10.5}
    assert Sums().named() == {"loss": 0.0}
