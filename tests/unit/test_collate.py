from __future__ import annotations

import numpy as np
import pytest
import torch

from rayalign.collate import collate
from rayalign.errors import DataError
from rayalign.types import Example, Sequence

SHORT = Sequence((5, 6), (7,), rollout_logps=(-0.5,), columns={"reference/logps": np.array([-1.0], np.float32)})
LONG = Sequence((5,), (8, 9, 0), columns={"reference/logps": np.array([-2.0, -3.0, -4.0], np.float32)})


def test_pads_on_the_right_and_points_at_the_predicting_positions():
    batch = collate([Example((SHORT, LONG), {"p": 0.25})], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [5, 8, 9, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [[7, 0, 0], [8, 9, 0]]
    assert batch.positions.tolist() == [[1, 0, 0], [0, 1, 2]]
    assert batch.mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch.columns["reference/logps"].tolist() == [[-1, 0, 0], [-2, -3, -4]]
    assert batch.rollout_logps[0, 0] == -0.5 and torch.isnan(batch.rollout_logps[1]).all()
    assert batch.values["p"].tolist() == [0.25] and batch.weight.tolist() == [1.0] and batch.rows == 2
    assert batch.by_example(batch.labels).shape == (1, 2, 3)


def test_a_real_token_that_equals_the_pad_id_is_not_masked():
    batch = collate([Example((LONG,))], pad_id=0)
    assert batch.mask.sum() == 3 and batch.attention_mask.sum() == 4


def test_columns_and_values_may_hold_several_numbers():
    rows = [
        Sequence((1,), (2, 3), columns={"policy/top_logits": np.array([[1.0, 2.0], [3.0, 4.0]])}),
        Sequence((1,), (2,), columns={"policy/top_logits": np.array([[5.0, 6.0]])}),
    ]
    batch = collate([Example(tuple(rows), {"ranks": (1.0, 0.0), "p": 0.5})], pad_id=0)
    assert batch.columns["policy/top_logits"].tolist() == [[[1, 2], [3, 4]], [[5, 6], [0, 0]]]
    assert batch.values["ranks"].tolist() == [[1.0, 0.0]] and batch.values["p"].tolist() == [0.5]
    for wrong in ((1.0,), (1.0, 2.0, 3.0), ((1.0, 2.0), (3.0, 4.0))):
        with pytest.raises(ValueError, match="ranks"):
            collate([Example(tuple(rows), {"ranks": wrong})], pad_id=0)


@pytest.mark.parametrize(
    "row",
    [
        Sequence((1,), ()),
        Sequence((), (1,)),
        Sequence((1,), (2, 3), rollout_logps=(0.0,)),
        Sequence((1,), (2, 3), columns={"reference/logps": np.zeros(1)}),
        Sequence((1,), (2, 3), columns={"policy/top_logits": np.zeros((1, 2))}),
    ],
)
def test_rows_that_cannot_be_used_are_data_errors(row):
    with pytest.raises(DataError):
        collate([Example((row,))], pad_id=0)


@pytest.mark.parametrize(
    "examples",
    [
        [],
        [Example((SHORT,)), Example((SHORT, LONG))],
        [Example((SHORT, Sequence((1,), (2,))))],
        [Example((SHORT,), {"p": 1.0}), Example((SHORT,))],
    ],
)
def test_examples_that_do_not_fit_together_are_refused(examples):
    with pytest.raises(ValueError):
        collate(examples, pad_id=0)


def test_weights_have_to_be_one_an_example():
    assert collate([Example((SHORT,))], pad_id=0, weight=[0.0]).weight.tolist() == [0.0]
    with pytest.raises(ValueError):
        collate([Example((SHORT,))], pad_id=0, weight=[1.0, 0.0])
