"""Which answers are compared, and what becomes of pairs that were not."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayalign.scorers import schedule


def play(name: str, truth: np.ndarray, budget: int | None = None) -> tuple[list[list[tuple[int, int]]], dict]:
    """The rounds that a schedule asks for when P(i ≻ j) = σ(truth_i − truth_j), and the results."""
    plan, rounds, results = schedule.start(name, len(truth), budget), [], {}
    found = None
    while True:
        try:
            pairs = next(plan) if found is None else plan.send(found)
        except StopIteration:
            return rounds, results
        found = {(i, j): float(1 / (1 + np.exp(truth[j] - truth[i]))) for i, j in pairs}
        rounds.append(pairs)
        results |= found


def test_all_pairs_are_asked_at_once() -> None:
    rounds, results = play("all", np.arange(4.0))
    assert rounds == [list(combinations(range(4), 2))] and len(results) == 6


@pytest.mark.parametrize("count", range(1, 10))
def test_a_knockout_is_one_comparison_less_than_there_are_answers_and_the_best_wins(count: int) -> None:
    truth = np.random.default_rng(count).permutation(count).astype(float)
    rounds, results = play("tournament", truth)
    assert len(results) == count - 1 == sum(map(len, rounds))
    assert len(rounds) == int(np.ceil(np.log2(count))) if count > 1 else not rounds
    losers = {j if prob >= 0.5 else i for (i, j), prob in results.items()}
    assert set(range(count)) - losers == {int(truth.argmax())}
    scores = schedule.win_rates(schedule.complete(count, results))
    assert int(np.argmax(scores)) == truth.argmax()


def test_a_tie_of_a_knockout_lets_the_earlier_go_on() -> None:
    rounds, _ = play("tournament", np.zeros(4))
    assert rounds == [[(0, 1), (2, 3)], [(0, 2)]]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(1, 40), st.integers(0, 10**6))
def test_swiss_rounds_spend_their_budget_on_pairs_that_have_not_met(count: int, budget: int, seed: int) -> None:
    truth = np.random.default_rng(seed).normal(size=count)
    rounds, results = play("swiss", truth, budget)
    pairs = [pair for each in rounds for pair in each]
    assert len(pairs) == len(set(pairs)) == min(budget, count * (count - 1) // 2)
    assert all(i < j for i, j in pairs)
    for each in rounds:
        places = [place for pair in each for place in pair]
        assert len(places) == len(set(places))  # each answer once a round
    assert (rounds, results) == play("swiss", truth, budget)


def test_swiss_rounds_find_the_order_with_fewer_comparisons_than_all_pairs() -> None:
    truth = np.array([0.3, 2.2, -1.0, 1.1, -2.5, 0.9, 3.4, -0.2])
    _, results = play("swiss", truth, 16)  # of 28
    scores = schedule.win_rates(schedule.complete(8, results))
    assert np.corrcoef(np.argsort(np.argsort(scores)), np.argsort(np.argsort(truth)))[0, 1] > 0.9
    assert int(np.argmax(scores)) == 6


def test_strengths_are_those_that_made_the_probabilities() -> None:
    truth = np.array([1.0, 0.2, -0.4, -0.8])
    _, results = play("all", truth)
    found = schedule.strengths(4, results)
    gradient = np.zeros(4)
    for (i, j), prob in results.items():
        error = prob - 1 / (1 + np.exp(found[j] - found[i]))
        gradient[i] += error
        gradient[j] -= error
    np.testing.assert_allclose(gradient, schedule.RIDGE * found, atol=1e-9)  # the optimum, ridge included
    np.testing.assert_allclose(found, truth, atol=1e-3)
    assert abs(found.sum()) < 1e-9


def test_what_was_not_compared_is_what_a_bradley_terry_judge_would_say() -> None:
    truth = np.array([2.0, 1.0, 0.0, -1.0])
    _, results = play("tournament", truth)
    expected = 1 / (1 + np.exp(truth[None, :] - truth[:, None]))
    np.testing.assert_allclose(schedule.complete(4, results), expected, atol=2e-3)


def test_who_wins_the_knockout_scores_best_also_among_equals() -> None:
    random = np.random.default_rng(0)
    for count in (4, 5, 8):
        for _ in range(100):
            truth = random.normal(scale=0.5, size=count)
            _, results = play("tournament", truth)
            assert np.argmax(schedule.win_rates(schedule.complete(count, results))) == truth.argmax()


def test_certain_verdicts_stay_finite_and_what_never_met_is_even() -> None:
    matrix = np.array(schedule.complete(4, {(0, 1): 1.0}))
    assert matrix[0, 1] == 1.0 and matrix[1, 0] == 0.0
    assert matrix[2, 3] == 0.5 and 0.5 < matrix[0, 2] < 1 and 0 < matrix[1, 2] < 0.5
    np.testing.assert_allclose(matrix + matrix.T, np.ones((4, 4)), atol=1e-12)


def test_scores_are_mean_win_probabilities() -> None:
    assert schedule.win_rates(schedule.complete(3, {(0, 1): 0.9, (0, 2): 0.7, (1, 2): 0.4})) == pytest.approx(
        (0.8, 0.25, 0.45)
    )
    assert schedule.win_rates(schedule.complete(1, {})) == (0.5,)
