"""Rows and data sets that are of no use: each an error with its place, or a counted skip."""

from __future__ import annotations

import json

import pytest
from jsonschema import Draft202012Validator

from rayalign.config import load_config
from rayalign.data.config import DataConfig
from rayalign.errors import DataError
from rayalign.schema import record_schema
from tests.tiny_models import build_tokenizer
from tests.unit.examples_data import KINDS, PAIRS, load, write

PAIR = {"prompt": "q", "chosen": "x", "rejected": "y"}
RANKED = {"prompt": "q", "completions": ["x", "y", "z"]}
SAID = {"prompt": "q", "completion": "x"}
TALK = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]}
NAN = float("nan")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


BAD_ROWS = [
    (PAIR, PAIR | {"chosen": "y"}, "the two answers are the same", '"y"'),
    (PAIR, PAIR | {"rejected": " "}, "an answer is empty", '" "'),
    (PAIR, PAIR | {"rejected": None}, "an answer is neither a text nor messages", "null"),
    (PAIR, PAIR | {"rejected": 7}, "an answer is neither a text nor messages", "7"),
    (PAIR, PAIR | {"rejected": ["y"]}, "an answer is neither a text nor messages", '["y"]'),
    (PAIR, {"prompt": "q", "chosen": "x"}, "there is no column 'rejected'", "prompt, chosen"),
    (PAIR, PAIR | {"prompt": ""}, "this is not a prompt", '""'),
    (PAIR, PAIR | {"prompt": 3}, "this is not a prompt", "3"),
    (PAIR, {"prompt": None, "chosen": "x", "rejected": "y"}, "the two answers have no prompt in common", '"x"'),
    (
        PAIR,
        {"prompt": None, "chosen": "x", "rejected": [{"role": "user", "content": "a"}]},
        "an answer without a",
        '"x"',
    ),
    (PAIR, PAIR | {"chosen": [{"role": "user", "content": "a"}]}, "an answer is not one message", "user"),
    (PAIR | {"votes": [2, 1]}, PAIR | {"votes": [2, -1]}, "these votes cannot be", "[2, -1]"),
    (PAIR | {"votes": [2, 1]}, PAIR | {"votes": [0, 0]}, "these votes cannot be", "[0, 0]"),
    (PAIR | {"votes": [2, 1]}, PAIR | {"votes": [2, 1, 0]}, "there are not as many votes as answers", "[2, 1, 0]"),
    (PAIR | {"votes": [2, 1]}, PAIR | {"votes": 2}, "the votes are not a list", "2"),
    (PAIR | {"votes": [2, 1]}, PAIR | {"votes": [5, 5]}, "both answers are equally good", "[5, 5]"),
    (PAIR | {"probability": 1}, PAIR | {"probability": 0.5}, "both answers are equally good", "0.5"),
    (PAIR, PAIR | {"votes": [6, 4]}, "this row has votes, and the first one has no such column", "[6, 4]"),
    (PAIR, PAIR | {"margin": 2}, "this row has margin, and the first one has no such column", "2"),
    (PAIR, PAIR | {"completion": "z"}, "this row has completion, and the first one has no such column", "z"),
    (SAID, SAID | {"ratings": [1, 2]}, "this row has ratings, and the first one has no such column", "[1, 2]"),
    (TALK, {"messages": [*TALK["messages"], TALK["messages"][0]]}, "this conversation does not end", "role is user"),
    (TALK, {"messages": TALK["messages"][1:]}, "this is not a conversation", "assistant"),
    (PAIR | {"probability": 1}, PAIR | {"probability": 1.1}, "a probability is out of range", "1.1"),
    (PAIR | {"probability": 1}, PAIR | {"probability": NAN}, "a probability is not a finite number", "NaN"),
    (PAIR | {"margin": 1}, PAIR | {"margin": NAN}, "a margin is not a finite number", "NaN"),
    (PAIR | {"margin": 1}, PAIR, "there is no column 'margin'", "prompt, chosen, rejected"),
    (RANKED | {"ranks": [1, 2, 3]}, RANKED | {"ranks": [1, 2]}, "there are not as many ranks as answers", "[1, 2]"),
    (RANKED | {"ranks": [1, 2, 3]}, RANKED | {"ranks": [1, NAN, 2]}, "a rank is not a finite number", "NaN"),
    (RANKED | {"ranks": [1, 2, 3]}, RANKED | {"ranks": [1, 1, 1]}, "all answers are equally good", "[1, 1, 1]"),
    (RANKED | {"ranks": [1, 2, 3]}, RANKED | {"completions": ["x"], "ranks": [1]}, "there are not several", '["x"]'),
    (RANKED | {"ranks": [1, 2, 3]}, RANKED | {"completions": "xyz", "ranks": [1]}, "there are not several", '"xyz"'),
    (RANKED | {"choice": 0}, RANKED | {"choice": 3}, "the choice is none of the answers", "3"),
    (RANKED | {"choice": 0}, RANKED | {"choice": -1}, "the choice is none of the answers", "-1"),
    (RANKED | {"choice": 0}, RANKED | {"choice": True}, "the choice is none of the answers", "true"),
    (RANKED | {"choice": 0}, RANKED | {"completions": ["x"] * 3, "choice": 0}, "all answers are the same", '"x"'),
    (SAID | {"label": 1}, SAID | {"label": 2}, "this is no label", "2"),
    (SAID | {"label": 1}, SAID | {"label": NAN}, "this is no label", "NaN"),
    (SAID | {"label": 1}, SAID | {"label": None}, "this is no label", "null"),
    (SAID | {"label": 1}, SAID | {"label": "great"}, "this is no label", "great"),
    (SAID | {"ratings": [1, 2]}, SAID | {"ratings": [1.5]}, "these are no ratings", "[1.5]"),
    (SAID | {"votes": [1, 2]}, SAID | {"votes": [1, -2]}, "these votes cannot be", "[1, -2]"),
    (SAID | {"agreement": 0.5}, SAID | {"agreement": 1.5}, "a share is out of range", "1.5"),
    (SAID | {"votes": [1, 2]}, SAID | {"votes": [NAN, 1]}, "a vote is not a finite number", "NaN"),
]


@pytest.mark.parametrize(("good", "bad", "what", "found"), BAD_ROWS)
def test_a_bad_row_is_an_error_with_its_line_or_a_counted_skip(tokenizer, tmp_path, good, bad, what, found):
    others = [good, good | {"label": 0}] if "label" in good else [good]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(["", *(json.dumps(row) for row in [*others, bad])]))
    line = len(others) + 2
    with pytest.raises(DataError) as error:
        load(tokenizer, str(path))
    told = str(error.value).splitlines()
    assert told[0].startswith(f"{path}:{line}: {what}"), told
    assert found in told[1] and told[2].startswith("  rule: ") and told[3].startswith("  remedy: ")
    loaded = load(tokenizer, str(path), on_bad_row="skip")
    assert (loaded.rows, loaded.counts["skipped"]) == (len(others), 1)
    assert loaded.counts[f"skipped: {error.value.what}"] == 1
    assert len(loaded.step(0, 2 * len(others))) == 2 * len(others)


def test_columns_that_change_nothing_may_come_later(tokenizer, tmp_path):
    rows = [PAIR, PAIR | {"votes": None, "images": [], "genre": "opera"}, PAIR | {"question": "q", "note": 1}]
    loaded = load(tokenizer, str(write(tmp_path / "a.jsonl", rows)), ("pair",))
    assert loaded.rows == 3
    given = {"path": str(write(tmp_path / "b.jsonl", [PAIR, PAIR | {"completion": "z"}])), "columns": {
        "chosen": "chosen", "rejected": "rejected"}}  # fmt: skip
    assert load(tokenizer, given).rows == 2


def test_a_broken_line_is_an_error_or_a_skip(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", PAIRS)
    path.write_text(path.read_text() + '{"prompt": \n')
    with pytest.raises(DataError, match=r"a.jsonl:21: this line is not JSON"):
        load(tokenizer, str(path))
    assert load(tokenizer, str(path), on_bad_row="skip").rows == 20


def test_nothing_left_is_an_error(tokenizer, tmp_path):
    path = str(write(tmp_path / "a.jsonl", [PAIR | {"chosen": "y"}] * 3))
    with pytest.raises(DataError, match="not one row to learn from") as error:
        load(tokenizer, path, on_bad_row="skip")
    assert "3 rows; 3 × the two answers are the same" in str(error.value)
    (tmp_path / "blank.jsonl").write_text("\n \n")
    for stream in (False, True):
        with pytest.raises(DataError, match="there is not one row"):
            load(tokenizer, {"path": str(tmp_path / "blank.jsonl"), "stream": stream})


def test_labels_that_are_all_equal_are_refused_over_all_sources(tokenizer, tmp_path):
    good = str(write(tmp_path / "good.jsonl", [SAID | {"label": True}] * 2))
    bad = str(write(tmp_path / "bad.jsonl", [SAID | {"label": False}] * 2))
    for path, word in ((good, "good"), (bad, "bad")):
        with pytest.raises(DataError, match="all labels are equal") as error:
            load(tokenizer, path)
        assert f"each answer is {word}" in str(error.value)
    assert load(tokenizer, [good, bad]).rows == 4


@pytest.mark.parametrize(
    ("row", "kinds", "columns", "what", "remedy"),
    [
        (PAIR | {"completion": "z"}, KINDS, {}, "more than one way", "{completion: completion}"),
        (PAIR | {"real": "r", "generated": "g"}, KINDS, {}, "more than one way", "{real: real, generated: generated}"),
        (RANKED | {"choice": 1, "votes": [1, 0, 0]}, KINDS, {}, "more than one way", "choice: choice"),
        (
            SAID | {"label": 1, "votes": [1, 0]},
            KINDS,
            {},
            "more than one way",
            "{completion: completion, votes: votes}",
        ),
        (PAIR | {"votes": [1, 0], "probability": 1}, KINDS, {}, "may be the probability", "{votes: votes} or"),
        ({"question": "q", "instruction": "i", "answer": "x"}, KINDS, {}, "may be the prompt", "{prompt: instruction}"),
        ({"prompt": "q", "answer": "x", "response": "z"}, KINDS, {}, "may be the completion", "{completion: response}"),
        (PAIR, ("label",), {}, "these rows are prompt/chosen/rejected", "choose an algorithm"),
        (
            SAID | {"label": 1},
            ("completion",),
            {},
            "these rows are prompt/completion/label",
            "{completion: completion}",
        ),
        ({"prompt": "q", "text": "x"}, KINDS, {}, "make no row", "columns: {"),
        ({"completion": "x"}, KINDS, {}, "make no row", "columns: {"),
        (PAIR, KINDS, {"chosen": "good"}, "there is no column 'good'", "choose one of"),
        (PAIR, KINDS, {"chose": "chosen"}, "nothing that a row has", "did you mean chosen?"),
    ],
)
def test_columns_that_cannot_be_read_are_listed_with_what_settles_it(
    tokenizer, tmp_path, row, kinds, columns, what, remedy
):
    path = str(write(tmp_path / "a.jsonl", [row]))
    with pytest.raises(DataError, match=what) as error:
        load(tokenizer, {"path": path, "columns": columns}, kinds)
    told = str(error.value)
    assert remedy in told
    if not columns:
        assert f"columns {', '.join(row)}" in told


@pytest.mark.parametrize(
    ("row", "kinds", "columns", "answers"),
    [
        (PAIR | {"completion": "z"}, KINDS, {"completion": "completion"}, ("z",)),
        (PAIR | {"completion": "z"}, ("pair",), {}, ("x", "y")),
        (PAIR | {"good": "g"}, KINDS, {"chosen": "good"}, ("g", "y")),
        (PAIR | {"votes": [1, 0], "probability": 1}, KINDS, {"votes": "votes"}, ("x", "y")),
        (SAID | {"label": 1}, ("completion",), {"completion": "completion"}, ("x",)),
        (SAID | {"rating": 4}, ("completion",), {}, ("x",)),
        ({"q": "q", "up": "a", "down": "b"}, KINDS, {"prompt": "q", "chosen": "up", "rejected": "down"}, ("a", "b")),
        ({"question": "q", "instruction": "i", "answer": "x"}, KINDS, {"prompt": "question"}, ("x",)),
    ],
)  # fmt: skip
def test_what_settles_it(tokenizer, tmp_path, row, kinds, columns, answers):
    path = str(write(tmp_path / "a.jsonl", [row]))
    group = load(tokenizer, {"path": path, "columns": columns}, kinds).step(0, 1)[0]
    assert group.texts == answers and group.prompt.text == "q"


def test_files_that_cannot_be_read(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.parquet").write_text("no parquet")
    (tmp_path / "a.csv").write_text('prompt,chosen,rejected\nq,"x\n')
    (tmp_path / "a.json").write_text('{"prompt": "q"}')
    write(tmp_path / "pairs.jsonl", PAIRS)
    cases = {
        "folder": "this is a folder",
        "a.parquet": "this file is not parquet",
        "a.csv": "a.csv:2: this line is not CSV",
        "a.json": "not a list",
        "pair.jsonl": r"there is no such file(.|\n)*did you mean pairs.jsonl",
        "no_such_owner/no_such_data": "could not be loaded",
    }
    for path, message in cases.items():
        for stream in (False, True):
            with pytest.raises(DataError, match=message):
                load(tokenizer, {"path": path, "stream": stream})


def test_a_stream_meets_bad_rows_as_it_goes(tokenizer, tmp_path):
    path = str(write(tmp_path / "a.jsonl", [*PAIRS, PAIR | {"chosen": "y"}]))
    loaded = load(tokenizer, {"path": path, "stream": True}, on_bad_row="skip")
    assert len(loaded.step(0, 42)) == 40
    assert loaded.counts["skipped"] == loaded.counts["skipped: the two answers are the same"] == 1
    with pytest.raises(DataError, match="a.jsonl:21: the two answers are the same"):
        load(tokenizer, {"path": path, "stream": True}).step(0, 42)
    (tmp_path / "b.jsonl").write_text('{"prompt": \n' + (tmp_path / "a.jsonl").read_text())
    assert (
        len(load(tokenizer, {"path": str(tmp_path / "b.jsonl"), "stream": True}, on_bad_row="skip").step(0, 22)) == 20
    )
    with pytest.raises(DataError, match="b.jsonl:1: this line is not JSON"):
        load(tokenizer, {"path": str(tmp_path / "b.jsonl"), "stream": True}).step(0, 22)
    ratings = str(write(tmp_path / "r.jsonl", [SAID | {"ratings": [1]}]))
    with pytest.raises(DataError, match="classes of a stream's ratings"):
        load(tokenizer, {"path": ratings, "stream": True})


def test_a_stream_of_which_all_rows_are_held_out_is_refused(tokenizer, tmp_path):
    path = str(write(tmp_path / "a.jsonl", PAIRS[:2]))
    with pytest.raises(DataError, match="no row of this stream is left"):
        load(tokenizer, {"path": path, "stream": True}, held_out=0.999).step(0, 1)


def test_the_spellings_of_sources():
    whole = DataConfig(examples=[{"path": "a.jsonl"}]).examples
    assert DataConfig(examples="a.jsonl").examples == DataConfig(examples={"path": "a.jsonl"}).examples == whole
    assert [each.path for each in DataConfig(examples=["a.jsonl", {"path": "b.csv"}]).examples] == ["a.jsonl", "b.csv"]
    assert DataConfig(prompts="p.jsonl").examples == DataConfig(examples=None).examples == ()
    config = DataConfig(examples={"path": "a.jsonl", "label_noise": {"prob": 0.2}})
    assert DataConfig.model_validate(config.model_dump(mode="json")) == config
    for wrong, rule in (
        ([{"path": "a", "weight": 1}, "b"], "has no weight"),
        (["a", {"path": "b", "stream": True}], "a stream among several"),
        ({"path": ""}, "at least 1 character"),
        ({"path": "a", "label_noise": {"prob": 1.5}}, "less than or equal to 1"),
        ({"path": "a", "weight": 0}, "greater than 0"),
        (7, "dictionary"),
    ):
        with pytest.raises(ValueError, match=rule):
            DataConfig(examples=wrong)


def test_an_override_adds_to_a_source_that_is_a_text(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "{model: {path: m}, algorithm: preference, data: {examples: a.jsonl}, "
        "learner: torch, placement: local, trackers: []}"
    )
    (found,) = load_config(
        path, ["data.examples.columns.chosen=good", "data.examples.label_noise.prob=0.2"]
    ).data.examples
    assert (found.path, found.columns, found.label_noise.prob) == ("a.jsonl", {"chosen": "good"}, 0.2)


@pytest.mark.parametrize(
    ("examples", "valid"),
    [
        ("a.jsonl", True),
        ({"path": "a.jsonl", "label_noise": {"prob": 0.2}}, True),
        (["a.jsonl", {"path": "b.csv", "stream": True}], True),
        ({"pth": "a.jsonl"}, False),
        ([7], False),
    ],
)
def test_the_json_schema_knows_the_spellings(examples, valid):
    assert Draft202012Validator(record_schema(DataConfig)).is_valid({"examples": examples}) is valid
