"""Which answers are compared with which, and what the comparisons come to: a K×K matrix and scores.

A schedule is a generator: it yields pairs (i, j), i < j, that are compared together, and is sent P(i ≻ j) of them.
What it asks for depends on these numbers alone, so the same judge gives the same matrix.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from itertools import combinations
from typing import Literal

import numpy as np

Pair = tuple[int, int]
Results = Mapping[Pair, float]
Schedule = Generator[list[Pair], dict[Pair, float], None]
ScheduleName = Literal["all", "tournament", "swiss"]
RIDGE = 1e-4  # of the strengths: it hardly moves what was compared, and puts what was not in the middle
CERTAIN = 0.99  # the most that one comparison says of pairs that were not compared


def start(name: ScheduleName, count: int, budget: int | None = None) -> Schedule:
    """The schedule of this name for `count` answers. `budget`: comparisons of swiss rounds."""
    if name == "all":
        return _all(count)
    return _tournament(count) if name == "tournament" else _swiss(count, budget or count)


def _all(count: int) -> Schedule:
    """K(K−1)/2 comparisons, at once."""
    if count > 1:
        yield list(combinations(range(count), 2))


def _tournament(count: int) -> Schedule:
    """Knockout in the order of the answers: K−1 comparisons. At a tie the earlier goes on; an odd one out has a bye."""
    alive = list(range(count))
    while len(alive) > 1:
        pairs = list(zip(alive[::2], alive[1::2], strict=False))
        found = yield pairs
        bye = alive[2 * len(pairs) :]
        alive = [i if found[i, j] >= 0.5 else j for i, j in pairs] + bye


def _swiss(count: int, budget: int) -> Schedule:
    """Rounds in which those of like strength meet who have not met yet, until the budget is spent or all have met."""
    results: dict[Pair, float] = {}
    while len(results) < budget:
        ranks = strengths(count, results)
        order = sorted(range(count), key=lambda i: (-ranks[i], i))
        pairs: list[Pair] = []
        while order:
            first = order.pop(0)
            other = next((j for j in order if _pair(first, j) not in results), None)
            if other is not None:
                order.remove(other)
                pairs.append(_pair(first, other))
        if not pairs:
            return
        results |= yield pairs[: budget - len(results)]


def _pair(i: int, j: int) -> Pair:
    return (i, j) if i < j else (j, i)


def strengths(count: int, results: Results) -> np.ndarray:
    """Bradley-Terry strengths [K] that fit P(i ≻ j) = σ(s_i − s_j), certain verdicts taken as less so, with a
    ridge that puts an answer that was never compared in the middle. They add up to 0."""
    found = np.zeros(count)
    if not results:
        return found
    first, second = np.array(list(results)).T
    wanted = np.clip(list(results.values()), 1 - CERTAIN, CERTAIN)
    design = np.zeros((len(wanted), count))
    design[np.arange(len(wanted)), first], design[np.arange(len(wanted)), second] = 1.0, -1.0
    for _ in range(100):  # Newton's method; strictly concave, and steps are bounded
        prob = 1 / (1 + np.exp(-design @ found))
        gradient = design.T @ (wanted - prob) - RIDGE * found
        curvature = design.T @ (design * (prob * (1 - prob))[:, None]) + RIDGE * np.eye(count)
        step = np.linalg.solve(curvature, gradient)
        found += step / max(1.0, np.abs(step).max())
        if np.abs(step).max() < 1e-12:
            break
    return found


def complete(count: int, results: Results) -> tuple[tuple[float, ...], ...]:
    """[K, K] P(i ≻ j): as compared, and of pairs that were not, by the strengths that fit those that were."""
    ranks = strengths(count, results)
    matrix = 1 / (1 + np.exp(ranks[None, :] - ranks[:, None]))
    np.fill_diagonal(matrix, 0.5)
    for (i, j), prob in results.items():
        matrix[i, j], matrix[j, i] = prob, 1 - prob
    return tuple(tuple(map(float, row)) for row in matrix)


def win_rates(matrix: tuple[tuple[float, ...], ...]) -> tuple[float, ...]:
    """Scores: the mean probability of being better than another answer; ½ where there is no other."""
    count = len(matrix)
    return tuple((sum(row) - 0.5) / (count - 1) if count > 1 else 0.5 for row in matrix)
