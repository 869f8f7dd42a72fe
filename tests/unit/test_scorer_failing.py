"""Scorers that fail on some completions: which one is at fault, and what becomes of it."""

from __future__ import annotations

import threading

import pytest

from rayalign.errors import ConfigError, ScoreError, ScorerLost
from rayalign.rollouts import group_metrics
from rayalign.scorers import failing
from rayalign.scorers.base import score_groups
from rayalign.scorers.failing import FAILED, TooLate, Worker
from rayalign.scorers.python import Python
from rayalign.scorers.url import Url
from tests.http_service import Reply, serving
from tests.scored import group

REWARDS = """
import threading
never, calls = threading.Event(), []

def scored(completions, bad):
    calls.append(list(completions))
    return [bad(text) if text.startswith("bad") else float(len(text)) for text in completions]

def raises(prompts, completions): return scored(completions, lambda text: {}[text])
def nan(prompts, completions): return scored(completions, lambda text: float("nan"))
def none(prompts, completions): return scored(completions, lambda text: None)
def few(prompts, completions): return [score for score in scored(completions, lambda text: None) if score is not None]
def hangs(prompts, completions): return scored(completions, lambda text: never.wait() and 0.0)
def single(prompts, completions):
    if len(completions) > 1:
        raise MemoryError("one at a time")
    return scored(completions, len)
"""
KINDS = ["raises", "nan", "none", "few", "hangs"]
GROUPS = [group(3, "a", "bb"), group(4, "ccc", "bad one", "dd"), group(5, "e", "f")]


@pytest.fixture(autouse=True)
def rewards(tmp_path, monkeypatch):
    (tmp_path / "my_failing_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_failing_rewards

    my_failing_rewards.calls.clear()
    my_failing_rewards.never.clear()
    yield my_failing_rewards
    my_failing_rewards.never.set()  # so that no thread is left behind


def scored(name: str, groups=GROUPS, **settings):
    score = Python(function=f"my_failing_rewards:{name}", **{"timeout_s": 0.2, **settings}).start()
    try:
        return score_groups(score, groups, who="scorer-0")
    finally:
        score.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_names_the_completion(kind):
    with pytest.raises(ScoreError, match="for completion 1 of prompt 4: 'bad one'") as raised:
        scored(kind)
    assert raised.value.where == f"scorer.function my_failing_rewards:{kind}"
    assert raised.value.value and raised.value.rule and raised.value.remedy


@pytest.mark.parametrize("kind", KINDS)
def test_zero_scores_it_0(kind):
    found = scored(kind, on_error="zero")
    assert [each.scores for each in found] == [(1.0, 2.0), (3.0, 0.0, 2.0), (1.0, 1.0)]
    assert [each.contested for each in found] == [(), (), ()]
    assert group_metrics(found) == {FAILED: 1.0}


@pytest.mark.parametrize("kind", KINDS)
def test_skip_learns_nothing_from_it(kind):
    found = scored(kind, on_error="skip")
    assert [each.scores for each in found] == [(1.0, 2.0), (3.0, 2.5, 2.0), (1.0, 1.0)]  # the mean of the others
    assert [each.contested for each in found] == [(False,) * 2, (False, True, False), (False,) * 2]
    assert group_metrics(found) == {FAILED: 1.0}


def test_what_fails_is_found_by_few_calls(rewards):
    scored("raises", on_error="skip")
    assert [len(call) for call in rewards.calls] == [7, 2, 3, 1, 1, 1, 2]
    rewards.calls.clear()
    scored("raises", GROUPS[:1], on_error="skip")
    assert [len(call) for call in rewards.calls] == [2]


def test_counts_are_added_up_over_groups():
    groups = [group(0, "bad", "bad too"), group(1, "a", "bad")]
    assert group_metrics(scored("nan", groups, on_error="skip")) == {FAILED: 3.0}
    assert scored("nan", groups, on_error="skip")[0].scores == (0.0, 0.0)  # nothing there to be the mean of


def test_one_that_fails_on_several_only_is_asked_one_by_one_or_ends_the_run():
    assert scored("single", on_error="skip")[0].scores == (1.0, 2.0)
    with pytest.raises(ScoreError, match="the scoring function failed") as raised:
        scored("single")
    assert raised.value.value.startswith("MemoryError: one at a time")


def test_a_function_that_takes_a_missing_column_ends_the_run_whatever_is_tolerated(rewards):
    rewards.wants = lambda prompts, completions, stars: [0.0] * len(completions)
    with pytest.raises(ScoreError, match="wants a column 'stars'"):
        scored("wants", on_error="skip")


def test_all_calls_together_take_no_longer_than_the_scorer_has():
    """After the first two calls, three completions that hang and a deadline of 1 s."""
    groups = [group(0, "bad", "bad", "bad", "bad", "bad", "bad", "bad", "bad")]
    (found,) = scored("hangs", groups, on_error="skip", deadline_s=1.0, timeout_s=0.25)
    assert found.contested == (True,) * 8  # those that nobody had time for as well


def test_calls_that_never_come_back_are_counted(monkeypatch):
    monkeypatch.setattr(failing, "MOST_LEFT", 2)
    never, worker = threading.Event(), Worker()
    for _ in range(2):
        with pytest.raises(TooLate):
            worker(never.wait, 0.01)
    with pytest.raises(ScorerLost, match="too many calls"):
        worker(len, 1.0, obj=())
    never.set()
    for thread in worker._left:
        thread.join()
    assert worker(lambda x: x + 1, 5.0, x=1) == 2
    worker.close()


def test_a_deadline_that_leaves_no_time_to_find_out(tmp_path, make):
    with pytest.raises(ConfigError, match="no time to find the completion") as raised:
        make(scorer={"name": "python", "function": "my_failing_rewards:nan", "timeout_s": 100})
    assert raised.value.remedy == "set scorer.deadline_s=400, or lower timeout_s"


def answered(body, before):
    return Reply([None if text.startswith("bad") else float(len(text)) for text in body["completions"]])


@pytest.mark.parametrize(("policy", "scores"), [("zero", (3.0, 0.0, 2.0)), ("skip", (3.0, 2.5, 2.0))])
def test_a_service_that_fails_on_one(policy, scores):
    with serving(answered) as service:
        score = Url(url=service.url, backoff_s=0.001, timeout_s=30.0, on_error=policy).start()
        try:
            found = score_groups(score, GROUPS, who="scorer-0")
        finally:
            score.close()
    assert found[1].scores == scores and found[0].scores == (1.0, 2.0)
    assert group_metrics(found) == {FAILED: 1.0} and found[1].contested == (
        (False, True, False) if policy == "skip" else ()
    )
