"""Rows with votes: the layouts of ESConv (ratings) and MIC (shares), no votes at all, and what is refused."""

from __future__ import annotations

import json

import pytest

from rayalign.config import parse_config
from rayalign.data.votes import Classes
from rayalign.errors import DataError
from tests.parts import tiny_config
from tests.unit.examples_data import bytes_tokenizer, load, one, write

THREE = Classes(("bad", "neutral", "good"), ((1, 2), (3, 3), (4, 5)))
TWO = Classes(("disagree", "agree"))
SAID = {"prompt": "q", "completion": "x"}


@pytest.fixture(scope="module")
def tokenizer():
    return bytes_tokenizer()


def votes_of(tokenizer, folder, row, classes):
    config_rows = load_rows(tokenizer, folder, [SAID | row], classes)
    return config_rows.step(0, 1)[0].votes


def load_rows(tokenizer, folder, rows, classes, **settings):
    from rayalign.data.config import DataConfig
    from rayalign.data.examples import load_examples

    path = str(write(folder / "rows.jsonl", rows))
    stream = settings.pop("stream", False)
    config = DataConfig(examples={"path": path, "stream": stream}, held_out=0.0, **settings)
    return load_examples(config, tokenizer, kinds=("votes",), max_tokens=200, seed=0, classes=classes)


def test_ratings_of_users_become_votes_for_three_classes(tokenizer, tmp_path):
    """As in ESConv: a conversation, an answer, and ratings from 1 to 5; one rating need not be a list."""
    talk = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "q"},
    ]
    row = {"prompt": talk, "completion": "x", "ratings": [5, 1, 3, 4]}
    group = load_rows(tokenizer, tmp_path, [row], THREE).step(0, 1)[0]
    assert group.votes == ((1.0, 1.0, 2.0),) and len(group.prompt.messages) == 3
    assert votes_of(tokenizer, tmp_path, {"rating": 2}, THREE) == ((1.0, 0.0, 0.0),)
    assert votes_of(tokenizer, tmp_path, {"votes": [0, 2, 1]}, THREE) == ((0.0, 2.0, 1.0),)


@pytest.mark.parametrize("share", [0.025, 0.15, 0.5, 0.85, 0.95])
def test_shares_of_people_who_agree_are_one_vote_for_two_classes(tokenizer, tmp_path, share):
    """As in MIC."""
    for name in ("agreement", "share"):
        assert votes_of(tokenizer, tmp_path, {name: share}, TWO) == ((pytest.approx(1 - share), share),)


def test_ratings_may_be_texts(tokenizer, tmp_path):
    """As in ESConv."""
    assert votes_of(tokenizer, tmp_path, {"rating": "5"}, THREE) == ((0.0, 0.0, 1.0),)
    assert votes_of(tokenizer, tmp_path, {"ratings": ["1", "5", 3]}, THREE) == ((1.0, 1.0, 1.0),)


def test_no_votes_at_all_are_no_fault(tokenizer, tmp_path):
    assert votes_of(tokenizer, tmp_path, {"votes": [0, 0, 0]}, THREE) == ((0.0, 0.0, 0.0),)
    assert votes_of(tokenizer, tmp_path, {"ratings": []}, THREE) == ((0.0, 0.0, 0.0),)
    rows = [SAID | {"ratings": [1, 2]}, SAID | {"completion": "y", "ratings": []}]
    found = load(tokenizer, str(write(tmp_path / "r.jsonl", rows))).step(0, 2)
    assert {group.votes for group in found} == {((1.0, 1.0),), None}


@pytest.mark.parametrize(
    ("row", "classes", "what", "rule"),
    [
        ({"votes": [1, 2]}, THREE, "these votes do not match the classes", "bad, neutral, good"),
        ({"votes": [1, -2, 0]}, THREE, "these votes cannot be", "at least 0"),
        ({"ratings": [3, 6]}, THREE, "a rating belongs to no class", "1 to 2, 3 to 3, 4 to 5"),
        ({"ratings": [2.5]}, THREE, "these are no ratings", "whole numbers"),
        ({"ratings": {"a": 5}}, THREE, "the ratings are not a list", "a list of numbers"),
        ({"ratings": "five"}, THREE, "a rating is not a finite number", "a number"),
        ({"agreement": 0.5}, THREE, "these votes do not match the classes", "votes for 3 classes"),
        ({"agreement": -0.1}, TWO, "a share is out of range", "from 0 to 1"),
        ({"agreement": "most"}, TWO, "a share is not a finite number", "a number"),
    ],
)
def test_bad_votes_are_an_error_with_their_line_or_a_counted_skip(tokenizer, tmp_path, row, classes, what, rule):
    good = {"votes": [1, 1, 1], "ratings": [3], "agreement": 0.5}
    first = SAID | {name: good[name] for name in row}
    if classes is THREE and "agreement" in row:
        with pytest.raises(DataError, match=what):
            load_rows(tokenizer, tmp_path, [SAID | row], classes)
        return
    with pytest.raises(DataError, match=what) as caught:
        load_rows(tokenizer, tmp_path, [first, SAID | row], classes)
    assert caught.value.where.endswith(":2") and rule in caught.value.rule
    kept = load_rows(tokenizer, tmp_path, [first, SAID | row], classes, on_bad_row="skip")
    assert kept.rows == 1 and kept.counts["skipped"] == 1


def test_a_streams_ratings_need_ranges(tokenizer, tmp_path):
    rows = [SAID | {"ratings": [5]}]
    assert load_rows(tokenizer, tmp_path, rows, THREE, stream=True).step(0, 1)[0].votes == ((0.0, 0.0, 1.0),)
    with pytest.raises(DataError, match="classes of a stream's ratings") as caught:
        load_rows(tokenizer, tmp_path, rows, Classes(("a", "b")), stream=True)
    assert "algorithm.ratings" in caught.value.remedy


def test_ratings_without_ranges_make_a_class_of_each_number(tokenizer, tmp_path):
    rows = [SAID | {"ratings": [1, 3]}, SAID | {"completion": "y", "ratings": [2]}]
    found = {g.texts: g.votes for g in load_rows(tokenizer, tmp_path, rows, Classes(("a", "b", "c"))).step(0, 2)}
    assert found == {("x",): ((1.0, 0.0, 1.0),), ("y",): ((0.0, 1.0, 0.0),)}


def test_a_run_says_before_it_starts_that_ratings_make_other_classes(tmp_path, model):
    from rayalign.api import run_training

    rows = [{"prompt": f"q{i}", "completion": "x", "ratings": [1 + i % 5]} for i in range(20)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    algorithm = {"name": "disagreement", "classes": ["bad", "neutral", "good"]}
    config = tiny_config(
        tmp_path, model, algorithm=algorithm, data={"examples": str(tmp_path / "r.jsonl")}, scorer=None
    )
    with pytest.raises(DataError, match="these votes do not match the classes") as caught:
        run_training(parse_config(config))
    assert "algorithm.ratings" in caught.value.remedy and not (tmp_path / "run").exists()
    assert "from 1 to 5" in caught.value.value and caught.value.where == str(tmp_path / "r.jsonl")


def test_a_rating_far_from_the_others_is_told_at_once(tokenizer, tmp_path):
    """No row becomes votes for two thousand million classes."""
    rows = [SAID | {"rating": 1}, SAID | {"completion": "y", "rating": -(2**31)}]
    with pytest.raises(DataError, match="these votes do not match the classes") as caught:
        load_rows(tokenizer, tmp_path, rows, Classes(("a", "b", "c")))
    assert "from -2147483648 to 1" in caught.value.value


def test_one_reads_what_a_group_has(tokenizer, tmp_path):
    assert one(tokenizer, tmp_path, SAID | {"votes": [3, 1]}).scores is None


def test_a_rating_is_a_vote_for_the_same_class_in_each_source(tokenizer, tmp_path):
    from rayalign.data.config import DataConfig
    from rayalign.data.examples import load_examples

    sources = []
    for name, given in {"low": [1, 2, 3], "high": [3, 4, 5]}.items():
        each = [SAID | {"completion": f"{name}{rating}", "rating": rating} for rating in given]
        sources.append({"path": str(write(tmp_path / f"{name}.jsonl", each))})
    config, five = DataConfig(examples=sources, held_out=0.0), Classes(tuple("abcde"))
    rows = load_examples(config, tokenizer, kinds=("votes",), max_tokens=200, seed=0, classes=five)
    votes = {group.texts[0]: group.votes[0] for group in rows.step(0, 6)}
    assert votes["low3"] == votes["high3"] == (0.0, 0.0, 1.0, 0.0, 0.0)
    assert votes["low1"].index(1.0) == 0 and votes["high5"].index(1.0) == 4
