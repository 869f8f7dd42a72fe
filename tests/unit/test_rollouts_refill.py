"""Dynamic sampling replaces what is learned from, never what is said of the samples."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import pytest

from rayalign.rollouts import Collector, Rollouts
from rayalign.scorers.base import LocalScorer, ScoreFunction, ScorerConfig
from rayalign.types import Completion, Group, Prompt, Request, Sampling

SOLVED, MIXED = (1, 1), (1, 0)  # what the two answers to a prompt say; three prompts of four are solved


class Echo:
    """Answers at once: to a prompt of token n what `answers` says of it, in two tokens."""

    version = 0

    def __init__(self) -> None:
        self._open: list[Request] = []

    def submit(self, requests: Sequence[Request]) -> None:
        self._open += requests

    def poll(self, timeout_s: float = 1.0) -> list[Completion]:
        found, self._open = self._open, []
        return [
            Completion(each.id, (answers(each.prompt_ids[0])[int(each.id[-1])], 7), (-0.5, -0.5), "stop", self.version)
            for each in found
        ]


def answers(prompt: int) -> tuple[int, int]:
    return MIXED if prompt % 4 == 0 else SOLVED


class First(ScorerConfig):
    """The first token."""

    name: str = "first"

    def start(self) -> ScoreFunction:
        return lambda groups: [[float(c.token_ids[0]) for c in group.completions] for group in groups]


def drawing(refill: int, *, depth: int = 0, every: int = 1) -> Rollouts:
    return Rollouts(
        Collector(Echo(), LocalScorer(First()), str),  # type: ignore[arg-type]
        [Prompt(n, f"prompt {n}", (n,)) for n in range(80)],
        [Sampling(max_tokens=2)] * 2,
        seed=0,
        count=24,
        depth=depth,
        resample_every=every,
        useful=lambda group: len(set(group.scores or ())) > 1,
        refill=refill,
    )


def useful(groups: Sequence[Group]) -> int:
    return sum(len(set(group.scores or ())) > 1 for group in groups)


def taken(refill: int, **settings: int):
    rollouts = drawing(refill, **settings)
    try:
        rollouts.start(0)
        return rollouts.take(0)
    finally:
        rollouts.close()


@pytest.mark.parametrize("depth", [0, 1])
def test_replaced_groups_are_in_every_mean(depth):
    """All 80 prompts are asked, of which 20 leave something to learn: no choice of them moves the mean, 7/8."""
    rollout = taken(56, depth=depth)
    assert useful(rollout.groups) == 20 and len(rollout.groups) == 24
    metrics = rollout.metrics()
    assert metrics["groups/sampled_besides"] == 56 and len(rollout.drawn) == 80
    assert metrics["reward/mean"] == pytest.approx(0.875) and metrics["reward/std"] == pytest.approx(0.109375**0.5)
    assert metrics["rollout/tokens_per_s"] * rollout.rollout_s == pytest.approx(80 * 2 * 2)


def test_the_first_draw_is_that_of_a_run_without_refill():
    plain, filled = taken(0), taken(56)
    asked = [group.prompt.index for group in plain.groups]
    assert [group.prompt.index for group in plain.unselected] == asked
    assert [group.prompt.index for group in filled.unselected] == asked
    assert [group.prompt.index for group in filled.groups] != asked
    assert len({group.prompt.index for group in filled.drawn}) == 80


def test_what_is_not_learned_from_keeps_no_numbers_of_tokens_but_those_that_kl_needs():
    rollout = taken(56)
    trained = {group.prompt.index for group in rollout.groups}
    for group in rollout.drawn:
        first, second = group.completions
        assert first.logps and bool(second.logps) is (group.prompt.index in trained)
        assert group.texts and len(second.token_ids) == 2


def test_a_resumed_run_says_the_same_of_samples_that_are_used_again():
    before = drawing(56, every=2)
    before.start(0)
    told = before.take(0).metrics(first_use=False)
    after = drawing(56, every=2)
    after.restore(pickle.loads(pickle.dumps(before.state())))
    assert after.take(1).metrics(first_use=False) == told and told["reward/mean"] == pytest.approx(0.875)


def test_a_rollout_of_a_checkpoint_that_knew_of_no_others_is_its_groups():
    rollout = taken(0)
    vars(rollout).pop("sampled", None)
    old = pickle.loads(pickle.dumps(rollout))
    assert old.drawn == old.unselected == rollout.groups
    assert old.metrics()["reward/mean"] == rollout.metrics()["reward/mean"]
