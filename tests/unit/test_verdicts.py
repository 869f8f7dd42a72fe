"""Win, tie, loss, quality and the sign test of a comparison, by hand."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from rayalign.compare.verdicts import interval, sign_test, verdicts_of
from rayalign.errors import ScoreError
from tests.unit.algorithm_cases import group


def pairs(scores, preferences=None, metrics=None):
    """Groups of two, one for each row of scores."""
    preferences, metrics = preferences or [None] * len(scores), metrics or [{}] * len(scores)
    return [
        group(f"p{n}", [1], [[2], [3]], row, preferences=None if p is None else ((0.5, p), (1 - p, 0.5)), metrics=m)
        for n, (row, p, m) in enumerate(zip(scores, preferences, metrics, strict=True))
    ]


def test_shares_and_quality_of_scores():
    found = verdicts_of(pairs([(1, 0), (0, 1), (2, 2), (3, 1)]), 2, tie=0.0, seed=0)
    assert found.outcome().tolist() == [[1, -1], [0, 1]]
    rows = found.rows()
    assert [rows["a"][key][0] for key in ("win", "tie", "loss", "quality")] == [0.5, 0.25, 0.25, 1.5]
    assert [rows["b"][key][0] for key in ("win", "tie", "loss", "quality")] == [0.25, 0.25, 0.5, 1.0]
    assert found.win_rate()[0] == 0.625 and found.quality_lead()[0] == 0.5
    assert found.sign_test() == {"a": 1, "b": 0, "even": 1, "p": 1.0}


def test_a_judges_probability_decides_where_there_is_one():
    """And not its scores; what it says besides is averaged over the pairs that have it."""
    judged = pairs([(0, 1), (0, 1), (1, 0)], [0.9, 0.5, 0.4], [{"judge/ties": 0.0}, {"judge/ties": 1.0}, {}])
    found = verdicts_of(judged, 1, tie=0.0, seed=0)
    assert found.outcome().ravel().tolist() == [1, 0, -1]
    assert found.lead.ravel().tolist() == pytest.approx([0.8, 0.0, -0.2])
    assert found.metrics == {"judge/ties": 0.5}
    assert verdicts_of(judged, 1, tie=0.2, seed=0).outcome().ravel().tolist() == [1, 0, 0]


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 5), (9, 1), (25, 12), (400, 300)])
def test_the_sign_test_is_the_binomial_one(wins, losses):
    """Worked out apart: all outcomes that are no likelier than the one seen, added up as fractions."""
    count = wins + losses
    weights = [Fraction(1)]
    for k in range(count):
        weights.append(weights[-1] * (count - k) / (k + 1))
    wanted = sum(w for w in weights if w <= weights[wins]) / Fraction(2) ** count
    assert sign_test(wins, losses) == pytest.approx(float(wanted), rel=1e-12)
    assert sign_test(losses, wins) == sign_test(wins, losses)


def test_equal_models_are_found_different_no_more_often_than_the_level_says():
    rng = np.random.default_rng(0)
    found = [sign_test(wins, 40 - wins) for wins in rng.binomial(40, 0.5, 2000)]
    assert 0.02 <= np.mean(np.array(found) <= 0.05) <= 0.05


def test_intervals_are_over_prompts_and_not_over_answers():
    """Of two prompts whose answers all agree the mean is known no better for having eight answers each."""
    found = verdicts_of(pairs([(1, 0)] * 8 + [(0, 1)] * 8), 8, tie=0.0, seed=0)
    assert found.rows()["a"]["win"] == (0.5, 0.0, 1.0)
    assert found.sign_test()["p"] == 1.0


def test_how_an_interval_is_shown():
    assert interval((0.5, 0.25, 0.75), percent=True) == "50.0 [25.0, 75.0]"
    assert interval((0.5, -0.25, 0.75)) == "+0.500 [-0.250, +0.750]"


def test_pairs_without_two_scores_are_refused():
    with pytest.raises(ScoreError, match="no two scores"):
        verdicts_of([], 1, tie=0.0, seed=0)
