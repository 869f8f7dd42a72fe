"""The scorer `python`: what a function of one's own is given, and what is said of one that cannot be used."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from rayalign.api import run_training
from rayalign.config import load_config, parse_config
from rayalign.errors import ConfigError, ScoreError
from rayalign.scorers.base import score_groups
from rayalign.scorers.function import numbers
from rayalign.scorers.python import Python
from tests.parts import tiny_config
from tests.scored import group

REWARDS = """
import json

def called(arguments):
    with open("calls.jsonl", "a") as file:
        print(json.dumps(arguments), file=file)

def score(prompts, completions):
    called((prompts, completions))
    return [float(len(text)) for text in completions]

def stars(completions, prompts, stars, topic="none", scale=1):
    return [scale * s + (t == "space") for s, t in zip(stars, topic)] if topic != "none" else [scale * s for s in stars]

def everything(**columns):
    import numpy
    called(columns)
    return numpy.array([1.0] * len(columns["completions"]), dtype="float32")

def tensor(prompts, completions):
    import torch
    return torch.tensor([len(text) for text in completions])

class Polite:
    def __call__(self, prompts, completions):
        return [1.0 for _ in completions]
polite = Polite()

def mean(prompts, completions): return 0.5
def few(prompts, completions): return [0.5]
def nothing(prompts, completions): return [None for _ in completions]
def nan(prompts, completions): return [float("nan") for _ in completions]
def fails(prompts, completions): return {}["lexicon"]
def one(text): return 1.0
def positional(prompts, completions, /): return [1.0 for _ in completions]
async def slow(prompts, completions): return [1.0 for _ in completions]
limit = 3
"""
GROUPS = [group(0, "a", "bb", stars=2, topic="space"), group(1, "ccc", "", stars=5)]


@pytest.fixture(autouse=True)
def rewards(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_of_tests.py").write_text(REWARDS)
    (tmp_path / "my_broken_rewards.py").write_text("import no_such_lexicon\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)


def scored(name: str, groups=GROUPS, **settings):
    score = Python(function=f"my_rewards_of_tests:{name}", **settings).start()
    try:
        return [each.scores for each in score_groups(score, groups, who="scorer-0")]
    finally:
        score.close()


def calls() -> list:
    """What the function was asked, in its process."""
    with open("calls.jsonl") as file:
        return [json.loads(line) for line in file]


def test_it_gets_texts_and_gives_numbers():
    assert scored("score") == [(1.0, 2.0), (3.0, 0.0)]
    assert calls() == [[["prompt 0"] * 2 + ["prompt 1"] * 2, ["a", "bb", "ccc", ""]]]


def test_it_gets_the_columns_that_it_names_and_arguments():
    assert scored("stars") == [(3.0, 3.0), (5.0, 5.0)]  # a row without a topic has None
    assert scored("stars", arguments={"scale": 10, "topic": "none"}) == [(20.0, 20.0), (50.0, 50.0)]
    assert scored("stars", [group(0, "a", stars=4)]) == [(4.0,)]  # its own default where no row has a topic


def test_with_two_stars_it_gets_every_column():
    assert scored("everything", arguments={"mood": "calm"}) == [(1.0, 1.0), (1.0, 1.0)]
    (columns,) = calls()
    assert columns["stars"] == [2, 2, 5, 5] and columns["topic"] == ["space", "space", None, None]
    assert columns["mood"] == "calm" and sorted(columns) == ["completions", "mood", "prompts", "stars", "topic"]


@pytest.mark.parametrize(("name", "want"), [("tensor", [(1.0, 2.0), (3.0, 0.0)]), ("polite", [(1.0, 1.0)] * 2)])
def test_tensors_arrays_and_objects_that_can_be_called_will_do(name, want):
    assert scored(name) == want and isinstance(want[0][0], float)


def test_numbers_of_any_kind_are_floats():
    for given in ([1, 2.0], (np.float32(1), True), torch.tensor([1.0, 2.0], dtype=torch.bfloat16), np.ones(2)):
        found = numbers(given, ("a", "b"), "scorer.function f")
        assert len(found) == 2 and all(type(number) is float for number in found)


@pytest.mark.parametrize(
    ("name", "what", "value"),
    [
        ("mean", "gave no list", "float: 0.5"),
        ("few", "another number of scores", "1 of them"),
        ("nothing", "a score is no number", "None for completion 0 of the call"),
        ("fails", "the scoring function failed", "KeyError: 'lexicon', at "),
        ("nan", "a score is not a finite number", "nan for 'a'"),
    ],
)
def test_what_it_must_not_give(name, what, value):
    with pytest.raises(ScoreError) as raised:
        scored(name)
    assert what in raised.value.what and raised.value.value.startswith(value)
    assert name == "nan" or raised.value.where == f"scorer.function my_rewards_of_tests:{name}"


def test_a_column_that_no_row_has():
    with pytest.raises(ScoreError) as raised:
        scored("stars", [group(0, "a", "b", topic="space")])
    assert raised.value.what == "the scoring function wants a column 'stars' that these prompts do not have"
    assert raised.value.value == "columns topic"


@pytest.mark.parametrize(
    ("function", "what", "remedy"),
    [
        ("my_rewards_of_tests", "this does not name a function", "put a colon between"),
        ("no_such_rewards:score", "there is no such module", "run from the folder that holds no_such_rewards"),
        ("my_broken_rewards:score", "my_broken_rewards fails while it is imported", "mend it until"),
        ("my_rewards_of_tests:scores", "holds no scores", "did you mean score?"),
        ("my_rewards_of_tests:limit", "limit is no function, but of type int", "name a function"),
        ("my_rewards_of_tests:Polite", "Polite is a class, no function", "an object that is made in the module"),
        ("my_rewards_of_tests:slow", "this function is asynchronous", "write it with def"),
        ("my_rewards_of_tests:one", "takes no prompts and no completions", "def one(prompts, completions, **columns)"),
        ("my_rewards_of_tests:positional", "takes no prompts and no completions", "**columns"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_before_anything_starts(tmp_path, model, function, what, remedy):
    with pytest.raises(ConfigError) as raised:
        parse_config(tiny_config(tmp_path, model, scorer={"name": "python", "function": function}))
    error = raised.value
    assert error.where.endswith("key scorer.function") and error.value == function
    assert what in error.what and remedy in error.remedy and error.rule


def test_an_argument_that_it_does_not_take(tmp_path, model):
    scorer = {"name": "python", "function": "my_rewards_of_tests:score", "arguments": {"scale": 2}}
    with pytest.raises(ConfigError, match="takes no scale"):
        parse_config(tiny_config(tmp_path, model, scorer=scorer))


def test_a_training_with_one(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scorer = {"name": "python", "function": "my_rewards_of_tests:score"}
    result = run_training(parse_config(tiny_config(tmp_path, model, scorer=scorer, train__steps=1)))
    assert result.step == 1
    saved = load_config(result.run_dir / "config.yaml")
    assert saved.scorer.function == "my_rewards_of_tests:score"


def test_the_function_that_is_shipped():
    score = Python(function="configs.rewards:on_topic", arguments={"longest": 4}).start()
    texts = ("The camera glides over glaciers", "I liked it", "", "glaciers glaciers " * 8)
    asked = replace(group(0, *texts), prompt=replace(group(0).prompt, text="Praise the camera work about glaciers"))
    (found,) = score([asked])
    score.close()
    assert found == pytest.approx([2 / 4 * 4 / 5, 0.0, 0.0, 1 / 4 * 4 / 16])
