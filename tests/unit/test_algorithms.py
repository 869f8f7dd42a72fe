"""What each algorithm makes of groups, and that its loss is the formula of its paper on them."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rayalign.algorithms import ALGORITHMS
from rayalign.algorithms.base import Offline, Regularised
from rayalign.algorithms.cringe import Cringe
from rayalign.algorithms.kto import KTO
from rayalign.algorithms.preference import Preference
from rayalign.algorithms.reward_model import RewardModel
from rayalign.algorithms.sft import SFT
from rayalign.protocols import needs_reference
from rayalign.registry import resolve
from rayalign.types import Column, Sampling, TopLogits
from tests.unit.algorithm_cases import VOCABULARY, group, logps, random_groups, step, table, whole

PAIRS = random_groups(5, (1.0, 0.0))
LABELS = [*random_groups(4, (1.0,)), *random_groups(3, (0.0,), seed=7)]
RANKED = random_groups(3, (-2.0, 0.0, -1.0, -1.0), seed=3)
CASES: dict[str, tuple[Any, list]] = {
    "sft": (SFT(), PAIRS),
    "sft by sequences": (SFT(aggregation="sequence_mean", token_accuracy=True, kl_weight=0.1), RANKED),
    "dpo": (Preference(nll_weight=0.2), PAIRS),
    "slic": (Preference(loss={"name": "slic_hf", "target": "best", "delta": 9.0}, kl_weight=0.3), RANKED),
    "kto": (KTO(weight_undesirable="auto", kl_weight=0.2), LABELS),
    "kto of pairs": (KTO(), PAIRS),
    "kto paired": (KTO(paired=True), PAIRS),
    "binary cringe": (Cringe(variant="binary", kl_weight=0.1), LABELS),
    "pairwise cringe": (Cringe(), PAIRS),
    "reward model": (RewardModel(), RANKED),
    "plackett-luce": (RewardModel(loss="plackett_luce"), RANKED),
}


@pytest.mark.parametrize("case", CASES)
def test_the_split_into_micro_batches_changes_nothing(case):
    """Loss, gradient and metrics of a step are the same one example at a time, in either order."""
    algorithm, groups = CASES[case]
    algorithm = pickle.loads(pickle.dumps(algorithm))
    examples, _ = algorithm.examples(groups)
    widths = sorted({len(example.sequences) for example in examples})
    together = [[i for i, e in enumerate(examples) if len(e.sequences) == width] for width in widths]
    found = []
    for parts in (together, [[i] for i in range(len(examples))], [[i] for i in reversed(range(len(examples)))]):
        policy = table(1).requires_grad_()
        loss, metrics = step(algorithm, examples, policy, table(0), parts)
        loss.backward()
        assert policy.grad.abs().max() > 1e-4
        found.append((loss.detach(), policy.grad, metrics))
    for loss, gradient, metrics in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-6, atol=1e-9)
        assert metrics == pytest.approx(found[0][2], rel=1e-5, abs=1e-6)


NEEDED = {"disagreement": {"classes": ("bad", "good")}}  # keys without a default


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_satisfies_the_protocol(name):
    algorithm = resolve(ALGORITHMS[name])(**NEEDED.get(name, {}))
    assert algorithm.name == name and algorithm.network in ("causal", "score")
    assert bool(algorithm.rows) != bool(algorithm.request(Sampling(max_tokens=4)))
    assert algorithm.credit([]) == ([], {}) and algorithm.refresh(1) is None
    assert bool(algorithm.columns) == algorithm.learns
    assert algorithm.examples([])[0] == []
    assert algorithm.summarise({"loss": 1.0}) == {"loss": 1.0}


@pytest.mark.parametrize("name", [n for n in ALGORITHMS if issubclass(resolve(ALGORITHMS[n]), Regularised)])
def test_the_exact_kl_to_the_reference_is_an_option_of_every_policy(name):
    plain, regularised = resolve(ALGORITHMS[name])(), resolve(ALGORITHMS[name])(kl_weight=0.5)
    assert Column.REFERENCE_KL not in plain.columns
    assert Column.REFERENCE_KL in regularised.columns and needs_reference(regularised)


def test_the_regulariser_is_the_exact_kl_summed_over_tokens():
    groups = random_groups(2, (1.0, 0.0))
    plain, _ = whole(Preference(), groups)
    loss, metrics = whole(Preference(kl_weight=0.5), groups)
    kls = []
    for each in groups:
        for completion in each.completions:
            ids = [*each.prompt.token_ids, *completion.token_ids][len(each.prompt.token_ids) - 1 : -1]
            policy, reference = (torch.softmax(table(seed)[ids, :VOCABULARY], -1) for seed in (1, 0))
            kls.append(float((reference * (reference / policy).log()).sum()))
    assert metrics["kl/exact"] == pytest.approx(sum(kls) / 2)
    assert loss - plain == pytest.approx(0.5 * sum(kls) / 2)


def test_of_kto_and_its_mismatched_rows_only_the_answers_own_are_regularised():
    groups = random_groups(2, (1.0,))
    loss, metrics = whole(KTO(kl_weight=1.0), groups)
    _, of_sft = whole(SFT(kl_weight=1.0), groups)
    assert metrics["kl/exact"] == pytest.approx(of_sft["kl/exact"])
    assert loss == pytest.approx(whole(KTO(), groups)[0] + metrics["kl/exact"])


def test_sft_takes_the_best_answer_and_counts_tokens():
    groups = random_groups(3, (0.5, 2.0, -1.0))
    token_means = [logps(g.prompt.token_ids, g.completions[1].token_ids, 1) for g in groups]
    loss, metrics = whole(SFT(), groups)
    assert loss == pytest.approx(-np.concatenate(token_means).mean())
    by_sequence, _ = whole(SFT(aggregation="sequence_mean"), groups)
    assert by_sequence == pytest.approx(-np.mean([part.mean() for part in token_means])) == metrics["nll"]


def test_sft_measures_token_accuracy():
    groups = random_groups(3, (1.0,))
    weights, right = table(1)[:, :VOCABULARY].argmax(-1).tolist(), []
    for each in groups:
        ids = [each.prompt.token_ids[-1], *each.completions[0].token_ids]
        right.append(np.mean([weights[a] == b for a, b in zip(ids[:-1], ids[1:], strict=True)]))
    assert whole(SFT(token_accuracy=True), groups)[1]["token_accuracy"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize("algorithm", [SFT(), Preference(), RewardModel(), RewardModel(loss="k_choose_2"), KTO()])
def test_scores_that_are_no_numbers_are_dropped_and_counted(algorithm):
    bad = group("bad", [1], [[2, 3], [4]], (math.nan, math.nan))
    examples, metrics = algorithm.examples([bad])
    assert examples == []
    dropped = {name: value for name, value in metrics.items() if name.endswith("/dropped")}
    assert list(dropped.values())[0] >= 1.0 and [v for n, v in metrics.items() if n.endswith("/kept")] == [0.0]


def test_of_ranked_answers_only_those_without_a_score_are_left_out():
    mixed = group("mixed", [1], [[2], [3], [4], [2]], (0.0, math.inf, -1.0, -2.0))
    examples, metrics = Preference().examples([mixed])
    # Of six pairs three have the answer without a finite score, and one is an answer against itself.
    assert [tuple(r.completion_ids for r in e.sequences) for e in examples] == [((2,), (4,)), ((4,), (2,))]
    assert metrics == {"pairs/kept": 2.0, "pairs/dropped": 4.0, "pairs/same_answer": 1.0}


@pytest.mark.parametrize("algorithm", [Preference(), Cringe(), KTO(paired=True), RewardModel()])
def test_ties_and_pairs_of_one_answer_are_dropped(algorithm):
    tie = group("tie", [1], [[2], [3]], (1.0, 1.0))
    same = group("same", [1], [[2], [2]], (1.0, 0.0))
    counts = {"pairs/kept": 0.0, "pairs/dropped": 2.0, "pairs/same_answer": 1.0}
    assert algorithm.examples([tie, same]) == ([], counts)


@pytest.mark.parametrize("algorithm", [KTO(), Cringe(variant="binary")])
def test_an_answer_that_is_good_and_bad_is_dropped(algorithm):
    unclear = group("unclear", [1], [[2], [2]], (1.0, 0.0))
    examples, metrics = algorithm.examples([unclear, group("good", [1], [[2]], (1.0,))])
    assert len(examples) == 1
    wanted = {"labels/kept": 1.0, "labels/dropped": 2.0, "labels/good_share": 1.0}
    assert metrics.items() >= wanted.items()


@pytest.mark.parametrize(
    ("record", "settings", "message"),
    [
        (Preference, {"reference": {"cached": True, "update": "replace"}}, "cannot be kept"),
        (Preference, {"reference": {"cached": True}, "kl_weight": 0.1}, "needs the reference itself"),
        (Preference, {"loss": "simpo", "reference": {"update": "replace"}}, "no reference that could follow"),
        (Cringe, {"samples": 1}, "makes no pair"),
        (Cringe, {"samples": 2, "kl_weight": 0.1, "reference": {"cached": True}}, "needs the reference itself"),
        (KTO, {"weight_desirable": -1.0}, "greater than or equal to 0"),
        (KTO, {"paired": True, "weight_desirable": 3.0}, "both halves of a pair weigh the same"),
        (KTO, {"paired": True, "weight_undesirable": "auto"}, "both halves of a pair weigh the same"),
        (Preference, {"loss": {"name": "mix", "losses": ["dpo", {"name": "dpo", "beta": 0.2}]}}, "twice"),
        (Preference, {"loss": {"name": "mix", "losses": ["dpo", "ipo"], "weights": [1.0]}}, "1 weights for 2 losses"),
        (Preference, {"loss": {"name": "mix", "losses": ["dpo", "mix"]}}, "no loss is called mix"),
    ],
)
def test_settings_that_do_not_fit_are_refused(record, settings, message):
    with pytest.raises(ValidationError, match=message):
        record(**settings)


def test_samples_of_an_online_method_cannot_be_cached():
    online = resolve(ALGORITHMS["online_preference"])
    assert online(reference={"update": "replace"}).refresh(1) == 0.0
    with pytest.raises(ValidationError, match="new at every step"):
        online(reference={"cached": True})


def test_iterative_cringe_learns_from_its_own_samples():
    algorithm = Cringe(samples=3)
    assert len(algorithm.request(Sampling(max_tokens=4))) == 3 and algorithm.rows == ()
    assert algorithm.columns == (Column.LOGPS, TopLogits(5))
    assert issubclass(Cringe, Offline) and Cringe(variant="binary").rows == ("label", "pair")
