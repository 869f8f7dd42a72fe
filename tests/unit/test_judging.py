"""A judge's answers become preferences and scores: real tiny models whose answers are known or can be computed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayalign.checks import check_training
from rayalign.config import parse_config
from rayalign.errors import ConfigError, ScoreError
from rayalign.samples import Rollout, group_metrics
from rayalign.scorers.asking import Answer
from rayalign.scorers.base import LocalScorer, score_groups
from rayalign.scorers.judge import Judge
from rayalign.scorers.mix import Mix
from rayalign.scorers.templates import load_template
from rayalign.types import Group, Judgement
from tests.judges import ENDS, Says, build_steady_judge, group, judge
from tests.parts import tiny_config
from tests.tiny_models import build_tiny_llama

TEXTS = ("a great film", "a bad film", "it was not very good", "happy story about love")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random judge, which at least reads."""
    return build_tiny_llama(tmp_path_factory.mktemp("reader"), seed=7)


def steady(folder: Path, **probs: float) -> Path:
    return build_steady_judge(folder / "judge", {key.removeprefix("t"): prob for key, prob in probs.items()})


def score(config: Judge, *groups: Group) -> list[Group]:
    scorer = LocalScorer(config)
    scorer.submit(groups)
    found: list[Group] = []
    while portion := scorer.poll():
        found += portion
    scorer.close()
    return found


@torch.no_grad()
def answer_probs(model: Path, messages: list[dict[str, str]], answers: tuple[str, ...]) -> np.ndarray:
    """By transformers, from the text on: softmax over the answers' logits."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    logits = network(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, -1]
    ids = [tokenizer.convert_tokens_to_ids(answer) for answer in answers]
    return logits[ids].softmax(-1).double().numpy()


def test_preferences_are_the_mean_of_both_orders(reader: Path) -> None:
    (found,) = score(judge(reader, min_mass=0.0, tie_margin=0.0), group(0, *TEXTS[:3]))
    template = load_template("helpful")

    def first(i: int, j: int) -> float:
        values = {"prompt": "write a review", "first": TEXTS[i], "second": TEXTS[j]}
        return float(answer_probs(reader, list(template.question("q", values).messages), ("1", "2"))[0])

    matrix = np.array(found.preferences)
    flips = 0
    for i in range(3):
        for j in range(i):
            one, other = first(i, j), first(j, i)
            assert matrix[i, j] == pytest.approx((one + 1 - other) / 2, abs=1e-5)
            flips += (one > 0.5) == (other > 0.5)
    np.testing.assert_allclose(matrix + matrix.T, 1.0)
    np.testing.assert_allclose(found.scores, [(row.sum() - 0.5) / 2 for row in matrix])
    assert found.metrics["judge/order_dependent"] == pytest.approx(flips / 3)
    assert len({round(p, 9) for p in matrix.flatten()}) == 7  # this judge tells all of them apart


@pytest.mark.parametrize("name", ["engine", "policy"])
def test_variables_of_the_chat_template_reach_it(tmp_path: Path, name: str) -> None:
    folder = build_tiny_llama(tmp_path / "thinks", seed=7)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template += "{% if add_generation_prompt and enable_thinking is not defined %}think{% endif %}"
    tokenizer.save_pretrained(folder)
    own, variables = judge(folder).ask, {"enable_thinking": False}
    thinking = own.start()
    if name == "engine":
        asking = own.model_copy(update={"chat_template_kwargs": variables}).start()
    else:
        ask = {"name": "policy", "chat_template_kwargs": variables}
        asking = judge(folder, ask=ask).start_with(thinking)._asker
    messages = [{"role": "user", "content": "x"}]
    think = tuple(tokenizer("think", add_special_tokens=False)["input_ids"])
    assert thinking._ids(messages) == asking._ids(messages) + think


def test_an_answer_that_spells_special_tokens_stays_in_its_turn(reader: Path) -> None:
    asking = judge(reader).ask.start()
    specials = set(asking._tokenizer.all_special_ids)
    assert len(specials) > 1

    def count(answer: str) -> int:
        return sum(token in specials for token in asking._ids([{"role": "user", "content": answer}]))

    words = asking._tokenizer.all_special_tokens
    assert count("bad" + "".join(words) + "1" + words[0] + words[0]) == count("bad")
    assert asking._ids([{"role": "user", "content": "a <b> c"}]) == asking._turns.prompt(
        [{"role": "user", "content": "a <b> c"}], ""
    )


@pytest.mark.parametrize("mode", ["pairwise", "direct"])
def test_the_judge_sees_the_whole_conversation(mode: str) -> None:
    messages = ({"role": "system", "content": "In French."}, {"role": "user", "content": "Who?"})
    one = group(0, *TEXTS[:2], prompt="Who?")
    one = replace(one, prompt=replace(one.prompt, messages=messages))
    asker = Says(*[math.log(0.2)] * (2 if mode == "pairwise" else 5))
    judge("any", mode=mode).start_with(asker)([one])
    assert all("System: In French.\n\nUser: Who?" in asked.messages[-1]["content"] for asked in asker.asked)
    assert len(asker.asked) == 2


@pytest.mark.parametrize(
    ("logps", "unseen", "expected"),
    [
        ((math.log(0.03), -math.inf), 0.0, 0.5),  # the other may be as likely
        ((math.log(0.3), -math.inf), math.log(0.01), 30 / 31),
        ((math.log(0.9), -math.inf), 0.0, 0.9),
        ((0.0, -math.inf), 0.0, 1.0),
        ((-math.inf, math.log(0.6)), 0.0, 0.4),
        ((math.log(0.6), math.log(0.2)), 0.0, 0.75),
    ],
)
def test_an_answer_that_was_not_given_back_is_not_impossible(
    logps: tuple[float, ...], unseen: float, expected: float
) -> None:
    judging = judge("any", min_mass=0.02).start_with(Says(*logps, unseen=unseen))
    read = judging._value(Answer("q", logps, unseen=unseen))
    assert read.value == pytest.approx(expected) and read.mass == pytest.approx(sum(map(math.exp, logps)))
    assert judging([group(0, "a", "b")])[0].metrics["judge/mass"] == pytest.approx(read.mass)


def test_a_direct_judge_gives_the_expected_rating_from_minus_one_to_one(reader: Path) -> None:
    (found,) = score(judge(reader, mode="direct", min_mass=0.0), group(0, *TEXTS))
    template, answers = load_template("helpful_score"), ("1", "2", "3", "4", "5")
    for text, rating in zip(TEXTS, found.scores, strict=True):
        values = {"prompt": "write a review", "answer": text}
        probs = answer_probs(reader, list(template.question("q", values).messages), answers)
        assert rating == pytest.approx((probs @ np.arange(1, 6) - 3) / 2, abs=1e-5)
    assert found.preferences is None and found.metrics.keys() == {"judge/refused", "judge/mass"}


def test_thinking_stands_before_the_answer(reader: Path) -> None:
    """Greedy thoughts of twelve tokens, then the question for the verdict, as a transformers model would go on."""
    config = judge(reader, mode="direct", reasoning=12, min_mass=0.0)
    (found,) = score(config, group(0, TEXTS[0]))
    tokenizer = AutoTokenizer.from_pretrained(reader)
    network = AutoModelForCausalLM.from_pretrained(reader, dtype=torch.float32)
    question = load_template("helpful_score").question(
        "q", {"prompt": "write a review", "answer": TEXTS[0]}, reasoning=12
    )
    text = tokenizer.apply_chat_template(list(question.messages), add_generation_prompt=True, tokenize=False)
    asked = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    thought = network.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
    said = tokenizer.decode(thought, skip_special_tokens=True).strip()
    probs = answer_probs(reader, list(question.concluded(said)), question.answers)
    assert found.scores[0] == pytest.approx((probs @ np.arange(1, 6) - 3) / 2, abs=1e-5)
    (at_once,) = score(judge(reader, mode="direct", min_mass=0.0), group(0, TEXTS[0]))
    assert abs(at_once.scores[0] - found.scores[0]) > 1e-3


def test_a_judge_that_always_says_the_first_prefers_nobody(tmp_path: Path) -> None:
    model = steady(tmp_path, t1=0.96, t2=0.03)
    (found,) = score(judge(model, report_agreement="vader"), group(0, *TEXTS))
    assert found.preferences == ((0.5,) * 4,) * 4 and found.scores == (0.5,) * 4
    assert found.metrics["judge/order_dependent"] == 1.0 and found.metrics["judge/ties"] == 1.0
    assert found.metrics["judge/refused"] == 0.0 and "judge/agreement" not in found.metrics


def test_preferences_within_the_margin_are_ties(reader: Path) -> None:
    (exact,) = score(judge(reader, min_mass=0.0, tie_margin=0.0), group(0, *TEXTS))
    gaps = sorted(abs(exact.preferences[i][j] - 0.5) for i in range(4) for j in range(i))
    margin = (gaps[2] + gaps[3]) / 2
    (found,) = score(judge(reader, min_mass=0.0, tie_margin=margin), group(0, *TEXTS))
    assert found.metrics["judge/ties"] == 0.5
    for i in range(4):
        for j in range(i):
            expected = exact.preferences[i][j]
            assert found.preferences[i][j] == (0.5 if abs(expected - 0.5) <= margin else expected)


def test_equal_answers_are_not_compared(tmp_path: Path, reader: Path) -> None:
    (found,) = score(judge(reader, min_mass=0.0, tie_margin=0.0), group(0, TEXTS[0], TEXTS[1], TEXTS[0]))
    assert found.preferences[0][2] == 0.5 != found.preferences[0][1]
    assert found.preferences[0][1] == pytest.approx(found.preferences[2][1], abs=1e-12)
    (same, one) = score(judge(steady(tmp_path)), group(0, *["so so"] * 9), group(1, "alone"))
    assert same.scores == (0.5,) * 9 and same.metrics == {}  # a judge without an answer was not asked
    assert one.scores == (0.5,) and one.preferences == ((0.5,),)


@pytest.mark.parametrize(
    ("probs", "reason"),
    [
        ({}, "0 of the probability|e-.. of the probability"),
        ({"t1": 0.004, "t2": 0.004}, "0.008 of the probability is on its answers, min_mass is 0.2"),
        ({ENDS: 1.0}, "of the probability"),
        ({"t1": math.nan, "t2": math.nan}, "log-probs nan, nan"),
    ],
    ids=["neither", "hardly", "nothing", "nan"],
)
@pytest.mark.parametrize("mode", ["pairwise", "direct"])
def test_a_judge_that_does_not_answer_is_counted_and_then_stops_the_run(
    tmp_path: Path, probs: dict[str, float], reason: str, mode: str
) -> None:
    model = steady(tmp_path, **probs)
    (found,) = score(judge(model, mode=mode), group(0, *TEXTS[:2]))
    assert found.scores == ((0.5, 0.5) if mode == "pairwise" else (0.0, 0.0))
    assert found.metrics["judge/refused"] == 1.0 and "judge/ties" not in found.metrics
    many = [group(index, *TEXTS) for index in range(2)]
    with pytest.raises(ScoreError, match="the judge does not answer") as caught:
        score(judge(model, mode=mode), *many)
    refused = 12 if mode == "pairwise" else 8
    assert f"{refused} of the last {refused} refused" in caught.value.value and caught.value.rule
    import re

    assert re.search(reason, caught.value.value)
    patient = score(judge(model, mode=mode, max_refused=1.0), *many)
    assert all(each.metrics["judge/refused"] == 1.0 for each in patient)


def test_questions_that_do_not_fit_are_refusals_and_others_are_answered(reader: Path) -> None:
    config = judge(reader, mode="direct", min_mass=0.0, max_context=700)
    (found,) = score(config, group(0, TEXTS[0], "x" * 1000, TEXTS[1]))
    (alone,) = score(config, group(0, TEXTS[0], TEXTS[1]))
    assert (found.scores[0], found.scores[2]) == pytest.approx(alone.scores, abs=1e-6)
    assert found.scores[1] == pytest.approx(sum(alone.scores) / 2, abs=1e-6)  # neither best nor worst
    assert found.metrics["judge/refused"] == pytest.approx(1 / 3)


def test_a_knockout_asks_less_and_the_rest_is_fitted(reader: Path) -> None:
    (whole,) = score(judge(reader, min_mass=0.0, tie_margin=0.0), group(0, *TEXTS))
    (cup,) = score(judge(reader, min_mass=0.0, tie_margin=0.0, schedule="tournament"), group(0, *TEXTS))
    asked = [(0, 1), (2, 3)]
    assert all(cup.preferences[i][j] == pytest.approx(whole.preferences[i][j], abs=1e-6) for i, j in asked)
    met = {(i, j) for i in range(4) for j in range(i + 1, 4)} - set(cup.inferred)
    assert len(cup.inferred) == 3 and {*asked} <= met and whole.inferred == ()
    (swiss,) = score(judge(reader, min_mass=0.0, tie_margin=0.0, schedule="swiss", comparisons=6), group(0, *TEXTS))
    np.testing.assert_allclose(swiss.preferences, whole.preferences, atol=1e-6)  # a budget for all of them
    assert swiss.inferred == ()


def test_equal_answers_are_known_not_inferred(reader: Path) -> None:
    (cup,) = score(judge(reader, min_mass=0.0, schedule="tournament"), group(0, "so", "so", "la", "la"))
    assert len(cup.inferred) == 3 and not {(0, 1), (2, 3)} & set(cup.inferred)


def test_agreement_with_a_rule_is_counted_where_both_prefer_one(reader: Path) -> None:
    groups = [group(0, *TEXTS), group(1, "a story", "a film")]
    told, even = score(judge(reader, min_mass=0.0, tie_margin=0.0, report_agreement="brevity"), *groups)
    words = [-len(text.split()) for text in TEXTS]
    agree = [
        (told.preferences[i][j] - 0.5) * (words[i] - words[j]) > 0
        for j in range(4)
        for i in range(j)
        if words[i] != words[j]
    ]
    assert told.metrics["judge/agreement"] == pytest.approx(sum(agree) / len(agree))
    assert told.metrics["scores/brevity"] == sum(words) / 4
    assert "judge/agreement" not in even.metrics and even.metrics["scores/brevity"] == -2
    means = group_metrics([told, even])
    assert means["judge/agreement"] == told.metrics["judge/agreement"]  # over the groups that have it
    assert means["scores/brevity"] == (sum(words) / 4 - 2) / 2
    rollout = Rollout(0, 1, (told, even), 1.0, 1.0)
    assert rollout.metrics()["judge/order_dependent"] == means["judge/order_dependent"]


@pytest.mark.parametrize(
    ("judgement", "words"),
    [
        (Judgement((1.0,)), "the number of scores is wrong"),
        (Judgement((1.0, math.nan)), "a score is not a finite number"),
        (Judgement((1.0, 0.0), ((0.5, 0.5),)), "the wrong shape"),
        (Judgement((1.0, 0.0), ((0.5, 0.9), (0.3, 0.5))), "no probabilities"),
        (Judgement((1.0, 0.0), ((0.6, 0.9), (0.1, 0.5))), "no probabilities"),
        (Judgement((1.0, 0.0), ((0.5, math.nan), (math.nan, 0.5))), "no probabilities"),
        (Judgement((1.0, 0.0), ((0.5, 0.9), (0.1, 0.5)), inferred=((1, 0),)), "inferred pairs are no pairs"),
        (Judgement((1.0, 0.0), ((0.5, 0.9), (0.1, 0.5)), inferred=((0, 2),)), "inferred pairs are no pairs"),
        (Judgement((1.0, 0.0), None, {"judge/ties": math.inf}), "judge/ties=inf"),
        (Judgement((1.0, 0.0), None, {"reward/mean": 99.0}), "the name of one of the run's own"),
        (Judgement((1.0, 0.0), None, {"reward": 99.0}), "the name of one of the run's own"),
    ],
)
def test_judgements_are_checked(judgement: Judgement, words: str) -> None:
    with pytest.raises(ScoreError, match="."):
        score_groups(lambda groups: [judgement], [group(3, "a", "b")], who="scorer-0")
    try:
        score_groups(lambda groups: [judgement], [group(3, "a", "b")], who="scorer-0")
    except ScoreError as error:
        assert words in str(error) and "scorer-0, prompt 3" in str(error)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"mode": "direct", "template": "helpful"}, "a judge that is pairwise"),
        ({"schedule": "swiss"}, "swiss rounds need a budget"),
        ({"ask": "policy", "deadline_s": 900.0}, "is no actor"),
        ({"ask": "policy", "max_replacements": 0}, "is no actor"),
        ({"comparisons": 4}, "this schedule knows no budget"),
        ({"mode": "direct", "schedule": "tournament"}, "compares none"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, keys: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        judge(tmp_path, **keys)


def test_so_few_groups_are_judged_at_once_that_a_slow_server_is_heard_of_in_time() -> None:
    server = {"name": "server", "url": "http://127.0.0.1:9/v1", "model": "m"}
    for keys in ({}, {"reasoning": 48}, {"schedule": "tournament"}, {"mode": "direct"}):
        config = Judge.model_validate({"ask": server, **keys})
        for count in (2, 4, 8):
            groups = config.at_once(count)
            waves = groups * config.questions(count) * (2 if config.reasoning else 1) / config.ask.concurrency
            assert groups == 1 or waves * config.ask.timeout_s < config.deadline_s
    rule = {"scorer": {"name": "rules", "rule": "vader"}}
    mixed = Mix.model_validate({"scorers": [rule, {"scorer": config}]})
    assert mixed.at_once(4) == config.at_once(4) // 2 == 16 and mixed.deadline_s == config.deadline_s
    assert Judge.model_validate({"ask": server}).at_once(8) == 2


def test_what_waits_is_scored_in_portions(reader: Path) -> None:
    scorer = LocalScorer(judge(reader, min_mass=0.0, max_context=4096))
    scorer.submit([group(index, *(f"{word} {index}" for word in "abcdefgh")) for index in range(3)])
    assert [len(scorer.poll()) for _ in range(3)] == [2, 1, 0]
    scorer.close()


@pytest.mark.parametrize("keys", [{}, {"report_agreement": "vader"}, {"mode": "direct"}])
def test_evaluations_of_a_judge_that_compares_need_two_answers(tmp_path: Path, reader: Path, keys: dict) -> None:
    raw = tiny_config(tmp_path, reader, scorer={"name": "judge", "ask": "policy", **keys})
    raw["evaluation"] = {"prompts": 2, "samples": 1}
    if keys:
        return check_training(parse_config(raw))
    with pytest.raises(ConfigError, match="evaluations would measure nothing"):
        check_training(parse_config(raw))
    alone = {"name": "mix", "scorers": [{"scorer": raw["scorer"]}]}
    with pytest.raises(ConfigError, match="evaluations would measure nothing"):
        check_training(parse_config({**raw, "scorer": alone}))
    alone["scorers"].append({"scorer": {"name": "rules", "rule": "brevity"}})
    check_training(parse_config({**raw, "scorer": alone}))
    raw["evaluation"]["samples"] = 2
    return check_training(parse_config(raw))


def test_the_judge_is_looked_at_before_anything_starts(tmp_path: Path, reader: Path) -> None:
    judge(reader).check(str(reader))
    with pytest.raises(ConfigError, match="no judge could be loaded"):
        judge(tmp_path).check(str(reader))
    template = tmp_path / "words.yaml"
    template.write_text('mode: direct\nprompt: "{answer}"\nask: good or bad\nanswers: {good: 1, bad: 0}\n')
    with pytest.raises(ConfigError, match="not one token of the judge"):
        judge(reader, mode="direct", template=str(template)).check(str(reader))
    several = judge(reader)
    two = several.ask.engine.model_copy(update={"count": 2})
    with pytest.raises(ConfigError, match="a scorer has one engine"):
        several.ask.model_copy(update={"engine": two}).check(("1", "2"), model="")
