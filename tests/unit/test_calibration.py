"""Calibration by ranking: its loss is the papers', likelihoods come to rank as the scorer does, the rest is counted."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rayalign.algorithms.candidates import agreement, ranked
from rayalign.algorithms.dpm_calibration import Calibration
from rayalign.collate import collate
from rayalign.maths.ranking import margin_ranking_loss
from rayalign.types import Example, Sequence
from tests.unit.algorithm_cases import group, logps, random_groups, step, table, whole

NAN = float("nan")
GOLD = (3, 1, 4, 1)


def with_gold(each, gold=GOLD):
    return replace(each, prompt=replace(each.prompt, gold_ids=tuple(gold)))


def mixed():
    """Groups of three and of four candidates, one with ties, some with a reference answer: rows of two lengths, which
    of equal length are not all of the same making."""
    four = random_groups(3, (0.5, 2.0, -1.0, 2.0), seed=3)
    three = random_groups(3, (0.1, 0.3, 0.2), seed=5)
    return [with_gold(four[0]), four[1], with_gold(three[0]), three[1], with_gold(three[2], (5, 2)), four[2]]


def expected(each, margin, reduction, likelihood, seed=1):
    """Of one group, from the formula: pairs by the scores, offsets by their ranks."""
    own = [logps(each.prompt.token_ids, c.token_ids, seed) for c in each.completions]
    p = [x.mean() if likelihood == "mean_logprob" else np.exp(x).mean() for x in own]
    levels = sorted(set(each.scores), reverse=True)
    ranks = [levels.index(score) for score in each.scores]
    found: dict[int, list[float]] = {}
    for i, j in itertools.permutations(range(len(p)), 2):
        if ranks[i] < ranks[j]:
            found.setdefault(ranks[j] - ranks[i], []).append(max(0.0, p[j] - p[i] + margin * (ranks[j] - ranks[i])))
    per_offset = [sum(v) if reduction == "pair_sum" else sum(v) / len(v) for v in found.values()]
    return sum(per_offset)


@pytest.mark.parametrize("reduction", ["pair_sum", "offset_mean"])
@pytest.mark.parametrize("likelihood", ["mean_logprob", "mean_prob"])
def test_the_loss_is_the_papers_plus_the_likelihood_of_the_reference_answer(likelihood, reduction):
    groups, margin = mixed(), 0.3
    algorithm = Calibration(likelihood=likelihood, reduction=reduction, margin=margin, mle_weight=0.7)
    loss, metrics = whole(algorithm, groups)
    ranking = [expected(each, margin, reduction, likelihood) for each in groups]
    nll = [-logps(g.prompt.token_ids, g.prompt.gold_ids, 1) for g in groups if g.prompt.gold_ids]
    mean = sum(each.mean() for each in nll) / len(groups)
    assert loss == pytest.approx(sum(ranking) / len(groups) + 0.7 * mean, rel=1e-5)
    assert metrics["ranking/loss"] == pytest.approx(np.mean(ranking), rel=1e-5)
    said = algorithm.summarise(metrics)
    assert said["gold/nll"] == pytest.approx(np.concatenate(nll).mean(), rel=1e-5)
    assert said["gold/perplexity"] == pytest.approx(math.exp(np.concatenate(nll).mean()), rel=1e-5)
    assert not {"gold/nats", "gold/tokens"} & said.keys()


@pytest.mark.parametrize(("reduction", "value"), [("pair_sum", 0.15), ("offset_mean", 0.075)])
@pytest.mark.parametrize("likelihood", ["mean_logprob", "mean_prob"])
def test_the_worked_value(likelihood, reduction, value):
    """p = [−.4, −.35, −.6], margin .1; as probabilities the same numbers and a constant, which does not matter."""
    p = torch.tensor([-0.4, -0.35, -0.6], dtype=torch.float64)
    each = group("row", [1], [[2, 2], [3], [4, 4, 4]], (2.0, 1.0, 0.0))
    (example,), _ = Calibration().examples([each])
    batch = collate([example], pad_id=0)
    tokens = p if likelihood == "mean_logprob" else (p + 1).log()
    terms = Calibration(likelihood=likelihood, reduction=reduction, margin=0.1).loss(
        batch, {"policy/logps": tokens.unsqueeze(1).expand(3, 3)}, {}
    )
    assert terms.loss.tolist() == [pytest.approx(value, abs=1e-6)]


@pytest.mark.parametrize("reduction", ["pair_sum", "offset_mean"])
def test_ranks_that_are_positions_change_nothing_and_ties_form_no_pair(reduction):
    p, order = torch.randn(3, 5, dtype=torch.float64), torch.randperm(5)
    ranks = torch.arange(5).expand(3, 5)
    plain = margin_ranking_loss(p, margin=0.2, reduction=reduction)
    assert torch.allclose(margin_ranking_loss(p, margin=0.2, reduction=reduction, ranks=ranks), plain)
    mixed_up = margin_ranking_loss(p[:, order], margin=0.2, reduction=reduction, ranks=ranks[:, order])
    assert torch.allclose(mixed_up, plain)
    first = torch.tensor([[0, 1, 1]])
    tied = margin_ranking_loss(torch.tensor([[0.0, 0.0, 5.0]]), margin=0.1, reduction=reduction, ranks=first)
    both = [0.1, 5.1]  # to the best one, each a rank away
    assert tied.tolist() == [pytest.approx(sum(both) if reduction == "pair_sum" else sum(both) / 2)]
    assert margin_ranking_loss(p, margin=0.2, reduction=reduction, ranks=ranks * 0).tolist() == [0.0] * 3
    with pytest.raises(ValueError, match="ranks"):
        margin_ranking_loss(p, margin=0.2, reduction=reduction, ranks=ranks[:, :4])


def test_any_split_into_micro_batches_is_one_batch():
    algorithm = Calibration(mle_weight=0.5, margin=0.1, kl_weight=0.1)
    examples, _ = algorithm.examples(mixed())
    widths = [len(example.sequences) for example in examples]
    assert sorted(set(widths)) == [3, 4, 5]

    def run(parts):
        policy = table(1).requires_grad_()
        loss, metrics = step(algorithm, examples, policy, table(0), parts)
        loss.backward()
        return float(loss.detach()), algorithm.summarise(metrics), policy.grad

    one = run([[i for i, w in enumerate(widths) if w == width] for width in sorted(set(widths))])
    each = run([[i] for i in range(len(examples))])
    assert one[0] == pytest.approx(each[0]) and one[1] == pytest.approx(each[1])
    assert torch.allclose(one[2], each[2], atol=1e-12) and float(one[2].abs().sum()) > 0


@pytest.mark.parametrize("likelihood", ["mean_logprob", "mean_prob"])
@pytest.mark.parametrize("reduction", ["pair_sum", "offset_mean"])
def test_training_ranks_the_likelihoods_as_the_scorer_does(likelihood, reduction):
    """From a policy that ranks otherwise, to all margins kept: no loss is left, and no gradient."""
    groups = [with_gold(each, (each.prompt.token_ids[0], 7)) for each in random_groups(4, (0.1, 0.4, 0.3, 0.2), seed=2)]
    algorithm = Calibration(likelihood=likelihood, reduction=reduction, margin=0.01, mle_weight=0.0)
    examples, _ = algorithm.examples(groups)
    policy = table(1).requires_grad_()
    optimizer = torch.optim.Adam([policy], lr=0.05)
    seen = []
    for _ in range(400):
        optimizer.zero_grad()
        loss, metrics = step(algorithm, examples, policy, table(0), [range(len(examples))])
        loss.backward()
        optimizer.step()
        seen.append(metrics)
    assert seen[0]["ranking/kendall_tau"] < 0.6 and seen[0]["ranking/loss"] > 0.01
    assert (seen[-1]["ranking/kendall_tau"], seen[-1]["ranking/top1"]) == (1.0, 1.0)
    assert seen[-1]["ranking/loss"] == 0.0 and float(policy.grad.abs().sum()) == 0.0


def test_the_reference_answer_is_not_forgotten_where_it_weighs():
    groups = [with_gold(each) for each in random_groups(4, (0.1, 0.4, 0.3, 0.2), seed=2)]

    def perplexity(weight):
        algorithm = Calibration(mle_weight=weight, margin=0.5)
        examples, _ = algorithm.examples(groups)
        policy = table(1).requires_grad_()
        optimizer = torch.optim.Adam([policy], lr=0.05)
        for _ in range(100):
            optimizer.zero_grad()
            loss, metrics = step(algorithm, examples, policy, table(0), [range(len(examples))])
            loss.backward()
            optimizer.step()
        return algorithm.summarise(metrics)["gold/perplexity"]

    _, before = whole(Calibration(), groups)
    assert perplexity(1.0) < 0.5 * math.exp(before["gold/nats"] / before["gold/tokens"]) < perplexity(0.0)


def test_what_cannot_rank_is_left_out_and_counted():
    answers = [[1, 2], [3], [4, 5], [3], [6]]
    groups = [
        group("nan", [1], answers, (0.1, NAN, 0.3, 0.2, NAN)),
        group("same", [2], answers, (0.1, 0.5, 0.3, 0.2, 0.1)),  # [3] twice, the better one stays; two of equal score
        group("tied", [3], answers, (0.2,) * 5),
        group("alone", [4], answers, (NAN, 0.2, NAN, 0.3, NAN)),  # two that are the same
        replace(group("stripped", [5], answers, (5.0, 4.0, 3.0, 2.0, 1.0)), texts=("a", " a", "b", "c ", "c")),
    ]
    examples, metrics = Calibration().examples(groups)
    assert metrics == {
        "examples/kept": 3.0,
        "examples/dropped": 2.0,
        "candidates/kept": 10.0,
        "candidates/dropped": 15.0,
        "candidates/repeated": 5.0,  # of same, tied, alone one each; of stripped two
        "candidates/unscored": 5.0,
        "gold/missing": 3.0,
    }
    rows = [[row.completion_ids for row in example.sequences] for example in examples]
    assert rows[0] == [(4, 5), (3,), (1, 2)]
    assert rows[1] == [(3,), (4, 5), (1, 2), (6,)] and examples[1].values["ranks"] == (0.0, 1.0, 2.0, 2.0)
    assert rows[2] == [(1, 2), (4, 5), (3,)]
    assert all(example.values["gold"] == 0.0 for example in examples)
    kept, more = Calibration(min_candidates=4).examples(groups)
    assert len(kept) == 1 and more["examples/dropped"] == 4.0
    contested = replace(groups[1], contested=(False, True, False, False, False))  # the best of all
    (example,), more = Calibration().examples([contested])
    assert [row.completion_ids for row in example.sequences] == [(4, 5), (3,), (1, 2), (6,)]
    assert more["candidates/unscored"] == 1.0
    order, ranks, lost = ranked(groups[0])
    assert (order, ranks, lost["unscored"]) == ([2, 3, 0], (0.0, 1.0, 2.0), 2)


def test_a_step_without_a_reference_answer_says_nothing_of_it():
    _, metrics = whole(Calibration(mle_weight=5.0), random_groups(2, (1.0, 0.0)))
    said = Calibration().summarise(metrics)
    assert not [name for name in said if name.startswith("gold/")]
    plain, _ = whole(Calibration(mle_weight=0.0), random_groups(2, (1.0, 0.0)))
    heavy, _ = whole(Calibration(mle_weight=5.0), random_groups(2, (1.0, 0.0)))
    assert plain == heavy


def test_what_is_masked_may_be_anything():
    """Padding of the policy's columns, and an engine that gave no log-probs."""
    rows = (Sequence((1,), (2, 3)), Sequence((1,), (4,)), Sequence((1,), (5, 6, 7)))
    batch = collate([Example(rows, {"ranks": (0.0, 1.0, 0.0), "gold": 1.0})], pad_id=0)
    columns = torch.full((3, 3), -1.0)
    columns = torch.where(batch.mask > 0, columns, torch.tensor(NAN)).requires_grad_()
    terms = Calibration(margin=0.1).loss(batch, {"policy/logps": columns}, {})
    terms.loss.sum().backward()
    assert terms.loss.tolist() == [pytest.approx(1.1)]  # equal likelihoods miss the margin; and the answer's NLL
    assert torch.isfinite(columns.grad).all()


def test_kendalls_tau_and_the_first_place():
    rng = np.random.default_rng(0)
    for _ in range(20):
        likelihood, ranks = rng.normal(size=6), rng.integers(0, 4, size=6)
        ranks = np.unique(ranks, return_inverse=True)[1]
        signs = [
            np.sign(likelihood[i] - likelihood[j])
            for i, j in itertools.permutations(range(6), 2)
            if ranks[i] < ranks[j]
        ]
        tau, top = agreement(
            torch.from_numpy(likelihood[None]), torch.from_numpy(ranks[None]), torch.ones(1, 6, dtype=torch.bool)
        )
        assert float(tau) == pytest.approx(np.mean(signs) if signs else 0.0)
        assert float(top) == float(ranks[likelihood.argmax()] == 0)
    out = torch.tensor([[True, True, False]])
    tau, top = agreement(torch.tensor([[1.0, 0.0, 9.0]]), torch.tensor([[0.0, 1.0, 0.0]]), out)
    assert (float(tau), float(top)) == (1.0, 1.0)  # the one that is masked has the largest likelihood


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 1}, "one candidate alone has no rank"),
        ({"samples": 4, "min_candidates": 5}, "all prompts would be dropped"),
        ({"samples": 4, "kl_weight": 0.1, "reference": {"cached": True}}, "exact KL needs the reference itself"),
        ({"reference": {"update": "replace", "every": 5}}, "no reference that could follow"),
        ({"margin": -0.1}, "greater than or equal to 0"),
        ({"likelihood": "sum"}, "mean_logprob"),
        ({"min_candidates": 1}, "greater than or equal to 2"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValidationError, match=message):
        Calibration(**settings)


def test_rows_are_read_or_candidates_sampled():
    assert Calibration().rows == ("ranked", "pair") and Calibration(samples=10).rows == ()
    assert not Calibration().needs and Calibration().takes_gold
    assert Calibration(samples=10).request("how") == ["how"] * 10
