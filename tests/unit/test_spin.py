"""SPIN: the course of its iterations, and what they converge to, exactly, on a policy small enough to enumerate."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rayalign.algorithms.sft import SFT
from rayalign.algorithms.spin import SPIN
from rayalign.collate import collate
from rayalign.data.order import Passes
from rayalign.record import Unfit
from rayalign.types import Completion, Example, Group, Prompt
from rayalign.types import Sequence as Row
from tests.unit.algorithm_cases import VOCABULARY, annotated, columns_of, group

# The answer to the one prompt (token 0) is one of the tokens 0 … 11; the policy is a row of logits.
DATA = torch.softmax(torch.linspace(-2.0, 2.0, VOCABULARY, dtype=torch.float64).cos() * 2, -1)


def start() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).log_softmax(-1)


class Expected:
    """E over y ~ data and y′ ~ opponent of the algorithm's own loss: all pairs of answers as one batch, weighed.

    Args:
        opponent: [V] log-probs.
    """

    def __init__(self, algorithm: SPIN, opponent: torch.Tensor):
        self._algorithm = algorithm
        self._table = torch.zeros(VOCABULARY, VOCABULARY + 1, dtype=torch.float64)
        pairs = [(y, other) for y in range(VOCABULARY) for other in range(VOCABULARY)]
        batch = collate([Example((Row((0,), (y,)), Row((0,), (other,)))) for y, other in pairs], pad_id=0)
        # What a learner annotates is float32; here the point is that of an exact optimum.
        self._batch = replace(batch, columns={"reference/logps": opponent[batch.labels]})
        self._weights = torch.stack([DATA[y] * opponent[other].exp() for y, other in pairs])

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """[V] logits of the policy → the loss."""
        policy = self._table.clone()
        policy[0, :VOCABULARY] = logits
        columns = columns_of(self._batch, policy, self._table, self._algorithm.columns)
        return (self._weights * self._algorithm.loss(self._batch, columns, {}).loss).sum()


def optimum(algorithm: SPIN, opponent: torch.Tensor) -> torch.Tensor:
    """Full-batch training to the end: [V] log-probs."""
    logits, expected = opponent.clone().requires_grad_(), Expected(algorithm, opponent)
    optimiser = torch.optim.LBFGS(
        [logits], lr=1.0, max_iter=600, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = expected(logits)
        loss.backward()
        return loss

    for _ in range(2):
        optimiser.step(closure)
    return logits.detach().log_softmax(-1)


def distance(logps: torch.Tensor) -> float:
    """Spread of log π − log p: 0 where the two are one, whatever the normaliser."""
    return float((logps - DATA.log()).max() - (logps - DATA.log()).min())


@pytest.mark.parametrize("lam", [0.4, 0.5, 0.75, 1.0, 3.0])
def test_an_iteration_ends_where_theory_says(lam):
    before = start()
    wanted = (before + (DATA.log() - before) / lam).log_softmax(-1)
    found = optimum(SPIN(lam=lam, steps=1), before)
    assert torch.allclose(found.exp(), wanted.exp(), atol=2e-6)


@pytest.mark.parametrize(
    ("lam", "shrinks"), [(0.6, True), (0.75, True), (1.0, True), (2.0, True), (0.5, None), (0.45, False)]
)
def test_iterations_contract_above_a_half_and_diverge_below(lam, shrinks):
    """log π − log p is multiplied by 1 − 1/λ, up to the normaliser."""
    algorithm, logps = SPIN(lam=lam, steps=1), (DATA.log() + 0.25 * start()).log_softmax(-1)
    spreads = [distance(logps)]
    for _ in range(3):
        logps = optimum(algorithm, logps)
        spreads.append(distance(logps))
    factors = [after / before for before, after in zip(spreads, spreads[1:], strict=False) if before > 1e-3]
    assert factors == pytest.approx([abs(1 - 1 / lam)] * len(factors), abs=2e-3)
    if shrinks is None:
        assert spreads[-1] == pytest.approx(spreads[0], rel=1e-2)
    else:
        assert (spreads[-1] < spreads[0]) is shrinks


def test_there_is_nothing_to_learn_where_the_opponent_is_the_data():
    logits = DATA.log().clone().requires_grad_()
    for lam in (0.1, 0.5, 2.0):
        (gradient,) = torch.autograd.grad(Expected(SPIN(lam=lam, steps=1), DATA.log())(logits), logits)
        assert gradient.abs().max() < 1e-12
    elsewhere = start().requires_grad_()
    (gradient,) = torch.autograd.grad(Expected(SPIN(lam=0.5, steps=1), start())(elsewhere), elsewhere)
    assert gradient.abs().max() > 1e-3


def test_settings_by_iteration():
    spin = SPIN(iterations=4, steps=(2, 3), lam=(0.1, 5.0), lr_scale=(1.0, 0.5, 0.2))
    assert [spin.first_step(t) for t in range(5)] == [0, 2, 5, 8, 11] and spin.total_steps == 11
    assert [spin.iteration(step) for step in range(11)] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert spin.iteration(11) == 3  # beyond the end
    assert [step for step in range(1, 12) if spin.refresh(step) is not None] == [2, 5, 8, 11]
    assert spin.refresh(2) == 0.0 and spin.refresh(0) is None
    assert [spin.at(step).lam for step in (0, 2, 8)] == [0.1, 5.0, 5.0]
    assert [(s.first, s.steps, s.lr_scale) for s in map(spin.stretch, (0, 4, 7, 10))] == [
        (0, 2, 1.0), (2, 3, 0.5), (5, 3, 0.2), (8, 3, 0.2),
    ]  # fmt: skip
    assert [step for step in range(12) if spin.begins(step)] == [0, 2, 5, 8]


def test_epochs_are_steps_once_rows_are_known():
    assert SPIN(iterations=3).total_steps is None and SPIN(iterations=3).refresh(5) is None
    assert SPIN(iterations=3).over(100, 10).steps == (20, 40)  # two passes, as published; then over twice the pairs
    assert SPIN(iterations=3, epochs=1, mix_previous=False).over(100, 8).steps == 12
    assert SPIN(iterations=1, epochs=3).over(7, 8).steps == 2
    assert SPIN(steps=5).over(100, 8).steps == 5


@pytest.mark.parametrize(
    "wrong", [{"steps": 2, "epochs": 2}, {"lam": ()}, {"lr_scale": (1.0,) * 4}, {"lam": 0}, {"steps": (0,)}]
)
def test_settings_that_cannot_be(wrong):
    with pytest.raises((Unfit, ValueError)):
        SPIN(iterations=3, **wrong)


def test_pairs_of_the_same_answer_are_counted_and_left_out():
    groups = [
        group("a", [1, 2], [[3, 4], [5]], (1.0, 0.0)),
        group("b", [1, 2], [[3, 4], [3, 4]], (1.0, 0.0)),
        Group("c", Prompt(0, "c", (1,)), (Completion("c/0", (2,), (), "stop", -1),), ("x",), (1.0,)),
    ]
    examples, counts = SPIN(steps=1).examples(groups)
    assert [[row.completion_ids for row in e.sequences] for e in examples] == [[(3, 4), (5,)]]
    assert counts == {"pairs/kept": 1.0, "pairs/dropped": 2.0, "pairs/same_answer": 1.0}
    assert isinstance(SPIN(steps=1).for_held_out(), SFT)


def test_the_loss_begins_at_log_2_and_follows_lambda():
    pairs = [Example((Row((0,), (3,)), Row((0,), (5,))))]
    table = torch.randn(VOCABULARY, VOCABULARY + 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = collate(annotated(pairs, table), pad_id=0)
    for lam in (0.1, 5.0):
        terms = SPIN(lam=lam, steps=1).loss(batch, columns_of(batch, table, table, SPIN.columns), {})
        assert terms.loss.item() == pytest.approx(math.log(2), abs=1e-6)
        other = table.clone()
        other[0, 3] += 1.0
        terms = SPIN(lam=lam, steps=1).loss(batch, columns_of(batch, other, table, SPIN.columns), {})
        gap = terms.metrics["spin/gap"].item()
        assert gap == pytest.approx(1.0, abs=1e-6)
        assert terms.metrics["rewards/margins"].item() == pytest.approx(lam * gap)
        assert terms.loss.item() == pytest.approx(math.log1p(math.exp(-lam * gap)))
        likely = SPIN(lam=lam, steps=1, nll_weight=0.2).loss(batch, columns_of(batch, other, table, SPIN.columns), {})
        nll = -other[0, :VOCABULARY].log_softmax(-1)[3].item()
        assert (likely.loss - terms.loss).item() == pytest.approx(0.2 * nll, rel=1e-4)


def test_a_pass_over_two_iterations_has_each_pair_once():
    passes = Passes(2 * 15, seed=(0, 1))
    assert sorted(passes[slot][1] for slot in range(30)) == list(range(30))
    halves = np.array([passes[slot][1] >= 15 for slot in range(30)])
    assert 0 < halves[:10].sum() < 10  # in a new order, both from the beginning
