"""The losses of pairs and labels are those of maths, of the right numbers; and hand-worked values."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from rayalign.algorithms.cringe import Cringe
from rayalign.algorithms.kto import KTO
from rayalign.algorithms.losses import PAIR_LOSSES, Pair
from rayalign.algorithms.online_preference import OnlinePreference
from rayalign.algorithms.preference import Preference
from rayalign.errors import DataError
from rayalign.maths import preference as maths
from rayalign.maths.cringe import cringe_loss_of_top, cringe_token_loss
from rayalign.registry import resolve
from tests.unit.algorithm_cases import VOCABULARY, group, logps, random_groups, step, table, whole

PAIRS = random_groups(4, (1.0, 0.0))


def sums(groups, seed: int, answer: int) -> torch.Tensor:
    return torch.tensor([logps(g.prompt.token_ids, g.completions[answer].token_ids, seed).sum() for g in groups])


def means(groups, seed: int, answer: int) -> torch.Tensor:
    return torch.tensor([logps(g.prompt.token_ids, g.completions[answer].token_ids, seed).mean() for g in groups])


def gaps(groups, of=sums) -> torch.Tensor:
    return (of(groups, 1, 0) - of(groups, 0, 0)) - (of(groups, 1, 1) - of(groups, 0, 1))


GAP = gaps(PAIRS)
W, L, MEAN_W, MEAN_L = sums(PAIRS, 1, 0), sums(PAIRS, 1, 1), means(PAIRS, 1, 0), means(PAIRS, 1, 1)
WANTED = {
    "dpo": ({"beta": 0.3, "label_smoothing": 0.1}, maths.dpo_loss(GAP, beta=0.3, label_smoothing=0.1)),
    "robust": ({"beta": 0.3, "flip_prob": 0.2}, maths.robust_dpo_loss(GAP, beta=0.3, flip_prob=0.2)),
    "soft": ({"beta": 0.3}, maths.dpo_loss(GAP, beta=0.3)),  # certain labels
    "ipo": ({"tau": 0.2}, maths.ipo_loss(GAP, tau=0.2)),
    "psi_po": ({"tau": 0.2}, maths.ipo_loss(GAP, tau=0.2)),  # K = 2, identity, certain labels
    "hinge": ({"beta": 0.3}, maths.hinge_loss(GAP, beta=0.3)),
    "slic_hf": ({"delta": 2.0, "weight": 0.3}, maths.slic_hf_loss(W, L, W, delta=2.0, weight=0.3)),
    "simpo": ({"beta": 2.0, "gamma": 0.5}, maths.simpo_loss(MEAN_W, MEAN_L, beta=2.0, gamma=0.5)),
    "orpo": ({"weight": 0.4}, maths.orpo_loss(MEAN_W, MEAN_L, weight=0.4)),
    "spin": ({"lam": 0.7}, maths.spin_loss(GAP, lam=0.7)),
}


@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if name != "mix"])
def test_pair_losses_are_those_of_maths(name):
    settings, wanted = WANTED[name]
    loss, metrics = whole(Preference(loss={"name": name, **settings}, unrated="certain"), PAIRS)
    assert loss == pytest.approx(float(wanted.mean()), rel=1e-5)
    assert metrics["logps/chosen"] == pytest.approx(float(W.mean()), rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(metrics["rewards/chosen"] - metrics["rewards/rejected"])


def test_the_means_of_log_probs_are_an_option_of_ipo_and_slic():
    loss, _ = whole(Preference(loss={"name": "ipo", "tau": 0.2, "mean": True}), PAIRS)
    assert loss == pytest.approx(float(maths.ipo_loss(gaps(PAIRS, means), tau=0.2).mean()), rel=1e-5)
    loss, _ = whole(Preference(loss={"name": "slic_hf", "delta": 2.0, "weight": 0.3, "mean": True}), PAIRS)
    assert loss == pytest.approx(
        float(maths.slic_hf_loss(MEAN_W, MEAN_L, MEAN_W, delta=2.0, weight=0.3).mean()), rel=1e-5
    )


def test_implicit_rewards_of_dpo_are_beta_times_the_log_ratios():
    _, metrics = whole(Preference(loss={"beta": 0.3}), PAIRS)
    assert metrics["rewards/margins"] == pytest.approx(0.3 * float(GAP.mean()), rel=1e-5)
    assert metrics["rewards/accuracies"] == float((GAP > 0).double().mean())


def test_a_mix_is_the_weighted_sum_of_its_parts_and_says_each():
    mix = {"name": "mix", "losses": [{"name": "ipo", "tau": 0.2}, "simpo"], "weights": [0.5, 1.0]}
    loss, metrics = whole(Preference(loss=mix), PAIRS)
    ipo, simpo = WANTED["ipo"][1].mean(), WANTED["simpo"][1].mean()
    assert loss == pytest.approx(float(0.5 * ipo + simpo), rel=1e-5)
    assert metrics["loss/ipo"] == pytest.approx(float(ipo), rel=1e-5)
    assert metrics["loss/simpo"] == pytest.approx(float(simpo), rel=1e-5)


def test_only_losses_with_a_reference_ask_for_one():
    needs = {name: bool(Preference(loss={"name": name}).needs) for name in WANTED}
    assert {name for name, needed in needs.items() if not needed} == {"slic_hf", "simpo", "orpo"}
    assert Preference(loss={"name": "mix", "losses": ["simpo", "ipo"]}).needs
    assert not Preference(loss={"name": "mix", "losses": ["simpo", "orpo"]}).needs


def test_the_chosen_nll_is_added_as_a_mean():
    plain, metrics = whole(Preference(), PAIRS)
    loss, _ = whole(Preference(nll_weight=0.2), PAIRS)
    assert metrics["nll"] == pytest.approx(-float(MEAN_W.mean()), rel=1e-5)
    assert loss - plain == pytest.approx(-0.2 * float(MEAN_W.mean()), rel=1e-4)


@pytest.mark.parametrize("paired", [False, True])
def test_kto_adds_the_good_answers_nll_as_a_mean(paired):
    plain, _ = whole(KTO(paired=paired), PAIRS)
    loss, _ = whole(KTO(paired=paired, nll_weight=0.2), PAIRS)
    assert loss - plain == pytest.approx(-0.2 * float(MEAN_W.mean()), rel=1e-4)


def test_slic_can_keep_up_the_likelihood_of_the_best_answer_of_all():
    ranked = random_groups(2, (-1.0, 0.0, -2.0), seed=5)
    loss, _ = whole(Preference(loss={"name": "slic_hf", "delta": 2.0, "weight": 0.3, "target": "best"}), ranked)
    best, second, last = sums(ranked, 1, 1), sums(ranked, 1, 0), sums(ranked, 1, 2)
    terms = [
        maths.slic_hf_loss(*pair, best, delta=2.0, weight=0.3)
        for pair in ((best, second), (best, last), (second, last))
    ]
    assert loss == pytest.approx(float(torch.cat(terms).mean()), rel=1e-5)


def test_probabilities_are_those_of_annotators_where_there_are_any():
    votes = [
        group("votes", g.prompt.token_ids, [c.token_ids for c in g.completions], (1.0, 0.0),
              preferences=((0.5, 0.8), (0.2, 0.5)))
        for g in PAIRS
    ]  # fmt: skip
    soft, _ = whole(Preference(loss={"name": "soft", "beta": 0.3}), votes)
    wanted = maths.soft_dpo_loss(GAP, beta=0.3, prob_chosen=torch.full_like(GAP, 0.8))
    assert soft == pytest.approx(float(wanted.mean()), rel=1e-5)
    psi, _ = whole(Preference(loss={"name": "psi_po", "tau": 0.2, "psi": "logit"}), votes)
    # u_w − u_l = ½(logit .5 + logit .8) − ½(logit .2 + logit .5) = logit .8
    wanted = maths.psi_po_loss(GAP, torch.full_like(GAP, math.log(4)), tau=0.2)
    assert psi == pytest.approx(float(wanted.mean()), rel=1e-5)


def test_scores_of_samples_are_read_as_a_bradley_terry_annotators():
    (example,), _ = OnlinePreference(samples=2, loss="soft").examples([group("s", [1], [[2], [3]], (0.5, -1.0))])
    assert example.values == {"prob_chosen": pytest.approx(1 / (1 + math.exp(-1.5)))}
    (example,), _ = Preference(loss="soft", unrated="certain").examples([group("s", [1], [[2], [3]], (0.5, -1.0))])
    assert example.values == {"prob_chosen": 1.0}


@pytest.mark.parametrize("loss", ["soft", {"name": "mix", "losses": ["soft", "simpo"]}])
def test_the_soft_loss_wants_probabilities_unless_it_is_told_what_their_lack_means(loss):
    """A column of them that was not mapped would else make it plain DPO, silently."""
    with pytest.raises(DataError, match="neither votes nor a probability") as caught:
        Preference(loss=loss).examples(PAIRS)
    assert caught.value.where == "data.examples, row 1"
    assert len(Preference(loss=loss, unrated="certain").examples(PAIRS)[0]) == len(PAIRS)
    assert len(Preference(loss="psi_po").examples(PAIRS)[0]) == len(PAIRS)


def test_utilities_of_ranked_answers_are_means_over_all_of_them():
    ranked = group("r", [1], [[2], [3], [4]], (0.0, -1.0, -2.0))
    examples, _ = Preference(loss="psi_po", pairs="best_worst").examples([ranked])
    # Certain: u = ((½ + 1 + 1)/3, (0 + ½ + 1)/3, (0 + 0 + ½)/3)
    assert examples[0].values["utility_gap"] == pytest.approx(2.5 / 3 - 0.5 / 3)


def test_a_pair_alone_gives_the_worked_values():
    policy = torch.tensor([[-12.3, -14.1], [-45, -40.5], [-8.75, -8.75], [-30.2, -33.9], [-101.5, -99]])
    reference = torch.tensor([[-13, -13.5], [-44.2, -43], [-9.5, -9], [-28, -35], [-103, -97.25]])
    pair = Pair(policy.double(), torch.ones(5, 2).double(), reference.double())
    for name, settings, wanted in (
        ("dpo", {"beta": 0.1}, 0.7171814),
        ("dpo", {"beta": 0.1, "label_smoothing": 0.1}, 0.7140814),
        ("robust", {"beta": 0.1, "flip_prob": 0.1}, 0.7210564),
        ("ipo", {"tau": 0.1}, 34.9565),
        ("hinge", {"beta": 0.1}, 1.031),
    ):
        loss = resolve(PAIR_LOSSES[name])(**settings)
        assert float(loss.of(pair).mean()) == pytest.approx(wanted, abs=1e-5)


# KTO


def ratios(groups, answer: int = 0) -> torch.Tensor:
    return sums(groups, 1, answer) - sums(groups, 0, answer)


@pytest.mark.parametrize("seeds", [(1, 0), (0, 1)])
def test_ktos_reference_point_is_that_of_the_next_answers(seeds):
    """With policy and reference exchanged the point has the other sign, and one of the two is cut off at 0."""
    good, bad = random_groups(3, (1.0,)), random_groups(2, (0.0,), seed=9)
    groups = [*good, *bad]
    mismatched = torch.tensor([
        [logps(a.prompt.token_ids, b.completions[0].token_ids, seed).sum() for seed in seeds]
        for a, b in zip(groups, groups[1:] + groups[:1], strict=True)
    ])  # fmt: skip
    point = maths.kto_reference_point(mismatched[:, 0], mismatched[:, 1])
    wanted = maths.kto_loss(
        sums(groups, seeds[0], 0), sums(groups, seeds[1], 0), torch.tensor([True] * 3 + [False] * 2),
        z_ref=point, beta=0.2, weight_undesirable=1.5,
    )  # fmt: skip
    algorithm = KTO(beta=0.2, weight_undesirable=1.5)
    examples, _ = algorithm.examples(groups)
    loss, metrics = step(algorithm, examples, table(seeds[0]), table(seeds[1]), [[0, 1], [2, 3, 4]])
    assert float(loss) == pytest.approx(float(wanted.mean()), rel=1e-5)
    assert metrics["kto/reference_point"] == pytest.approx(float(point), rel=1e-5, abs=1e-9)
    d = 0.2 * (sums(groups, seeds[0], 0) - sums(groups, seeds[1], 0))
    assert metrics["rewards/good"] == pytest.approx(float(d[:3].mean()), rel=1e-5)
    assert metrics["rewards/bad"] == pytest.approx(float(d[3:].mean()), rel=1e-5)


def test_the_mismatched_answer_is_that_of_another_prompt():
    examples, metrics = KTO().examples([*PAIRS[:2]])
    assert metrics["labels/good_share"] == 0.5
    for example, (mine, other, which) in zip(examples, [(0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1)], strict=True):
        own, mismatched = example.sequences
        assert own.prompt_ids == mismatched.prompt_ids == PAIRS[mine].prompt.token_ids
        assert mismatched.completion_ids == PAIRS[other].completions[which].token_ids
    sampled = [group(str(i), [i], [[10 * i + k] for k in range(4)], (0.0, 1.0, 2.0, 4.0)) for i in range(3)]
    second = [example.sequences[1] for example in KTO(samples=4).examples(sampled)[0]]
    assert len({row.completion_ids for row in second}) == len(second) == 12  # no forward pass twice


def test_a_mismatched_answer_is_not_longer_than_the_longest_row():
    """A long prompt would else meet a long answer, beyond what the model has room for."""
    long_prompt = group("a", range(9), [[1]], (1.0,))
    long_answer = group("b", [2], [range(1, 8)], (0.0,))
    (first, second), metrics = KTO().examples([long_prompt, long_answer])
    assert first.sequences[1].prompt_ids == tuple(range(9)) and first.sequences[1].completion_ids == (1,)
    assert second.sequences[1].completion_ids == (1,)
    assert metrics["kto/mismatched_cut"] == 1.0
    assert KTO().examples(random_groups(1, (1.0, 0.0)))[1]["kto/mismatched_cut"] == 0.0


def test_with_one_prompt_alone_the_reference_point_is_zero():
    loss, metrics = whole(KTO(beta=0.2), PAIRS[:1])
    assert metrics["kto/reference_point"] == 0.0
    d = torch.stack([ratios(PAIRS[:1], 0), -ratios(PAIRS[:1], 1)])
    assert loss == pytest.approx(float(torch.sigmoid(-0.2 * d).mean()), rel=1e-5)


def test_paired_kto_is_the_paired_loss_of_maths():
    columns = [sums(PAIRS, seed, answer) for seed in (1, 0) for answer in (0, 1)]
    loss, _ = whole(KTO(beta=0.2, paired=True), PAIRS)
    assert loss == pytest.approx(float(maths.kto_pair_loss(*columns, beta=0.2).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, (1.0, 1.0)),
        ({"weight_undesirable": "auto"}, (1.0, 1.5)),
        ({"weight_desirable": "auto", "weight_undesirable": 3.0}, (2.0, 3.0)),
        ({"weight_desirable": "auto", "weight_undesirable": "auto"}, (5 / 6, 5 / 4)),
    ],
)
def test_weights_even_out_what_there_is_more_of(settings, wanted):
    groups = [*random_groups(3, (1.0,)), *random_groups(2, (0.0,), seed=9)]
    examples, _ = KTO(**settings).examples(groups)
    assert {e.values["good"]: e.values["weight"] for e in examples} == pytest.approx({1.0: wanted[0], 0.0: wanted[1]})


def test_good_answers_alone_are_said_and_weigh_as_they_are():
    examples, metrics = KTO(weight_desirable="auto").examples(random_groups(3, (1.0,)))
    assert metrics["labels/good_share"] == 1.0 and {e.values["weight"] for e in examples} == {1.0}
    assert "rewards/bad" not in whole(KTO(), random_groups(3, (1.0,)))[1]


# Cringe


def cringe_of(groups, answer: int) -> torch.Tensor:
    """[B] token means with top_k = 1, where nothing is left to chance."""
    found = []
    for each in groups:
        ids = [each.prompt.token_ids[-1], *each.completions[answer].token_ids]
        logits = table(1)[ids[:-1], :VOCABULARY].unsqueeze(0)
        tokens = cringe_token_loss(logits, torch.tensor([ids[1:]]), torch.ones(1, len(ids) - 1), top_k=1)
        found.append(tokens.mean())
    return torch.stack(found)


def test_binary_cringe_is_the_mean_over_good_and_over_bad_answers():
    loss, metrics = whole(Cringe(variant="binary", top_k=1, alpha=0.4), PAIRS)
    wanted = maths.binary_cringe_loss(-MEAN_W, cringe_of(PAIRS, 1), alpha=0.4)
    assert loss == pytest.approx(float(wanted.mean()), rel=1e-5)
    assert metrics["nll/good"] == pytest.approx(-float(MEAN_W.mean()), rel=1e-5)
    assert metrics["cringe/bad"] == pytest.approx(float(cringe_of(PAIRS, 1).mean()), rel=1e-5)


def test_pairwise_cringe_has_a_gate():
    loss, metrics = whole(Cringe(top_k=1, alpha=0.4, margin=1.0, temperature=3.0), PAIRS)
    gate = maths.pairwise_cringe_gate(W, L, margin=1.0, temperature=3.0)
    wanted = gate * maths.binary_cringe_loss(-MEAN_W, cringe_of(PAIRS, 1), alpha=0.4)
    assert loss == pytest.approx(float(wanted.mean()), rel=1e-5)
    assert metrics["cringe/gate"] == pytest.approx(float(gate.mean()), rel=1e-5)


def test_the_draws_of_cringe_follow_the_softmax_of_the_top_logits():
    top = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64).expand(1, 30000, 3)
    label = torch.full((1, 30000), -1.0, dtype=torch.float64)
    uniform = torch.rand(1, 30000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = cringe_loss_of_top(label, top, torch.ones(1, 30000), uniform=uniform)
    wanted = torch.softmax(top[0, 0], -1)
    for index, probability in enumerate(wanted):
        drawn = (losses + logsigmoid(top[0, 0, index] + 1)).abs() < 1e-12
        assert float(drawn.double().mean()) == pytest.approx(float(probability), abs=0.01)


def test_draws_are_of_the_step_and_the_row():
    first, again, turned = (
        {e.sequences[0].prompt_ids: e.values["seed"] for e in Cringe().examples(groups)[0]}
        for groups in (PAIRS, PAIRS, PAIRS[::-1])
    )
    assert first == again and len(set(first.values())) == 4
    assert not set(first.values()) & set(turned.values())


@pytest.mark.parametrize("end", [0.0, 1 - 2**-53, math.nan])
def test_draws_at_the_ends_are_of_the_top_logits(end):
    top, uniform = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[end]], dtype=torch.float64)
    found = cringe_loss_of_top(torch.zeros(1, 1), top, torch.ones(1, 1), uniform=uniform)
    assert float(found) == pytest.approx(float(-logsigmoid(top[0, 0, 1 if end > 0 else 0])))
    with pytest.raises(ValueError, match="do not fit"):
        cringe_loss_of_top(torch.zeros(1, 2), top, torch.ones(1, 1))
