"""d-PM: its loss and gradient in any split of a step are those of maths; baselines, votes that are missing, metrics."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from rayalign.algorithms.disagreement import Disagreement
from rayalign.algorithms.votes import BINS
from rayalign.collate import collate
from rayalign.errors import DataError
from rayalign.learners.statistics import moving_means
from rayalign.maths.disagreement import dpm_loss, fit_temperature, vote_prior
from tests.unit.algorithm_cases import group

CLASSES = ("bad", "neutral", "good")
COUNTS = [[3, 0, 0], [1, 1, 1], [0, 0, 0], [0, 2, 1], [0, 0, 5], [1, 0, 2], [2, 2, 0]]
PARTS = ([[0, 1, 2, 3, 4, 5, 6]], [[6, 0], [1, 2, 3], [5, 4]], [[i] for i in range(7)])


def algorithm(**settings):
    return Disagreement(classes=CLASSES, **({"prior_weight": 0.0, "temperature_scaling": False} | settings))


def rows(counts=COUNTS, trust=None):
    groups = [
        group(f"row-{i}", [1], [[2 + i % 5]], (0.0,), votes=(tuple(map(float, c)),)) for i, c in enumerate(counts)
    ]
    if trust is not None:
        groups = [replace(each, trust=(share,)) for each, share in zip(groups, trust, strict=True)]
    return algorithm().examples(groups)


def logits(seed=0, spread=1.0, count=7):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, 3, generator=generator, dtype=torch.float64) * spread).requires_grad_()


def step(wanted, scores, parts, carried=None, trust=None):
    """(sum of the loss, its gradient, the mass) as a learner makes it of micro-batches."""
    examples, _ = rows(trust=trust)
    batches = [(collate([examples[i] for i in part], pad_id=0), {"policy/classes": scores[part]}) for part in parts]
    known: dict[str, torch.Tensor] = {}

    def add(verb, *more):
        found: dict[str, torch.Tensor] = {}
        for batch, columns in batches:
            detached = {name: value.detach() for name, value in columns.items()}
            for name, value in verb(batch, detached, *more).items():
                found[name] = found.get(name, 0.0) + value
        return found

    if wanted.statistics is not None:
        known |= add(wanted.statistics)
        learner = SimpleNamespace(carried={} if carried is None else {"mass": carried})
        known |= moving_means(learner, known, wanted.carries, learning=True)
        if wanted.further_statistics is not None:
            known |= add(wanted.further_statistics, dict(known))
    total = sum((wanted.loss(batch, columns, known).loss * batch.weight.double()).sum() for batch, columns in batches)
    return total, torch.autograd.grad(total, scores)[0], known.get("mass")


def prior(smoothing=0.1):
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    counts[2] = 1.0  # nobody has voted: uniform
    return vote_prior(counts, smoothing=smoothing)


@pytest.mark.parametrize("parts", PARTS, ids=["whole", "parts", "rows"])
@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("objective", ["kl_q_r", "kl_r_q", "js"])
def test_any_split_gives_the_loss_and_gradient_of_the_whole(objective, detached, parts):
    scores = logits(spread=2.0)
    want = dpm_loss(scores, prior(), divergence=objective, detach_posterior=detached).sum()
    gradient = torch.autograd.grad(want, scores)[0]
    wanted = algorithm(objective=objective, detach_posterior=detached)
    total, found, _ = step(wanted, scores, parts)
    torch.testing.assert_close(total, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)
    other = torch.autograd.grad(
        dpm_loss(scores, prior(), divergence=objective, detach_posterior=not detached).sum(), scores
    )
    assert (found - other[0]).abs().max() > 1e-3  # what flows through r is not nothing


@pytest.mark.parametrize("parts", PARTS, ids=["whole", "parts", "rows"])
def test_the_mass_may_be_a_moving_average_with_the_gradient_of_what_is_fresh_in_it(parts):
    wanted = algorithm(objective="kl_r_q", detach_posterior=False, mass="moving_average", mass_decay=0.75)
    first, scores = logits(1), logits(2)
    _, _, before = step(wanted, first, parts)
    torch.testing.assert_close(before, first.softmax(-1).mean(0))
    total, found, _ = step(wanted, scores, parts, before)
    log_q = scores.log_softmax(-1)
    mass = 0.25 * log_q.exp().mean(0) + 0.75 * before.detach()
    log_r = (log_q - mass.log() + prior().log()).log_softmax(-1)
    want = (log_r.exp() * (log_r - log_q)).sum()
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(found, torch.autograd.grad(want, scores)[0])


def test_held_out_rows_are_measured_with_the_mass_that_was_kept_however_many_they_are():
    kept = torch.tensor([0.6, 0.3, 0.1])
    learner = SimpleNamespace(carried={"mass": kept})
    sums = {"mass": torch.tensor([30.0, 120.0, 150.0]), "mass/rows": torch.tensor(300.0)}
    found = moving_means(learner, sums, {"mass": 0.9}, learning=False)
    assert found["mass"].equal(kept) and found["mass/fresh"].equal(torch.zeros(3)) and learner.carried["mass"] is kept
    found = moving_means(learner, sums, {"mass": 0.9}, learning=True)
    torch.testing.assert_close(found["mass"], 0.9 * kept + 0.1 * torch.tensor([0.1, 0.4, 0.5]))
    assert learner.carried["mass"] is found["mass"]


def test_the_mass_may_be_that_of_the_votes():
    scores = logits(3)
    total, found, mass = step(algorithm(objective="kl_r_q", mass="votes", detach_posterior=False), scores, PARTS[1])
    torch.testing.assert_close(mass, prior().sum(0))
    log_q = scores.log_softmax(-1)
    log_r = (log_q - prior().sum(0).log() + prior().log()).log_softmax(-1)
    want = (log_r.exp() * (log_r - log_q)).sum()
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(found, torch.autograd.grad(want, scores)[0])


@pytest.mark.parametrize("parts", PARTS, ids=["whole", "parts", "rows"])
@pytest.mark.parametrize("mass", ["batch", "moving_average", "votes"])
@pytest.mark.parametrize("detached", [True, False])
def test_a_row_counts_in_the_mass_as_much_as_it_is_trusted(detached, mass, parts):
    trust = torch.tensor([1.0, 0.5, 0.125, 0.0, 1.0, 0.25, 1.0], dtype=torch.float64)
    wanted = algorithm(objective="kl_r_q", detach_posterior=detached, mass=mass, mass_decay=0.75)
    before, scores = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64), logits(4, spread=2.0)
    total, found, _ = step(wanted, scores, parts, before, trust.tolist())
    log_q = scores.log_softmax(-1)
    own = ((prior() if mass == "votes" else log_q.exp()) * trust.unsqueeze(-1)).sum(0)
    log_mass = (0.25 * own / trust.sum() + 0.75 * before if mass == "moving_average" else own).log()
    log_r = (log_q - log_mass + prior().log()).log_softmax(-1)
    log_r = log_r.detach() if detached else log_r
    want = ((log_r.exp() * (log_r - log_q)).sum(-1) * trust).sum()
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(found, torch.autograd.grad(want, scores)[0])


@pytest.mark.parametrize("mass", ["batch", "moving_average", "votes"])
@pytest.mark.parametrize("detached", [True, False])
def test_a_step_of_rows_without_any_trust_moves_nothing(detached, mass):
    wanted = algorithm(objective="js", detach_posterior=detached, mass=mass)
    for before in (None, torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)):
        total, found, kept = step(wanted, logits(5), PARTS[1], before, [0.0] * 7)
        assert total == 0 and found.equal(torch.zeros(7, 3, dtype=torch.float64))
        if mass == "moving_average" and before is not None:
            torch.testing.assert_close(kept, before)
    learner = SimpleNamespace(carried={})
    moving_means(learner, {"mass": torch.zeros(3), "mass/rows": torch.tensor(0.0)}, {"mass": 0.9}, learning=True)
    assert learner.carried == {}


def test_baselines_are_cross_entropies_and_need_no_statistics():
    counts, log_q = torch.tensor(COUNTS, dtype=torch.float64), logits().log_softmax(-1)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    soft = torch.stack([c / c.sum() if c.sum() else uniform for c in counts])
    majority = torch.tensor(
        [[1, 0, 0], [1 / 3] * 3, [1 / 3] * 3, [0, 1, 0], [0, 0, 1], [0, 0, 1], [0.5, 0.5, 0]], dtype=torch.float64
    )
    for name, target in (("soft", soft), ("majority", majority), ("prior", prior(0.4))):
        wanted = algorithm(objective=name, smoothing=0.4)
        assert wanted.statistics is None and wanted.further_statistics is None
        torch.testing.assert_close(step(wanted, logits(), PARTS[1])[0], -(target * log_q).sum())


def test_the_prior_may_have_a_part_in_the_loss():
    parts = [step(algorithm(prior_weight=w), logits(), PARTS[1])[0] for w in (0.0, 0.25, 1.0)]
    torch.testing.assert_close(parts[1], 0.75 * parts[0] + 0.25 * parts[2])
    assert algorithm(prior_weight=1.0).statistics is None


def test_no_votes_at_all_are_counted_and_not_compared_with():
    examples, metrics = rows([[0, 0, 0], [0, 0, 0], [0, 3, 0]])
    assert metrics == {"votes/none": 2.0, "answers/kept": 3.0}
    scores = logits(count=3)
    found = algorithm(objective="soft").loss(collate(examples, pad_id=0), {"policy/classes": scores}, {}).metrics
    means = algorithm().summarise({name: float(value.mean()) for name, value in found.items()})
    assert means["nll"] == pytest.approx(-float(scores.detach().log_softmax(-1)[2, 1]))
    assert means["votes/share"] == pytest.approx(1 / 3)
    examples, _ = rows([[0, 0, 0]])
    found = algorithm(objective="soft").loss(collate(examples, pad_id=0), {"policy/classes": scores[:1]}, {}).metrics
    means = algorithm().summarise({name: float(value.mean()) for name, value in found.items()})
    assert "nll" not in means and means["entropy"] > 0


def test_smoothing_may_be_none():
    examples, _ = rows()
    total, found, _ = step(algorithm(objective="kl_q_r", smoothing=0.0, detach_posterior=False), logits(), PARTS[2])
    assert math.isfinite(float(total.detach())) and torch.isfinite(found).all()


def test_metrics_of_rows():
    scores = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
    examples, _ = rows([[2, 2, 0], [3, 0, 1], [0, 1, 0]])
    found = algorithm(objective="soft").loss(collate(examples, pad_id=0), {"policy/classes": scores}, {}).metrics
    q = scores.softmax(-1)
    assert found["accuracy"].tolist() == [1.0, 0.0, 1.0]  # of a tie either is right
    assert found["nll"].tolist() == pytest.approx(
        [
            -(q[0, 0].log() + q[0, 1].log()).item() / 2,
            -(3 * q[1, 0].log() + q[1, 2].log()).item() / 4,
            -q[2, 1].log().item(),
        ]
    )
    assert found["entropy"].tolist() == pytest.approx((-(q * q.log()).sum(-1)).tolist(), rel=1e-6)
    assert found["agreement"].tolist() == pytest.approx((q * q).sum(-1).tolist(), rel=1e-6)
    gaps = (0.5 - q[0, 0], 0.25 - q[1, 2], 1.0 - q[2, 1])
    bins: dict[int, float] = {}
    for gap, confidence in zip(gaps, (q[0, 0], q[1, 2], q[2, 1]), strict=True):
        bins[int(confidence * BINS)] = bins.get(int(confidence * BINS), 0.0) + float(gap)
    means = algorithm().summarise({name: float(value.mean()) for name, value in found.items()})
    assert means["calibration/ece"] == pytest.approx(sum(map(abs, bins.values())) / 3, rel=1e-5)
    assert not any("gap" in name for name in means)


def test_the_preset_is_the_published_form_and_keys_beside_it_win():
    published = Disagreement(classes=CLASSES, preset="published")
    assert (published.objective, published.detach_posterior, published.prior_weight) == ("kl_q_r", False, 0.0)
    assert not published.temperature_scaling and published.mass == "batch"
    assert Disagreement(classes=CLASSES, preset="published", objective="js").objective == "js"
    assert Disagreement.model_validate(published.model_dump()) == published


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"classes": ("a", "a")}, "same name"),
        ({"weights": (1.0, 0.0)}, "not as many weights as classes"),
        ({"weights": (1.0, 1.0, 1.0)}, "worth the same"),
        ({"ratings": ((1, 2), (3, 5))}, "not as many ratings as classes"),
        ({"ratings": ((1, 2), (2, 3), (4, 5))}, "not apart"),
        ({"ratings": ((2, 1), (3, 3), (4, 5))}, "not apart"),
        ({"ratings": ((0, 10**12), (10**12, 10**13), (-5, -1))}, "not apart"),
        ({"smoothing": -1.0}, "smoothing"),
        ({"objective": "kl"}, "objective"),
    ],
)
def test_settings_that_do_not_fit(settings, what):
    with pytest.raises(ValidationError, match=what):
        Disagreement(**({"classes": CLASSES} | settings))


def test_ranges_of_ratings_may_be_wide_and_in_any_order():
    ranges = ((5, 10**12), (1, 2), (3, 4))
    assert Disagreement(classes=CLASSES, ratings=ranges).ratings == ranges


def test_votes_that_do_not_match_the_classes_name_their_row():
    with pytest.raises(DataError, match="these votes do not match the classes") as caught:
        algorithm().examples([group("a", [1], [[2]], (0.0,), votes=((1.0, 2.0),))])
    assert caught.value.where == "data.examples, row 1" and "bad, neutral, good" in caught.value.rule
    with pytest.raises(DataError, match="these votes cannot be"):
        algorithm().examples([group("a", [1], [[2]], (0.0,), votes=((1.0, -2.0, 0.0),))])


def test_a_temperature_is_that_of_the_votes():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4000, 3, generator=generator, dtype=torch.float64) * 3
    drawn = torch.multinomial(torch.softmax(scores / 1.8, -1), 4, replacement=True, generator=generator)
    shares = torch.nn.functional.one_hot(drawn, 3).double().mean(1)
    found = fit_temperature(scores, shares)
    assert found == pytest.approx(1.8, rel=0.05)

    def nll(t):
        return float(-(shares * torch.log_softmax(scores / t, -1)).sum(-1).mean())

    assert nll(found) <= min(nll(found * 1.01), nll(found / 1.01))
    assert fit_temperature(scores, torch.full_like(shares, 1 / 3)) == pytest.approx(20.0)
    with pytest.raises(ValueError, match="needs rows"):
        fit_temperature(scores[:0], shares[:0])


def test_a_class_that_nobody_chose_stays_unlikely_where_the_mass_is_that_of_the_votes():
    counts = torch.tensor([[3.0, 0.0, 0.0], [2.0, 1.0, 0.0]], dtype=torch.float64)
    examples, _ = rows(counts.tolist())
    batch, scores = collate(examples, pad_id=0), torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    wanted, columns = algorithm(objective="kl_r_q", mass="votes", smoothing=0.0), {"policy/classes": scores}
    known = wanted.statistics(batch, columns)
    assert known["mass"][2] == 0
    pull = torch.autograd.grad(wanted.loss(batch, columns, known).loss.sum(), scores)[0]
    assert (pull[:, 2] > 0.3).all()  # descent makes the third class less likely
