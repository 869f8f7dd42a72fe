"""Which two of the sampled answers make a pair, which is chosen, and what each pair loss learns of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from pydantic import ValidationError

from rayalign.algorithms.cringe import Cringe
from rayalign.algorithms.kto import KTO
from rayalign.algorithms.losses import PAIR_LOSSES
from rayalign.algorithms.online_preference import OnlinePreference
from rayalign.algorithms.pairing import Pairing
from rayalign.config import parse_config
from rayalign.errors import ConfigError
from rayalign.types import Sampling
from tests.unit.algorithm_cases import group, random_groups, whole

CYCLE = ((0.5, 0.9, 0.2), (0.1, 0.5, 0.7), (0.8, 0.3, 0.5))  # 0 beats 1 beats 2 beats 0
JUDGED = group("judged", [1], [[2], [3], [4]], (0.53, 0.43, 0.53), preferences=CYCLE)
SCORED = group("scored", [1], [[2], [3], [4], [5]], (0.0, 3.0, 1.0, -2.0))


def chosen(pairing: Pairing, *groups) -> list[tuple[int, int]]:
    return [(i, j) for _, i, j in pairing.of(groups)[0]]


def test_scores_say_who_is_better_where_nobody_compared():
    assert chosen(Pairing("best_worst"), SCORED) == [(1, 3)]
    assert chosen(Pairing("all"), SCORED) == [(1, 0), (2, 0), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_a_judges_probabilities_say_who_is_better_where_it_compared():
    assert chosen(Pairing("all"), JUDGED) == [(0, 1), (2, 0), (1, 2)]
    turned = replace(SCORED, preferences=((0.5, 0.9, 0.9, 0.9), (0.1, 0.5, 0.9, 0.1), *((0.1, 0.9, 0.5, 0.5),) * 2))
    assert chosen(Pairing("best_worst"), turned) == [(3, 1)]  # far apart in score, and compared the other way round


def test_a_random_pair_is_each_of_them_as_often_and_the_same_for_the_same_seed():
    pairing, count = Pairing("random"), 6000
    seen = Counter(chosen(pairing, replace(SCORED, seed=seed))[0] for seed in range(count))
    assert len(seen) == 6
    assert all(abs(times - count / 6) < 4 * (count * 5 / 36) ** 0.5 for times in seen.values())
    again = [replace(SCORED, seed=7)] * 3
    assert len(set(chosen(pairing, *again))) == 1


def test_bernoulli_labels_follow_the_probability():
    count = 4000
    for group_, wins in (
        (JUDGED, 0.9),
        (replace(SCORED, scores=(0.0, 0.0, 0.0, 0.0)), 0.5),
        (SCORED, 1 / (1 + 20.0855)),
    ):
        pairing = Pairing("all", "bernoulli", "bradley_terry")
        first = [chosen(pairing, replace(group_, seed=seed))[0] for seed in range(count)]
        assert set(first) == {(0, 1), (1, 0)}
        share = sum(pair == (0, 1) for pair in first) / count
        assert abs(share - wins) < 4 * (wins * (1 - wins) / count) ** 0.5


def test_ties_teach_only_what_learns_from_probabilities():
    tied = group("tied", [1], [[2], [3]], (0.5, 0.5), preferences=((0.5, 0.5), (0.5, 0.5)))
    counts = {"pairs/kept": 0.0, "pairs/dropped": 1.0, "pairs/same_answer": 0.0}
    assert OnlinePreference(pairs="random").examples([tied]) == ([], counts)
    (example,), _ = OnlinePreference(pairs="random", loss="soft").examples([tied])
    assert example.values["prob_chosen"] == 0.5
    assert OnlinePreference(loss="soft").examples([tied])[0] == []  # there is no best one, and no worst


@pytest.mark.parametrize("which", ["best_worst", "all", "random"])
def test_what_cannot_be_compared_is_left_out_and_counted(which):
    same = group("same", [1], [[2], [2]], (1.0, 0.0))
    broken = group("broken", [1], [[2], [3]], (1.0, float("nan")))
    found, counts = Pairing(which).of([same, broken])
    assert (found, counts) == ([], {"pairs/kept": 0.0, "pairs/dropped": 2.0, "pairs/same_answer": 1.0})


@pytest.mark.parametrize("loss", [name for name in PAIR_LOSSES if name != "mix"])
@pytest.mark.parametrize("judged", [False, True])
@pytest.mark.parametrize("pairs", ["best_worst", "all", "random"])
def test_every_pair_loss_learns_from_scores_and_from_a_judges_matrix(loss, judged, pairs):
    """Its loss is the one that it has on the pair with the same labels and probabilities written down by hand."""
    groups = random_groups(3, (0.3, -0.2, 1.5), seed=5)
    matrix = ((0.5, 0.8, 0.1), (0.2, 0.5, 0.3), (0.9, 0.7, 0.5))
    groups = [replace(each, preferences=matrix if judged else None, seed=n) for n, each in enumerate(groups)]
    algorithm = OnlinePreference(samples=3, loss=loss, pairs=pairs)
    examples, metrics = algorithm.examples(groups)
    assert len(examples) == metrics["pairs/kept"] == (9 if pairs == "all" else 3)
    for example in examples:
        places = [next(i for g in groups for i, c in enumerate(g.completions) if c.token_ids == row.completion_ids)
                  for row in example.sequences[:2]]  # fmt: skip
        i, j = places
        lead = (0.3, -0.2, 1.5)[i] - (0.3, -0.2, 1.5)[j]
        wanted = matrix[i][j] if judged else 1 / (1 + 2.718281828**-lead)
        assert example.values["prob_chosen"] == pytest.approx(wanted, rel=1e-6) and wanted > 0.5
    loss_value, measured = whole(algorithm, groups)
    assert loss_value == loss_value and abs(loss_value) < 1e4
    assert 0 <= measured["rewards/accuracies"] <= 1


def test_the_sign_of_a_score_is_its_distance_from_the_mean_of_its_prompt():
    high = group("high", [1], [[2], [3], [4]], (5.0, 6.0, 10.0))
    low = group("low", [2], [[2], [3], [4]], (-5.0, -6.0, -5.5))  # the last one is its mean
    for algorithm in (KTO(samples=3), Cringe(samples=3, variant="binary", good_above="mean")):
        examples, counts = algorithm.examples([high, low])
        assert [e.values["good"] for e in examples] == [0.0, 0.0, 1.0, 1.0, 0.0]
        assert (counts["labels/kept"], counts["labels/dropped"]) == (5.0, 1.0)
    assert [e.values["good"] for e in KTO(samples=3, good_above=5.5).examples([high])[0]] == [0.0, 1.0, 1.0]


def test_equal_scores_are_neither_good_nor_bad():
    tied = group("tied", [1], [[2], [3], [4]], (0.1, 0.1, 0.1))  # whose mean in floating point is another number
    assert KTO(samples=3).examples([tied])[0] == []


def test_online_kto_and_cringe_ask_for_samples_and_no_rows():
    for algorithm in (KTO(samples=4), KTO(samples=4, paired=True), Cringe(samples=4, pairs="random")):
        assert len(algorithm.request(Sampling(max_tokens=4))) == 4 and algorithm.rows == ()
    seeded = [replace(SCORED, seed=seed) for seed in range(40)]
    drawn = {Cringe(samples=4).examples([each])[0][0].values["seed"] for each in seeded}
    assert len(drawn) == 40  # another s* in each step that uses the same set again
    seen = {e.sequences[0].completion_ids for e in Cringe(samples=4, pairs="random").examples(seeded)[0]}
    assert len(seen) > 1
    (example,), _ = KTO(samples=4, paired=True).examples([SCORED])
    assert [row.completion_ids for row in example.sequences] == [(3,), (5,)]


@pytest.mark.parametrize(
    ("record", "settings", "message"),
    [
        (KTO, {"good_above": 0.2}, "says itself which answers are good"),
        (KTO, {"samples": 1}, "neither good nor bad"),
        (KTO, {"samples": 1, "paired": True}, "makes no pair"),
        (KTO, {"samples": 4, "reference": {"cached": True}}, "new at every step"),
        (Cringe, {"pairs": "random"}, "this is for samples"),
        (Cringe, {"variant": "binary", "good_above": "mean"}, "this is for samples"),
        (Cringe, {"variant": "binary", "samples": 1, "good_above": "mean"}, "neither good nor bad"),
        (OnlinePreference, {"pairs": "worst"}, "best_worst"),
        (OnlinePreference, {"samples": 1}, "greater than or equal to 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(record, settings, message):
    with pytest.raises(ValidationError, match=message):
        record(**settings)


@pytest.mark.parametrize("name", ["kto", "cringe"])
def test_who_looks_for_an_algorithm_among_the_losses_is_told_where_it_is(name):
    algorithm = {"name": "online_preference", "loss": {"name": name}}
    with pytest.raises(ConfigError, match="no loss is called") as error:
        parse_config({"model": {"path": "m"}, "algorithm": algorithm, "data": {"prompts": "p.jsonl"}})
    assert f"algorithm: {{name: {name}, samples: 4}}" in error.value.remedy
