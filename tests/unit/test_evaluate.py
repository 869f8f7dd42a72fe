"""Numbers of an evaluation, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rayalign.evaluate import EvaluatedSample, Evaluation, bootstrap_interval, distinct_n, rise, summarise


def make(scores):
    samples = [
        EvaluatedSample(p, f"p{p}", "a b a", score, 3, p == 0, 0.5, 0.25)
        for p, row in enumerate(scores)
        for score in row
    ]
    return Evaluation(0, tuple(samples))


def test_distinct_n():
    assert distinct_n(["a b a", "b a"], 1) == 2 / 5
    assert distinct_n(["a b a", "b a"], 2) == 2 / 3
    assert distinct_n(["a"], 2) == 0.0


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(size=(300, 40))
    hits = [low <= 0 <= high for low, high in (bootstrap_interval(row, seed=1) for row in draws)]
    assert 0.90 <= np.mean(hits) <= 0.98
    assert bootstrap_interval(np.array([2.0, 2.0]), seed=0) == (2.0, 2.0)


def test_summary_and_rise_are_paired_by_prompt():
    before, after = make([[0.0, 1.0], [2.0, 3.0]]), make([[1.0, 2.0], [3.0, 4.0]])
    metrics = summarise(before, seed=0)
    assert metrics["reward"] == 1.5
    assert metrics["reward/low"] >= 0.5
    assert metrics["reward/high"] <= 2.5
    assert (metrics["kl/k1"], metrics["kl/k3"], metrics["truncated"]) == (0.5, 0.25, 0.5)
    assert rise(before, after, seed=0) == pytest.approx((1.0, 1.0, 1.0))
    again = Evaluation.from_record({"step": 0, **before.record()})
    assert again == before


def test_what_no_scorer_scored_is_in_no_mean():
    before, after = make([[0.0, None], [None, None], [2.0, 4.0]]), make([[1.0, 1.0], [5.0, 5.0], [None, 3.0]])
    assert summarise(before, seed=0)["reward"] == (0.0 + 3.0) / 2
    assert rise(before, after, seed=0)[0] == (1.0 + 0.0) / 2
    none = make([[None], [None]])
    assert "reward" not in (metrics := summarise(none, seed=0)) and metrics["length"] == 3.0
    assert np.isnan(rise(none, make([[1.0], [2.0]]), seed=0)).all()
    assert Evaluation.from_record({"step": 0, **none.record()}) == none


def test_kl_is_left_out_without_a_reference():
    sample = EvaluatedSample(0, "p", "a", 1.0, 1, False, None, None)
    assert "kl/k1" not in summarise(Evaluation(0, (sample,)), seed=0)
