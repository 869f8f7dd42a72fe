"""The enumerable half of tests/bench/resampling.py: its sums are right, and offline training leaves its samples."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from rayalign.types import Request, Sampling
from tests.bench.resampling import ROWS, last_set
from tests.bench.resampling_exact import LENGTH, TableEngine, distribution, measure, run, start, true_reward
from tests.unit.algorithm_cases import VOCABULARY


def test_the_distribution_is_that_of_the_answers():
    table = start()
    probs = table[:, :VOCABULARY].softmax(-1)
    found = distribution(table)
    assert found.sum((1, 2, 3)).tolist() == pytest.approx([1.0] * VOCABULARY)
    for s, a, b, c in [(0, 1, 2, 3), (11, 0, 0, 0), (5, 7, 11, 2)]:
        assert float(found[s, a, b, c]) == pytest.approx(float(probs[s, a] * probs[a, b] * probs[b, c]))


def test_the_engine_samples_that_distribution():
    engine, count = TableEngine(start()), 4000
    engine.submit([Request(str(n), (3,), Sampling(LENGTH), seed=n) for n in range(count)])
    done = engine.poll()
    exact = distribution(start())[3]
    first = exact.sum((1, 2))
    shares = torch.bincount(torch.tensor([c.token_ids[0] for c in done]), minlength=VOCABULARY) / count
    assert ((shares - first).abs() < 4 * (first * (1 - first) / count).sqrt()).all()
    assert sum(done[0].logps) == pytest.approx(float(exact[done[0].token_ids].log()))


def test_measures_are_sums_over_all_answers():
    table, initial, reward = start().clone(), start(), true_reward()
    table[2, 4] += 1.5
    seen = {(2, 4, 1, 1), (0, 0, 0, 0)}
    policy, reference = distribution(table), distribution(initial)
    wanted = {"reward": 0.0, "kl": 0.0, "outside": 0.0, "moved_outside": 0.0}
    for ids in product(range(VOCABULARY), repeat=4):
        p, q = float(policy[ids]), float(reference[ids])
        wanted["reward"] += p * float(reward[ids]) / VOCABULARY
        wanted["kl"] += p * torch.tensor(p / q).log().item() / VOCABULARY
        wanted["outside"] += (ids not in seen) * p / VOCABULARY
        wanted["moved_outside"] += (ids not in seen) * max(p - q, 0.0) / VOCABULARY
    found = measure(table, initial, reward, seen)
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, abs=1e-6)
    at_start = measure(initial, initial, reward, set())
    assert at_start["outside"] == 1.0 and at_start["kl"] == at_start["moved"] == 0.0
    assert at_start["reward"] == pytest.approx(0.0, abs=1e-9)


def test_with_the_same_compute_offline_training_puts_more_mass_outside_and_wins_less():
    ends = {name: run(ROWS[name], seed=0, steps=96, every=96)[-1] for name in ("every 1", "never")}
    assert ends["never"]["reward"] < ends["every 1"]["reward"] - 0.2
    assert ends["never"]["outside"] > ends["every 1"]["outside"] + 0.1
    share = {name: end["moved_outside"] / end["moved"] for name, end in ends.items()}
    assert share["never"] > 0.3 and share["never"] > share["every 1"] + 0.1


def test_whose_samples_the_last_step_learned_from():
    assert [last_set(ROWS[name], 48) for name in ("every 1", "every 4", "every 16", "never")] == [47, 44, 32, 0]
    assert last_set({"resample_every": 16}, 49) == 48
