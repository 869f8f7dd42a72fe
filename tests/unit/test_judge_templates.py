"""Templates of a judge: what they say, and what is wrong with them when they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayalign.errors import ConfigError
from rayalign.scorers.engine_asker import answer_ids
from rayalign.scorers.templates import FOLDER, load_template
from tests.tiny_models import build_tokenizer

GOOD = """
mode: pairwise
prompt: "Request: {prompt}\\nA: {first}\\nB: {second}"
ask: Which is better? Say A or B.
think: Compare them.
answers: {A: 1, B: 0}
"""
VALUES = ("prompt", "first", "second")
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def write(folder: Path, text: str) -> str:
    (folder / "mine.yaml").write_text(text)
    return str(folder / "mine.yaml")


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("reasoning", [0, 20])
def test_shipped_templates_ask_for_what_they_judge(name: str, reasoning: int) -> None:
    template = load_template(name)
    template.check_reasoning("here")
    values = {"prompt": "P?", "first": "one", "second": "two", "answer": "three"}
    question = template.question("q", values, reasoning=reasoning)
    last = question.messages[-1]
    assert last["role"] == "user"
    for text in ("one", "two") if template.mode == "pairwise" else ("three",):
        assert text in last["content"]
    assert "{" not in last["content"]
    assert (template.ask in last["content"]) == (not reasoning)
    assert question.conclude == (template.ask if reasoning else "")
    assert [m["role"] for m in question.messages] == ["user", "assistant"] * (len(question.messages) // 2) + ["user"]
    assert len(answer_ids(build_tokenizer(), question.answers, "tiny")) == len(question.answers)


def test_examples_are_turns_and_thinking_comes_before_the_verdict() -> None:
    template = load_template("positive")
    values = {"prompt": "", "first": "x", "second": "y"}
    at_once = template.question("q", values).messages
    thinking = template.question("q", values, reasoning=9).messages
    assert [m["content"] for m in at_once if m["role"] == "assistant"] == ["2", "1"]
    said = [m["content"] for m in thinking if m["role"] == "assistant"]
    assert said[1::2] == ["2", "1"] and all(len(text) > 20 for text in said[::2])
    concluded = template.question("q", values, reasoning=9).concluded("I think so.")
    assert concluded[-2:] == (
        {"role": "assistant", "content": "I think so."},
        {"role": "user", "content": template.ask},
    )


def test_braces_in_what_is_judged_stay_text(tmp_path: Path) -> None:
    template = load_template(write(tmp_path, GOOD))
    content = template.question("q", {"prompt": "{first}", "first": "{second} {}", "second": "{x"}).messages[0][
        "content"
    ]
    assert content == "Request: {first}\nA: {second} {}\nB: {x\n\nWhich is better? Say A or B."


def test_a_key_that_holds_nothing_is_not_there(tmp_path: Path) -> None:
    for blank in ("null", "~", ""):
        template = load_template(write(tmp_path, f"{GOOD}system: {blank}\n"))
        assert template.system == "" and len(template.question("q", dict.fromkeys(VALUES, "x")).messages) == 1
    assert load_template(write(tmp_path, f"{GOOD}system: 'null'\n")).system == "null"


def test_answers_keep_their_spelling(tmp_path: Path) -> None:
    text = GOOD.replace("{A: 1, B: 0}", "{yes: 1, 1: 0, no: 0.5}")
    assert load_template(write(tmp_path, text)).answers == {"yes": 1.0, "1": 0.0, "no": 0.5}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("{first}", "it", r"key prompt: the judge would not see what it judges: \{first\} is missing"),
        (GOOD, "mode: direct\nprompt: rate it\nask: 1 or 2\nanswers: {1: 1, 2: 2}", r"\{answer\} is missing"),
        (GOOD, "mode: pairwise\n{prompt}: y\n", r"this template is not plain YAML"),
        (GOOD, "mode: pairwise\n? [a, b]\n: y\n", r"this template is not plain YAML"),
        (GOOD, "a: &a [*a]", r"this template is not plain YAML"),
        ("Which is better? Say A or B.", "''", r"key ask: this cannot be used"),
        ("Which is better? Say A or B.", "", r"key ask: this key is missing"),
        ("{second}", "{secnd} {second}", r"no placeholder is called secnd(.|\n)*did you mean second"),
        ("pairwise", "direct", r"no placeholder is called first"),
        ("pairwise", "both", r"key mode(.|\n)*found:  both"),
        ("{A: 1, B: 0}", "{A: 1, A: 0}", r"key A: this key stands twice"),
        ("{A: 1, B: 0}", '{A: 1, " A": 0}', r"two answers are equal"),
        ("{A: 1, B: 0}", '{A: 1, "": 0}', r"an answer is empty"),
        ("{A: 1, B: 0}", "{A: 1, B: 1}", r"all answers mean the same"),
        ("{A: 1, B: 0}", "{A: 1, B: 5}", r"these values are no verdicts"),
        ("{A: 1, B: 0}", "{A: good, B: bad}", r"key answers.A(.|\n)*found:  good"),
        ("ask: Which", "aks: Which", r"key aks: no key of a template is called so(.|\n)*did you mean ask"),
        ("ask: Which is better? Say A or B.\n", "", r"key ask(.|\n)*found:  nothing"),
        ("think: Compare them.", "examples: [{first: a, verdict: A}]", r"example 1 lacks prompt, second"),
        (
            "think: Compare them.",
            "examples: [{prompt: p, first: a, second: b, verdict: C}]",
            r"a verdict that is no answer: C",
        ),
        ("think: Compare them.", "examples: [{prompt: p, first: a, second: b, third: c, verdict: A}]", r"third"),
        ("{A: 1, B: 0}", "{A: 1", r"this template is not YAML"),
        (GOOD, "just a text", r"this cannot be used(.|\n)*found:  just a text"),
        (GOOD, "", r"this cannot be used(.|\n)*found:  nothing"),
    ],
)
def test_what_is_wrong_with_a_template_is_said(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=words) as caught:
        load_template(path)
    assert "mine.yaml" in caught.value.where and caught.value.rule and caught.value.remedy


def test_a_template_that_is_not_there_is_named_with_what_is() -> None:
    with pytest.raises(ConfigError, match="no such template") as caught:
        load_template("helpfull")
    assert "did you mean helpful?" in caught.value.remedy


def test_a_template_without_words_for_thinking_cannot_think(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="how to think first"):
        load_template(write(tmp_path, GOOD.replace("think: Compare them.", ""))).check_reasoning("key scorer.template")
    silent = GOOD + "examples: [{prompt: p, first: a, second: b, verdict: A}]"
    with pytest.raises(ConfigError, match="no thinking in example 1"):
        load_template(write(tmp_path, silent)).check_reasoning("key scorer.template")


def test_answers_that_the_tokenizer_splits_are_refused() -> None:
    tokenizer = build_tokenizer()
    with pytest.raises(ConfigError, match="not one token") as caught:
        answer_ids(tokenizer, ("1", "10"), "/models/j")
    assert "'10', which it reads as '1', '0'" in caught.value.value
    with pytest.raises(ConfigError, match="the same token"):
        answer_ids(tokenizer, ("1", "1"), "/models/j")
