"""Scorers that fail on some completions: which one is at fault, and what becomes of it."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from rayalign.errors import ConfigError, ScoreError, ScorerLost
from rayalign.samples import Rollout, group_metrics
from rayalign.scorers.base import LocalScorer, score_groups
from rayalign.scorers.child import Child, TooLate
from rayalign.scorers.failing import FAILED
from rayalign.scorers.mix import Mix
from rayalign.scorers.python import Python
from rayalign.scorers.url import Url
from tests.http_service import Reply, serving
from tests.scored import group

REWARDS = """
import json, os, re, signal, sys, threading, time
never, process = threading.Event(), os.getpid()

def scored(completions, bad):
    with open("calls.jsonl", "a") as file:
        print(json.dumps(completions), file=file)
    return [bad(text) if text.startswith("bad") else float(len(text)) for text in completions]

def raises(prompts, completions): return scored(completions, lambda text: {}[text])
def nan(prompts, completions): return scored(completions, lambda text: float("nan"))
def none(prompts, completions): return scored(completions, lambda text: None)
def few(prompts, completions): return [score for score in scored(completions, lambda text: None) if score is not None]
def hangs(prompts, completions): return scored(completions, lambda text: never.wait() and 0.0)
def holds(prompts, completions): return scored(completions, lambda text: bool(re.match("(a+)+$", "a" * 60 + "b")))
def dies(prompts, completions): return scored(completions, lambda text: os._exit(3))
def exits(prompts, completions): return scored(completions, lambda text: sys.exit(3))
def wants(prompts, completions, stars): return [0.0] * len(completions)
def single(prompts, completions):
    if len(completions) > 1:
        raise MemoryError("one at a time")
    return scored(completions, len)
def leaving():
    def call(text):
        threading.Timer(0.3, re.match, ("(a+)+$", "a" * 60 + "b")).start()
        return len(text)
    return call
def alarm(prompts, completions):
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 60)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return [float(os.getpid()) for _ in completions]
"""
POLICIES = ["error", "zero", "skip"]
ONCE = ["raises", "nan", "none", "few", "exits"]
GROUPS = [group(3, "a", "bb"), group(4, "ccc", "bad one", "dd"), group(5, "e", "f")]


@pytest.fixture(autouse=True)
def rewards(tmp_path, monkeypatch):
    (tmp_path / "my_failing_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)


def scored(name: str, groups=GROUPS, **settings):
    score = Python(function=f"my_failing_rewards:{name}", **settings).start()
    try:
        return score_groups(score, groups, who="scorer-0")
    finally:
        score.close()


def calls() -> list[list[str]]:
    """What the function was asked, in this process or in another."""
    with open("calls.jsonl") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(("kind", "timeout_s"), [*((kind, None) for kind in ONCE), ("hangs", 1.5), ("dies", 60.0)])
def test_an_error_names_the_completion(kind, timeout_s):
    with pytest.raises(ScoreError, match="for completion 1 of prompt 4: 'bad one'") as raised:
        scored(kind, timeout_s=timeout_s)
    assert raised.value.where == f"scorer.function my_failing_rewards:{kind}"
    assert raised.value.value and raised.value.rule and raised.value.remedy


@pytest.mark.parametrize("kind", ["hangs", "dies"])
def test_an_error_names_it_before_the_deadline_where_nothing_is_said_of_time(kind):
    """Also without actors, which somebody would wait for."""
    scorer = LocalScorer(Python(function=f"my_failing_rewards:{kind}", deadline_s=16.0))
    try:
        scorer.submit(GROUPS)
        begun = time.monotonic()
        with pytest.raises(ScoreError, match="for completion 1 of prompt 4: 'bad one'") as raised:
            scorer.poll()
        assert time.monotonic() - begun < 16.0
    finally:
        scorer.close()
    assert [len(call) for call in calls()][:3] == [7, 2, 3]
    if kind == "hangs":
        assert raised.value.value == "nothing after 1.6 s for 1 completion"
        assert raised.value.rule == "1.6 s of scorer.deadline_s, without a timeout_s"
        assert raised.value.remedy.endswith("or raise scorer.deadline_s")


def test_a_call_that_only_takes_long_has_half_of_the_deadline():
    limits = {policy: Python(function="my_failing_rewards:nan", on_error=policy).limits_s() for policy in POLICIES}
    assert limits == {"error": (150.0, 30.0), "zero": (30.0, 30.0), "skip": (30.0, 30.0)}
    set_ = Python(function="my_failing_rewards:nan", timeout_s=60.0)
    assert set_.limits_s() == (60.0, 60.0)
    assert set_.within(60.0).limits_s() == (15.0, 15.0) and set_.within(400.0).limits_s() == (60.0, 60.0)


@pytest.mark.parametrize(("kind", "timeout_s"), [("raises", None), ("holds", 1.5), ("dies", 60.0)])
def test_zero_scores_it_0(kind, timeout_s):
    found = scored(kind, on_error="zero", timeout_s=timeout_s)
    assert [each.scores for each in found] == [(1.0, 2.0), (3.0, 0.0, 2.0), (1.0, 1.0)]
    assert [each.contested for each in found] == [(), (), ()]
    assert group_metrics(found) == {FAILED: 1.0}


@pytest.mark.parametrize(("kind", "timeout_s"), [*((kind, None) for kind in ONCE), ("hangs", 1.5)])
def test_skip_learns_nothing_from_it(kind, timeout_s):
    found = scored(kind, on_error="skip", timeout_s=timeout_s)
    assert [each.scores for each in found] == [(1.0, 2.0), (3.0, 2.5, 2.0), (1.0, 1.0)]  # the mean of the others
    assert [each.skipped for each in found] == [(False,) * 2, (False, True, False), (False,) * 2]
    assert [each.contested for each in found] == [(), (False, True, False), ()]
    assert group_metrics(found) == {FAILED: 1.0}


def test_what_fails_is_found_by_few_calls():
    """All others are asked before the completions of the group at fault."""
    scored("raises", on_error="skip")
    assert [len(call) for call in calls()] == [7, 2, 3, 2, 1, 1, 1]
    scored("raises", GROUPS[:1], on_error="skip")
    assert [len(call) for call in calls()[7:]] == [2]
    scored("raises", GROUPS[1:2], on_error="skip")
    assert [len(call) for call in calls()[8:]] == [3, 1, 1, 1]


def test_counts_are_added_up_over_groups():
    groups = [group(0, "bad", "bad too"), group(1, "a", "bad")]
    found = scored("nan", groups, on_error="skip")
    assert group_metrics(found) == {FAILED: 3.0}
    assert found[0].scores == (0.0, 0.0) and found[0].contested == (True, True)  # nothing there to be the mean of
    assert [each.known_scores for each in found] == [(None, None), (1.0, None)]
    metrics = Rollout(0, 0, tuple(found), 1.0, 1.0).metrics()
    assert (metrics["reward/mean"], metrics["reward/std"]) == (1.0, 0.0)
    assert "reward/mean" not in Rollout(0, 0, tuple(found[:1]), 1.0, 1.0).metrics()


def test_answers_that_are_contested_or_scored_0_have_scores():
    """What a classifier of disagreement is not sure of is in the means; so is a 0 that a policy says."""
    assert replace(GROUPS[0], scores=(1.0, 2.0), contested=(True, False)).known_scores == (1.0, 2.0)
    assert scored("nan", on_error="zero")[1].known_scores == (3.0, 0.0, 2.0)
    mixed = Mix(scorers=[{"scorer": {"name": "python", "function": "my_failing_rewards:nan", "on_error": "skip"}}])
    score = mixed.start()
    assert [each.known_scores for each in score_groups(score, GROUPS[1:], who="scorer-0")] == [
        (3.0, None, 2.0),
        (1.0, 1.0),
    ]
    score.close()


def test_one_that_fails_on_several_only_is_asked_one_by_one_or_ends_the_run():
    assert scored("single", on_error="skip")[0].scores == (1.0, 2.0)
    with pytest.raises(ScoreError, match="the scoring function failed") as raised:
        scored("single")
    assert raised.value.value.startswith("MemoryError: one at a time")


def test_a_function_that_takes_a_missing_column_ends_the_run_whatever_is_tolerated():
    with pytest.raises(ScoreError, match="wants a column 'stars'"):
        scored("wants", on_error="skip")


def test_several_that_hang_cost_no_others_their_scores():
    hanging = [group(index, "bad", "ok") for index in (1, 2)]
    fine = [group(index, "ok", "fine") for index in (0, 3, 4, 5)]
    found = scored("hangs", [*hanging, *fine], on_error="zero", timeout_s=1.5)
    assert [each.scores for each in found] == [(0.0, 2.0)] * 2 + [(2.0, 4.0)] * 4
    assert group_metrics(found) == {FAILED: 2.0}


def test_when_time_is_out_no_policy_is_for_those_never_asked():
    groups = [group(0, *["bad"] * 8), group(1, "fine", "fine")]
    with pytest.raises(ScoreError, match="no time was left") as raised:
        scored("hangs", groups, on_error="zero", deadline_s=12.0, timeout_s=3.0)
    count, _, of = raised.value.value.partition(" of ")
    assert of.startswith("10 completions") and 6 <= int(count) <= 8  # the second group's fared well
    assert "fine" in {text for call in calls() for text in call if len(call) == 2}


@pytest.mark.parametrize("settings", [{}, {"timeout_s": 60.0}, {"on_error": "skip"}])
def test_it_is_called_in_the_main_thread_of_its_process_whatever_is_tolerated(settings):
    """As rewards with time limits of their own (signal.alarm) want it."""
    with ThreadPoolExecutor(1) as sampling:
        found = sampling.submit(scored, "alarm", **settings).result()
    assert found[0].scores[0] != os.getpid() and len({s for each in found for s in each.scores}) == 1


def test_its_process_is_started_once_and_ends_with_the_scorer():
    score = Python(function="my_failing_rewards:alarm", on_error="skip").start()
    ((first, _), *_), ((second, _), *_) = ([judged.scores for judged in score(GROUPS)] for _ in range(2))
    assert first == second and score.memory_gib() > 0
    score.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(first), 0)
    assert score.memory_gib() == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_a_function_that_is_not_there_in_its_process(policy):
    config = Python(function="my_failing_rewards:nan", on_error=policy)
    with open("my_failing_rewards.py", "w") as file:
        print("limit = 1", file=file)  # as on a node with another version of the module
    with pytest.raises(ConfigError, match="holds no nan") as raised:
        config.start()
    assert raised.value.where == "key scorer.function" and raised.value.value.startswith("my_failing_rewards:nan on ")
    assert raised.value.rule and raised.value.remedy


def test_a_module_that_never_ends_being_imported_or_ends_its_process():
    config = Python(function="my_failing_rewards:nan", on_error="skip", deadline_s=2.0)
    for line, value in (
        ("import time; time.sleep(600)", "nothing after 2 s"),
        ("import os; os._exit(4)", "exit code 4"),
    ):
        with open("my_failing_rewards.py", "w") as file:
            print(line, file=file)
        with pytest.raises(ScorerLost, match="is not imported in a process of its own") as raised:
            config.start()
        assert raised.value.value == value


def test_a_deadline_that_leaves_no_time_to_find_out(tmp_path, make):
    with pytest.raises(ConfigError, match="no time to find the completion") as raised:
        make(scorer={"name": "python", "function": "my_failing_rewards:nan", "timeout_s": 100})
    assert raised.value.remedy == "set scorer.deadline_s=400, or lower timeout_s"


def test_a_process_that_reads_nothing_is_too_late_whatever_it_is_sent():
    """What a call has left behind keeps the interpreter to itself, and more than a pipe holds waits to be read."""
    import my_failing_rewards

    child = Child(my_failing_rewards.leaving)
    for text in ("a", "a" * 4_000_000):
        child.start(30.0)
        assert child("b", 10.0) == 1
        time.sleep(1.0)
        with pytest.raises(TooLate):
            child(text, 1.0)
    child.close()


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
