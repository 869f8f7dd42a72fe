"""Where online training ends on a policy that can be enumerated: five answers to one prompt, exact expectations.

Pairs are drawn from the policy itself, so each pair (i, j) weighs π(i)·π(j), without a gradient through the sampling.
What is trained is the algorithm as it stands: its `examples`, and its `loss` on a collated batch.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch

from rayalign.algorithms.online_preference import OnlinePreference
from rayalign.collate import collate
from tests.unit.algorithm_cases import group

REFERENCE = torch.tensor([0.4, 0.25, 0.15, 0.15, 0.05], dtype=torch.float64)
REWARD = torch.tensor([0.0, 1.0, -0.5, 2.0, 3.0], dtype=torch.float64)
BETA = 0.5
OPTIMUM = [0.0130448, 0.0602429, 0.0017996, 0.2670828, 0.6578299]  # ∝ π_ref·exp(r/β)
PAIRS = list(permutations(range(5), 2))


def trained(algorithm: OnlinePreference, *, seeds: int = 1, steps: int = 2000, lr: float = 0.2) -> torch.Tensor:
    """The policy [5] after gradient steps on the algorithm's exact expected loss.

    Args:
        seeds: draws of each pair's label; what is drawn once is drawn for all steps.
    """
    groups = [
        replace(group("pair", [0], [[i + 1], [j + 1]], (float(REWARD[i]), float(REWARD[j]))), seed=place * seeds + draw)
        for place, (i, j) in enumerate(PAIRS)
        for draw in range(seeds)
    ]
    examples, _ = algorithm.examples(groups)
    assert len(examples) == len(groups)
    batch = collate(examples, pad_id=0)
    answers = batch.labels.squeeze(1) - 1  # [R] which of the five each row is
    batch = replace(batch, columns={"reference/logps": REFERENCE.log()[answers].unsqueeze(1)})
    logits = REFERENCE.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    first, second = batch.by_example(answers).T
    for _ in range(steps):
        logps = logits.log_softmax(-1)
        weight = (logps[first] + logps[second]).detach().exp() / seeds
        terms = algorithm.loss(batch, {"policy/logps": logps[answers].unsqueeze(1)}, {})
        optimizer.zero_grad()
        (weight * terms.loss).sum().backward()
        optimizer.step()
        schedule.step()
    return logits.detach().softmax(-1)


def ipo_optimum(wins: torch.Tensor, tau: float) -> torch.Tensor:
    """π ∝ π_ref·exp(u/τ) with u(y) = E_{y′∼π} P(y ≻ y′): of its own samples, so solved by iteration."""
    policy = REFERENCE.clone()
    for _ in range(20000):
        policy = 0.9 * policy + 0.1 * (REFERENCE.log() + wins @ policy / tau).softmax(-1)
    return policy


WINS = torch.sigmoid(REWARD[:, None] - REWARD[None, :])


def test_online_dpo_on_probabilities_reaches_the_optimum_of_rlhf():
    policy = trained(OnlinePreference(pairs="random", loss={"name": "soft", "beta": BETA}))
    assert policy.tolist() == pytest.approx(OPTIMUM, abs=2e-4)


def test_online_dpo_on_drawn_labels_reaches_it_as_well():
    """Bernoulli(σ(r₁ − r₂)): of 600 draws a pair, so to within what their shares miss the probabilities by."""
    algorithm = OnlinePreference(pairs="random", labels="bernoulli", loss={"name": "dpo", "beta": BETA})
    policy = trained(algorithm, seeds=600, steps=300, lr=0.2)
    assert policy.tolist() == pytest.approx(OPTIMUM, abs=0.02)


def test_online_dpo_on_certain_labels_goes_elsewhere():
    """The better answer wins for certain: its log-ratio grows without end, whatever β."""
    policy = trained(OnlinePreference(pairs="random", loss={"name": "dpo", "beta": BETA}))
    assert policy[4] > 0.98 > OPTIMUM[4]


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_online_ipo_reaches_its_own_optimum(tau):
    """Psi-PO with the identity and the probability of a pair is IPO's expectation over drawn labels."""
    policy = trained(OnlinePreference(pairs="random", samples=2, loss={"name": "psi_po", "tau": tau}))
    wanted = ipo_optimum(WINS, tau)
    assert policy.tolist() == pytest.approx(wanted.tolist(), abs=2e-4)
    assert (wanted - REFERENCE).abs().max() > 0.05


def test_online_ipo_on_drawn_labels_reaches_it_as_well():
    algorithm = OnlinePreference(pairs="random", labels="bernoulli", loss={"name": "ipo", "tau": 0.5})
    policy = trained(algorithm, seeds=600, steps=300, lr=0.2)
    assert policy.tolist() == pytest.approx(ipo_optimum(WINS, 0.5).tolist(), abs=0.01)


def test_online_ipo_on_certain_labels_stops():
    """As MATHS says: DPO drives the loser to 0, IPO stops where the gap is what the certain wins call for."""
    policy = trained(OnlinePreference(pairs="random", loss={"name": "ipo", "tau": 1.0}))
    certain = ((REWARD[:, None] - REWARD[None, :]).sign() + 1) / 2
    assert policy.tolist() == pytest.approx(ipo_optimum(certain, 1.0).tolist(), abs=2e-4)
