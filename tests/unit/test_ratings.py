"""Human ratings of words as a scorer: which words count, what is held out, and files that are none."""

from __future__ import annotations

import hashlib
import json

import pytest

from rayalign.errors import ConfigError, DataError
from rayalign.scorers.base import score_groups
from rayalign.scorers.ratings import Ratings, held_out, read_lexicon, words_in
from rayalign.types import Completion, Group, Prompt


def scored(config, *texts):
    completions = tuple(Completion(str(k), (k,), (), "stop", 0) for k in range(len(texts)))
    (found,) = score_groups(config.start(), [Group("g", Prompt(0, "p", (1,)), completions, texts)], who="scorer-0")
    return found


def test_one_word_in_five_is_held_out_by_a_hash_of_the_word_alone():
    lexicon = read_lexicon()
    assert len(lexicon) > 7000 and all(len(ratings) == 10 for ratings in lexicon.values())
    assert all(-4 <= rating <= 4 for ratings in lexicon.values() for rating in ratings)
    held = [word for word in lexicon if held_out(word)]
    assert 0.18 < len(held) / len(lexicon) < 0.22
    for word in ("great", "awful", ":)", "naïve"):
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        assert held_out(word) == (int.from_bytes(digest, "big") % 5 == 0)


def test_the_score_is_the_mean_rating_of_the_words_that_count():
    lexicon = read_lexicon()
    means = {word: sum(ratings) / 10 for word, ratings in lexicon.items()}
    held = [word for word in lexicon if held_out(word) and word.isalpha()][:2]
    other = next(word for word in lexicon if not held_out(word) and word.isalpha())
    text = f"It is {held[0]}, {other}: {held[1].upper()}!"
    wanted = {
        "held_out": (means[held[0]] + means[held[1]]) / 2,
        "training": means[other],
        "all": (means[held[0]] + means[held[1]] + means[other]) / 3,
    }
    for words, score in wanted.items():
        found = scored(Ratings(words=words), text, "of stone", f"{other} {other}")
        assert found.scores[0] == pytest.approx(score) and found.scores[1] == 0.0
        counts = {"held_out": (2 / 3, 1 / 3), "training": (1.0, 2 / 3), "all": (5 / 3, 2 / 3)}[words]
        assert (found.metrics["ratings/words"], found.metrics["ratings/coverage"]) == pytest.approx(counts)


def test_words_are_found_as_they_stand_and_without_what_stands_around_them():
    lexicon = {"good": 1, ":)": 1, "XD": 1, "not-so": 1}
    assert words_in('Good, "GOOD" (good). :) XD xd not-so goodness', lexicon) == [
        "good", "good", "good", ":)", "XD", "not-so"
    ]  # fmt: skip


def test_a_lexicon_of_ones_own_and_files_that_are_none(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("fine\t1.5\t0.5\t[1, 2]\npoor\t-1.0\t0.0\t[-1, -1, -1]\n\n")
    assert read_lexicon(file) == {"fine": (1, 2), "poor": (-1, -1, -1)}
    assert scored(Ratings(words="all", lexicon=str(file)), "fine, poor").scores == (0.25,)
    known = Ratings(lexicon=str(file)).contents()
    file.write_text(file.read_text() + "calm\t0.5\t0.5\t[0, 1]\n")
    assert known and Ratings(lexicon=str(file)).contents() != known and Ratings().contents() == {}
    with pytest.raises(ConfigError) as error:
        Ratings(lexicon=str(tmp_path / "none.txt")).check_files()
    assert error.value.where == "key scorer.lexicon" and error.value.remedy
    fields = ("[]", "[x]", "7", "[1.9, -0.5]", "[True]", "'12'")
    for line in ("fine 1.5 0.5 [1]", *(f"fine\t1.5\t0.5\t{field}" for field in fields), json.dumps({})):
        file.write_text("poor\t-1.0\t0.0\t[-1]\n" + line + "\n")
        with pytest.raises(ConfigError) as error:
            read_lexicon(file)
        assert error.value.where == f"{file}:2" and error.value.value == line
    file.write_bytes("poor\t-1.0\t0.0\t[-1]\nschön\t1.0\t0.0\t[1]\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8") as error:
        read_lexicon(file)
    assert error.value.where == f"{file}:2"


def test_a_word_of_the_other_part_is_not_taken_for_one_that_looks_like_it(tmp_path):
    """ ":D" is held out, and ":d" is not."""
    lexicon = read_lexicon(None)
    assert held_out(":D") and not held_out(":d") and {":D", ":d"} <= lexicon.keys()
    assert scored(Ratings(words="training"), ":D", ":d").metrics["ratings/words"] == 0.5
    assert scored(Ratings(words="held_out"), ":D", ":d").metrics["ratings/words"] == 0.5
