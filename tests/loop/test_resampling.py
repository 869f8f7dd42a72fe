"""How long one set of samples is used: from every step to the whole run, with which prompts, and from which weights."""

from __future__ import annotations

import pytest

from rayalign.errors import ConfigError, TrainingStopped
from tests.loop.conftest import records, timeless
from tests.parts import PowerCut

STEPS = 6


def taken(run_dir) -> list[tuple[int, ...]]:
    """Of each step the prompts whose samples it used first; empty where it used samples again."""
    steps: dict[int, dict[int, None]] = {step: {} for step in range(1, STEPS + 1)}
    for sample in records(run_dir, "samples"):
        steps[sample["step"]][sample["prompt_index"]] = None
    return [tuple(prompts) for prompts in steps.values()]


@pytest.mark.parametrize(("every", "at_once"), [(1, 1), (3, 1), (3, 3), (3, 2), (6, 6), ("never", None), ("never", 2)])
def test_a_set_is_sampled_by_one_version_and_its_rollouts_take_turns(train, every, at_once):
    run = train(train__steps=STEPS, rollout__resample_every=every, rollout__at_once=at_once, train__epochs=1)
    steps, prompts = records(run.run_dir), taken(run.run_dir)
    length = STEPS if every == "never" else every
    size = at_once or 4  # never: 16 prompts, 4 a rollout
    for index, record in enumerate(steps):
        block, age = divmod(index, length)
        assert record["rollout/version"] == block * length
        assert bool(prompts[index]) == (age < size)
        again = steps[block * length + age % size]
        assert record["reward/mean"] == again["reward/mean"]
        assert ("kl/k1" in record) == (age == 0)  # on older samples it would be another number
        assert ("time/rollout_s" in record) == (age < size)
    of_a_set = [index for row in prompts[: min(size, length)] for index in row]
    assert len(set(of_a_set)) == min(16, 4 * min(size, length))


@pytest.mark.parametrize(("every", "at_once", "depth"), [(3, 2, 0), (2, 2, 1), ("never", None, 0)])
@pytest.mark.parametrize("killed_at", [1, 3, 5])
def test_a_killed_run_goes_on_with_the_samples_that_it_had(train, tmp_path, every, at_once, depth, killed_at):
    changes = {
        "train__steps": STEPS,
        "rollout__resample_every": every,
        "rollout__at_once": at_once,
        "rollout__depth": depth,
        "algorithm__pairs": "random",
        "checkpoint__every": 1,
    }
    whole = train(**changes, run_dir=str(tmp_path / "whole")).run_dir
    with pytest.raises(PowerCut):
        train(**changes, run_dir=str(tmp_path / "cut"), trackers=[{"name": "tests.parts:Stop", "step": killed_at}])
    resumed = train(**changes, run_dir=str(tmp_path / "cut"), resume=True).run_dir
    assert [timeless(r) for r in records(resumed)] == [timeless(r) for r in records(whole)]
    assert records(resumed, "samples") == records(whole, "samples")


def test_a_longer_run_that_never_samples_again_keeps_the_samples_of_the_shorter(train, tmp_path):
    """Their number depends on the steps; that of a resumed run is what it began with."""
    changes = {"rollout__resample_every": "never", "run_dir": str(tmp_path / "run")}
    train(**changes, train__steps=2)
    steps = records(train(**changes, train__steps=5, resume=True).run_dir)
    assert [r["rollout/version"] for r in steps] == [0.0] * 5
    assert [r["reward/mean"] for r in steps[2:]] == [steps[i]["reward/mean"] for i in (0, 1, 0)]
    assert len({s["prompt_index"] for s in records(tmp_path / "run", "samples")}) == 8


def test_random_pairs_of_samples_that_are_used_again_are_others(train):
    """A pair is a function of run, step and prompt: two of 6 for each of 4 prompts, anew in each step."""
    changes = {"train__steps": 4, "rollout__resample_every": "never", "rollout__at_once": 1, "algorithm__samples": 6}
    run = train(**changes, algorithm__pairs="random", optimizer__lr=1e-12)
    assert len({round(record["logps/chosen"], 3) for record in records(run.run_dir)}) == 4


@pytest.mark.parametrize("again", [1, "never"])
def test_ties_for_ever_stop_a_run_also_when_nothing_is_sampled_again(train, again):
    with pytest.raises(TrainingStopped, match="3 rollouts in which no prompt left an example"):
        train(
            scorer={"name": "tests.parts:SameScore"},
            rollout__max_empty=3,
            rollout__resample_every=again,
            rollout__at_once=1,
            train__steps=9,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout__resample_every": "never", "rollout__depth": 1}, "nothing is sampled again"),
        ({"rollout__resample_every": 2, "rollout__at_once": 3}, "thrown away unused"),
        ({"rollout__resample_every": 0}, "resample_every"),
        ({"rollout__resample_every": "once"}, "resample_every"),
    ],
)
def test_sets_that_cannot_be_are_refused(make, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    "algorithm",
    [
        *(
            {"name": "online_preference", "loss": loss}
            for loss in ("ipo", "psi_po", "hinge", "slic_hf", "simpo", "soft")
        ),
        {"name": "online_preference", "loss": "robust", "pairs": "all", "labels": "bernoulli"},
        {"name": "kto", "samples": 4},
        {"name": "kto", "samples": 4, "paired": True},
        {"name": "cringe", "samples": 4, "pairs": "random"},
        {"name": "cringe", "samples": 4, "variant": "binary", "good_above": "mean"},
    ],
    ids=lambda each: "-".join(str(value) for value in each.values()),
)
def test_every_online_loss_trains_on_the_same_samples(train, tmp_path, algorithm):
    plain = records(train(train__steps=1, run_dir=str(tmp_path / "plain")).run_dir)[0]
    first, *_, last = records(train(algorithm=algorithm, train__steps=3).run_dir)
    assert first["loss"] != last["loss"] and first["grad_norm"] > 0
    assert first.get("pairs/kept", first.get("labels/kept", 0)) > 0
    assert first["reward/mean"] == plain["reward/mean"]  # the same seeds, so the same samples


@pytest.mark.parametrize(
    ("reference", "zero"),
    [
        ({"update": "fixed"}, [True, False, False, False]),
        ({"update": "replace", "every": 2}, [True, False, True, False]),
        ({"update": "average", "decay": 0.5}, [True, False, False, False]),
    ],
)
def test_the_reference_stays_follows_or_is_replaced(train, reference, zero):
    steps = records(train(algorithm__reference=reference, algorithm__loss="ipo", train__steps=4).run_dir)
    assert [r["kl/k3"] == 0.0 for r in steps] == zero


@pytest.mark.parametrize("loss", ["dpo", "ipo", "soft", "psi_po"])
def test_the_policy_follows_a_judges_preferences_and_not_its_scores(train, loss):
    changes = {"train__steps": 10, "rollout__prompts": 8, "evaluation__prompts": 4, "optimizer__lr": 2e-3}
    algorithm = {"name": "online_preference", "samples": 4, "pairs": "all", "loss": loss}
    run = train(scorer={"name": "tests.online_parts:Contrary"}, algorithm=algorithm, **changes)
    before, after = run.evaluations[0].metrics, run.evaluations[10].metrics
    assert after["reward/high"] < before["reward/low"]
    assert records(run.run_dir)[0]["judge/ties"] == 0.25
